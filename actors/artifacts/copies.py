"""Copies saved artifacts, and reseals them under a fresh data key.

The new files are complete in the store before one transaction of the registry makes them count.
Only then are the old files deleted. So a crash at any point leaves the old or the new artifact
whole, and perhaps files that no artifact uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from actors.artifacts.delete import remove_old
from actors.artifacts.fetch import check_written, fetch, sealed_file
from actors.artifacts.publish import Draft, enter, written
from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest
from actors.storage.manifest import Manifest
from actors.storage.store import MANIFEST, ArtifactStore
from tg_tinker.errors import IntegrityError, NotFoundError, TGTinkerError
from tg_tinker.types import ArtifactInfo


def copy(registry: Registry, root: str, tenant: str, artifact_id: str) -> ArtifactInfo:
    """Makes another artifact of the same content, lineage, run and step, under its own data key.

    Returns the copy.

    Raises:
        NotFoundError: if the source is unknown, deleted or expired, even during the call. No copy
            is left.
        IntegrityError: if the source is not what was published. No copy is made.
    """
    store, keeper = ArtifactStore(root), registry.data_keys.keeper(tenant)
    draft = Draft(registry, store, keeper, fetch(registry, store, keeper, artifact_id))
    manifest, size = written(store, draft)
    info = enter(
        registry, store, draft,
        lambda: registry.artifacts.publish_copy(
            tenant, artifact_id, draft.artifact_id, size, manifest,
            registry.data_keys.key_of(draft.wrapped_key),
        ),
    )  # fmt: skip
    keep_newest(registry, store, tenant)
    return info


def reseal(registry: Registry, root: str, tenant: str, artifact_id: str) -> ArtifactInfo:
    """Encrypts an artifact again under a fresh data key, and deletes its old files from the store.

    Returns the artifact.

    Raises:
        NotFoundError: if the artifact is unknown, deleted or expired, even during the call.
        IntegrityError: if the artifact is not what was published, or the store does not return what
            was written. The artifact is unchanged.
        InvalidRequestError: if somebody else resealed the artifact or rotated the tenant key during
            the call.
        StorageError: if the store refuses. The artifact is unchanged, unless the message says that
            it is resealed and old files are left.
    """
    store, keeper = ArtifactStore(root), registry.data_keys.keeper(tenant)
    before = registry.catalogue.stored_as(tenant, artifact_id)
    files = fetch(registry, store, keeper, artifact_id)
    stored_as = registry.artifacts.begin_reseal(tenant, artifact_id)
    draft = Draft(registry, store, keeper, files, artifact_id, stored_as)
    manifest, size = written(store, draft)

    def switch() -> ArtifactInfo:
        check_written(store, draft)  # the new files will be the only copy
        return registry.artifacts.finish_reseal(
            tenant, artifact_id, before, stored_as, size, manifest,
            registry.data_keys.key_of(draft.wrapped_key),
        )  # fmt: skip

    info = enter(registry, store, draft, switch)
    keep_newest(registry, store, tenant)
    remove_old(store, tenant, before)
    return info


def readopt(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, whole: Iterable[str]
) -> None:
    """Finds the files of an artifact that was resealed after a backup of the database was made.

    The restored database has only the earlier name of the artifact in the store. The newest valid
    files become the artifact.

    Args:
        whole: the names in the store that have a manifest and a wrapped key.

    Raises:
        NotFoundError: if the store has no files of the artifact under a later name, or if files of
            the newest such name are gone.
        IntegrityError: if no files are valid; the reason concerns the newest.
    """
    problems: list[TGTinkerError] = []
    for stored_as in _resealed(artifact_id, whole):
        try:
            content = store.read(tenant, stored_as, MANIFEST)
            manifest = Manifest.parse(content, tenant, artifact_id)
            for name in manifest.files:
                sealed_file(store, stored_as, manifest, name)
            wrapped = store.read_key(tenant, stored_as)
            return registry.data_keys.adopt(tenant, artifact_id, stored_as, content, wrapped)
        except (IntegrityError, NotFoundError) as error:
            problems.append(error)
    raise next(iter(problems), NotFoundError("its files are gone"))


def _resealed(artifact_id: str, whole: Iterable[str]) -> list[str]:
    """Returns the names that an artifact may have after being resealed, the newest first."""
    names = [name for name in whole if re.fullmatch(rf"{artifact_id}\.[1-9][0-9]{{0,8}}", name)]
    return sorted(names, key=lambda name: -int(name.rpartition(".")[2]))
