"""Reads artifacts from the store, checks and opens them, and accepts only what was published."""

from __future__ import annotations

import hashlib

from actors.artifacts.publish import Draft
from actors.process import no_core_files
from actors.registry.registry import Registry
from actors.registry.rollback import meet
from actors.storage.capabilities import Capability
from actors.storage.manifest import Manifest
from actors.storage.store import MANIFEST, ArtifactStore
from tg_tinker.errors import IntegrityError, NotFoundError
from tg_tinker.storage.envelope import context_of, unseal


def fetch(
    registry: Registry, store: ArtifactStore, capability: Capability, artifact_id: str
) -> dict[str, bytes]:
    """Returns the files of an artifact in clear, after it has verified every file.

    Raises:
        NotFoundError: if the artifact is unknown, deleted, expired or of another tenant, or if its
            files are gone.
        ActorLostError: if the capability belongs to an actor that was replaced.
        IntegrityError: if the files are not what was published, or do not belong to this key.
        RollbackError, StorageError: see `rollback.meet`.
    """
    tenant = capability.tenant
    no_core_files()  # a copy, an export or a check decrypts in the program that uses the SDK
    meet(registry, store, tenant, capability.who)
    stored_as = registry.catalogue.stored_as(tenant, artifact_id)
    try:
        manifest, key = _opened(registry, store, capability, artifact_id, stored_as)
        return {
            name.removesuffix(".enc"): _file(store, stored_as, manifest, key, name)
            for name in manifest.files
        }
    except (NotFoundError, IntegrityError):
        if registry.catalogue.stored_as(tenant, artifact_id) == stored_as:
            raise
    # The artifact was resealed while it was read.
    return fetch(registry, store, capability, artifact_id)


def check_written(store: ArtifactStore, draft: Draft) -> None:
    """Reads a written draft back. Raises IntegrityError unless it opens to the draft's files."""
    content = store.read(draft.tenant, draft.stored_as, MANIFEST)
    manifest = Manifest.parse(content, draft.tenant, draft.artifact_id)
    manifest.check(draft._key)
    same = store.read_key(draft.tenant, draft.stored_as) == draft.wrapped_key and all(
        _file(store, draft.stored_as, manifest, draft._key, f"{name}.enc") == content
        for name, content in draft._files.items()
    )
    if not same:
        raise IntegrityError(f"the store does not return what was written as {draft.stored_as}")


def _opened(
    registry: Registry, store: ArtifactStore, capability: Capability, artifact_id: str,
    stored_as: str,
) -> tuple[Manifest, bytes]:  # fmt: skip
    """Returns the verified manifest of an artifact, and its data key."""
    tenant = capability.tenant
    content = store.read(tenant, stored_as, MANIFEST)
    registry.catalogue.check_manifest(tenant, artifact_id, content)
    manifest = Manifest.parse(content, tenant, artifact_id)
    wrapped = store.read_key(tenant, stored_as)
    key = registry.data_keys.open(capability, artifact_id, wrapped, store.root)
    manifest.verify(key)
    return manifest, key


def _file(store: ArtifactStore, stored_as: str, manifest: Manifest, key: bytes, name: str) -> bytes:
    context = context_of(manifest.tenant, manifest.artifact_id, name.removesuffix(".enc"))
    return unseal(key, sealed_file(store, stored_as, manifest, name), context)


def sealed_file(store: ArtifactStore, stored_as: str, manifest: Manifest, name: str) -> bytes:
    """Reads a sealed file from the store. Raises IntegrityError unless it matches the manifest."""
    entry = manifest.files[name]
    sealed = store.read(manifest.tenant, stored_as, name, entry.size)
    if len(sealed) != entry.size or hashlib.sha256(sealed).hexdigest() != entry.sha256:
        raise IntegrityError(f"{name} of artifact {manifest.artifact_id} is not what was published")
    return sealed
