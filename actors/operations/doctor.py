"""Checks a machine before data is trusted to it.

The checks start nothing. They change nothing except a probe in the store, which they remove: the
database is opened with `looks_only`. SQLite itself may move the rest of a crash from the -wal file
into the database file. If a cluster runs, the checks join it and ask each machine.

Each check yields at most one finding. A new check is one more line in `examine`. `doctor_cluster`
and `doctor_nodes` have the checks of clusters.
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
from actors.registry.database import DAMAGED, MISREAD, refuse_misread
from actors.registry.registry import Registry
from actors.registry.rollback import tenants, unknown_in
from actors.storage import signing
from actors.storage.filesystems import RetryPolicy
from actors.storage.key_providers import open_keyring
from actors.storage.secrets import FILE as SECRETS
from actors.storage.secrets import Secrets
from actors.storage.store import ArtifactStore, open_objects
from tg_tinker.cluster import node
from tg_tinker.cluster.authentication import check_authenticated
from tg_tinker.cluster.connection import running_cluster
from tg_tinker.cluster.ray_folder import ray_folder
from tg_tinker.errors import (
    ClusterUnavailableError,
    IntegrityError,
    InvalidRequestError,
    TGTinkerError,
)
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.keyrings import SETTING, Variable, audit_folder, place_of
from tg_tinker.storage.stores import parse

SCARCE, TOO_LITTLE = 10 * 2**30, 2**30
"""Free bytes: enough for a few saves of a large model, and too few for any save."""

_PROBE = b"written by tg-tinker doctor, to be removed at once"


def examine(home: Path, keyring: str, store: str, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Yields the findings of all checks, in the order in which to fix their problems.

    Args:
        keyring, store: the parameters of the same names of `ServiceClient`.
        proc: the folder in which the kernel describes processes and settings.
    """
    place = place_of(keyring)
    yield _home(home)
    yield _keyring(place)
    yield _audit_key(audit_folder(place, home))
    yield _secrets(audit_folder(place, home))
    yield _apart(place, store)
    yield _store(store)
    yield _known_keys(home, place)
    yield _registry(home, place, store)
    yield _space(home, store)
    yield _statistics(home)
    yield _swap(proc)
    yield _core_dumps(proc)
    yield from doctor_cluster.examine(home, place, proc)
    yield _address()
    yield from _nodes(store)


def _home(home: Path) -> Finding:
    if not home.is_dir():
        return Finding("home", PROBLEM, f"there is no home at {home}: run `tg-tinker init`")
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        message = f"{home} has mode {mode:04o}, so other users may read it: set it with chmod 700"
        return Finding("home", PROBLEM, message)
    return Finding("home", OK, f"{home}, closed to other users")


def _keyring(place: Path | Variable) -> Finding:
    if isinstance(place, Variable) and not os.environ.get(place.name):
        message = (
            f"{place} is not set in this shell, so the keyring was not read: set the variable where"
            " the cluster starts"
        )
        return Finding("keyring", WARNING, message)
    try:
        ring = open_keyring(str(place))
    except TGTinkerError as error:
        return Finding("keyring", PROBLEM, error.message)
    found = f"{place}, keys {', '.join(ring.key_ids)}, primary {ring.primary}"
    if isinstance(place, Variable):
        message = (
            f"{found}; /proc shows the variable to root and to the user of each process of the"
            " cluster: on a shared machine, use a file of mode 0600"
        )
        return Finding("keyring", WARNING, message)
    return Finding("keyring", OK, f"{found}, closed to other users")


def _audit_key(folder: Path) -> Finding:
    try:
        signing.load(folder)
    except TGTinkerError as error:
        return Finding("audit key", PROBLEM, error.message)
    return Finding("audit key", OK, f"in {folder}, closed to other users, the pinned one")


def _secrets(folder: Path) -> Finding:
    try:
        Secrets(folder).fingerprints()
    except TGTinkerError as error:
        return Finding("secrets", PROBLEM, error.message)
    if not (folder / SECRETS).exists():
        message = (
            f"all follow from {signing.SIGNING_KEY}, as in every home of an earlier release:"
            " `tg-tinker keys rotate-secret NAME` gives one a key of its own"
        )
        return Finding("secrets", OK, message)
    return Finding("secrets", OK, f"in {folder}, closed to other users")


