"""The key that signs heads of audit logs, beside the keyring, and its public half, pinned at init.

audit.key    PEM, mode 0600; the registry's process alone reads it
audit.pub    PEM; give it to whoever shall verify exported logs
"""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path

from tg_tinker.errors import IntegrityError, StorageError
from tg_tinker.storage.envelope import new_signing_key, public_key_of
from tg_tinker.storage.files import written

SIGNING_KEY, PUBLIC_KEY = "audit.key", "audit.pub"


def create(folder: Path) -> None:
    """Both files; those that are there stay as they are. Whoever comes first makes the key."""
    _write_new(folder / SIGNING_KEY, new_signing_key())
    _write_new(folder / PUBLIC_KEY, public_key_of((folder / SIGNING_KEY).read_bytes()))


def load(folder: Path) -> bytes:
    """The signing key.

    Raises:
        StorageError: a file is missing, or others may read the key.
        IntegrityError: the key is damaged, or not the one that was pinned.
    """
    path = folder / SIGNING_KEY
    try:
        mode, key = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        pinned = (folder / PUBLIC_KEY).read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {error.filename} ({error.strerror}): {SIGNING_KEY} and {PUBLIC_KEY} lie"
            " beside the keyring, `tg-tinker init` made them. Put their backup back"
        ) from None
    if mode & 0o077:
        raise StorageError(
            f"the signing key {path} has mode {mode:04o}, others may read it: chmod 600 it, and"
            " treat it as known to others"
        )
    if public_key_of(key) != pinned:
        raise IntegrityError(
            f"{path} is not the key that was pinned in {PUBLIC_KEY} at init: put its backup back."
            " Heads by another key would prove nothing to whoever has the pinned one"
        )
    return key


def _write_new(path: Path, content: bytes) -> None:
    """Durable and whole, unless there is one."""
    with written(path, content) as partial, suppress(FileExistsError):
        path.hardlink_to(partial)
