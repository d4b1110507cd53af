"""Checks what serving a base model over HTTP needs, before anything is started for it.

Who may sample is in `keys`; the serving itself is the cluster's.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tg_tinker.cluster.connection import running_cluster
from tg_tinker.cluster.ports import addresses, check_port
from tg_tinker.errors import NotFoundError


def check_serving(model_ref: str, host: str, port: int) -> None:
    """What would stop `ServiceClient.serve_http`, told before a cluster is started for it.

    Raises:
        NotFoundError: no such path; whether the hub has a model is not asked.
        InvalidRequestError: a host without an address.
        ClusterUnavailableError: the port is taken.
    """
    check_model(model_ref)
    addresses(host, port)
    if (os.environ.get("RAY_ADDRESS") or running_cluster() or "local") == "local":
        check_port(host, port)  # on a cluster that runs, its own Serve may have it


def check_model(model_ref: str) -> None:
    """A model that is a path, or no hub id, must be here: replicas find out late."""
    path = Path(model_ref)
    with contextlib.suppress(RuntimeError):  # ~ of a user that there is not
        path = path.expanduser()
    if not path.exists() and (model_ref.startswith(("/", ".", "~")) or model_ref.count("/") != 1):
        raise NotFoundError(
            f"model_ref {model_ref!r}: there is no such path here, and it is no hub id such as"
            " 'org/name'"
        )
