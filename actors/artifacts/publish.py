"""Artifacts: files sealed, published, fetched and exported.

An artifact is a manifest in clear and sealed files, each bound to its tenant, artifact and name.
It counts once its manifest lies in the store and the registry knows the manifest's digest.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from actors.engine.checkpoint import WEIGHTS, from_files
from actors.process import no_core_files
from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest, meet
from actors.storage.capabilities import Capability
from actors.storage.manifest import DATA_KEY, Manifest, SealedFile
from actors.storage.store import MANIFEST, ArtifactStore
from tg_tinker.errors import (
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TGTinkerError,
)
from tg_tinker.storage.envelope import (
    ALGORITHM,
    FORMAT_VERSION,
    Buffer,
    commitment,
    context_of,
    sealed_parts,
    unseal,
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
        RollbackError, StorageError: see `audit_heads.meet`.
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
        self._key, self.wrapped_key = registry.new_data_key(
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
    key_id, provider = registry.key_of(draft.wrapped_key), registry.key_info()[1]
    manifest, size = written(store, draft, write)
    enter(
        registry, store, draft,
        lambda: registry.publish(
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
        return registry.reaches(draft.tenant, draft.stored_as)
    except TGTinkerError:
        return True


def fetch(
    registry: Registry, store: ArtifactStore, capability: Capability, artifact_id: str
) -> dict[str, bytes]:
    """The files of an artifact in clear, after every one of them was verified.

    Raises:
        NotFoundError: unknown, deleted, expired, of another tenant, or its files are gone.
        ActorLostError: the capability is of an actor that was replaced.
        IntegrityError: not what was published, or not for this key.
        RollbackError, StorageError: see `audit_heads.meet`.
    """
    tenant = capability.tenant
    no_core_files()  # a copy, an export or a check decrypts in the program that uses the SDK
    meet(registry, store, tenant, capability.who)
    stored_as = registry.stored_as(tenant, artifact_id)
    try:
        manifest, key = _opened(registry, store, capability, artifact_id, stored_as)
        return {
            name.removesuffix(".enc"): _file(store, stored_as, manifest, key, name)
            for name in manifest.files
        }
    except (NotFoundError, IntegrityError):
        if registry.stored_as(tenant, artifact_id) == stored_as:
            raise
    return fetch(registry, store, capability, artifact_id)  # it was resealed while it was read


def check_written(store: ArtifactStore, draft: Draft) -> None:
    """Reads a written draft back. Raises IntegrityError unless it opens as what it was made of."""
    content = store.read(draft.tenant, draft.stored_as, MANIFEST)
    manifest = Manifest.parse(content, draft.tenant, draft.artifact_id)
    manifest.check(draft._key)
    same = store.read_key(draft.tenant, draft.stored_as) == draft.wrapped_key and all(
        _file(store, draft.stored_as, manifest, draft._key, f"{name}.enc") == content
        for name, content in draft._files.items()
    )
    if not same:
        raise IntegrityError(f"the store does not give back what was written as {draft.stored_as}")


def _opened(
    registry: Registry, store: ArtifactStore, capability: Capability, artifact_id: str,
    stored_as: str,
) -> tuple[Manifest, bytes]:  # fmt: skip
    """The verified manifest of an artifact, and its data key."""
    tenant = capability.tenant
    content = store.read(tenant, stored_as, MANIFEST)
    registry.check_manifest(tenant, artifact_id, content)
    manifest = Manifest.parse(content, tenant, artifact_id)
    wrapped = store.read_key(tenant, stored_as)
    key = registry.open_data_key(capability, artifact_id, wrapped, store.root)
    manifest.verify(key)
    return manifest, key


def _file(store: ArtifactStore, stored_as: str, manifest: Manifest, key: bytes, name: str) -> bytes:
    context = context_of(manifest.tenant, manifest.artifact_id, name.removesuffix(".enc"))
    return unseal(key, sealed_file(store, stored_as, manifest, name), context)


def sealed_file(store: ArtifactStore, stored_as: str, manifest: Manifest, name: str) -> bytes:
    """A file as it lies in the store. Raises IntegrityError unless it is what the manifest says."""
    entry = manifest.files[name]
    sealed = store.read(manifest.tenant, stored_as, name, entry.size)
    if len(sealed) != entry.size or hashlib.sha256(sealed).hexdigest() != entry.sha256:
        raise IntegrityError(f"{name} of artifact {manifest.artifact_id} is not what was published")
    return sealed


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
        RollbackError: see `audit_heads.meet`.
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
    stored_as = registry.delete_artifact(tenant, artifact_id, event)
    keep_newest(registry, store, tenant)
    store.delete(tenant, stored_as)


def check_deletable(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, lost: bool = False
) -> None:
    """In another store the files would stay, and in an older database the deletion would be lost.
    An artifact that lost some of its files is here all the same; one that lost all, if `lost`.

    Raises:
        NotFoundError: unknown, deleted, or in another store.
        RollbackError, StorageError: see `audit_heads.meet`.
    """
    meet(registry, store, tenant)
    stored_as = registry.stored_as(tenant, artifact_id)
    here = lost or store.holds(tenant, stored_as)
    if not here and registry.stored_as(tenant, artifact_id) == stored_as:  # not just resealed
        raise NotFoundError(
            f"artifact {artifact_id} has no file in this store: open the one that it was saved to."
            f" If its files are lost, `tg-tinker artifacts delete --lost {artifact_id}`"
        )


def export_adapter(
    registry: Registry, store: str, tenant: str, artifact_id: str, target: Path
) -> None:
    """Writes an adapter in clear, as the directory that `PeftModel.from_pretrained` reads.

    Raises:
        InvalidRequestError: the artifact holds all weights, not an adapter.
        StorageError: the target's disk is full or refuses; no half-written adapter is left.
    """
    files = fetch(registry, ArtifactStore(store), registry.reader(tenant), artifact_id)
    adapter_config = from_files(files).state.adapter_config
    if adapter_config is None:
        raise InvalidRequestError(
            f"artifact {artifact_id} is of a full fine-tune, not an adapter; this version exports"
            " adapters only"
        )
    outputs = {
        WEIGHTS: files[WEIGHTS],
        "adapter_config.json": json.dumps(adapter_config, indent=2).encode(),
    }
    registry.record_export(tenant, artifact_id)  # what is not in the audit log is not exported
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in outputs.items():
            (target / name).touch(mode=0o600)
            (target / name).write_bytes(content)
    except BaseException as error:
        for name in outputs:
            with suppress(OSError):
                (target / name).unlink()
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"cannot export to {target} ({error.strerror}): choose another directory"
        ) from None
    keep_newest(registry, ArtifactStore(store), tenant)