def _apart(place: Path | Variable, store: str) -> Finding:
    """Checks whether one stolen disk would hold both the ciphertexts and the key to open them."""
    name = "keyring and store"
    try:
        folder = parse(store)
        if isinstance(place, Path) and isinstance(folder, Path):
            keys, data = _existing(place), _existing(folder)
            if keys.stat().st_dev == data.stat().st_dev:
                message = (
                    "on one device, so a stolen disk or a copy of it has data and key: stop the"
                    " cluster, move keyring, secrets.json and the files audit.* to another device,"
                    f" and set {SETTING} to the new path of the keyring"
                )
                return Finding(name, WARNING, message)
    except (TGTinkerError, OSError):
        return Finding(name, WARNING, "not compared: fix the store first")
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
        message = "returned other bytes than were written: save nothing there until it is fixed"
        return Finding("store", PROBLEM, message)
    return Finding("store", OK, f"{store}: wrote, read and removed a probe")


def _store_to_be(folder: Path) -> Finding:
    above = _existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        message = f"{folder} does not exist and cannot be made in {above}: fix its permissions"
        return Finding("store", PROBLEM, message)
    return Finding("store", OK, f"{folder} does not exist yet; the first save makes it")


def _known_keys(home: Path, place: Path | Variable) -> Finding:
    """Checks whether the keyring has the newest key that the home's database was used with."""
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
            f"the keyring is an older copy: it lacks {', '.join(missing)}. Restore the newest copy;"
            " if it is lost, continue without it by `tg-tinker keys rotate`"
        )
        return Finding(name, PROBLEM, message)
    return Finding(name, OK, "the keyring has the newest key that the database knows")


def _registry(home: Path, place: Path | Variable, store: str) -> Finding:
    """Checks whether the home's database is whole and not behind the heads in the store."""
    name = "registry"
    try:
        database = default_database(home)
        if not has_rows(home):
            refuse_misread(database)
            return Finding(name, OK, _NO_ROWS)
        with closing(looked_at(home, place)) as registry:
            behind = _behind(registry, ArtifactStore(store, RetryPolicy(attempts=1)))
            forged = registry.api_keys.problems()
    except TGTinkerError as error:
        if error.details.get("reason") in (DAMAGED, MISREAD):
            return Finding(name, PROBLEM, error.message)
        return Finding(name, WARNING, f"not compared with the store: {error.message}")
    if forged and not behind:
        message = (
            f"API key {', '.join(sorted(forged)[:5])} ({len(forged)} in all) has a row that the"
            f" registry did not write as it is in {database}, so it opens nothing: `tg-tinker"
            " registry check` says why"
        )
        return Finding(name, PROBLEM, message)
    if not behind:
        return Finding(name, OK, f"{database} knows all rows that the store knows of it")
    message = (
        f"the store knows more of tenant {', '.join(behind)} than {database}: the database is an"
        " older copy, so nothing is opened, saved or removed. Restore the newest copy, or see"
        " `tg-tinker registry check`"
    )
    return Finding(name, PROBLEM, message)


_NO_ROWS = "not compared: there is no database yet, or TG_TINKER_DATABASE does not name it"


def _behind(registry: Registry, store: ArtifactStore) -> list[str]:
    """Returns the tenants whose audit log lacks rows that heads in the store attest."""
    return [
        tenant
        for tenant in tenants(registry, store)
        if registry.heads.judge(tenant, None, *unknown_in(registry, store, tenant))[0]
    ]


def _space(home: Path, store: str) -> Finding:
    places = [home, ray_folder()]  # Ray spills there
    with suppress(TGTinkerError):
        folder = parse(store)
        places += [folder] if isinstance(folder, Path) else []
    free, place = min((shutil.disk_usage(_existing(place)).free, str(place)) for place in places)
    message = f"{free / 2**30:.1f} GiB at {place}"
    if free < SCARCE:
        message += ": a save without enough space fails. Free some space, or move the store"
    status = OK if free >= SCARCE else WARNING if free >= TOO_LITTLE else PROBLEM
    return Finding("free space", status, message)


