"""Checks and creates the home directory: registry, store, keyring, converted models of one user.

`storage` knows the locations in the home, and the upper packages own the contents.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tg_tinker.backend import actors_backend
from tg_tinker.errors import StorageError
from tg_tinker.storage.databases import database_file
from tg_tinker.storage.home import home_directory
from tg_tinker.storage.keyrings import default_place, place_of

_log = logging.getLogger("tg_tinker")


def check_home() -> None:
    """Checks that a home exists, for commands that only read and must not create an empty home.

    Raises:
        StorageError: there is no home.
    """
    home = home_directory()
    if not database_file(home).exists():
        raise StorageError(
            f"there is no TG-Tinker home at {home}: correct TG_TINKER_HOME, restore a lost"
            f" {database_file(home).name}, or run `tg-tinker init` to create a home"
        )


def init_home(home: Path | None = None, keyring: str | None = None) -> Path:
    """Creates a missing home directory, with a keyring and an empty registry; returns its path.

    Args:
        home: the path of the home directory; None means the default home.
        keyring: the location of the keyring, as in `ServiceClient`.
    """
    home = home or home_directory()
    place = default_place(home) if keyring is None else place_of(keyring)
    if actors_backend().create_home(home, str(place)):
        _log.warning(
            "made a new home in %s: back up audit.key, secrets.json and the keyring, which opens"
            " every artifact",
            home,
        )
    return home
