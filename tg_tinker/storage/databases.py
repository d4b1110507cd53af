"""Checks the URL of the registry's database: a SQLite file or a PostgreSQL server.

The URL contains no secret, because Ray keeps it as an argument and shows it on its dashboard.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from tg_tinker.errors import InvalidRequestError
from tg_tinker.hosts import is_loopback
from tg_tinker.storage.sqlite_files import connect_read_only, sqlite_file, sqlite_url
from tg_tinker.texts import check_text

SETTING = "TG_TINKER_DATABASE"
POSTGRESQL = "postgresql+psycopg://"
FORM = f"{POSTGRESQL}USER@HOST:PORT/NAME"

OPTIONS = (
    "connect_timeout", "host", "passfile", "sslcert", "sslkey", "sslmode", "sslrootcert",
)  # fmt: skip
"""The libpq options that a URL may set after its question mark.

None of these options holds a secret or changes how durable a commit is.
"""


def default_database(home: Path) -> str:
    """Returns the URL in `TG_TINKER_DATABASE`, or the URL of `registry.db` in the home directory.

    Raises:
        InvalidRequestError: see `check_database`.
    """
    return check_database(os.environ.get(SETTING) or sqlite_url(database_file(home)))


def database_file(home: Path) -> Path:
    """Returns the path of `registry.db`, a file that every home has.

    The file stays empty in a home whose registry is in another database.
    """
    return home / "registry.db"


REVISION = "0004"
"""The revision of the registry's tables in this release, the newest in
`actors.registry.migrations`."""

REVISION_TABLE = "registry_revision"
"""The table in which a database records its revision."""

FIRST_REVISION = "0001"
"""The revision of a database that records none."""


def revision_on_record(file: Path) -> str | None:
    """Returns the revision of the registry in a SQLite file.

    Returns None if the file holds no registry or cannot be read. Does not change the file, and
    needs only Python's own `sqlite3`.
    """
    try:
        with closing(connect_read_only(file)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if REVISION_TABLE in tables:
                query = f"SELECT version_num FROM {REVISION_TABLE}"  # noqa: S608
                return str(connection.execute(query).fetchone()[0])
    except (sqlite3.Error, TypeError):
        return None  # the code that opens the file later reports the reason
    return FIRST_REVISION if "registry" in tables else None


def check_database(url: str) -> str:
    """Returns the URL. That of a SQLite file gets the absolute path, for every process the same.

    Raises:
        InvalidRequestError: the URL has another form, holds a password or another option than
            `OPTIONS`, or needs `sslmode`; or see `sqlite_file`. The message does not repeat the
            URL.
    """
    check_text(url, "the database URL")
    if (file := sqlite_file(url)) is not None:
        return sqlite_url(file)
    if not url.isprintable():  # `urlsplit` drops line breaks, the driver does not
        raise _refused()
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        well_formed = parts.port != 0 and len(unquote(parts.path)) > 1 and not parts.fragment
    except ValueError:
        raise _refused() from None
    if parts.password is not None or not options.keys() <= {*OPTIONS}:
        raise InvalidRequestError(
            "a database URL must hold no password and no options but"
            f" {', '.join(OPTIONS)}, because Ray shows the URL. Put the password into a file of"
            " mode 0600, and name the file in PGPASSFILE on the head node or with ?passfile=FILE"
            " in the URL; or set PGPASSWORD on the head node"
        )
    if f"{parts.scheme}://" != POSTGRESQL or not well_formed or not _host(parts, options):
        raise _refused()
    if "sslmode" not in options and not _local(_host(parts, options)):
        raise InvalidRequestError(
            "a database on another machine needs sslmode in its URL, because libpq's default may"
            " send clear text: add ?sslmode=verify-full&sslrootcert=FILE, or ?sslmode=disable on a"
            " network that you trust"
        )
    return url


def _host(parts: SplitResult, options: dict[str, list[str]]) -> str:
    """Returns the host that libpq connects to, or "" if the URL names none.

    A host that starts with a slash is the folder of a Unix socket.
    """
    return options.get("host", [parts.hostname or ""])[-1]


def _local(host: str) -> bool:
    return host.startswith("/") or is_loopback(host)


def _refused() -> InvalidRequestError:
    return InvalidRequestError(
        f"a database URL is sqlite:///FILE, or has the form {FORM} without a password: give the"
        " password by PGPASSFILE, PGPASSWORD or ?passfile=FILE on the head node"
    )
