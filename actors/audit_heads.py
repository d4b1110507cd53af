"""Signed heads of audit logs in the artifact store, out of reach of who rewrites the database.

Anybody who may write to the store can put an object among them. Who verifies the log is told of one
that is no head. A sweep passes over what does not even look like one.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from actors.registry import Registry
from actors.store import ArtifactStore, place_in
from tg_tinker.audit_log import AuditHead
from tg_tinker.errors import IntegrityError, StorageError

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
    next head covers its row."""
    with suppress(StorageError):
        keep_in(store, registry.audit_head(tenant))


def kept(root: str, tenant: str, public_key: bytes) -> list[AuditHead]:
    """All heads in the store.

    Raises:
        IntegrityError: names an object among them that the holder of the key did not state.
    """
    store, heads = ArtifactStore(root), []
    for name in store.audit_heads(tenant):
        try:
            head = AuditHead.parse(store.read_head(name))
            head.check(public_key)
            if head.tenant != tenant:
                raise IntegrityError("it is of another tenant's log")
        except IntegrityError as error:
            raise IntegrityError(
                f"{name} in the artifact store is not evidence of this audit log: {error.message}."
                " If no other registry uses this store, remove that object and verify again"
            ) from None
        heads.append(head)
    return heads


def unknown_in(store: ArtifactStore, registry: Registry, tenant: str) -> list[str]:
    """Objects with a head that the log does not go through, whoever signed it.

    Another registry signs with another key. Only what the names show to be unknown is read.
    """
    names = store.audit_heads(tenant)
    unknown = set(registry.unknown_rows(tenant, [place_in(name) for name in names]))
    stated: dict[str, str] = {}
    for name in names:
        if place_in(name) in unknown:
            try:
                stated[name] = AuditHead.parse(store.read_head(name)).place
            except IntegrityError as error:
                _log.warning("%s in the artifact store is passed over: %s", name, error.message)
    unknown = set(registry.unknown_rows(tenant, [*stated.values()])) if stated else set()
    return [name for name, place in stated.items() if place in unknown]
