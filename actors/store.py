"""Where sealed files lie: a local folder. It sees ciphertext, names and sizes only.

    <root>/t/<tenant>/a/<artifact_id>/<file>      an artifact; its manifest.json is written last
    <root>/t/<tenant>/keys/<artifact_id>.json     its wrapped data key, the only mutable file

    <root>/t/<tenant>/audit/<seq>.json            a signed head of its audit log

An artifact exists when its manifest does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tg_tinker.envelope import Buffer
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError

MANIFEST = "manifest.json"


class ArtifactStore:
    """Whole files, written durably or not at all."""

    def __init__(self, root: str) -> None:
        if "://" in root:
            raise InvalidRequestError(
                f"store {root!r} is not a local folder: cloud stores are not supported yet"
            )
        self._root = Path(root)

    def write_artifact(
        self,
        tenant: str,
        artifact_id: str,
        files: Mapping[str, Iterable[Buffer]],
        key: bytes,
        manifest: Callable[[], bytes],
    ) -> None:
        """Files, then the wrapped key, then the manifest; on failure nothing is left.

        Raises:
            StorageError: the disk is full or refuses.
        """
        folder, key_file = self._folder(tenant, artifact_id), self._key_file(tenant, artifact_id)
        try:
            for name, content in files.items():
                _write(folder / name, content)
            _write(key_file, [key])
            _write(folder / MANIFEST, [manifest()])
            _sync_directory(folder.parent)
        except OSError as error:
            self.delete(tenant, artifact_id)
            raise StorageError(
                f"the store refused the artifact ({error.strerror or type(error).__name__}): free"
                " or fix the disk and save again; training is not affected",
                details={"errno": error.errno},
            ) from None

    def read(self, tenant: str, artifact_id: str, name: str) -> bytes:
        return self._read(self._folder(tenant, artifact_id) / name, artifact_id)

    def read_key(self, tenant: str, artifact_id: str) -> bytes:
        return self._read(self._key_file(tenant, artifact_id), artifact_id)

    def write_key(self, tenant: str, artifact_id: str, key: bytes) -> None:
        """Replaces a wrapped data key in one step."""
        _write(self._key_file(tenant, artifact_id), [key])

    def delete(self, tenant: str, artifact_id: str) -> None:
        """Manifest first, so that it stops existing; then the key, then the data."""
        folder = self._folder(tenant, artifact_id)
        try:
            (folder / MANIFEST).unlink(missing_ok=True)
            self._key_file(tenant, artifact_id).unlink(missing_ok=True)
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            raise StorageError(
                f"the store kept files of {artifact_id} ({error.strerror}): remove {folder} by hand"
            ) from None

    def write_audit_head(self, tenant: str, seq: int, head: bytes) -> None:
        """Keeps a signed head of the audit log; one of the same row is replaced."""
        try:
            _write(self._audit(tenant) / f"{seq}.json", [head])
        except OSError as error:
            raise StorageError(
                f"the store refused a head of the audit log ({error.strerror}): free or fix the"
                " disk"
            ) from None

    def audit_heads(self, tenant: str) -> list[bytes]:
        """All signed heads that were kept here."""
        try:
            return [path.read_bytes() for path in self._audit(tenant).glob("[0-9]*.json")]
        except OSError as error:
            raise StorageError(
                f"the store does not give heads of the audit log: {error.strerror}"
            ) from None

    def _audit(self, tenant: str) -> Path:
        return self._root / "t" / tenant / "audit"

    def _folder(self, tenant: str, artifact_id: str) -> Path:
        return self._root / "t" / tenant / "a" / artifact_id

    def _key_file(self, tenant: str, artifact_id: str) -> Path:
        return self._root / "t" / tenant / "keys" / f"{artifact_id}.json"

    def _read(self, path: Path, artifact_id: str) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(
                f"artifact {artifact_id}: its file {path.name} is not in the store"
            ) from None
        except OSError as error:
            raise StorageError(f"the store does not give {path.name}: {error.strerror}") from None


def _write(path: Path, content: Iterable[Buffer]) -> None:
    """Durable and whole: a hidden partial file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Makes new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
