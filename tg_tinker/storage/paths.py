"""Resolves paths: `~` against the user's home, others against the working directory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tg_tinker.errors import InvalidRequestError


def expanded(path: Path) -> Path:
    """Returns the path with `~` expanded.

    Raises:
        InvalidRequestError: the path begins with `~`, and the system does not know this user.
    """
    with suppress(RuntimeError):
        return path.expanduser()
    raise InvalidRequestError(
        "the path begins with ~, and the system knows no home of this user (HOME is not set, or"
        f" user {os.geteuid()} is in no list of users): set HOME, or pass a path from /"
    )


def absolute_path(path: Path) -> Path:
    """Returns the path as an absolute one, with `~` expanded. Links are not followed.

    Raises:
        InvalidRequestError: see `expanded`; or the path is relative and the working directory was
            removed.
    """
    path = expanded(path)
    with suppress(FileNotFoundError):
        return path.absolute()
    raise InvalidRequestError(
        "the working directory of this program was removed: change to one that exists, or pass a"
        " path from /"
    )
