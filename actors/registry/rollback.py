"""A database held against the signed heads in an artifact store, out of reach of who puts a
database back or rewrites it.

One way for both kinds of chains: list the names of heads, ask the registry which of them it does
not know, read those alone, and let the registry judge. Anybody who may write to the store can put
an object among them: what was not signed here is passed over and told, and holds up nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from actors.registry.audit_log import SDK
from actors.registry.registry import Registry
from actors.storage.store import MOST, MOST_OF_A_HEAD, ArtifactStore, place_in
from tg_tinker.errors import IntegrityError, StorageError
from tg_tinker.records.entries import parse_place
from tg_tinker.records.heads import AuditHead

_log = logging.getLogger("tg_tinker")


def meet(registry: Registry, store: ArtifactStore, tenant: str, who: str = SDK) -> None:
    """Once for each process of the registry, before anything of a tenant is opened, saved or
    removed in a store: holds the database against the heads of its audit log there.

    Raises:
        RollbackError: it is older than one of them, or another one; nothing was changed.
        StorageError: the store does not answer: what it knows must not be passed over.
    """
    if not registry.heads.met(tenant, store.root):
        compare(registry, store, tenant, who)


def meet_all(registry: Registry, store: ArtifactStore) -> None:
    """`meet` for every tenant: before what concerns all of them."""
    for tenant in tenants(registry, store):
        meet(registry, store, tenant)


def compare(registry: Registry, store: ArtifactStore, tenant: str, who: str = SDK) -> list[str]:
    """`meet` in any case.

    Returns:
        Objects that have the form of a head and that nobody signed here: another registry uses
        the store, or somebody put them there.
    """
    names = store.audit_heads(tenant)
    lines, others = _held_against(registry, store, tenant, None, names, who=who)
    stated = {name: place for name in others if (place := _stated(lines[name]))}
    unknown = set(registry.audit_log.unknown(tenant, [*stated.values()])) if stated else set()
    return [name for name, place in stated.items() if place in unknown]


def meet_ledger(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str, kept: Sequence[str] = (),
    who: str = SDK,
) -> int:  # fmt: skip
    """Holds a ledger against every head of it in the store, and against others that are kept.

    Args:
        kept: heads that the caller has, a line each.
        who: asks, for the audit log.

    Returns:
        The number of the newest entry that the store knows; -1 if it has no head.

    Raises:
        LedgerMismatchError: the ledger is behind a head, or another chain.
        IntegrityError: a head that the caller has is damaged.
        StorageError: the store does not answer: what it knows must not be passed over.
    """
    names = store.ledger_heads(tenant, registry.heads.ledger_name(tenant, dataset))
    lines, _ = _held_against(registry, store, tenant, dataset, names, kept, who)
    known = [place_in(name) for name in names if name not in lines]
    return max((parse_place(place)[0] for place in known), default=-1)


def book_missing(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str, kept: Sequence[str] = ()
) -> int:
    """See `Heads.book_missing`, from all heads in the store and others that are kept."""
    names = store.ledger_heads(tenant, registry.heads.ledger_name(tenant, dataset))
    lines = _read(store, names, dataset)
    _, others = registry.heads.judge(tenant, dataset, lines)
    _tell(others)
    found = [line for name, line in lines.items() if name not in others]
    return registry.heads.book_missing(tenant, dataset, [*found, *kept])


def unknown_in(registry: Registry, store: ArtifactStore, tenant: str) -> dict[str, str]:
    """What objects hold that by their names are heads which the audit log does not know."""
    return _unknown(registry, store, tenant, None, store.audit_heads(tenant))


def _held_against(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str | None,
    names: Sequence[str], kept: Sequence[str] = (), who: str = SDK,
) -> tuple[dict[str, str], dict[str, str]]:  # fmt: skip
    """The objects that the chain does not know by name, and why some of them are no heads of it.
    Raises for those that are, see `Heads.meet`."""
    lines = _unknown(registry, store, tenant, dataset, names)
    others = registry.heads.meet(tenant, dataset, store.root, lines, kept, who)
    _tell(others)
    return lines, others


def _unknown(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str | None,
    names: Sequence[str],
) -> dict[str, str]:  # fmt: skip
    places = set(registry.heads.unknown(tenant, dataset, [place_in(name) for name in names]))
    return _read(store, [name for name in names if place_in(name) in places], dataset)


def _read(store: ArtifactStore, names: Sequence[str], dataset: str | None) -> dict[str, str]:
    """A head of a ledger carries entries; one of the audit log is short, whatever lies there."""
    most = MOST_OF_A_HEAD if dataset is None else MOST
    return {name: store.read_head(name, most) for name in names}


def _tell(others: Mapping[str, str]) -> None:
    for name, why in others.items():
        _log.warning("%s in the artifact store is passed over: %s", name, why)


def _stated(line: str) -> str | None:
    """The place that a head is of, whoever signed it."""
    try:
        return AuditHead.parse(line).place
    except IntegrityError:
        return None


# --- heads put into the store -----------------------------------------------------------------


def keep(store: str, head: AuditHead) -> None:
    """Puts a head into the store, durably.

    Raises:
        StorageError: the store refuses.
    """
    keep_in(ArtifactStore(store), head)


def keep_in(store: ArtifactStore, head: AuditHead) -> None:
    store.write_audit_head(head.tenant, head.place, head.line())


def keep_newest(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """After something that is done and on record: the change stands even if the store rejects the
    head, and the next head covers its row. Until then an older database would not be noticed by
    that row."""
    try:
        keep_in(store, registry.audit_log.head(tenant))
    except StorageError as error:
        _log.warning("the store did not take a head of the audit log: %s", error.message)


@contextmanager
def covered(registry: Registry, root: str, tenant: str) -> Iterator[None]:
    """Around a change that an older database must not undo: `meet` before, `keep_newest` after. A
    head of an older copy that went on would have the newest one refused."""
    store = ArtifactStore(root)
    meet(registry, store, tenant)
    yield
    keep_newest(registry, store, tenant)


def tenants(registry: Registry, store: ArtifactStore) -> list[str]:
    """All that the database or the store knows: an older database may have lost some."""
    return sorted({*registry.audit_log.tenants(), *store.tenants()})


def kept(root: str, tenant: str, public_key: bytes) -> list[AuditHead]:
    """All heads in the store.

    Raises:
        IntegrityError: names an object among them that the holder of the key did not state.
    """
    store, heads = ArtifactStore(root), []
    for name in store.audit_heads(tenant):
        try:
            line = store.read_head(name, MOST_OF_A_HEAD)
            heads.append(AuditHead.authentic(line, tenant, public_key))
        except IntegrityError as error:
            raise IntegrityError(
                f"{name} in the artifact store is not evidence of this audit log: {error.message}."
                " If no other registry uses this store, remove that object and verify again"
            ) from None
    return heads
