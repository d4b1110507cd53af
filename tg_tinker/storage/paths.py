"""Resolves paths: `~` against the user's home, others against the working directory."""

from __future__ import annotations

import os
from pathlib import Path

from tg_tinker.errors import InvalidRequestError


def absolute_path(path: Path) -> Path:
    """Returns the path as an absolute one, with `~` expanded. Links are not followed.

    Raises:
        InvalidRequestError: the path begins with `~` and the system does not know this user, or the
            path is relative and the working directory was removed.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        wrong = (
            "the path begins with ~, and the system knows no home of this user (HOME is not set,"
            f" or user {os.geteuid()} is in no list of users): set HOME, or pass a path from /"
        )
    except FileNotFoundError:
        wrong = (
            "the working directory of this program was removed: change to one that exists, or pass"
            " a path from /"
        )
    raise InvalidRequestError(wrong)