def _statistics(home: Path) -> Finding:
    """Checks Ray's usage statistics.

    Embedded clusters and `tg-tinker up` send none. For other clusters, the environment of
    `ray start` decides.
    """
    name = "usage statistics"
    if os.environ.get("RAY_USAGE_STATS_ENABLED") == "1":
        return Finding(name, WARNING, "Ray sends them: set RAY_USAGE_STATS_ENABLED=0")
    if node.read(home) is None and any(_running()) and not _disabled_in_file():
        message = (
            "the cluster that runs here may send Ray's usage statistics, unless it was started with"
            " RAY_USAGE_STATS_ENABLED=0: run `ray disable-usage-stats` once, then restart it"
        )
        return Finding(name, WARNING, message)
    return Finding(name, OK, "Ray sends none from here")


def _running() -> tuple[str | None, str]:
    """Returns the address of the cluster that runs here, and why programs do not take another."""
    try:
        return running_cluster(), ""
    except ClusterUnavailableError as error:
        return None, error.message


def _disabled_in_file() -> bool:
    """Returns whether `ray disable-usage-stats` has switched the statistics off."""
    try:
        known = json.loads(Path("~/.ray/config.json").expanduser().read_bytes())
        return known["usage_stats"] is False
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return False


def _swap(proc: Path) -> Finding:
    try:
        areas = [line.split()[0] for line in (proc / "swaps").read_text().splitlines()[1:]]
    except OSError:
        return Finding("swap", WARNING, "this system does not show swap: see that it is encrypted")
    # zram is memory.
    on_disk = [area for area in areas if "zram" not in area]
    if not on_disk:
        return Finding("swap", OK, "none on a disk")
    message = (
        f"{', '.join(on_disk)}: keys, weights and batches in memory may be written there. Encrypt"
        " the swap if it is not encrypted, or switch it off (`swapoff -a`)"
    )
    return Finding("swap", WARNING, message)


def _core_dumps(proc: Path) -> Finding:
    """Checks core dumps.

    The actors write none, but their limit does not bind a program that the kernel pipes dumps to.
    """
    name, pattern = "core dumps", ""
    with suppress(OSError):
        pattern = (proc / "sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|"):
        message = (
            f"go to {pattern[1:].split(' ')[0]}, which may keep them whatever the limit of a"
            " process is: configure it to keep none of Python and Ray"
        )
        return Finding(name, WARNING, message)
    if resource.getrlimit(resource.RLIMIT_CORE)[0] != 0:
        message = "your own programs, which hold batches, may write one: run `ulimit -c 0` first"
        return Finding(name, WARNING, message)
    return Finding(name, OK, "none are written")


def _address() -> Finding:
    """Checks where programs find a cluster, and whether it requires its token of them."""
    address, doubtful = _running()
    if doubtful:
        return Finding("address", WARNING, doubtful)
    if address is None:
        return Finding("address", OK, "no cluster runs here: programs start embedded ones")
    try:
        check_authenticated(address)
    except InvalidRequestError as error:
        return Finding("address", PROBLEM, error.message)
    except ClusterUnavailableError as error:
        return Finding("address", WARNING, error.message)
    message = f"{address}, from a file that no other user can replace; it requires its token"
    return Finding("address", OK, message)


def _nodes(store: str) -> Iterator[Finding]:
    """Yields the findings about the machines of a running cluster."""
    address, doubtful = _running()
    if address is None:
        message = "not compared: see address" if doubtful else "no cluster runs here"
        for name in OF_NODES:
            yield Finding(name, WARNING if doubtful else OK, message)
        return
    from actors.operations import doctor_nodes  # Loads Ray.

    yield from doctor_nodes.examine(address, store)


def _existing(path: Path) -> Path:
    """Returns the path itself if it exists, or else the nearest folder above it that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
