"""Who could get into a cluster from this machine: Ray's token, its TLS, what listens, and what a
tenant is. Files, variables and the kernel's own lists are read; nobody is called."""

from __future__ import annotations

import ipaddress
import os
import ssl
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from actors.operations.findings import OK, PROBLEM, WARNING, Finding
from actors.registry.registry import Registry
from tg_tinker.cluster.node import tls_files, tls_is_on
from tg_tinker.errors import TGTinkerError
from tg_tinker.storage.databases import SQLITE, default_database
from tg_tinker.storage.keyrings import Variable, audit_folder

SOON = timedelta(days=14)
"""Before the end of a certificate."""

_ONE_DOMAIN = (
    "a tenant is a label: whoever runs programs on the cluster reads the data of all. Give others"
    " API keys for HTTP, where tenants are kept apart"
)
_SERVERS = {"gcs_server": "GCS", "raylet": "raylet", "dashboard.py": "dashboard"}
"""Programs of Ray that take orders, by a part of their command line."""

_AT_LOOPBACK = ("--host=127.", "--host=localhost", "--host=::1")
"""Of a dashboard that takes orders there alone: where else it listens Prometheus gets numbers."""

_LISTENS = "0A"
"""As proc_net_tcp(5) has it."""


def examine(home: Path, place: Path | Variable, proc: Path) -> Iterator[Finding]:
    """See `doctor.examine`."""
    yield _tenants(home, place)
    yield _token()
    yield _tls()
    yield _exposure(proc)


def _tenants(home: Path, place: Path | Variable) -> Finding:
    known: list[str] = []
    with suppress(TGTinkerError):  # the check of the registry says why
        if has_rows(home):
            with closing(looked_at(home, place)) as registry:
                known = registry.audit_log.tenants()
    if len(known) > 1:
        return Finding("tenants", WARNING, f"{len(known)} in this registry, and {_ONE_DOMAIN}")
    return Finding("tenants", OK, f"one at most, or none that can be read; {_ONE_DOMAIN}")


def has_rows(home: Path) -> bool:
    """Whether there is a database to look at: to open an empty file would fill it."""
    url = default_database(home)
    file = Path(url.removeprefix(f"{SQLITE}/"))
    return not url.startswith(SQLITE) or (file.is_file() and file.stat().st_size > 0)


def looked_at(home: Path, place: Path | Variable) -> Registry:
    """The registry of a home; raises TGTinkerError where it cannot be opened."""
    return Registry(default_database(home), str(place), audit_folder(place, home), looks_only=True)


def _token() -> Finding:
    """Whoever has it may run code as this user."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        message = (
            "RAY_AUTH_TOKEN is in the environment, which /proc shows to root and to your own"
            " programs: put it into a file of mode 0600 that RAY_AUTH_TOKEN_PATH names"
        )
        return Finding("token", WARNING, message)
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    if not path.is_file():
        return Finding("token", OK, f"none at {path} yet: `tg-tinker up` makes one")
    if wrong := _open_to_others(path):
        return Finding("token", PROBLEM, wrong)
    return Finding("token", OK, f"{path}, closed to others")


def _tls(environment: Mapping[str, str] = os.environ) -> Finding:
    if not tls_is_on(environment):
        return Finding("TLS", OK, "off, which is for one machine alone; see machines")
    try:
        certificate, key, authority = tls_files(environment)
        ssl.create_default_context(cafile=authority).load_cert_chain(certificate, key)
        ends = min(_ends(certificate), _ends(authority))
    except (TGTinkerError, OSError, ValueError) as error:  # ssl's own among them
        message = f"its files are not usable ({type(error).__name__}): see docs/deployment.md"
        return Finding("TLS", PROBLEM, message)
    if wrong := _open_to_others(Path(key)):
        return Finding("TLS", PROBLEM, wrong)
    left, until = ends - datetime.now(UTC), f"the certificates are good until {ends:%Y-%m-%d}"
    if left < SOON:
        status = WARNING if left > timedelta(0) else PROBLEM
        message = f"{until}: make new ones on every machine, then start the cluster again"
        return Finding("TLS", status, message)
    return Finding("TLS", OK, f"on, {until}")


def _ends(path: str) -> datetime:
    """Of the first of the certificates in a file to end."""
    found = x509.load_pem_x509_certificates(Path(path).read_bytes())
    return min(certificate.not_valid_after_utc for certificate in found)


def _open_to_others(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{path} has mode {mode:04o}, others may read it: chmod 600 it" if mode & 0o077 else ""


def _exposure(proc: Path) -> Finding:
    """Ray's servers of this user that other machines reach."""
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
            " reaches it may run code here: end it, and start Ray with RAY_AUTH_MODE=token"
            " (`tg-tinker up`)"
        )
        return Finding("exposure", PROBLEM, message)
    if ("dashboard", True) in reached:
        message = (
            "the dashboard listens beyond this machine, not under TLS: start Ray with"
            " --dashboard-host=127.0.0.1 and reach it through ssh"
        )
        return Finding("exposure", WARNING, message)
    said = "Ray wants its token of whoever reaches it" if reached else "no Ray of this user does so"
    return Finding("exposure", OK, f"listening beyond this machine: {said}")


def _outside(proc: Path) -> set[str]:
    """Inodes of the sockets that listen on more than the loopback."""
    found = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / name).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTENS and not _is_loopback(local.partition(":")[0]):
                    found.add(rest[5])
    return found


def _is_loopback(text: str) -> bool:
    """Of an address in words of four bytes, each in this machine's order."""
    words = [bytes.fromhex(text[at : at + 8]) for at in range(0, len(text), 8)]
    packed = b"".join(word[:: 1 if sys.byteorder == "big" else -1] for word in words)
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _server(process: Path) -> str:
    """What of Ray a process is; empty where it is nothing of that, or another user's."""
    program = [Path(word).name for word in _command(process)[:3]]
    return next((_SERVERS[name] for name in program if name in _SERVERS), "")


def _is_kept_to_loopback(process: Path) -> bool:
    return any(word.startswith(_AT_LOOPBACK) for word in _command(process))


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
