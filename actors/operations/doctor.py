"""What to look at before data is trusted to this machine. It starts nothing and changes nothing but
a probe in the store, which it removes: the database is opened with `looks_only`. SQLite itself may
take what a crash left in a -wal into the file. Where a cluster runs it joins it and asks each
machine.

Each check answers with at most one finding; a new check is one more line of `examine`. What
concerns clusters is in `doctor_cluster` and `doctor_nodes`.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from actors.operations import doctor_cluster
from actors.operations.doctor_cluster import has_rows, looked_at
from actors.operations.findings import OF_NODES, OK, PROBLEM, WARNING, Finding
from actors.registry.database import DAMAGED
from actors.registry.registry import Registry
from actors.registry.rollback import tenants, unknown_in
from actors.storage import signing
from actors.storage.filesystems import RetryPolicy
from actors.storage.key_providers import open_keyring
from actors.storage.store import ArtifactStore, open_objects
from tg_tinker.cluster import node
from tg_tinker.cluster.connection import running_cluster
from tg_tinker.errors import IntegrityError, TGTinkerError
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.keyrings import SETTING, Variable, audit_folder, place_of
from tg_tinker.storage.stores import parse

SCARCE, TOO_LITTLE = 10 * 2**30, 2**30
"""Free bytes: a few saves of a large model, and none."""

_PROBE = b"written by tg-tinker doctor, to be removed at once"


def examine(home: Path, keyring: str, store: str, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """All checks, in the order in which their problems should be mended.

    Args:
        keyring, store: as `ServiceClient` takes them.
        proc: where the kernel tells about itself.
    """
    place = place_of(keyring)
    yield _home(home)
    yield _keyring(place)
    yield _audit_key(audit_folder(place, home))
    yield _apart(place, store)
    yield _store(store)
    yield _known_keys(home, place)
    yield _registry(home, place, store)
    yield _space(home, store)
    yield _statistics()
    yield _swap(proc)
    yield _core_dumps(proc)
    yield from doctor_cluster.examine(home, place, proc)
    yield from _nodes(home, store)


def _home(home: Path) -> Finding:
    if not home.is_dir():
        return Finding("home", PROBLEM, f"there is none at {home}: run `tg-tinker init`")
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        message = f"{home} has mode {mode:04o}, others may look into it: chmod 700 it"
        return Finding("home", PROBLEM, message)
    return Finding("home", OK, f"{home}, closed to others")


def _keyring(place: Path | Variable) -> Finding:
    if isinstance(place, Variable) and not os.environ.get(place.name):
        message = (
            f"{place} is not set in this shell, so it was not read: the cluster needs it where"
            " it starts"
        )
        return Finding("keyring", WARNING, message)
    try:
        ring = open_keyring(str(place))
    except TGTinkerError as error:
        return Finding("keyring", PROBLEM, error.message)
    found = f"{place}, keys {', '.join(ring.key_ids)}, primary {ring.primary}"
    if isinstance(place, Variable):
        message = (
            f"{found}; every process of the cluster shows it to root and to its own user in"
            " /proc: on a machine that you share, use a file of mode 0600"
        )
        return Finding("keyring", WARNING, message)
    return Finding("keyring", OK, f"{found}, closed to others")


def _audit_key(folder: Path) -> Finding:
    try:
        signing.load(folder)
    except TGTinkerError as error:
        return Finding("audit key", PROBLEM, error.message)
    return Finding("audit key", OK, f"in {folder}, closed to others, the one that was pinned")


def _apart(place: Path | Variable, store: str) -> Finding:
    """Whether one stolen disk holds ciphertexts and the key to them."""
    name = "keyring and store"
    try:
        folder = parse(store)
        if isinstance(place, Path) and isinstance(folder, Path):
            keys, data = _existing(place), _existing(folder)
            if keys.stat().st_dev == data.stat().st_dev:
                message = (
                    "on one device, so a stolen disk or a copy of it opens itself: with the cluster"
                    " stopped, move keyring, audit.key and audit.pub to another device and set"
                    f" {SETTING} to the keyring's new path"
                )
                return Finding(name, WARNING, message)
    except (TGTinkerError, OSError):
        return Finding(name, WARNING, "not compared: mend the store first")
    return Finding(name, OK, "not on one device")


def _store(store: str) -> Finding:
    try:
        folder = parse(store)
        if isinstance(folder, Path) and not folder.exists():
            return _store_to_be(folder)
        objects = open_objects(store, RetryPolicy(attempts=1))
        name = f"doctor-{secrets.token_hex(8)}"
        try:
            objects.put(name, _PROBE)
            same = objects.read(name) == _PROBE
        finally:
            objects.delete(name)
    except TGTinkerError as error:
        return Finding("store", PROBLEM, error.message)
    if not same:
        message = "gave back other bytes than it took: save nothing there before it is mended"
        return Finding("store", PROBLEM, message)
    return Finding("store", OK, f"{store}: wrote, read and removed a probe")


def _store_to_be(folder: Path) -> Finding:
    above = _existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        message = f"{folder} does not exist and cannot be made in {above}: mend its permissions"
        return Finding("store", PROBLEM, message)
    return Finding("store", OK, f"{folder} does not exist yet, the first save makes it")


def _known_keys(home: Path, place: Path | Variable) -> Finding:
    """Whether the keyring is the newest one that the home's database was used with."""
    name = "keyring and registry"
    try:
        if not has_rows(home):
            return Finding(name, OK, _NO_ROWS)
        with closing(looked_at(home, place)) as registry:
            missing = registry.data_keys.missing_keys()
    except IntegrityError as error:
        return Finding(name, PROBLEM, error.message)
    except TGTinkerError as error:
        return Finding(name, WARNING, f"not compared: {error.message}")
    if missing:
        message = (
            f"the keyring is an older copy, it lacks {', '.join(missing)}: put the newest one back;"
            " if it is lost, `tg-tinker keys rotate` goes on without it"
        )
        return Finding(name, PROBLEM, message)
    return Finding(name, OK, "the keyring has the newest key that the database knows")


