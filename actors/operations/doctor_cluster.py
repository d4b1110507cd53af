"""Checks who could get into a cluster from this machine.

The checks cover tenants, Ray's version, folder, token and TLS, and its listening servers. They read
files, variables and the kernel's own lists, and call no service.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

from cryptography import x509

from actors.operations.findings import OK, PROBLEM, WARNING, Finding
from actors.registry.registry import Registry
from tg_tinker.cluster.authentication import HOW_TO_CLOSE, TESTED_RAY, token_file, wrong_with
from tg_tinker.cluster.node import tls_files, tls_is_on
from tg_tinker.cluster.other_users import is_exposed, keeps_out, listed_address
from tg_tinker.cluster.ray_folder import check_ray_folder, ray_folder
from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.hosts import is_loopback
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.keyrings import Variable, audit_folder
from tg_tinker.storage.sqlite_files import sqlite_file

SOON = timedelta(days=14)
"""The time before the end of a certificate in which the check warns."""

_ONE_DOMAIN = (
    "a tenant is a label: whoever runs programs on the cluster reads the data of all. Give other"
    " people API keys for HTTP, which separates tenants"
)
_SERVERS = {"gcs_server": "GCS", "raylet": "raylet", "dashboard.py": "dashboard"}
"""Programs of Ray that execute requests, by a part of their command line."""

_SOCKET = "--raylet_socket_name"

_LISTENS = "0A"
"""The code of a listening socket in proc_net_tcp(5)."""


def examine(home: Path, place: Path | Variable, proc: Path) -> Iterator[Finding]:
    """Yields the findings of this module; see `doctor.examine`."""
    yield _tenants(home, place)
    yield _version()
    yield _folder(proc)
    yield _token()
    yield _tls()
    yield _exposure(proc)


def _tenants(home: Path, place: Path | Variable) -> Finding:
    known: list[str] = []
    with suppress(TGTinkerError):  # The check of the registry reports why.
        if has_rows(home):
            with closing(looked_at(home, place)) as registry:
                known = registry.audit_log.tenants()
    if len(known) > 1:
        return Finding("tenants", WARNING, f"{len(known)} in this registry, and {_ONE_DOMAIN}")
    return Finding("tenants", OK, f"at most one, or none that can be read; {_ONE_DOMAIN}")


def has_rows(home: Path) -> bool:
    """Returns whether there is a database to read. Opening an empty file would create tables."""
    file = sqlite_file(default_database(home))
    return file is None or (file.is_file() and file.stat().st_size > 0)


def looked_at(home: Path, place: Path | Variable) -> Registry:
    """Opens the registry of a home for reading only, and returns it.

    Raises:
        TGTinkerError: the registry cannot be opened.
    """
    return Registry(default_database(home), str(place), audit_folder(place, home), looks_only=True)


def _token() -> Finding:
    """Checks Ray's token. Whoever has the token may run code as this user."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        message = (
            "RAY_AUTH_TOKEN is in the environment, which /proc shows to root and to your own"
            " programs: move the token to a file of mode 0600 that RAY_AUTH_TOKEN_PATH names"
        )
        return Finding("token", WARNING, message)
    path = token_file()
    if not path.is_file():
        return Finding("token", OK, f"none at {path} yet: the first start makes one")
    if wrong := wrong_with(path):
        if not is_exposed(path):
            return Finding("token", PROBLEM, f"{wrong}: {HOW_TO_CLOSE}")
        message = (
            f"{wrong}: remove it on every machine, restart the clusters that use it, and copy the"
            " new one; if nobody else has used this machine, `chmod 600` it instead"
        )
        return Finding("token", PROBLEM, message)
    return Finding("token", OK, f"{path}, closed to other users")


def _version() -> Finding:
    found = version("ray")
    if [int(part) for part in found.split(".")[:2]] < [int(part) for part in TESTED_RAY.split(".")]:
        message = f"{found} is older than {TESTED_RAY}, and may start without a token: upgrade it"
        return Finding("Ray", PROBLEM, message)
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        message = (
            f"RAY_AUTH_MODE is {mode!r}: a cluster of `ray start` from this shell requires no"
            " token, and TG-Tinker refuses it. Set RAY_AUTH_MODE=token"
        )
        return Finding("Ray", WARNING, message)
    return Finding("Ray", OK, f"version {found}")


def _folder(proc: Path) -> Finding:
    """Checks the folder of the next cluster, and those of this user's that run.

    Who can write beside the sockets of a node can take its place.
    """
    name = "Ray's folder"
    running = {path for process in proc.glob("[0-9]*") if (path := _sockets_folder(process))}
    if open_ones := sorted(str(path) for path in running if not keeps_out(path)):
        message = (
            f"other users may replace the sockets in {', '.join(open_ones)}, and so take part in"
            " the cluster there: end it, and start it by `tg-tinker up`, or with RAY_TMPDIR naming"
            " a folder of mode 0700"
        )
        return Finding(name, PROBLEM, message)
    try:
        check_ray_folder()
    except InvalidRequestError as error:
        return Finding(name, PROBLEM, error.message)
    where = ray_folder().parent
    return Finding(name, OK, f"closed to other users, in {where}; {len(running)} run now")


