"""Artifacts that go: deleted for good in the registry first, then in the store; shredded."""

from __future__ import annotations

from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest, meet
from actors.storage.store import ArtifactStore
from tg_tinker.errors import NotFoundError, StorageError


def delete(
    registry: Registry, store: str, tenant: str, artifact_id: str,
    event: str = "artifact.delete", lost: bool = False,
) -> None:  # fmt: skip
    """Entry first, so that no copy of the files counts any more; then manifest, key, files.

    Args:
        event: what the audit log calls it.
        lost: also where this store has no file of it.

    Raises:
        NotFoundError: unknown, deleted already, or in another store; nothing was deleted.
        RollbackError: see `rollback.meet`.
        StorageError: the store refused: the artifact is gone, some of its files are not.
    """
    folder = ArtifactStore(store)
    check_deletable(registry, folder, tenant, artifact_id, lost)
    remove(registry, folder, tenant, artifact_id, event)


def remove(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, event: str
) -> None:
    """`delete` of one that is known to be in this store."""
    # By the name that the entry has now: somebody may have resealed it since.
    stored_as = registry.artifacts.delete(tenant, artifact_id, event)
    keep_newest(registry, store, tenant)
    store.delete(tenant, stored_as)


def check_deletable(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, lost: bool = False
) -> None:
    """In another store the files would stay, and in an older database the deletion would be lost.
    An artifact that lost some of its files is here all the same; one that lost all, if `lost`.

    Raises:
        NotFoundError: unknown, deleted, or in another store.
        RollbackError, StorageError: see `rollback.meet`.
    """
    meet(registry, store, tenant)
    stored_as = registry.catalogue.stored_as(tenant, artifact_id)
    here = lost or store.holds(tenant, stored_as)
    if (
        not here and registry.catalogue.stored_as(tenant, artifact_id) == stored_as
    ):  # not just resealed
        raise NotFoundError(
            f"artifact {artifact_id} has no file in this store: open the one that it was saved to."
            f" If its files are lost, `tg-tinker artifacts delete --lost {artifact_id}`"
        )


NOT_REACHED = (
    "Backups of the store, and earlier versions that a bucket keeps: with one of them the keyring"
    " opens the artifact. End them too, or retire the key that wrapped it (tg-tinker keys rotate,"
    " then keys retire).",
    "Copies of it, and exports in clear: they are artifacts and files of their own.",
    "Training clients that have loaded it, and snapshots and later artifacts of their runs: close"
    " the clients, shred the artifacts.",
    "Samplers that hold it forget it within seconds, once its running requests end; their memory"
    " is freed and not overwritten. A sampler without a connection to the registry keeps it until"
    " it ends.",
    "Blocks of a disk that the file system has freed but not overwritten.",
)
"""What shredding does not reach, for whoever has to rely on it."""


def shred(registry: Registry, root: str, tenant: str, artifact_id: str) -> list[str]:
    """Deletes an artifact, its one wrapped key first; says what that does not reach.

    Broken off anywhere, nothing opens it any more. The next call goes on; once the entry is gone it
    raises NotFoundError, and what is left is ciphertext without a key, for a sweep.

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
            "the artifact is under a fresh key, but what the old one opens is left:"
            f" {error.message}",
            details=error.details,
        ) from None
