"""Artifacts: files sealed and published.

An artifact is a manifest in clear and sealed files, each bound to its tenant, artifact and name.
It counts once its manifest lies in the store and the registry knows the manifest's digest.
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
"""Of every id of an artifact, and of nothing else."""


class Draft:
    """An artifact on its way into the store: plain files in this process, and their key.

    Sealing happens while somebody reads the parts: the ciphertext is never whole in memory.

    Args:
        artifact_id: of an artifact that is sealed anew; a new id when None.
        stored_as: its name in the store; the id when None.

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
        """Of the files in the store."""
        return [f"{name}.enc" for name in self._files]

    def parts(self, name: str) -> Iterator[memoryview]:
        """A file as it is sealed; a part is released when the next one is asked for."""
        plain = name.removesuffix(".enc")
        digest, size = hashlib.sha256(), 0
        context = context_of(self.tenant, self.artifact_id, plain)
        for part in sealed_parts(self._key, self._files[plain], context):
            digest.update(part)
            size += len(part)
            yield part
        self._sealed[name] = SealedFile(size, digest.hexdigest())  # of the last attempt

    def manifest(self) -> bytes:
        """Once all files were read to their end."""
        context = context_of(self.tenant, self.artifact_id, DATA_KEY)
        files = {name: self._sealed[name] for name in self.names}
        committed = commitment(self._key, context).hex()
        return Manifest(self.tenant, self.artifact_id, committed, files).to_bytes(self._key)

    @property
    def size(self) -> int:
        """Bytes of all sealed files, once they were read."""
        return sum(file.size for file in self._sealed.values())


class Sealed:
    """A file of a draft for `ArtifactStore`: sealed anew whenever an upload begins anew."""

    def __init__(self, draft: Draft, name: str) -> None:
        self._draft, self._name = draft, name

    def __iter__(self) -> Iterator[memoryview]:
        return self._draft.parts(self._name)


Write = Callable[[ArtifactStore, Draft], None]


def write(store: ArtifactStore, draft: Draft) -> None:
    """Into the store from this process."""
    files = {name: Sealed(draft, name) for name in draft.names}
    store.write_artifact(draft.tenant, draft.stored_as, files, draft.wrapped_key, draft.manifest)


def publish(
    registry: Registry, store: ArtifactStore, draft: Draft, *,
    run_id: str, epoch: int, step: int, include_optimizer: bool,
    labels: Mapping[str, str] | None = None, write: Write = write,
) -> tuple[int, EncryptionInfo]:  # fmt: skip
    """Stores a draft and enters it as an artifact; its size in ciphertext bytes, and its seal.

    Raises:
        StorageError: the store refused; nothing is left of the artifact.
        ActorLostError: a newer actor owns the run; nothing is left of the artifact.
        ClusterUnavailableError: the registry does not answer; it may be an artifact or not.
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
    """Puts a draft into the store: its manifest, and its size in ciphertext bytes."""
    write(store, draft)
    manifest = draft.manifest()
    return manifest, draft.size + len(manifest)


def enter(registry: Registry, store: ArtifactStore, draft: Draft, entry: Callable[[], _T]) -> _T:
    """What was written becomes an artifact's by `entry`, or is taken away again."""
    try:
        return entry()
    except BaseException:
        if not _needed(registry, draft):
            store.delete(draft.tenant, draft.stored_as)
        raise


def _needed(registry: Registry, draft: Draft) -> bool:
    """Whether an artifact needs the files of a draft whose entry failed.

    True also where nobody answers: perhaps only the answer was lost. If they are nobody's, a sweep
    finds them.
    """
    try:
        return registry.catalogue.reaches(draft.tenant, draft.stored_as)
    except TGTinkerError:
        return True
