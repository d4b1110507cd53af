"""Connects this process to a running Ray cluster, or starts an embedded cluster inside it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tg_tinker.backend import serve_backend
from tg_tinker.cluster import node
from tg_tinker.cluster.authentication import (
    check_authenticated,
    check_fits,
    check_token,
    make_token,
    name_token,
    require_token,
)
from tg_tinker.cluster.interrupts import stops_held_back, stops_raise
from tg_tinker.cluster.other_users import is_foreign_link, keeps_out, others_listen, read_own
from tg_tinker.cluster.ray_calls import lazy_ray, translated
from tg_tinker.cluster.ray_folder import private_ray_folder, ray_folder
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError
from tg_tinker.storage.home import home_directory
from tg_tinker.storage.paths import absolute_path

WITHOUT_TLS = "TG_TINKER_WITHOUT_TLS"

_SHARED = Path("/tmp/ray")  # noqa: S108
"""Ray's folder in programs whose environment names no other."""

_OBJECT_STORE_BYTES = 512 * 2**20

_log = logging.getLogger("tg_tinker")


def refuse_another(address: str | None) -> None:
    """Checks that an address does not name another cluster than the connected one.

    A process has one Ray connection, so a second service would silently use the same cluster.

    Raises:
        InvalidRequestError: the address names another cluster.
    """
    current = lazy_ray().get_runtime_context().gcs_address
    if address not in (None, "auto", "local", current):
        raise InvalidRequestError(
            f"this process is already connected to the Ray cluster at {current}: leave out"
            f" address={address!r}, or use another process"
        )


def connect(address: str | None) -> bool:
    """Connects this process; returns whether it started an embedded cluster.

    A cluster that was only found is passed over with a warning if this program does not fit it; one
    that was named, by `address` or RAY_ADDRESS, is then refused.

    Raises:
        ClusterUnavailableError: no cluster answers, Ray did not start, or see `check_fits`.
        InvalidRequestError: the address is not supported, the cluster requires no token, or see
            `check_encrypted` and `check_ray_folder`; or the working directory was removed.
        StorageError: see `make_token` and `home_directory`.
    """
    absolute_path(Path())  # Ray starts its processes in the working directory.
    name_token()
    named, how = address, "named by `address`"
    if named is None:
        named, how = os.environ.get("RAY_ADDRESS"), "named by RAY_ADDRESS"
    if named is None:
        target = fitting_cluster() or "local"
    elif named == "auto":
        # Ray itself would follow links, and take any cluster that it sees on this machine.
        target, how = _running() or ("", "")
    else:
        target = named
    if not target:
        raise ClusterUnavailableError(f"no cluster runs here: {_START_ONE}")
    if target == "local":
        _start_embedded()
        return True
    if "://" in target:
        raise InvalidRequestError(
            f"address {target!r}: Ray Client connections are not supported; run on the head node,"
            " use `ray job submit`, or use HTTP"
        )
    if not node.answers(target):
        raise ClusterUnavailableError(f"no Ray cluster answers at {target}: {_START_ONE}")
    if named is not None:
        _check(target, how)
    require_token()
    with _starting():
        lazy_ray().init(address=target, **_QUIET)
    with _left_on_error():
        check_encrypted()
    return False


def _check(address: str, how: str) -> None:
    """Checks that a cluster requires its token, and that this program fits it."""
    check_token()
    check_authenticated(address)
    check_fits(address, how)


_QUIET = {"configure_logging": False, "log_to_driver": False, "logging_level": logging.ERROR}
_START_ONE = (
    "start a cluster with `ray start --head`, correct RAY_ADDRESS or `address`, or pass"
    " address='local' for an embedded cluster"
)


def _start_embedded() -> None:
    folder = private_ray_folder()
    make_token()
    serve_backend().seal_http()
    require_token()
    with _quiet_stderr(), _closed_umask(), _starting():
        lazy_ray().init(
            address="local", include_dashboard=False, _temp_dir=str(folder),
            object_store_memory=_OBJECT_STORE_BYTES, **_QUIET,
        )  # fmt: skip
    with _left_on_error():
        check_requires_token()


@contextlib.contextmanager
def _left_on_error() -> Iterator[None]:
    """Leaves the cluster, and ends an embedded one, if the block fails."""
    try:
        yield
    except BaseException:
        lazy_ray().shutdown()
        raise


def check_requires_token() -> None:
    """Checks that the cluster of this process refuses programs without its token.

    Raises:
        InvalidRequestError: the cluster answers to everyone.
    """
    check_authenticated(lazy_ray().get_runtime_context().gcs_address)


def living_nodes() -> list[Any]:
    with translated():
        return [node for node in lazy_ray().nodes() if node["Alive"]]


