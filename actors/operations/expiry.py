"""Deletes expired artifacts."""

from __future__ import annotations

from collections.abc import Iterator

from actors.artifacts.delete import delete
from actors.registry.registry import Registry
from actors.registry.rollback import meet
from actors.storage.store import ArtifactStore
from tg_tinker.errors import TGTinkerError


def delete_expired(registry: Registry, root: str, tenant: str) -> Iterator[tuple[str, str]]:
    """Deletes every expired artifact. Yields (id, problem); the problem is empty after a deletion.

    Raises:
        RollbackError, StorageError: see `rollback.meet`. An older database may have older expiry
            times, so nothing was deleted.
    """
    meet(registry, ArtifactStore(root), tenant)
    for artifact_id in registry.catalogue.expired(tenant):
        try:
            delete(registry, root, tenant, artifact_id, "artifact.expire")
        except TGTinkerError as error:
            yield artifact_id, error.message
        else:
            yield artifact_id, ""
