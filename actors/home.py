"""The home directory: where all lasting state lies, and how it is made once."""

from __future__ import annotations

import os
from pathlib import Path

from actors.keys import FileKeyring
from tg_tinker.errors import StorageError

DATABASE, KEYRING, STORE, MODELS = "registry.db", "keyring", "store", "models"


def create(home: Path) -> bool:
    """Makes a home of mode 0700 with a keyring and an empty registry; false if there is one.

    Raises:
        StorageError: half a home: making the other half would hide that something was lost.
    """
    parts = [home / KEYRING, home / DATABASE]
    there = [part for part in parts if part.exists()]
    if len(there) == len(parts):
        home.chmod(0o700)
        return False
    if there:
        missing = next(part for part in parts if part not in there)
        raise StorageError(
            f"{home} holds {there[0].name} but no {missing.name}: put the backup back, or choose"
            " another TG_TINKER_HOME"
        )
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.chmod(0o700)
        FileKeyring.create(home / KEYRING)
        os.close(os.open(home / DATABASE, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise StorageError(f"cannot make the home {home}: {error.strerror}") from None
    return True
