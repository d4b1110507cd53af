"""Removes what lies in a store and belongs to no artifact: a save that was killed, a deletion that
the store refused half-way, a re-encryption that was broken off.

A sweep notes each orphan as it is. One that begins at least `min_age_s` later removes it if it is
an orphan still and nothing of it has changed. Both times are the store's own: the modification time
of an object that the sweep writes. A save that is slower than that is decided in the registry
(`actors.registry.orphans`), where the notes are too: a sweep that was killed is finished by the
next one.
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
"""An artifact's id; a re-encryption adds a number."""

_OWNED = re.compile(
    rf"a/{_FOLDER}/(?:{re.escape(MANIFEST)}|[A-Za-z0-9_][A-Za-z0-9._-]*\.enc)|keys/{_FOLDER}\.json"
)
_CLOCK = "clock"
_KEPT = (
    "its artifact has lost its files, and these may be what is left of it: `tg-tinker registry"
    " accept` finds them after an older database was put back, `tg-tinker artifacts delete --lost`"
    " forgets the artifact"
)
_HEADS = ("audit/", "ledgers/")
"""Signed heads: no artifact's, and never touched."""


class _Found(NamedTuple):
    """Files that belong to nothing, by their names below the tenant's folder.

    Attributes:
        name: of the artifact that they would be of; a single file's own if it is there.
        whole: it is an artifact, and nothing else is in its folder.
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
    """`sweep` of the store at a folder or URI."""
    return sweep(registry, ArtifactStore(root), tenant, min_age_s, dry_run)


def sweep(
    registry: Registry, store: ArtifactStore, tenant: str, min_age_s: float, dry_run: bool = False
) -> Iterator[Orphan]:
    """Every orphan of a tenant, as soon as it is dealt with.

    Nothing that an artifact needs is removed, whatever happens meanwhile and wherever this stops.

    Args:
        min_age_s: between the beginnings of the two sweeps that must find an orphan the same.
        dry_run: removes and notes nothing; only writes the object that tells the time.

    Raises:
        RollbackError: the store knows more than the registry; nothing was removed.
        IntegrityError: another registry uses the store, too.
        StorageError: the store refused to list, or the registry's database refused.
    """
    _check_heads(registry, store, tenant)
    now, files = _looked(store.objects, tenant)
    reachable = registry.catalogue.reachable(tenant)  # asked after the listing
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
            yield _removed(store.objects, tenant, orphan)  # else it is an artifact by now
    if not dry_run:
        keep_in(store, registry.audit_log.head(tenant))


def _check_heads(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """To a registry that was restored from a backup, or to a second one on the same store, what
    it does not know of would be orphans. Heads of the audit log follow every save."""
    if others := compare(registry, store, tenant):
        raise IntegrityError(
            f"the store has a head of an audit log, {others[0]}, that was not signed here: another"
            " one uses this store. Nothing was removed; give each registry a store of its own. If"
            " none does, somebody put that object there: remove it"
        )


def _looked(objects: Objects, tenant: str) -> tuple[float, list[ObjectInfo]]:
    """The store's time in seconds, and all that it has of a tenant."""
    root = f"t/{tenant}"
    objects.put(f"{root}/{_CLOCK}", b"")
    files = {info.name.removeprefix(f"{root}/"): info for info in objects.list_below(root)}
    if _CLOCK not in files:
        raise StorageError("the store does not list what was just written to it: try again later")
    now = files.pop(_CLOCK).modified.timestamp()
    return now, [info._replace(name=name) for name, info in files.items()]


def _judged(
    files: Iterable[ObjectInfo], reachable: set[str]
) -> tuple[list[_Found], list[ObjectInfo]]:
    """Orphans, and files that TG-Tinker does not name so."""
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
    """What a file is of, None where that is nothing; whether a write that was killed left it."""
    for whole in (name, intended(name)):
        if whole == _CLOCK:
            return _CLOCK, whole != name
        if found := _OWNED.fullmatch(whole):
            return found[1] or found[2], whole != name
    return None, False


def _lost(files: Iterable[ObjectInfo], reachable: Iterable[str]) -> set[str]:
    """Ids of artifacts that lack their manifest or key under the name that the registry knows: a
    database that was put back knows one that was resealed since by an older name."""
    names = {info.name for info in files}
    return {
        _id_of(name)
        for name in reachable
        if not {f"a/{name}/{MANIFEST}", f"keys/{name}.json"} <= names
    }


def _id_of(name: str) -> str:
    """Of the artifact that a name in the store is of."""
    return name.partition(".")[0]


def _is_new(orphan: _Found, seen: Seen | None, now: float) -> bool:
    """Whether its time begins now: not seen so before, or the clock was put back since."""
    if seen is None:
        return True
    return not seen.buried and (seen.fingerprint != orphan.fingerprint or seen.at > now)


def _is_due(seen: Seen, now: float, min_age_s: float) -> bool:
    return seen.buried or now - seen.at >= min_age_s


def _removed(objects: Objects, tenant: str, orphan: _Found) -> Orphan:
    """After its burial. What came since the listing goes too: it is never published."""
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
