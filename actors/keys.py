"""The tenant's keys: a keyring file that wraps one data key per artifact.

The tenant key stays in the process of the registry; a training actor gets data keys only.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.objects import sync_folder
from tg_tinker.envelope import KEY_BYTES, derive_key, new_key, unwrap_key, wrap_key
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError

_FORMAT = 1


class FileKeyring:
    """Keys in a JSON file of mode 0600; refused when anyone else may read it."""

    provider = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            mode, text = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        except OSError as error:
            raise StorageError(
                f"cannot read the keyring {path} ({error.strerror}): put its backup back, or"
                " correct `keyring`"
            ) from None
        if mode & 0o077:
            raise StorageError(
                f"the keyring {path} has mode {mode:04o}, others may read it: chmod 600 it, and"
                " treat its keys as known to others"
            )
        try:
            content = json.loads(text)
            self._keys = {
                name: base64.b64decode(key, validate=True) for name, key in content["keys"].items()
            }
            self.primary: str = content["primary"]
            self._primary_key = self._keys[self.primary]
            if content["format"] != _FORMAT or {*map(len, self._keys.values())} != {KEY_BYTES}:
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            raise IntegrityError(
                f"the keyring {path} is damaged: put its backup back; without it no artifact opens"
            ) from None

    @classmethod
    def create(cls, path: Path) -> FileKeyring:
        """A keyring with one fresh key; never touches one that exists."""
        with _written(path, "k1", {"k1": new_key()}) as partial:
            path.hardlink_to(partial)  # fails if the keyring exists: no key is ever overwritten
        return cls(path)

    @property
    def key_ids(self) -> list[str]:
        """Oldest first."""
        return [*self._keys]

    def rotate(self) -> str:
        """A fresh primary key; the older ones stay, for what they have wrapped. Its id."""
        name = f"k{1 + max(int(key_id[1:]) for key_id in self._keys)}"
        self._replace(name, self._keys | {name: new_key()})
        return name

    def retire(self, key_id: str) -> None:
        """Forgets an older key for good: what it wrapped opens nowhere any more.

        Raises:
            InvalidRequestError: there is no such key, or it is the primary one.
        """
        if key_id not in self._keys or key_id == self.primary:
            older = [name for name in self._keys if name != self.primary]
            raise InvalidRequestError(
                f"key {key_id!r} cannot be retired: choose among {older}, which a rotation"
                " has replaced"
            )
        left = {name: key for name, key in self._keys.items() if name != key_id}
        self._replace(self.primary, left)

    def _replace(self, primary: str, keys: dict[str, bytes]) -> None:
        """The file in one step; this object only once it is durable."""
        try:
            with _written(self._path, primary, keys) as partial:
                partial.replace(self._path)
                sync_folder(self._path.parent)
        except OSError as error:
            raise StorageError(
                f"cannot write the keyring {self._path} ({error.strerror}): nothing was changed"
            ) from None
        self.primary, self._keys, self._primary_key = primary, keys, keys[primary]

    def wrap(self, data_key: bytes, context: bytes) -> dict[str, str]:
        """A JSON form of the data key under the primary key, bound to `context`."""
        wrapped = wrap_key(self._primary_key, data_key, context)
        return {"key_id": self.primary, "wrapped": base64.b64encode(wrapped).decode()}

    def unwrap(self, wrapped: dict[str, str], context: bytes) -> bytes:
        """The data key.

        Raises:
            IntegrityError: a key this ring does not have, another context, or changed bytes.
        """
        try:
            key_id = str(wrapped["key_id"])
            sealed = base64.b64decode(wrapped["wrapped"], validate=True)
            if base64.b64encode(sealed).decode() != wrapped["wrapped"] or len(wrapped) != 2:
                raise ValueError  # base64 has unused bits: one key, one text
        except (ValueError, KeyError, TypeError):
            raise IntegrityError("the wrapped data key is damaged: put its backup back") from None
        key = self._keys.get(key_id)
        if key is None:
            raise IntegrityError(
                f"the artifact needs key {key_id!r}, this keyring has"
                f" {sorted(self._keys)}: use the keyring it was saved with"
            )
        return unwrap_key(key, sealed, context)

    def derive(self, purpose: bytes) -> tuple[str, bytes]:
        """Id of the primary key, and a key made from it for one purpose."""
        return self.primary, derive_key(self._primary_key, purpose)


@contextmanager
def _written(path: Path, primary: str, keys: dict[str, bytes]) -> Iterator[Path]:
    """A durable keyring file of mode 0600 beside `path`; gone afterwards unless renamed."""
    encoded = {name: base64.b64encode(key).decode() for name, key in keys.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"format": _FORMAT, "primary": primary, "keys": encoded}, file)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)
