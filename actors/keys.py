"""The tenant's keys: a keyring file that wraps one data key per artifact.

The tenant key stays in the process of the registry; a training actor gets data keys only.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path

from tg_tinker.envelope import KEY_BYTES, new_key, unwrap_key, wrap_key
from tg_tinker.errors import IntegrityError, StorageError

_FORMAT = 1


class FileKeyring:
    """Keys in a JSON file of mode 0600; refused when anyone else may read it."""

    provider = "file"

    def __init__(self, path: Path) -> None:
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
        name = "k1"
        content = {
            "format": _FORMAT,
            "primary": name,
            "keys": {name: base64.b64encode(new_key()).decode()},
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(partial)  # fails if the keyring exists: no key is ever overwritten
        finally:
            partial.unlink()
        return cls(path)

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
        except (ValueError, KeyError, TypeError):
            raise IntegrityError("the wrapped data key is damaged: put its backup back") from None
        key = self._keys.get(key_id)
        if key is None:
            raise IntegrityError(
                f"the artifact needs key {key_id!r}, this keyring has"
                f" {sorted(self._keys)}: use the keyring it was saved with"
            )
        return unwrap_key(key, sealed, context)
