"""Turns the path of a SQLite file into a URL, and a URL into the path. No other code does either.

    /data/what?v=1/registry.db     sqlite:////data/what%3Fv=1/registry.db

A path may hold characters that mean something in a URL: ``?`` begins options, ``%`` an escape. Put
into a URL as it is, such a path would name another file.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote_to_bytes

from tg_tinker.errors import InvalidRequestError
from tg_tinker.storage.paths import absolute_path
from tg_tinker.texts import check_text

SQLITE = "sqlite://"
_ESCAPED = {ord(one): f"%{ord(one):02X}" for one in "%?#"}


def sqlite_url(file: Path) -> str:
    """Returns the URL of a SQLite file; `sqlite_file` returns the file again."""
    return f"{SQLITE}/{str(file).translate(_ESCAPED)}"


def sqlite_file(url: str) -> Path | None:
    """Returns the absolute path of the SQLite file that a URL names; None for another URL.

    A relative path is resolved as `absolute_path` does. ``#``, and a ``%`` that begins no escape,
    stand for themselves.

    Raises:
        InvalidRequestError: the URL has options or a host, names no file, or names one whose path
            has control characters or is no text; or see `absolute_path`. The message does not
            repeat the URL.
    """
    if not url.startswith(SQLITE):
        return None
    check_text(url, "the database URL")
    text = url.removeprefix(f"{SQLITE}/")
    path = os.fsdecode(unquote_to_bytes(text))
    if text == url or "?" in text or not path.isprintable() or path in ("", ":memory:"):
        raise InvalidRequestError(
            f"the URL of a SQLite database is {SQLITE}/FILE, without host, options and control"
            " characters: write ? as %3F and % as %25 in the path of the file"
        )
    return absolute_path(Path(path))


def connect_read_only(file: Path) -> sqlite3.Connection:
    """Returns a connection to an existing SQLite file, which cannot change it.

    Raises:
        sqlite3.Error: the file cannot be opened.
    """
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
