"""Seals files and publishes them as an artifact.

An artifact is a manifest in clear and sealed files. Each file is bound to its tenant, artifact and
name. The artifact counts once its manifest is in the store and the manifest's digest is in the
registry.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest, meet
from actors.storage.capabilities import Capability
from actors.storage.manifest import DATA_KEY, Manifest, SealedFile
from actors.storage.store import ArtifactStore
from tg_tinker.errors import (
    TGTinkerError,
)
from tg_tinker.storage.envelope import (
    ALGORITHM,
    FORMAT_VERSION,
    Buffer,
    commitment,
    context_of,
    sealed_parts,
)
from tg_tinker.types import EncryptionInfo

_T = TypeVar("_T")

ARTIFACT_PREFIX = "art-"
"""The prefix of every artifact's id. No other id has it."""


class Draft:
    """An artifact before it is stored: plain files in this process, and a new data key.

    Parts are sealed while a reader consumes them, so the ciphertext is never whole in memory.

    Args:
        artifact_id: the id of an artifact that is resealed, or None for a new id.
        stored_as: the artifact's name in the store, or None for the id.

    Raises:
        RollbackError, StorageError: see `rollback.meet`.
    """

    def __init__(
        self, registry: Registry, store: ArtifactStore, capability: Capability,
        files: Mapping[str, Buffer], artifact_id: str | None = None, stored_as: str | None = None,
    ) -> None:  # fmt: skip
        self.tenant = capability.tenant
        new_id = f"{ARTIFACT_PREFIX}{int(time.time() * 1e3):011x}{secrets.token_hex(8)}"
        self.artifact_id = artifact_id or new_id
        self.stored_as = stored_as or self.artifact_id
        meet(registry, store, self.tenant, capability.who)
        self._key, self.wrapped_key = registry.data_keys.new(
            capability, self.artifact_id, store.root
        )
        self._files = files
        self._sealed: dict[str, SealedFile] = {}

    @property
    def names(self) -> list[str]:
        """The names of the files in the store."""
        return [f"{name}.enc" for name in self._files]

    def parts(self, name: str) -> Iterator[memoryview]:
        """Yields the sealed parts of a file. A part is released when the next one is requested."""
        plain = name.removesuffix(".enc")
        digest, size = hashlib.sha256(), 0
        context = context_of(self.tenant, self.artifact_id, plain)
        for part in sealed_parts(self._key, self._files[plain], context):
            digest.update(part)
            size += len(part)
            yield part
        self._sealed[name] = SealedFile(size, digest.hexdigest())  # the last attempt counts

    def manifest(self) -> bytes:
        """Returns the manifest. Call it after all files have been read to their end."""
        context = context_of(self.tenant, self.artifact_id, DATA_KEY)
        files = {name: self._sealed[name] for name in self.names}
        committed = commitment(self._key, context).hex()
        return Manifest(self.tenant, self.artifact_id, committed, files).to_bytes(self._key)

    @property
    def size(self) -> int:
        """The bytes of all sealed files that have been read to their end."""
        return sum(file.size for file in self._sealed.values())


class Sealed:
    """A file of a draft for `ArtifactStore`. It is sealed again whenever an upload starts again."""

    def __init__(self, draft: Draft, name: str) -> None:
        self._draft, self._name = draft, name

    def __iter__(self) -> Iterator[memoryview]:
        return self._draft.parts(self._name)


Write = Callable[[ArtifactStore, Draft], None]


def write(store: ArtifactStore, draft: Draft) -> None:
    """Writes a draft into the store from this process."""
    files = {name: Sealed(draft, name) for name in draft.names}
    store.write_artifact(draft.tenant, draft.stored_as, files, draft.wrapped_key, draft.manifest)


def publish(
    registry: Registry, store: ArtifactStore, draft: Draft, *,
    run_id: str, epoch: int, step: int, include_optimizer: bool,
    labels: Mapping[str, str] | None = None, write: Write = write,
) -> tuple[int, EncryptionInfo]:  # fmt: skip
    """Stores a draft and registers it as an artifact.

    Returns:
        The size of the artifact in ciphertext bytes, and how it is encrypted.

    Raises:
        StorageError: if the store refuses. Nothing is left of the artifact.
        ActorLostError: if a newer actor owns the run. Nothing is left of the artifact.
        ClusterUnavailableError: if the registry does not answer. Then it is unknown whether the
            artifact exists.
    """
    key_id, provider = (
        registry.data_keys.key_of(draft.wrapped_key),
        registry.data_keys.key_info()[1],
    )
    manifest, size = written(store, draft, write)
    enter(
        registry, store, draft,
        lambda: registry.artifacts.publish(
            draft.tenant, run_id, epoch, draft.artifact_id, step, size, include_optimizer, manifest,
            key_id, labels,
        ),
    )  # fmt: skip
    keep_newest(registry, store, draft.tenant)
    return size, EncryptionInfo(ALGORITHM, key_id, provider, FORMAT_VERSION)


def written(store: ArtifactStore, draft: Draft, write: Write = write) -> tuple[bytes, int]:
    """Writes a draft into the store; returns its manifest and its size in ciphertext bytes."""
    write(store, draft)
    manifest = draft.manifest()
    return manifest, draft.size + len(manifest)


def enter(registry: Registry, store: ArtifactStore, draft: Draft, entry: Callable[[], _T]) -> _T:
    """Calls `entry`, which registers the written files, and returns its result.

    If `entry` fails, the files are deleted, unless an artifact may need them.
    """
    try:
        return entry()
    except BaseException:
        if not _needed(registry, draft):
            store.delete(draft.tenant, draft.stored_as)
        raise


def _needed(registry: Registry, draft: Draft) -> bool:
    """Returns whether an artifact needs the files of a draft whose entry failed.

    Returns True also if the registry does not answer, because perhaps only its answer was lost. If
    no artifact needs the files, a sweep finds them.
    """
    try:
        return registry.catalogue.reaches(draft.tenant, draft.stored_as)
    except TGTinkerError:
        return True
