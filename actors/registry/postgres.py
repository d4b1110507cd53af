"""Connects to PostgreSQL as the registry's database, and checks what the server guarantees.

An acknowledged charge must survive a crash of the server's machine. Therefore every new connection
checks the settings that decide this. The driver, psycopg, comes with the extra `postgres`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tg_tinker.errors import StorageError
from tg_tinker.storage.databases import check_database

OLDEST = 14
"""The oldest major version of the server that is supported."""

NEEDED = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_apply"),
    "server_encoding": ("UTF8",),
    "transaction_read_only": ("off",),
}
"""The values that each setting of the server may have."""

LIMITS = {
    "lock_timeout": "30s",
    "statement_timeout": "1min",
    "idle_in_transaction_session_timeout": "20s",
}
"""The limits of each connection, as the server writes them. A registry that freezes during a change
holds the only lock. The server ends its transaction before others stop waiting for the lock."""

_SETTINGS = ", ".join(
    f"current_setting('{name}')" for name in ("server_version_num", *NEEDED, *LIMITS)
)
_CONNECTION = {
    "application_name": "tg-tinker",
    "client_encoding": "utf8",
    # Else PGHOSTADDR would replace the URL's host, perhaps by one that is reached in clear.
    "hostaddr": "",
    "keepalives_idle": 30,
    "tcp_user_timeout": 30_000,
    "options": " ".join(f"-c {name}={value}" for name, value in LIMITS.items()),
}
_CONNECT_S = 10


def open_engine(url: str) -> sa.Engine:
    """Returns an engine that checks the settings on each new connection, and replaces lost
    connections.

    Raises:
        InvalidRequestError: See `check_database`.
        StorageError: psycopg is not installed.
    """
    check_database(url)
    limit = {} if "connect_timeout" in sa.make_url(url).query else {"connect_timeout": _CONNECT_S}
    try:
        engine = sa.create_engine(
            url, hide_parameters=True, pool_pre_ping=True, connect_args=_CONNECTION | limit
        )
    except ImportError:
        raise StorageError(
            "PostgreSQL needs psycopg, which is not installed here: install the extra 'postgres'"
            " (in a clone: pip install -e '.[postgres]') on the head node"
        ) from None
    sa.event.listen(engine, "connect", check_settings)
    return engine


def reading(engine: sa.Engine) -> sa.Engine:
    """Returns the engine for transactions that see one state of the database and change nothing."""
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def hold_for_opening(tx: sa.Connection) -> None:
    """Keeps everyone else from opening this database until `tx` ends. The lock is an advisory lock,
    because the database may have no table to lock yet."""
    tx.execute(sa.select(sa.func.pg_advisory_xact_lock(0x7467_7469_6E6B)))


def hold_for_upgrade(tx: sa.Connection) -> None:
    """Keeps everyone else from opening or changing this database: each change locks the row of
    `registry` first. Lifts the time limit, because a backup is written meanwhile."""
    hold_for_opening(tx)
    tx.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    if sa.inspect(tx).has_table("registry"):
        tx.execute(sa.text("LOCK TABLE registry"))


def check_settings(connection: Any, record: Any) -> None:
    """Checks a new connection of the driver: the server's version, `NEEDED` and `LIMITS`.

    Raises:
        StorageError: One of them is not as it must be.
    """
    version, *settings = connection.execute(f"SELECT {_SETTINGS}").fetchone()
    connection.rollback()
    if int(version) < OLDEST * 10_000:
        raise StorageError(
            f"the registry's database is PostgreSQL {int(version) // 10_000}: use version {OLDEST}"
            " or newer"
        )
    needed, limits = settings[: len(NEEDED)], settings[len(NEEDED) :]
    # A pooler may drop them without a word, and put another server behind the connection.
    for (name, limit), found in zip(LIMITS.items(), limits, strict=True):
        if found != limit:
            raise StorageError(
                f"the registry's database has {name} = {found}, although the registry has set"
                f" {limit} for its connection: a pooler such as pgbouncer has dropped it, and a"
                " registry that freezes would hold the one lock for good. Connect to the server"
                " itself, or set the limits for the user at the server (docs/storage.md)"
            )
    for (name, allowed), found in zip(NEEDED.items(), needed, strict=True):
        if found not in allowed:
            raise StorageError(
                f"the registry's database has {name} = {found}, it must be {' or '.join(allowed)}:"
                " with another value, acknowledged charges can be lost, or writing fails. Change"
                " the setting of the server, or choose another database"
            )
