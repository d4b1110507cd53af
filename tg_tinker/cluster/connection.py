"""How this process comes to a Ray cluster: a running one, or one that it starts inside itself."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tg_tinker.backend import serve_backend
from tg_tinker.cluster.interrupts import ctrl_c_held_back
from tg_tinker.cluster.node import answers, tls_is_on
from tg_tinker.cluster.ray_calls import lazy_ray, translated
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError

WITHOUT_TLS = "TG_TINKER_WITHOUT_TLS"

_STARTED_BY_RAY_START = Path("/tmp/ray/ray_current_cluster")  # noqa: S108
_OBJECT_STORE_BYTES = 512 * 2**20


def refuse_another(address: str | None) -> None:
    """A process has one Ray connection: a service elsewhere would silently use this one."""
    current = lazy_ray().get_runtime_context().gcs_address
    if address not in (None, "auto", "local", current):
        raise InvalidRequestError(
            f"this process is connected to the Ray cluster at {current} already: leave out"
            f" address={address!r}, or use a process of its own"
        )


def connect(address: str | None) -> bool:
    """Connects this process; true if it had to start an embedded cluster."""
    target = address or os.environ.get("RAY_ADDRESS") or running_cluster()
    quiet = {"configure_logging": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if target is None or target == "local":
        serve_backend().seal_http()
        with _quiet_stderr(), _starting():
            lazy_ray().init(
                address="local", include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES, **quiet,
            )  # fmt: skip
        _close_token_file()
        return True
    if "://" in target:
        raise InvalidRequestError(
            f"address {target!r}: run on the head node, by `ray job submit`, or use HTTP; Ray"
            " Client connections are not supported"
        )
    if target != "auto" and not answers(target):
        raise ClusterUnavailableError(
            f"no Ray cluster answers at {target}: start one with `ray start --head`, correct"
            " RAY_ADDRESS or `address`, or pass address='local' for an embedded one"
        )
    with _starting():
        lazy_ray().init(address=target, **quiet)
    try:
        check_encrypted()
    except InvalidRequestError:
        lazy_ray().shutdown()
        raise
    return False


def living_nodes() -> list[Any]:
    with translated():
        return [node for node in lazy_ray().nodes() if node["Alive"]]


def check_encrypted() -> None:
    """Between machines Ray sends in clear what is not sealed here, the transport key among it.

    Raises:
        InvalidRequestError: the cluster has several, Ray's TLS is off, and nobody has allowed it.
    """
    _refuse_unencrypted({node["NodeManagerAddress"] for node in living_nodes()})


def _refuse_unencrypted(machines: set[str]) -> None:
    if len(machines) < 2 or tls_is_on() or os.environ.get(WITHOUT_TLS) == "1":
        return
    raise InvalidRequestError(
        f"this cluster has {len(machines)} machines and Ray's TLS is off: who listens between them"
        " reads keys and batches. Set RAY_USE_TLS=1 and its certificates on every machine"
        f" (docs/deployment.md), or {WITHOUT_TLS}=1 on a network that nobody else shares"
    )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Around `ray.init`: cut in two by Ctrl-C, it leaves a process that crashes at its end."""
    try:
        with ctrl_c_held_back():
            yield
    except KeyboardInterrupt:
        lazy_ray().shutdown()
        raise
    except (
        ConnectionError, RuntimeError, ValueError, lazy_ray().exceptions.AuthenticationError,
    ) as error:  # fmt: skip
        raise ClusterUnavailableError(
            f"Ray did not start, or refused this process ({type(error).__name__}): check"
            " `ray status` and RAY_ADDRESS, that RAY_AUTH_MODE is as the cluster was started with,"
            " and that RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token holds its token"
        ) from None


def running_cluster() -> str | None:
    """The cluster that `ray start` left running on this machine. Embedded ones write no file."""
    try:
        # Anyone may write into the shared temporary directory: trust this user's file only.
        if _STARTED_BY_RAY_START.stat().st_uid != os.getuid():
            return None
        address = _STARTED_BY_RAY_START.read_text().strip()
    except OSError:
        return None
    return address if answers(address) else None


def _close_token_file() -> None:
    """Ray writes its cluster token readable by all; whoever reads it may run code."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        token.chmod(0o600)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops Ray's start-up notices; its errors come as exceptions."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
