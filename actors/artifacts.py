"""Artifacts: files sealed, published, fetched and exported.

An artifact is a manifest in clear (ids, sizes, hashes of ciphertext) and sealed files, each
bound to its tenant, artifact and name. It counts once its manifest lies in the store and the
registry knows the manifest's digest.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from pathlib import Path

from actors.registry import Registry
from actors.state import WEIGHTS, from_files
from actors.store import MANIFEST, ArtifactStore
from tg_tinker.envelope import ALGORITHM, FORMAT_VERSION, context_of, seal, unseal
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.types import EncryptionInfo


def publish(
    registry: Registry, store: ArtifactStore, files: dict[str, bytes], *,
    tenant: str, run_id: str, epoch: int, step: int, include_optimizer: bool,
) -> tuple[str, int, EncryptionInfo]:  # fmt: skip
    """Seals and stores files as a new artifact; its id, its size in ciphertext bytes, its seal.

    Raises:
        StorageError: the store refused; nothing is left of the artifact.
        ActorLostError: a newer actor owns the run; nothing is left of the artifact.
    """
    artifact_id = f"art-{int(time.time() * 1e3):011x}{secrets.token_hex(8)}"
    key_id, provider = registry.key_info()
    key, wrapped = registry.new_data_key(tenant, artifact_id)
    sealed = {
        f"{name}.enc": seal(key, content, context_of(tenant, artifact_id, name))
        for name, content in files.items()
    }
    manifest = _manifest(tenant, artifact_id, sealed)
    size = sum(map(len, sealed.values())) + len(manifest)
    store.write_artifact(tenant, artifact_id, sealed, wrapped, manifest)
    try:
        registry.publish(
            tenant, run_id, epoch, artifact_id, step, size, include_optimizer, manifest
        )
    except BaseException:
        store.delete(tenant, artifact_id)
        raise
    return artifact_id, size, EncryptionInfo(ALGORITHM, key_id, provider, FORMAT_VERSION)


def fetch(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str
) -> dict[str, bytes]:
    """The files of an artifact in clear, after every one of them was verified.

    Raises:
        NotFoundError: unknown, deleted, or its files are gone.
        IntegrityError: not what was published, or not for this key.
    """
    registry.artifact(tenant, artifact_id)
    manifest = store.read(tenant, artifact_id, MANIFEST)
    registry.check_manifest(tenant, artifact_id, manifest)
    key = registry.open_data_key(tenant, artifact_id, store.read_key(tenant, artifact_id))
    plain = {}
    for name, entry in json.loads(manifest)["files"].items():
        sealed = store.read(tenant, artifact_id, name)
        if hashlib.sha256(sealed).hexdigest() != entry["sha256"]:
            raise IntegrityError(f"{name} of artifact {artifact_id} is not what was published")
        inner = name.removesuffix(".enc")
        plain[inner] = unseal(key, sealed, context_of(tenant, artifact_id, inner))
    return plain


def delete(registry: Registry, store: str, tenant: str, artifact_id: str) -> None:
    """Entry first, so that no copy of the files counts any more; then manifest, key, files.

    Raises:
        NotFoundError: unknown, deleted already, or in another store; nothing was deleted.
        StorageError: the store refused: the artifact is gone, some of its files are not.
    """
    folder = ArtifactStore(store)
    registry.artifact(tenant, artifact_id)
    folder.read(tenant, artifact_id, MANIFEST)  # in another store its files would stay
    registry.delete_artifact(tenant, artifact_id)
    folder.delete(tenant, artifact_id)


def export_adapter(
    registry: Registry, store: str, tenant: str, artifact_id: str, target: Path
) -> None:
    """Writes an adapter in clear, as the directory that `PeftModel.from_pretrained` reads.

    Raises:
        InvalidRequestError: the artifact holds all weights, not an adapter.
        StorageError: the target's disk is full or refuses; no half-written adapter is left.
    """
    files = fetch(registry, ArtifactStore(store), tenant, artifact_id)
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
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in outputs.items():
            (target / name).write_bytes(content)
    except OSError as error:
        for name in outputs:
            (target / name).unlink(missing_ok=True)
        raise StorageError(
            f"cannot export to {target} ({error.strerror}): choose another directory"
        ) from None


def _manifest(tenant: str, artifact_id: str, sealed: dict[str, bytes]) -> bytes:
    described = {
        "format": FORMAT_VERSION,
        "algorithm": ALGORITHM,
        "artifact": artifact_id,
        "tenant": tenant,
        "files": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sealed.items()
        },
    }
    return json.dumps(described, sort_keys=True).encode()
