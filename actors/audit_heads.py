"""Signed heads of audit logs in the artifact store, out of reach of who rewrites the database."""

from __future__ import annotations

from actors.store import ArtifactStore
from tg_tinker.audit_log import AuditHead
from tg_tinker.errors import IntegrityError


def keep(store: str, head: AuditHead) -> None:
    """Puts a head into the store, durably.

    Raises:
        StorageError: the store refuses.
    """
    keep_in(ArtifactStore(store), head)


def keep_in(store: ArtifactStore, head: AuditHead) -> None:
    store.write_audit_head(head.tenant, head.seq, f"{head.line()}\n".encode())


def kept(store: str, tenant: str) -> list[AuditHead]:
    """All heads in the store; their signatures are for the caller to check.

    Raises:
        IntegrityError: one is damaged.
    """
    return kept_in(ArtifactStore(store), tenant)


def kept_in(store: ArtifactStore, tenant: str) -> list[AuditHead]:
    found = store.audit_heads(tenant)
    try:
        return [AuditHead.parse(content.decode("ascii").removesuffix("\n")) for content in found]
    except UnicodeDecodeError:
        raise IntegrityError("a head of the audit log in the store is damaged") from None