def _sockets_folder(process: Path) -> Path | None:
    """Returns the folder of a raylet's socket; None for programs that are no raylet of ours."""
    with suppress(OSError):  # It may have ended.
        if _server(process) == "raylet" and process.stat().st_uid == os.geteuid():
            options = (word.partition("=") for word in _command(process))
            return next((Path(at).parent for name, _, at in options if name == _SOCKET), None)
    return None


def _tls(environment: Mapping[str, str] = os.environ) -> Finding:
    if not tls_is_on(environment):
        return Finding("TLS", OK, "off, which is safe for one machine only; see machines")
    try:
        certificate, key, authority = tls_files(environment)
        ssl.create_default_context(cafile=authority).load_cert_chain(certificate, key)
        ends = min(_ends(certificate), _ends(authority))
    except (TGTinkerError, OSError, ValueError) as error:  # The errors of ssl are OSErrors.
        message = f"its files are not usable ({type(error).__name__}): see docs/deployment.md"
        return Finding("TLS", PROBLEM, message)
    if wrong := _open_to_others(Path(key)):
        return Finding("TLS", PROBLEM, wrong)
    left, until = ends - datetime.now(UTC), f"the certificates are valid until {ends:%Y-%m-%d}"
    if left < SOON:
        status = WARNING if left > timedelta(0) else PROBLEM
        message = f"{until}: make new ones on every machine, then restart the cluster"
        return Finding("TLS", status, message)
    return Finding("TLS", OK, f"on, {until}")


def _ends(path: str) -> datetime:
    """Returns when the first of the certificates in a file ends."""
    found = x509.load_pem_x509_certificates(Path(path).read_bytes())
    return min(certificate.not_valid_after_utc for certificate in found)


def _open_to_others(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{path} has mode {mode:04o}, others may read it: chmod 600 it" if mode & 0o077 else ""


def _exposure(proc: Path) -> Finding:
    """Checks which of this user's Ray servers other machines can reach."""
    outside = _outside(proc)
    reached = {
        (name, _variable(process, "RAY_AUTH_MODE").lower() == "token")
        for process in proc.glob("[0-9]*")
        if (name := _server(process))
        and not _is_kept_to_loopback(process)
        and _sockets(process) & outside
    }
    if names := sorted(name for name, token in reached if not token):
        message = (
            f"{', '.join(names)} of Ray listens beyond this machine without a token, so whoever"
            " reaches it may run code here: stop Ray, and start it with RAY_AUTH_MODE=token"
            " (`tg-tinker up`)"
        )
        return Finding("exposure", PROBLEM, message)
    if ("dashboard", True) in reached:
        message = (
            "the dashboard listens beyond this machine without TLS: start Ray with"
            " --dashboard-host=127.0.0.1 and reach the dashboard through ssh"
        )
        return Finding("exposure", WARNING, message)
    said = "Ray, which requires its token" if reached else "no Ray of this user"
    return Finding("exposure", OK, f"listening beyond this machine: {said}")


def _outside(proc: Path) -> set[str]:
    """Returns the inodes of the sockets that listen on more than the loopback address."""
    found = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / name).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTENS and not listed_address(local.partition(":")[0]).is_loopback:
                    found.add(rest[5])
    return found


def _server(process: Path) -> str:
    """Returns which Ray server a process is.

    Returns an empty text for any other process, and for the processes of other users.
    """
    program = [Path(word).name for word in _command(process)[:3]]
    return next((_SERVERS[name] for name in program if name in _SERVERS), "")


def _is_kept_to_loopback(process: Path) -> bool:
    """Returns whether a dashboard executes requests at the loopback address only.

    At other addresses, this dashboard only gives metrics to Prometheus.
    """
    options = (word.partition("=") for word in _command(process))
    return any(name == "--host" and is_loopback(host) for name, _, host in options)


def _command(process: Path) -> list[str]:
    with suppress(OSError):
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _sockets(process: Path) -> set[str]:
    with suppress(OSError):
        links = [str(one.readlink()) for one in (process / "fd").iterdir()]
        return {link[8:-1] for link in links if link.startswith("socket:[")}
    return set()


def _variable(process: Path, name: str) -> str:
    with suppress(OSError):
        for line in (process / "environ").read_bytes().decode(errors="replace").split("\0"):
            if line.startswith(f"{name}="):
                return line.partition("=")[2]
    return ""
