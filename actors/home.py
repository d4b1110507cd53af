"""The home directory: where all lasting state lies, and how it is made once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from actors import signing
from actors.keys import FileKeyring
from tg_tinker.errors import StorageError

DATABASE, KEYRING, STORE, MODELS = "registry.db", "keyring", "store", "models"


def create(home: Path) -> bool:
    """Makes a home of mode 0700: keyring, signing key, empty registry. False if there is one.

    Raises:
        StorageError: half a home: making the other half would hide that something was lost.
    """
    keyring, database = home / KEYRING, home / DATABASE
    if keyring.exists() and database.exists():
        return False
    # An empty database without a keyring is a home whose making was interrupted.
    if keyring.exists() or (database.exists() and database.stat().st_size):
        missing = database if keyring.exists() else keyring
        raise StorageError(
            f"{home} has lost its {missing.name}: put the backup back, or choose another"
            " TG_TINKER_HOME"
        )
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_shared(home)
        os.close(os.open(database, os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(f"cannot make the home {home}: {error.strerror}") from None
    try:
        signing.create(home)
        FileKeyring.create(keyring)  # last: with it the home is there
    except FileExistsError:
        return False  # another process was first, at this very moment
    except OSError as error:
        raise StorageError(f"cannot write {keyring}: {error.strerror}") from None
    return True


def _refuse_shared(home: Path) -> None:
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        raise StorageError(
            f"{home} has mode {mode:04o}, others may look into it: chmod 700 it, or choose another"
            " TG_TINKER_HOME"
        )
