"""Checks the conditions for serving a base model over HTTP, before anything is started.

`keys` decides who may sample, and `cluster` serves the model.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tg_tinker.cluster.connection import fitting_cluster
from tg_tinker.cluster.ports import addresses, check_port
from tg_tinker.errors import NotFoundError


def check_serving(model_ref: str, host: str, port: int) -> None:
    """Checks the arguments of `ServiceClient.serve_http` before a cluster is started.

    Raises:
        NotFoundError: the model path does not exist. The hub is not asked for the model.
        InvalidRequestError: the host has no address.
        ClusterUnavailableError: the port is taken.
    """
    check_model(model_ref)
    addresses(host, port)
    if (os.environ.get("RAY_ADDRESS") or fitting_cluster() or "local") == "local":
        # A running cluster may use the port for its own Serve.
        check_port(host, port)


def check_model(model_ref: str) -> None:
    """Checks that a model exists, unless it has the form of a hub id: replicas would fail late.

    Raises:
        NotFoundError: the path does not exist.
    """
    path = Path(model_ref)
    with contextlib.suppress(RuntimeError):  # the user in ~user does not exist
        path = path.expanduser()
    if not path.exists() and (model_ref.startswith(("/", ".", "~")) or model_ref.count("/") != 1):
        raise NotFoundError(
            f"model_ref {model_ref!r}: there is no such path here, and it is not a hub id: use a"
            " path or a hub id such as 'org/name'"
        )
