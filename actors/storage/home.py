"""The home directory: where all lasting state lies, and how it is made once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from actors.storage import signing
from actors.storage.key_providers import FileKeyring
from tg_tinker.errors import StorageError
from tg_tinker.storage.keyrings import Variable, audit_folder, place_of

DATABASE, KEYRING, STORE, MODELS = "registry.db", "keyring", "store", "models"


def create(home: Path, keyring: str | None = None) -> bool:
    """Makes a home of mode 0700: keyring, signing key, empty registry. False if there is one.

    Args:
        keyring: where it is if not in the home; one in the environment is never made here.

    Raises:
        StorageError: half a home: making the other half would hide that something was lost.
        InvalidRequestError: `keyring` names nothing that could be one.
    """
    place, database = place_of(keyring or home / KEYRING), home / DATABASE
    keys = audit_folder(place, home)
    last = keys / signing.PUBLIC_KEY if isinstance(place, Variable) else place
    if last.exists() and database.exists():
        return False
    # An empty database without what is made last is a home whose making was interrupted.
    if last.exists() or (database.exists() and database.stat().st_size):
        missing = database if last.exists() else last
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
        signing.create(keys)
        if isinstance(place, Path):
            FileKeyring.create(place)  # last: with it the home is there
    except FileExistsError:
        return False  # another process was first, at this very moment
    except OSError as error:
        raise StorageError(f"cannot write {last}: {error.strerror}") from None
    return True


def _refuse_shared(home: Path) -> None:
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        raise StorageError(
            f"{home} has mode {mode:04o}, others may look into it: chmod 700 it, or choose another"
            " TG_TINKER_HOME"
        )
