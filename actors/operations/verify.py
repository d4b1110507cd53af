"""Artifacts checked: each is opened and read as a run would, and the index held to the log."""

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
    """Reads artifacts again, as `load_state` would, and holds them against the audit log; (id, what
    is wrong), empty where nothing.

    One that is damaged does not keep the others from being checked.

    Args:
        artifact_id: one alone. None is all but those that have expired.

    Raises:
        NotFoundError: there is no such artifact.
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
