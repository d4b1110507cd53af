"""Artifacts after they were saved: copied, sealed anew under a fresh key.

What is new is complete in the store before one transaction of the registry makes it count, and
only then does what is old go. So a crash at any place leaves the old or the new, whole, and files
that nothing reaches.
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
    """Another artifact of the same content, lineage, run and step, under a data key of its own.

    Raises:
        NotFoundError: unknown, deleted or expired, also meanwhile; no copy is left.
        IntegrityError: the source is not what was published; there is no copy.
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
    """The same artifact under a fresh data key; what the old one opened goes from the store.

    Raises:
        NotFoundError: unknown, deleted or expired, also meanwhile.
        IntegrityError: it is not what was published, or the store does not give back what was
            written; it is as it was.
        InvalidRequestError: somebody else resealed it or rotated the tenant key meanwhile.
        StorageError: the store refused: either it is as it was, or, as the message then says, it
            is resealed and old files are left.
    """
    store, keeper = ArtifactStore(root), registry.data_keys.keeper(tenant)
    before = registry.catalogue.stored_as(tenant, artifact_id)
    files = fetch(registry, store, keeper, artifact_id)
    stored_as = registry.artifacts.begin_reseal(tenant, artifact_id)
    draft = Draft(registry, store, keeper, files, artifact_id, stored_as)
    manifest, size = written(store, draft)

    def switch() -> ArtifactInfo:
        check_written(store, draft)  # it will be the only copy
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
    """Finds an artifact again that was resealed after the copy of the database was made, which
    knows it under the name that it had before.

    Args:
        whole: names in the store of what has manifest and key.

    Raises:
        NotFoundError: there is nothing of it.
        IntegrityError: why what is there is not taken, of the newest.
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
    """Names that an artifact may have since it was resealed, the newest first."""
    names = [name for name in whole if re.fullmatch(rf"{artifact_id}\.[1-9][0-9]{{0,8}}", name)]
    return sorted(names, key=lambda name: -int(name.rpartition(".")[2]))
