"""Compares a database with the signed heads in an artifact store.

Somebody who replaces or rewrites the database, but cannot change the store, leaves these heads in
place. Both kinds of chains are compared in the same way: list the names of heads, find out which of
them the registry does not know, read only these, and judge them. The registry itself does this for
audit logs, and its callers for ledgers. Anybody who can write to the store can put an object among
them. An object that was not signed here is ignored with a warning, and blocks nothing.
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
from tg_tinker.records.heads import AuditHead, LedgerHead
from tg_tinker.records.successions import Signers

_log = logging.getLogger("tg_tinker")


def meet(registry: Registry, store: ArtifactStore, tenant: str, who: str = SDK) -> None:
    """Compares the database with the heads of a tenant's audit log in a store, once per process of
    the registry. Call it before anything of the tenant is opened, saved or removed in the store.

    Raises:
        RollbackError: The database is older than one of the heads, or is a different one; nothing
            was changed.
        StorageError: The store does not answer, and the comparison must not be skipped.
    """
    if not registry.heads.met(tenant, store.root):
        _tell(registry.heads.meet_store(tenant, store.root, who))


def meet_all(registry: Registry, store: ArtifactStore) -> None:
    """Calls `meet` for every tenant, before an operation that concerns all of them."""
    for tenant in tenants(registry, store):
        meet(registry, store, tenant)


def compare(registry: Registry, store: ArtifactStore, tenant: str, who: str = SDK) -> list[str]:
    """Compares like `meet`, even if this process has already compared.

    Returns:
        The names of objects that state a row the log does not know, and that are no authentic heads
        of this log: another registry uses the store, or somebody put them there.
    """
    others = registry.heads.meet_store(tenant, store.root, who)
    _tell(others)
    lines = _read(store, [*others], None)
    stated = {name: place for name in others if (place := _stated(lines[name]))}
    unknown = set(registry.audit_log.unknown(tenant, [*stated.values()])) if stated else set()
    return [name for name, place in stated.items() if place in unknown]


def meet_ledger(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str, kept: Sequence[str] = (),
    who: str = SDK,
) -> int:  # fmt: skip
    """Compares a ledger with all its heads in the store, and with heads that the caller keeps.

    Args:
        kept: Heads that the caller has, one line each.
        who: The name of the caller, for the audit log.

    Returns:
        The number of the newest entry of which the store has a head; -1 if it has none.

    Raises:
        LedgerMismatchError: The ledger is behind a head, or is another chain.
        IntegrityError: A head of the caller is damaged.
        StorageError: The store does not answer, and the comparison must not be skipped.
    """
    names = _ledger_heads(registry, store, tenant, dataset)
    lines, newest = _unknown(registry, store, tenant, dataset, names)
    _tell(registry.heads.meet_ledger(tenant, dataset, lines, kept, who, newest))
    known = [place_in(name) for name in names if name not in lines]
    return max((parse_place(place)[0] for place in known), default=-1)


def book_missing(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str, kept: Sequence[str] = ()
) -> int:
    """Calls `Heads.book_missing` with all heads in the store and with heads that the caller keeps,
    and returns its result."""
    names = _ledger_heads(registry, store, tenant, dataset)
    lines = _read(store, names, dataset)
    others = registry.heads.strangers(tenant, dataset, lines)
    _tell(others)
    found = [line for name, line in lines.items() if name not in others]
    return registry.heads.book_missing(tenant, dataset, [*found, *kept])


def unknown_in(
    registry: Registry, store: ArtifactStore, tenant: str
) -> tuple[dict[str, str], str]:  # fmt: skip
    """Returns the contents, by name, of the objects whose names state heads that the audit log does
    not know; and the newest head that it knows, see `Heads.judge`."""
    return _unknown(registry, store, tenant, None, store.audit_heads(tenant))


def _unknown(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str | None,
    names: Sequence[str],
) -> tuple[dict[str, str], str]:  # fmt: skip
    places = set(registry.heads.unknown(tenant, dataset, [place_in(name) for name in names]))
    found = [name for name in names if place_in(name) in places]
    known = [name for name in names if place_in(name) not in places]
    lines = _read(store, found, dataset)
    # The newest matters only beside others, and usually there are none.
    newest = _newest_line(store, known, dataset) if found else ""
    if found and not newest and dataset is not None:
        # A rotation of the signing key puts its head of the audit log after those of all ledgers.
        logs = store.audit_heads(tenant)
        missed = set(registry.heads.unknown(tenant, None, [place_in(name) for name in logs]))
        newest = _newest_line(store, [one for one in logs if place_in(one) not in missed], None)
    return lines, newest


def _newest_line(store: ArtifactStore, names: Sequence[str], dataset: str | None) -> str:
    """Returns the content of the object whose name states the last position; empty if there are
    no names."""
    newest = sorted(names, key=lambda name: parse_place(place_in(name))[0])[-1:]
    return "".join(_read(store, newest, dataset).values())


def sign_ledger_again(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str
) -> None:  # fmt: skip
    """Puts a head at the end of a ledger into the store, signed by the signing key of today, after
    a rotation of this key.

    Raises:
        LedgerMismatchError: See `meet_ledger`.
        StorageError: The store rejects the head.
    """
    stored = meet_ledger(registry, store, tenant, dataset)
    line = registry.heads.ledger_head(tenant, dataset, stored)
    head = LedgerHead.parse(line)
    for name in _ledger_heads(registry, store, tenant, dataset):
        if place_in(name) == head.place:
            # The head in the store also has the entries that this one lacks.
            line = registry.heads.signed_again(tenant, dataset, store.read_head(name))
            head = LedgerHead.parse(line)
    store.write_ledger_head(tenant, head.ledger, head.place, line)


def _ledger_heads(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str
) -> list[str]:  # fmt: skip
    """Returns the names of objects that may be heads of a ledger, under all its pseudonyms."""
    pseudonyms = registry.heads.ledger_names(tenant, dataset)
    return [name for one in pseudonyms for name in store.ledger_heads(tenant, one)]


def _read(store: ArtifactStore, names: Sequence[str], dataset: str | None) -> dict[str, str]:
    """Returns the contents of the named objects. A head of a ledger carries entries. A head of an
    audit log is short, so no more than its largest size is read."""
    most = MOST_OF_A_HEAD if dataset is None else MOST
    return {name: store.read_head(name, most) for name in names}


def _tell(others: Mapping[str, str]) -> None:
    for name, why in others.items():
        _log.warning("%s in the artifact store is ignored: %s", name, why)


def _stated(line: str) -> str | None:
    """Returns the position that a head states, whoever signed it; None if the line is no head."""
    try:
        return AuditHead.parse(line).place
    except IntegrityError:
        return None


# --- heads put into the store -----------------------------------------------------------------


def keep(store: str, head: AuditHead) -> None:
    """Writes a head to the store, durably.

    Raises:
        StorageError: The store rejects the head.
    """
    keep_in(ArtifactStore(store), head)


def keep_in(store: ArtifactStore, head: AuditHead) -> None:
    store.write_audit_head(head.tenant, head.place, head.line())


def keep_newest(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """Writes the newest head of the audit log to the store, after a change that is done and
    recorded. The change stands even if the store rejects the head, and the next head covers its
    row. Until then, the store does not reveal an older database that lacks only that row."""
    try:
        keep_in(store, registry.audit_log.head(tenant))
    except StorageError as error:
        _log.warning("a head of the audit log was not written to the store: %s", error.message)


@contextmanager
def covered(registry: Registry, root: str, tenant: str) -> Iterator[None]:
    """Surrounds a change that an older database must not undo: calls `meet` before it, and
    `keep_newest` after it. Without `meet`, an older copy could write a head that makes the newest
    database refuse."""
    store = ArtifactStore(root)
    meet(registry, store, tenant)
    yield
    keep_newest(registry, store, tenant)


def tenants(registry: Registry, store: ArtifactStore) -> list[str]:
    """Returns all tenants that the database or the store knows: an older database may lack some."""
    return sorted({*registry.audit_log.tenants(), *store.tenants()})


def kept(root: str, tenant: str, signers: Signers) -> list[AuditHead]:
    """Returns all heads of a tenant's audit log in the store.

    Raises:
        IntegrityError: An object among them is no head of this log that the key in force at its
            row signed. The error names the object.
    """
    store, heads = ArtifactStore(root), []
    for name in store.audit_heads(tenant):
        try:
            line = store.read_head(name, MOST_OF_A_HEAD)
            key = signers.at(AuditHead.parse(line).seq)
            heads.append(AuditHead.authentic(line, tenant, key))
        except IntegrityError as error:
            raise IntegrityError(
                f"{name} in the artifact store is not a valid head of this log: {error.message}."
                " If no other registry uses this store, remove that object and verify again"
            ) from None
    return heads
