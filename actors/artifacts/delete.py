"""Deletes artifacts for good, first in the registry and then in the store, and shreds them."""

from __future__ import annotations

from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest, meet
from actors.storage.store import ArtifactStore
from tg_tinker.errors import NotFoundError, StorageError


def delete(
    registry: Registry, store: str, tenant: str, artifact_id: str,
    event: str = "artifact.delete", lost: bool = False,
) -> None:  # fmt: skip
    """Deletes an artifact: its entry first, then manifest, key and files.

    Once the entry is deleted, no copy of the files counts as the artifact.

    Args:
        event: the name of the event in the audit log.
        lost: whether to delete the artifact even if this store has no file of it.

    Raises:
        NotFoundError: if the artifact is unknown, already deleted, or in another store. Nothing was
            deleted.
        RollbackError: see `rollback.meet`.
        StorageError: if the store refuses. If the entry is deleted by then, the artifact is
            deleted, but some of its files remain.
    """
    folder = ArtifactStore(store)
    check_deletable(registry, folder, tenant, artifact_id, lost)
    remove(registry, folder, tenant, artifact_id, event)


def remove(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, event: str
) -> None:
    """Deletes an artifact that is known to be in this store, as `delete` does."""
    # Uses the name that the entry has now, because the artifact may have been resealed since.
    stored_as = registry.artifacts.delete(tenant, artifact_id, event)
    keep_newest(registry, store, tenant)
    store.delete(tenant, stored_as)


def check_deletable(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, lost: bool = False
) -> None:
    """Raises unless an artifact can be deleted from this store.

    If the artifact is in another store, its files would stay there. If the database is older than
    the store, the deletion would be lost. An artifact that has lost some of its files counts as in
    this store; an artifact that has lost all counts only if `lost`.

    Raises:
        NotFoundError: if the artifact is unknown, deleted, or in another store.
        RollbackError, StorageError: see `rollback.meet`.
    """
    meet(registry, store, tenant)
    stored_as = registry.catalogue.stored_as(tenant, artifact_id)
    here = lost or store.holds(tenant, stored_as)
    # A changed name means that the artifact was just resealed.
    if not here and registry.catalogue.stored_as(tenant, artifact_id) == stored_as:
        raise NotFoundError(
            f"artifact {artifact_id} has no file in this store: open the store that it was saved"
            f" to. If its files are lost, run `tg-tinker artifacts delete --lost {artifact_id}`"
        )


NOT_REACHED = (
    "Backups of the store, and earlier versions that a bucket keeps: the keyring can open the"
    " artifact with any of them. Delete them too, or retire the tenant key that wrapped the data"
    " key (tg-tinker keys rotate, then keys retire).",
    "Copies of the artifact, and exports in clear: they are separate artifacts and files.",
    "Training clients that have loaded the artifact, and snapshots and later artifacts of their"
    " runs: close the clients and shred those artifacts.",
    "Samplers that hold the artifact: they release it within seconds, once its running requests"
    " end, but their memory is freed and not overwritten. A sampler without a connection to the"
    " registry keeps the artifact until that sampler ends.",
    "Disk blocks that the file system has freed but not overwritten.",
)
"""The data that shredding does not reach, for users who must rely on shredding."""


def shred(registry: Registry, root: str, tenant: str, artifact_id: str) -> list[str]:
    """Deletes an artifact, its only wrapped data key first; returns what the deletion cannot reach.

    If the call is interrupted after the key is deleted, nothing in this store opens the artifact.
    The next call continues the deletion. If the entry is already deleted, the next call raises
    NotFoundError; what remains is ciphertext without a key, for a sweep to remove.

    Raises:
        NotFoundError, RollbackError, StorageError: see `delete`.
    """
    store = ArtifactStore(root)
    check_deletable(registry, store, tenant, artifact_id)
    store.delete_key(tenant, registry.catalogue.stored_as(tenant, artifact_id))
    remove(registry, store, tenant, artifact_id, "artifact.shred")
    return [*NOT_REACHED]


def remove_old(store: ArtifactStore, tenant: str, stored_as: str) -> None:
    try:
        store.delete(tenant, stored_as)
    except StorageError as error:
        raise StorageError(
            "the artifact is under a fresh key, but files that the old key opens are left:"
            f" {error.message}",
            details=error.details,
        ) from None