def check_encrypted() -> None:
    """Checks that a cluster of several machines uses Ray's TLS.

    Without TLS, Ray sends all data that TG-Tinker does not seal in clear between machines. This
    includes the transport key.

    Raises:
        InvalidRequestError: the cluster has several machines, Ray's TLS is off, and
            TG_TINKER_WITHOUT_TLS=1 is not set.
    """
    _refuse_unencrypted({node["NodeManagerAddress"] for node in living_nodes()})


def _refuse_unencrypted(machines: set[str]) -> None:
    if len(machines) < 2 or node.tls_is_on() or os.environ.get(WITHOUT_TLS) == "1":
        return
    raise InvalidRequestError(
        f"this cluster has {len(machines)} machines and Ray's TLS is off: anyone on their network"
        " can read keys and batches. Set RAY_USE_TLS=1 and its certificates on every machine"
        f" (docs/deployment.md), or set {WITHOUT_TLS}=1 on a network that nobody else shares"
    )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Delays stops during `ray.init`, translates its errors, and keeps Ray out of signals.

    An interrupted `ray.init` would leave a process that crashes at its end. A program that has no
    way of its own to handle SIGTERM and SIGHUP gets that of Ctrl-C.

    Raises:
        ClusterUnavailableError: Ray did not start, or refused this process.
    """
    stops_raise()
    try:
        with stops_held_back(), _apart():
            yield
    except KeyboardInterrupt:
        lazy_ray().shutdown()
        raise
    except Exception as error:  # Ray raises a bare `Exception` where a process of it is late
        raise ClusterUnavailableError(
            f"Ray did not start, or refused this process ({type(error).__name__}): check"
            " `ray status` and RAY_ADDRESS, that RAY_AUTH_MODE is the same as at the start of the"
            " cluster, and that RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token contains its token. On a"
            " busy machine, try again"
        ) from None


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keeps Ray from handling SIGTERM, and its processes from the signals of this program's group.

    Terminals, `timeout` and batch systems send a signal to the whole group of a program. It must
    reach the program alone, which needs its cluster in order to save.
    """
    private = lazy_ray()._private
    start, handle = private.services.ConsolePopen, private.utils.set_sigterm_handler
    private.services.ConsolePopen = partial(start, process_group=0)
    private.utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        private.services.ConsolePopen = start
        private.utils.set_sigterm_handler = handle


def fitting_cluster() -> str | None:
    """Returns the address of the cluster that runs here if this program can use it; else None.

    A warning, once for each reason, says why a cluster is passed over.

    Raises:
        StorageError: see `check_token`.
    """
    address, how = None, ""
    try:
        address, how = _running() or (None, "")
        if address is not None:
            _check(address, how)
    except (ClusterUnavailableError, InvalidRequestError) as error:
        at = f"the Ray cluster at {address}, {how}," if address else "a Ray cluster"
        _warn(f"{at} was found and is passed over, because it was not named: {error.message}")
        return None
    return address


@cache
def _warn(text: str) -> None:
    _log.warning("%s", text)


def running_cluster() -> str | None:
    """Returns the address of the cluster that runs on this machine for this user, or None.

    It is the cluster that `tg-tinker up` left running, or else that of `ray start`. Embedded
    clusters write no address file, so this function never returns them.

    Raises:
        ClusterUnavailableError: other users could have put the address of `ray start` in its place.
    """
    found = _running()
    return None if found is None else found[0]


def _running() -> tuple[str, str] | None:
    """Returns the address as `running_cluster` does, and how it was found."""
    running = node.read(home_directory())
    if running is not None and not others_listen(running.address):
        return running.address, "which `tg-tinker up` started"
    for folder in dict.fromkeys((ray_folder(), _SHARED)):
        if address := _noted_in(folder):
            return address, f"which `ray start` noted in {folder}"
    return None


def _noted_in(folder: Path) -> str:
    """Returns the address that `ray start` has written into Ray's folder; empty if there is none.

    Anyone may write into a shared temporary directory, and Ray opens its own folder to all users.
    A program would give its token to the cluster at this address, and run what it answers.

    Raises:
        ClusterUnavailableError: a cluster of this user answers, but others may write there.
    """
    if is_foreign_link(folder):
        return ""
    place = Path(
        os.path.realpath(folder)
    )  # What is checked is what is read, whatever links lead there then.
    is_kept = keeps_out(place)
    address = (read_own(place / "ray_current_cluster") or "").strip()
    if not node.answers(address) or others_listen(address):
        return ""
    if not is_kept:
        raise ClusterUnavailableError(
            f"a cluster seems to run here, but other users may write to {folder}, where `ray start`"
            " noted its address: name it, by `address` or RAY_ADDRESS, or pass address='local' for"
            " an embedded cluster. A cluster of `tg-tinker up` is found without"
        )
    return address


@contextlib.contextmanager
def _closed_umask() -> Iterator[None]:
    """Has Ray's processes make their files and sockets for this user alone, whatever the umask of
    the program, as `tg-tinker up` does."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides Ray's messages at start-up; errors are raised as exceptions."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
