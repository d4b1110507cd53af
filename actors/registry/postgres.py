"""PostgreSQL as the registry's database: how it is reached, and what it must promise.

A charge that was acknowledged must outlast the server's machine, so the settings that decide it
are looked at on every new connection. The library, psycopg, comes with the extra `postgres`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tg_tinker.errors import StorageError
from tg_tinker.storage.databases import check_database

OLDEST = 14
"""Major version of the server."""

NEEDED = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_apply"),
    "server_encoding": ("UTF8",),
    "transaction_read_only": ("off",),
}
"""Setting of the server -> what it may be."""

_SETTINGS = ", ".join(f"current_setting('{name}')" for name in ("server_version_num", *NEEDED))

# A frozen registry in the middle of a change holds the one lock: its server ends it first.
_LIMITS = {
    "lock_timeout": "30s",
    "statement_timeout": "60s",
    "idle_in_transaction_session_timeout": "20s",
}
_CONNECTION = {
    "application_name": "tg-tinker",
    "client_encoding": "utf8",
    "keepalives_idle": 30,
    "tcp_user_timeout": 30_000,
    "options": " ".join(f"-c {name}={value}" for name, value in _LIMITS.items()),
}
_CONNECT_S = 10


def open_engine(url: str) -> sa.Engine:
    """An engine whose connections are looked over first, and again after the server was away.

    Raises:
        InvalidRequestError: see `check_database`.
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
            "PostgreSQL needs psycopg, which is not installed here: pip install"
            " 'tg-tinker[postgres]' (in a clone: pip install -e '.[postgres]') on the head node"
        ) from None
    sa.event.listen(engine, "connect", _check)
    return engine


def reading(engine: sa.Engine) -> sa.Engine:
    """The same, for transactions that see one state of the database and change nothing."""
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def hold_for_opening(tx: sa.Connection) -> None:
    """Nobody else opens this database before `tx` ends: it may have no table to lock yet."""
    tx.execute(sa.select(sa.func.pg_advisory_xact_lock(0x7467_7469_6E6B)))


def hold_for_upgrade(tx: sa.Connection) -> None:
    """The same, and nobody else changes a row: changes begin with that of `registry`. It may take
    longer than a change: a backup is written meanwhile."""
    hold_for_opening(tx)
    tx.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    if sa.inspect(tx).has_table("registry"):
        tx.execute(sa.text("LOCK TABLE registry"))


def _check(connection: Any, record: Any) -> None:
    version, *settings = connection.execute(f"SELECT {_SETTINGS}").fetchone()
    connection.rollback()
    if int(version) < OLDEST * 10_000:
        raise StorageError(
            f"the registry's database is PostgreSQL {int(version) // 10_000}: use {OLDEST} or newer"
        )
    for (name, allowed), found in zip(NEEDED.items(), settings, strict=True):
        if found not in allowed:
            raise StorageError(
                f"the registry's database has {name} = {found}, it must be {' or '.join(allowed)}:"
                " with any other a charge that was acknowledged can be lost, or text cannot be"
                " stored. Change it for the server, or choose another database"
            )