def _registry(home: Path, place: Path | Variable, store: str) -> Finding:
    """Whether the home's database is whole, and not older than what the store knows of it."""
    name = "registry"
    try:
        database = default_database(home)
        if not has_rows(home):
            return Finding(name, OK, _NO_ROWS)
        with closing(looked_at(home, place)) as registry:
            behind = _behind(registry, ArtifactStore(store, RetryPolicy(attempts=1)))
    except TGTinkerError as error:
        if error.details.get("reason") == DAMAGED:
            return Finding(name, PROBLEM, error.message)
        return Finding(name, WARNING, f"not compared with the store: {error.message}")
    if not behind:
        return Finding(name, OK, f"{database} knows all that the store knows of it")
    message = (
        f"the store knows more of tenant {', '.join(behind)} than {database}: it is an older copy,"
        " and nothing is opened, saved or removed. Put the newest one back, or see `tg-tinker"
        " registry check`"
    )
    return Finding(name, PROBLEM, message)


_NO_ROWS = "no database yet, or one that TG_TINKER_DATABASE does not name: not compared"


def _behind(registry: Registry, store: ArtifactStore) -> list[str]:
    """Tenants of whose audit log the store has heads that the registry does not know."""
    return [
        tenant
        for tenant in tenants(registry, store)
        if registry.heads.judge(tenant, None, unknown_in(registry, store, tenant))[0]
    ]


def _space(home: Path, store: str) -> Finding:
    places = [home, Path(os.environ.get("RAY_TMPDIR") or "/tmp")]  # noqa: S108  (Ray spills there)
    with suppress(TGTinkerError):
        folder = parse(store)
        places += [folder] if isinstance(folder, Path) else []
    free, place = min((shutil.disk_usage(_existing(place)).free, str(place)) for place in places)
    message = f"{free / 2**30:.1f} GiB at {place}"
    if free < SCARCE:
        message += ": a save that finds no room fails; make room, or put the store elsewhere"
    status = OK if free >= SCARCE else WARNING if free >= TOO_LITTLE else PROBLEM
    return Finding("free space", status, message)


def _statistics() -> Finding:
    """Ray's own. Embedded clusters send none; `ray start` decides for itself."""
    name = "usage statistics"
    if os.environ.get("RAY_USAGE_STATS_ENABLED") == "1":
        return Finding(name, WARNING, "Ray sends them: set RAY_USAGE_STATS_ENABLED=0")
    if running_cluster() is not None and not _disabled_in_file():
        message = (
            "the cluster that runs here may send Ray's, unless it was started with"
            " RAY_USAGE_STATS_ENABLED=0: `ray disable-usage-stats` once, then start it again"
        )
        return Finding(name, WARNING, message)
    return Finding(name, OK, "Ray sends none from here")


def _disabled_in_file() -> bool:
    """What `ray disable-usage-stats` writes."""
    try:
        known = json.loads((Path.home() / ".ray" / "config.json").read_bytes())
        return known["usage_stats"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _swap(proc: Path) -> Finding:
    try:
        areas = [line.split()[0] for line in (proc / "swaps").read_text().splitlines()[1:]]
    except OSError:
        return Finding("swap", WARNING, "this system does not tell: see that swap is encrypted")
    on_disk = [area for area in areas if "zram" not in area]  # which is memory
    if not on_disk:
        return Finding("swap", OK, "none on a disk")
    message = (
        f"{', '.join(on_disk)}: keys, weights and batches in memory may be written there. Encrypt"
        " it, if it is not, or switch it off (`swapoff -a`)"
    )
    return Finding("swap", WARNING, message)


def _core_dumps(proc: Path) -> Finding:
    """Our actors write none; a program that the kernel pipes them to is not bound by that."""
    name, pattern = "core dumps", ""
    with suppress(OSError):
        pattern = (proc / "sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|"):
        message = (
            f"go to {pattern[1:].split(' ')[0]}, which may keep them whatever the limit of a"
            " process is: see that it keeps none of Python's and Ray's"
        )
        return Finding(name, WARNING, message)
    if resource.getrlimit(resource.RLIMIT_CORE)[0] != 0:
        message = "your own programs, which hold batches, may write one: `ulimit -c 0` before them"
        return Finding(name, WARNING, message)
    return Finding(name, OK, "none are written")


def _nodes(home: Path, store: str) -> Iterator[Finding]:
    """What the machines of a running cluster say of themselves."""
    found = node.read(home)
    address = found.address if found is not None else running_cluster()
    if address is None:
        for name in OF_NODES:
            yield Finding(name, OK, "no cluster runs here: nothing to compare")
        return
    if found is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as it was started, before Ray reads it
    from actors.operations import doctor_nodes  # loads Ray

    yield from doctor_nodes.examine(address, store)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
