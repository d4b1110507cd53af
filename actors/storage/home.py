"""Creates the home directory, which holds all lasting state, exactly once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from actors.storage import secrets, signing
from actors.storage.key_providers import FileKeyring
from tg_tinker.errors import StorageError
from tg_tinker.storage.home import check_reachable, unusable
from tg_tinker.storage.keyrings import Variable, audit_folder, place_of

DATABASE, KEYRING, STORE, MODELS = "registry.db", "keyring", "store", "models"

SEALED = "api-keys.sealed"
"""The name of the file that says that no API key of an older release waits for its MAC. It is
beside the signing key."""

SEALED_TEXT = b"""The API keys of this registry have their MACs. A row without a MAC opens nothing.
Remove this file only to take over the API keys of a backup of revision 0002 or earlier, whose
database nobody else could write to.
"""


def create(home: Path, keyring: str | None = None) -> bool:
    """Creates a home of mode 0700 with keyring, signing key, secrets and empty registry. Returns
    False if there is a home already.

    Args:
        keyring: Where the keyring is, if not in the home. A keyring in the environment is never
            created here.

    Raises:
        StorageError: Half of a home is missing. Creating that half would hide that something was
            lost. Or this user cannot write to it.
        InvalidRequestError: `keyring` cannot name a keyring.
    """
    check_reachable(home)
    place, database = place_of(keyring or home / KEYRING), home / DATABASE
    keys = audit_folder(place, home)
    last = keys / signing.PUBLIC_KEY if isinstance(place, Variable) else place
    if last.exists() and database.exists():
        return False
    # An empty database without the file that is created last: the creation was interrupted.
    if last.exists() or (database.exists() and database.stat().st_size):
        missing = database if last.exists() else last
        raise StorageError(
            f"{home} has lost its {missing.name}: restore the backup of that file, or choose"
            " another TG_TINKER_HOME"
        )
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_shared(home)
        os.close(os.open(database, os.O_CREAT, 0o600))
    except OSError as error:
        raise unusable(home, error) from None
    try:
        if not (keys / signing.SIGNING_KEY).exists():
            # Before the signing key: a home with this key alone is one of an older release.
            secrets.create(keys)
            # Whoever writes the database may have filled it before the registry first opens it.
            signing.write_new(keys / SEALED, SEALED_TEXT)
        signing.create(keys)
        if isinstance(place, Path):
            # Last: with the keyring the home is complete.
            FileKeyring.create(place)
    except FileExistsError:
        return False  # Another process has created the home meanwhile.
    except OSError as error:
        raise StorageError(f"cannot write {last}: {error.strerror}") from None
    return True


def _refuse_shared(home: Path) -> None:
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        raise StorageError(
            f"{home} has mode {mode:04o}, so other users can look into it: chmod 700 it, or choose"
            " another TG_TINKER_HOME"
        )
