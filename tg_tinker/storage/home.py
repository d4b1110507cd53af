"""Finds the home directory, which holds all lasting state unless a setting moves a part of it."""

from __future__ import annotations

import os
from pathlib import Path

from tg_tinker.errors import InvalidRequestError, StorageError
from tg_tinker.storage.paths import absolute_path

VARIABLE = "TG_TINKER_HOME"


def home_directory() -> Path:
    """Returns the path in `TG_TINKER_HOME`, or `~/.tg-tinker` if the variable is not set.

    The directory holds the registry, the store, the keyring and converted models.

    Raises:
        InvalidRequestError: the path has control characters, or cannot be resolved. This user may
            have no home of its own, as in a container that runs under a number alone.
        StorageError: this user may not look at what is at the path.
    """
    named = os.environ.get(VARIABLE)
    try:
        home = absolute_path(Path(named or "~/.tg-tinker"))
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"{VARIABLE} cannot be used: {error.message}"
            if named
            else f"the home directory of TG-Tinker is unknown: set {VARIABLE} to a folder that this"
            f" user may write to ({error.message})"
        ) from None
    if not str(home).isprintable():
        raise InvalidRequestError(
            f"the path in {VARIABLE} has control characters or bytes that are no UTF-8, which no"
            " terminal shows and no database URL holds: choose a path without them"
        )
    check_reachable(home)
    return home


def check_reachable(home: Path) -> None:
    """Checks that this user may see whether there is a home at a path.

    Raises:
        StorageError: a folder above it is closed to this user or is no folder, or the path is too
            long. The message says what to do.
    """
    try:
        home.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise unusable(home, error) from None


def unusable(home: Path, error: OSError) -> StorageError:
    """Returns the error for a home that this user cannot make, enter or write to."""
    return StorageError(
        f"this user (number {os.geteuid()}) cannot use the home {home} ({error.strerror}): set"
        f" {VARIABLE} to a folder that this user may write to"
    )
