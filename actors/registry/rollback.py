"""Signed heads of audit logs in the artifact store, out of reach of who rewrites the database.

Anybody who may write to the store can put an object among them. Who verifies the log is told of one
that is no head. Opening and saving passes over what was not signed here; a sweep over what does not
even look like a head.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from actors.registry.audit_log import SDK
from actors.registry.registry import Registry
from actors.storage.store import MOST_OF_A_HEAD, ArtifactStore, place_in
from tg_tinker.errors import IntegrityError, StorageError
from tg_tinker.records.audit_log import AuditHead

_log = logging.getLogger("tg_tinker")


def keep(store: str, head: AuditHead) -> None:
    """Puts a head into the store, durably.

    Raises:
        StorageError: the store refuses.
    """
    keep_in(ArtifactStore(store), head)


def keep_in(store: ArtifactStore, head: AuditHead) -> None:
    store.write_audit_head(head.tenant, head.place, head.line())


def keep_newest(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """After something that is done and on record: a store that refuses costs nothing of it, and the
    next head covers its row. Until then an older database would not be noticed by that row."""
    try:
        keep_in(store, registry.audit_head(tenant))
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
    return sorted({*registry.logged_tenants(), *store.tenants()})


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


def meet_all(registry: Registry, store: ArtifactStore) -> None:
    """`meet` for every tenant: before what concerns all of them."""
    for tenant in tenants(registry, store):
        meet(registry, store, tenant)


def meet(registry: Registry, store: ArtifactStore, tenant: str, who: str = SDK) -> None:
    """Once for each process of the registry, before anything of a tenant is opened, saved or
    removed in a store: holds the database against the heads there.

    Raises:
        RollbackError: it is older than one of them, or another one; nothing was changed.
        StorageError: the store does not answer: what it knows must not be passed over.
    """
    if not registry.met(tenant, store.root):
        compare(registry, store, tenant, who)


def compare(registry: Registry, store: ArtifactStore, tenant: str, who: str = SDK) -> list[str]:
    """`meet` in any case. Only objects whose names the log does not know are read.

    Returns:
        Objects that have the form of a head and that nobody signed here: another registry uses
        the store, or somebody put them there.
    """
    lines = unknown_in(registry, store, tenant)
    others = registry.meet_store(tenant, store.root, lines, who)
    for name, why in others.items():
        _log.warning("%s in the artifact store is passed over: %s", name, why)
    stated = {name: place for name in others if (place := _stated(lines[name]))}
    unknown = set(registry.unknown_rows(tenant, [*stated.values()])) if stated else set()
    return [name for name, place in stated.items() if place in unknown]


def unknown_in(registry: Registry, store: ArtifactStore, tenant: str) -> dict[str, str]:
    """What objects hold that by their names are heads which the log does not know."""
    names = store.audit_heads(tenant)
    places = set(registry.unknown_rows(tenant, [place_in(name) for name in names]))
    unknown = [name for name in names if place_in(name) in places]
    return {name: store.read_head(name, MOST_OF_A_HEAD) for name in unknown}


def _stated(line: str) -> str | None:
    """The place that a head is of, whoever signed it."""
    try:
        return AuditHead.parse(line).place
    except IntegrityError:
        return None
