"""Verifies artifacts: reads each one as a run would, and compares the index with the audit log."""

from __future__ import annotations

from collections.abc import Iterator

from actors.artifacts.fetch import fetch
from actors.engine.checkpoint import from_files
from actors.registry.deletions import differences
from actors.registry.registry import Registry
from actors.registry.rollback import meet
from actors.storage.store import ArtifactStore
from tg_tinker.errors import TGTinkerError


def verify(
    registry: Registry, root: str, tenant: str, artifact_id: str | None = None
) -> Iterator[tuple[str, str]]:
    """Reads artifacts as `load_state` would, and compares them with the audit log.

    Yields (id, problem); the problem is empty if the artifact is correct. After a damaged artifact
    the check continues with the next one.

    Args:
        artifact_id: the artifact to verify; None verifies all that have not expired.

    Raises:
        NotFoundError: the artifact does not exist.
        RollbackError, StorageError: see `rollback.meet`; nothing was read.
    """
    store, reader = ArtifactStore(root), registry.data_keys.reader(tenant)
    meet(registry, store, tenant)
    changed = differences(registry, tenant)
    for one in _to_verify(registry, tenant, artifact_id):
        if one in changed:
            yield one, changed[one]
            continue
        try:
            state = from_files(fetch(registry, store, reader, one)).state
            registry.heads.check_lineage(tenant, state.lineage.ledgers, one)
        except TGTinkerError as error:
            yield one, error.message
        else:
            yield one, ""


def _to_verify(registry: Registry, tenant: str, artifact_id: str | None) -> list[str]:
    if artifact_id is not None:
        return [registry.catalogue.get(tenant, artifact_id).artifact_id]
    expired = registry.catalogue.expired(tenant)
    known = [info.artifact_id for info in registry.catalogue.find(tenant)]
    return [one for one in known if one not in expired]
