"""Removes orphans from a store: files that belong to no artifact.

Orphans remain after a save that was killed, a deletion that the store refused halfway, or a
re-encryption that was interrupted.

A sweep records each orphan and its files in the registry (`actors.registry.orphans`). A sweep that
begins at least `min_age_s` later removes the orphan if it is still an orphan and its files have not
changed. Both times are times of the store: the modification time of an object that the sweep
writes. If a save is slower than `min_age_s`, the registry decides whether the save or the sweep
succeeds. The next sweep finishes a sweep that was killed.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from actors.registry.orphans import Seen
from actors.registry.registry import Registry
from actors.registry.rollback import compare, keep_in
from actors.storage.objects import ObjectInfo, Objects, intended
from actors.storage.store import MANIFEST, ArtifactStore
from tg_tinker.errors import IntegrityError, StorageError
from tg_tinker.types import Orphan

_FOLDER = r"(art-[0-9a-f]{27}(?:\.[0-9]+)?)"
"""Matches the id of an artifact; a re-encryption adds a number."""

_OWNED = re.compile(
    rf"a/{_FOLDER}/(?:{re.escape(MANIFEST)}|[A-Za-z0-9_][A-Za-z0-9._-]*\.enc)|keys/{_FOLDER}\.json"
)
_CLOCK = "clock"
_KEPT = (
    "an artifact has lost its files, and these may be the remaining ones: after an older database"
    " was restored, `tg-tinker registry accept` finds them; `tg-tinker artifacts delete --lost`"
    " forgets the artifact"
)
_HEADS = ("audit/", "ledgers/")
"""Folders of signed heads. They belong to no artifact, and a sweep never removes them."""


class _Found(NamedTuple):
    """An orphan: files that belong to no artifact, by their names below the tenant's folder.

    Attributes:
        name: the name of the artifact that the files would belong to. For a single left-over file
            of an existing artifact, it is the name of the file.
        whole: whether the orphan is a whole artifact folder without any unknown file.
    """

    name: str
    files: Sequence[ObjectInfo]
    whole: bool

    @property
    def size(self) -> int:
        return sum(info.size for info in self.files)

    @property
    def fingerprint(self) -> str:
        described = [(info.name, info.size, info.modified.timestamp()) for info in self.files]
        return hashlib.sha256(repr(described).encode()).hexdigest()


def sweep_store(
    registry: Registry, root: str, tenant: str, min_age_s: float, dry_run: bool
) -> Iterator[Orphan]:
    """Calls `sweep` with the store at a folder or URI."""
    return sweep(registry, ArtifactStore(root), tenant, min_age_s, dry_run)


def sweep(
    registry: Registry, store: ArtifactStore, tenant: str, min_age_s: float, dry_run: bool = False
) -> Iterator[Orphan]:
    """Yields every orphan of a tenant, as soon as the sweep has handled it.

    The sweep removes nothing that an artifact needs, whatever happens meanwhile and wherever the
    sweep stops.

    Args:
        min_age_s: the minimum time between the beginnings of the two sweeps that must find an
            orphan unchanged.
        dry_run: removes and records nothing; writes only the object that shows the store's time.

    Raises:
        RollbackError: heads in the store attest rows that the registry lacks; nothing was removed.
        IntegrityError: another registry also uses the store; nothing was removed.
        StorageError: the store could not list its objects, or the registry's database refused.
    """
    _check_heads(registry, store, tenant)
    now, files = _looked(store.objects, tenant)
    # Read after the listing, so that an artifact that was saved meanwhile is no orphan.
    reachable = registry.catalogue.reachable(tenant)
    found, unknown = _judged(files, reachable)
    lost = _lost(files, reachable)
    orphans = [orphan for orphan in found if _id_of(orphan.name) not in lost]
    known = registry.orphans.of(tenant)
    new = {orphan.name: orphan.fingerprint for orphan in orphans
           if _is_new(orphan, known.get(orphan.name), now)}  # fmt: skip
    if not dry_run:
        registry.orphans.note(tenant, new, now)
    yield from (Orphan(info.name, 1, info.size, "unknown") for info in unknown)
    yield from (_told(one, "kept", _KEPT) for one in found if _id_of(one.name) in lost)
    for orphan in orphans:
        if orphan.name in new or not _is_due(known[orphan.name], now, min_age_s):
            yield _told(orphan, "waiting")
        elif dry_run:
            yield _told(orphan, "due")
        elif registry.orphans.bury(tenant, orphan.name, len(orphan.files), orphan.size):
            yield _removed(store.objects, tenant, orphan)  # Otherwise it has become an artifact.
    if not dry_run:
        keep_in(store, registry.audit_log.head(tenant))


def _check_heads(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """Refuses a sweep by a registry that may not know all artifacts of the store.

    A registry that was restored from a backup, or a second registry on the same store, would treat
    unknown artifacts as orphans. Every save puts a head of the audit log into the store, so the
    heads show this.
    """
    if others := compare(registry, store, tenant):
        raise IntegrityError(
            f"the store has a head of an audit log, {others[0]}, that was not signed here, so"
            " another registry uses this store, or somebody put the object there. Nothing was"
            " removed: give each registry its own store. If no other registry uses this store,"
            " check that object and remove it"
        )


def _looked(objects: Objects, tenant: str) -> tuple[float, list[ObjectInfo]]:
    """Returns the store's time in seconds, and all objects of the tenant in the store."""
    root = f"t/{tenant}"
    objects.put(f"{root}/{_CLOCK}", b"")
    files = {info.name.removeprefix(f"{root}/"): info for info in objects.list_below(root)}
    if _CLOCK not in files:
        raise StorageError(
            "the store does not list an object that was just written to it: try again later"
        )
    now = files.pop(_CLOCK).modified.timestamp()
    return now, [info._replace(name=name) for name, info in files.items()]


