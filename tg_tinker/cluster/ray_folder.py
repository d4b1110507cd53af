"""Finds, checks and closes the folder in which Ray keeps sessions, logs and sockets.

Ray opens its own folders to all users of the machine, whatever the umask, and who can write there
can take the place of a node. So TG-Tinker has Ray make them in a folder that only its user enters.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tg_tinker.cluster.other_users import is_closed, keeps_names, keeps_out
from tg_tinker.errors import InvalidRequestError

SOCKET = "session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""The longest path of a socket below Ray's folder. The number before the slash is a process id."""

_MOST_BYTES = 107
"""The maximum length of a socket's path, by unix(7)."""

_PREFIX = "tg-"
_MOST_NAME = len(f"/{_PREFIX}{2**32 - 1}")


def ray_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder that Ray uses when a program with this environment starts it."""
    return Path(_chosen(environment)[1], "ray")


def private_ray_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns a folder for Ray in a folder of mode 0700, which is made unless there is one.

    If another user has taken the usual name of the closed folder, it gets a new name.

    Raises:
        InvalidRequestError: see `check_ray_folder`, or the folder cannot be made.
    """
    check_ray_folder(environment)
    name, parent = _chosen(environment)
    above = Path(parent).resolve()
    try:
        for missing in [one for one in reversed((above, *above.parents)) if not one.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)
        closed = above if is_closed(above) else _closed_in(above)
    except OSError as error:
        raise _unusable(name, f"takes no new folder ({error.strerror})") from None
    if not keeps_out(closed):  # The folder above was made by another user at this moment.
        raise _unusable(name, _REPLACED)
    return closed / "ray"


def check_ray_folder(environment: Mapping[str, str] = os.environ) -> None:
    """Checks that Ray can start with its folder, which would else fail in many ways, some late.

    Raises:
        InvalidRequestError: the folder's path is too long, relative or has characters that Ray
            cannot use, this user may not write there, or others may replace what is there.
    """
    name, parent = _chosen(environment)
    if not parent.startswith("/") or not parent.isascii() or set(parent) & set("'\"\\"):
        raise _unusable(name, "is not an absolute path of ASCII characters without quotes")
    try:
        above = Path(parent).resolve()
        existing = next(one for one in (above, *above.parents) if one.exists())
    except (OSError, RuntimeError):  # Links that lead to each other are a RuntimeError.
        raise _unusable(name, _NO_FOLDER) from None
    is_own = existing != above or is_closed(above)
    room = _MOST_BYTES - len(f"/ray/{SOCKET}") - (0 if is_own else _MOST_NAME)
    if (length := len(str(above).rstrip("/"))) > room:
        wrong = f"has {length} characters, and the paths of Ray's sockets leave room for {room}"
        raise _unusable(name, wrong)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(name, _NO_FOLDER)
    if not keeps_names(existing):
        raise _unusable(name, _REPLACED)


_NO_FOLDER = "is no folder that this user may write to"
_REPLACED = "lets other users replace what is in it or above it"


def _unusable(name: str, wrong: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Ray cannot keep its files below {name}, which {wrong}: set RAY_TMPDIR to a folder with a"
        " short path that is yours and of mode 0700, or to /tmp"
    )


def _closed_in(above: Path) -> Path:
    """Returns this user's closed folder in a folder that others may write to.

    Another user may have made a folder or a link of the usual name first: it is left alone.
    """
    usual = above / f"{_PREFIX}{os.geteuid()}"
    with suppress(FileExistsError):
        usual.mkdir(mode=0o700)
    return usual if is_closed(usual) else Path(tempfile.mkdtemp(prefix=_PREFIX, dir=above))


def _chosen(environment: Mapping[str, str]) -> tuple[str, str]:
    """Returns the folder that holds Ray's folder, after the name of what determines it."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    found = [(name, environment[name]) for name in names if name in environment]
    return [*found, ("/tmp", "/tmp")][0]  # noqa: S108  (it is Ray's)
