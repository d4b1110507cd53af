"""Where the registry's database is: a SQLite file, or a PostgreSQL server that a URL names without
any secret in it. Ray keeps the URL as an argument and shows it on its dashboard."""

from __future__ import annotations

import ipaddress
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from tg_tinker.errors import InvalidRequestError

SETTING = "TG_TINKER_DATABASE"
SQLITE, POSTGRESQL = "sqlite://", "postgresql+psycopg://"
FORM = f"{POSTGRESQL}USER@HOST:PORT/NAME"

OPTIONS = (
    "connect_timeout", "host", "passfile", "sslcert", "sslkey", "sslmode", "sslrootcert",
)  # fmt: skip
"""Of libpq, after a question mark. None of them holds a secret or changes how a commit is kept."""


def default_database(home: Path) -> str:
    """What `TG_TINKER_DATABASE` names, or the file `registry.db` in the home directory.

    Raises:
        InvalidRequestError: see `check_database`.
    """
    return check_database(os.environ.get(SETTING) or f"{SQLITE}/{database_file(home)}")


def database_file(home: Path) -> Path:
    """Which every home has, even one whose registry is elsewhere."""
    return home / "registry.db"


REVISION = "0002"
"""Of the registry's tables in this release: the newest of `actors.registry.migrations`."""

REVISION_TABLE = "registry_revision"
"""Where a database has its revision on record."""

FIRST_REVISION = "0001"
"""Of a database that has none on record."""


def revision_on_record(file: Path) -> str | None:
    """The revision of a registry in a SQLite file; None where there is no registry in it, or where
    it cannot be read. Changes nothing and loads no library for it."""
    try:
        uri = f"file:{quote(str(file.absolute()))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if REVISION_TABLE in tables:
                query = f"SELECT version_num FROM {REVISION_TABLE}"  # noqa: S608
                return str(connection.execute(query).fetchone()[0])
    except (sqlite3.Error, TypeError):
        return None  # who opens it says why
    return FIRST_REVISION if "registry" in tables else None


def check_database(url: str) -> str:
    """The URL itself.

    Raises:
        InvalidRequestError: another form, or a secret in it. The text is not repeated.
    """
    if url.startswith(SQLITE):
        return url
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        well_formed = parts.port != 0 and len(unquote(parts.path)) > 1 and not parts.fragment
    except ValueError:
        raise _refused() from None
    if parts.password is not None or not options.keys() <= {*OPTIONS}:
        raise InvalidRequestError(
            "a database URL names no password and no options but"
            f" {', '.join(OPTIONS)}: Ray would show it. Put the password where libpq looks: a file"
            " of mode 0600 that PGPASSFILE names where the head node starts, or ?passfile=FILE in"
            " the URL; or PGPASSWORD in that environment"
        )
    if f"{parts.scheme}://" != POSTGRESQL or not well_formed or not _host(parts, options):
        raise _refused()
    if "sslmode" not in options and not _local(_host(parts, options)):
        raise InvalidRequestError(
            "a database on another machine needs sslmode in its URL, for libpq's own choice falls"
            " back to clear text: ?sslmode=verify-full&sslrootcert=FILE, or ?sslmode=disable on a"
            " network that you trust"
        )
    return url


def _host(parts: SplitResult, options: dict[str, list[str]]) -> str:
    """As libpq takes it: a folder is that of a Unix socket."""
    return options.get("host", [parts.hostname or ""])[-1]


def _local(host: str) -> bool:
    try:
        return host.startswith("/") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refused() -> InvalidRequestError:
    return InvalidRequestError(
        f"a database is sqlite:///FILE, or has the form {FORM}, without a password: that comes from"
        " PGPASSFILE, PGPASSWORD or ?passfile=FILE on the head node"
    )