def _judged(
    files: Iterable[ObjectInfo], reachable: set[str]
) -> tuple[list[_Found], list[ObjectInfo]]:
    """Returns the orphans, and the files whose names TG-Tinker does not use."""
    groups: dict[str, list[ObjectInfo]] = defaultdict(list)
    unknown = []
    for info in files:
        owner, left = _owner(info.name)
        if owner is None:
            unknown += [] if info.name.startswith(_HEADS) else [info]
        elif owner != _CLOCK and owner not in reachable:
            groups[owner].append(info)
        elif left:
            groups[info.name].append(info)
    shared = {info.name.split("/")[1] for info in unknown if info.name.startswith("a/")}
    return [
        _Found(name, group, whole=bool(re.fullmatch(_FOLDER, name)) and name not in shared)
        for name, group in groups.items()
    ], unknown


def _owner(name: str) -> tuple[str | None, bool]:
    """Returns the owner of a file, and whether a killed write left the file.

    The owner is the stored name of an artifact, or the clock; None for a name that TG-Tinker does
    not use.
    """
    for whole in (name, intended(name)):
        if whole == _CLOCK:
            return _CLOCK, whole != name
        if found := _OWNED.fullmatch(whole):
            return found[1] or found[2], whole != name
    return None, False


def _lost(files: Iterable[ObjectInfo], reachable: Iterable[str]) -> set[str]:
    """Returns the ids of artifacts whose manifest or key is not under the name the registry knows.

    After a restore, the database knows a resealed artifact by an older name.
    """
    names = {info.name for info in files}
    return {
        _id_of(name)
        for name in reachable
        if not {f"a/{name}/{MANIFEST}", f"keys/{name}.json"} <= names
    }


def _id_of(name: str) -> str:
    """Returns the id of the artifact that a name in the store belongs to."""
    return name.partition(".")[0]


def _is_new(orphan: _Found, seen: Seen | None, now: float) -> bool:
    """Returns whether the waiting time of an orphan begins now.

    It does if no sweep has seen the orphan in this form, or if the clock was set back since.
    """
    if seen is None:
        return True
    return not seen.buried and (seen.fingerprint != orphan.fingerprint or seen.at > now)


def _is_due(seen: Seen, now: float, min_age_s: float) -> bool:
    return seen.buried or now - seen.at >= min_age_s


def _removed(objects: Objects, tenant: str, orphan: _Found) -> Orphan:
    """Removes an orphan that the registry has marked as buried.

    Files that were added since the listing are removed too: a buried name is never published.
    """
    root, folder = f"t/{tenant}", f"a/{orphan.name}"
    try:
        for info in orphan.files:
            if not (orphan.whole and info.name.startswith(f"{folder}/")):
                objects.delete(f"{root}/{info.name}")
        if orphan.whole:
            objects.delete_all(f"{root}/{folder}")
    except StorageError as error:
        return _told(orphan, "refused", error.message)
    return _told(orphan, "removed")


def _told(orphan: _Found, state: str, problem: str = "") -> Orphan:
    return Orphan(orphan.name, len(orphan.files), orphan.size, state, problem)
