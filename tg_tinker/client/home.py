"""Finds and makes the home directory: registry, store, keyring and converted models of one user.

What lies in it is for its owners: `storage` says where, the upper packages what.
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
    """For who only looks: a home that is made for it would say that there is nothing.

    Raises:
        StorageError: there is none.
    """
    home = home_directory()
    if not database_file(home).exists():
        raise StorageError(
            f"there is no home of TG-Tinker at {home}: correct TG_TINKER_HOME, put a lost"
            f" {database_file(home).name} back, or run `tg-tinker init` to make a home"
        )


def init_home(home: Path | None = None, keyring: str | None = None) -> Path:
    """Makes the home directory where there is none: a keyring and an empty registry.

    Args:
        keyring: where the keyring is, as `ServiceClient` takes it.
    """
    home = home or home_directory()
    place = default_place(home) if keyring is None else place_of(keyring)
    if actors_backend().create_home(home, str(place)):
        _log.warning(
            "made a new home in %s: back up its keyring, it opens every artifact, and audit.key",
            home,
        )
    return home
