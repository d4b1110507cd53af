"""Copies the registry's rows into one SQLite file, and back into an empty database of either kind.

A backup is itself a registry database. Therefore one procedure serves both kinds of database, moves
a registry from one kind to the other, and also takes a plain copy of `registry.db`. A backup
contains neither the keyring nor the signing key.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sa

from actors.registry.database import Database, typed_refusal
from actors.registry.revisions import (
    VERSIONS,
    refuse_newer,
    revision_of,
    run_revisions,
)
from actors.registry.schema import AUDIT_ROWS, ENTRIES, METADATA, OWNER
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.records.audit_log import AuditRow
from tg_tinker.records.entries import place_of
from tg_tinker.storage.databases import REVISION
from tg_tinker.storage.files import sync
from tg_tinker.storage.sqlite_files import SQLITE, connect_read_only, sqlite_file

Reached = list[tuple[str, str, str]]
"""Where each chain ends: (tenant, ``ledger of NAME`` or ``audit log``, ``SEQ-HASH``)."""

_ROWS = 1000
"""The number of rows that are read and written at a time."""

_SUFFIXES = ("", "-journal", "-wal", "-shm")
"""The suffixes of all files that SQLite makes for a database."""


def backup(database: str, path: Path) -> Reached:
    """Writes one consistent state of a registry into a new file of mode 0600, which is durable on
    return.

    A registry of an older release gives a backup of that release.

    Returns:
        Where each chain ends.

    Raises:
        InvalidRequestError: The file exists.
        StorageError: The database or the disk fails; no file is left.
    """
    with (
        closing(Database(database, looks_only=True, other_revisions=True)) as registry,
        registry.reading() as old,
    ):
        return write_backup(old, path)


def write_backup(old: sa.Connection, path: Path) -> Reached:
    """Writes a backup of what a transaction sees, and returns where each chain ends; see
    `backup`."""
    with _new_file(path) as partial:
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(partial)), hide_parameters=True
        )
        with typed_refusal(), engine.begin() as new:
            revision = revision_of(old)
            if revision is None:
                raise StorageError("the database has no registry yet: there is nothing to back up")
            refuse_newer(revision)
            run_revisions(new, revision)
            _copy(old, new)
            return _reached(old)


def restore(path: Path, database: str) -> Reached:
    """Restores a backup into a database without rows, completely or not at all. Makes a missing
    SQLite file, and upgrades a backup of an older release.

    Returns:
        Where each chain ends.

    Raises:
        InvalidRequestError: The backup does not exist, or the database has rows.
        StorageError: The backup is damaged or of a newer release, or the database fails. The
            database is as it was.
    """
    if not path.is_file():
        raise InvalidRequestError(f"there is no backup {path}: name a file that exists")
    engine = sa.create_engine(SQLITE, creator=lambda: connect_read_only(path), hide_parameters=True)
    with (
        _made(database), closing(Database(database)) as registry,
        typed_refusal(), engine.connect() as old, registry.change() as new,
    ):  # fmt: skip
        revision = _check_whole(old, path)
        _refuse_rows(new)
        with _blamed(path):
            if revision != REVISION:
                _remake_tables(new, revision)
            _copy(old, new)
            run_revisions(new)
            return _reached(old)


def _remake_tables(new: sa.Connection, revision: str) -> None:
    """Replaces tables without rows by the tables of an older release; keeps the fencing token."""
    token = new.execute(sa.select(OWNER.c.fencing_token)).scalar_one()
    METADATA.drop_all(new)
    VERSIONS.drop(new)
    run_revisions(new, revision)
    owner = _tables(new)[OWNER.name]
    new.execute(owner.insert().values([1, token]))


def _copy(old: sa.Connection, new: sa.Connection) -> None:
    """Copies every table, referenced tables first. The fencing token is not copied: it belongs to
    each database."""
    # Some may be missing: the first release made some tables only when it needed them.
    there = _tables(old).keys()
    for table in _tables(new).values():
        if table.name != OWNER.name and table.name in there:
            for rows in old.execute(sa.select(table)).mappings().partitions(_ROWS):
                new.execute(table.insert(), [dict(row) for row in rows])


def _tables(connection: sa.Connection) -> dict[str, sa.Table]:
    """Returns the registry's tables as a database has them, in types that every kind of database
    accepts."""
    found, names = sa.MetaData(), {*sa.inspect(connection).get_table_names()}
    found.reflect(connection, only=sorted(METADATA.tables.keys() & names))
    for table in found.sorted_tables:
        for column in table.columns:
            column.type = column.type.as_generic()
    return {table.name: table for table in found.sorted_tables}


def _reached(connection: sa.Connection) -> Reached:
    ledgers = [
        (row.tenant, f"ledger of {row.dataset}", place_of(row.seq, row.hash))
        for row in _last(connection, ENTRIES, "tenant", "dataset")
    ]
    logs = [
        (row.tenant, "audit log", place_of(row.seq, AuditRow.parse(row.row).hash))
        for row in _last(connection, AUDIT_ROWS, "tenant")
    ]
    return sorted(ledgers + logs)


def _last(connection: sa.Connection, table: sa.Table, *chain: str) -> list[sa.Row[tuple[object]]]:
    """Returns the newest row of each chain."""
    of_chain = [table.c[name] for name in chain]
    newest = sa.select(*of_chain, sa.func.max(table.c.seq).label("seq")).group_by(*of_chain)
    ends = newest.subquery()
    same = sa.and_(*(table.c[name] == ends.c[name] for name in (*chain, "seq")))
    return [*connection.execute(sa.select(table).join(ends, same))]


def _refuse_rows(new: sa.Connection) -> None:
    for table in METADATA.sorted_tables:
        if table is not OWNER and _has_rows(new, table):
            raise InvalidRequestError(
                f"the database has rows already (table {table.name}): restore into an empty"
                " database. Nothing was changed"
            )


def _has_rows(connection: sa.Connection, table: sa.Table) -> bool:
    return (
        connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None
    )


def _check_whole(old: sa.Connection, path: Path) -> str:
    """Checks that a backup can be read to its end, and returns its revision."""
    try:
        # One state of the file, which may belong to a registry in use.
        old.exec_driver_sql("BEGIN")
        sound = old.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        revision = revision_of(old) if sound else None
        names = {*sa.inspect(old).get_table_names()} if sound else set()
    except sa.exc.DatabaseError:
        raise _damaged(path) from None
    if not sound:
        raise _damaged(path)
    if revision is None or (revision == REVISION and (missing := METADATA.tables.keys() - names)):
        raise StorageError(
            f"{path} is no backup of a registry, because it has no table"
            f" {min(missing) if revision else OWNER.name}: use another backup; nothing was changed"
        )
    refuse_newer(revision)
    try:
        for table in _tables(old).values():
            for _ in old.execute(sa.select(table)).partitions(_ROWS):
                pass
    except (sa.exc.DatabaseError, sa.exc.NoSuchTableError):
        # NoSuchTableError: a table refers to a missing one.
        raise _damaged(path) from None
    return revision


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Reports rows that no registry can have as damage of the backup, not as a failure of the
    database."""
    try:
        yield
    except (sa.exc.IntegrityError, sa.exc.DataError, IntegrityError):
        raise _damaged(path) from None
    except sa.exc.StatementError as error:
        if isinstance(error, sa.exc.DBAPIError):
            raise
        # A value has another type than its column.
        raise _damaged(path) from None


def _damaged(path: Path) -> StorageError:
    return StorageError(
        f"{path} is no backup of a registry, or it is damaged: use another backup; nothing was"
        " changed"
    )


@contextmanager
def _made(database: str) -> Iterator[None]:
    """Makes a missing SQLite file, and removes it again if nothing was restored: an empty file
    would be opened as a new registry."""
    if (file := sqlite_file(database)) is None:
        yield
        return
    made = [] if file.exists() else [path for path in _files_of(file) if not path.exists()]
    try:
        file.touch(0o600)
        yield
    except OSError as error:
        _remove(made)
        raise StorageError(f"cannot write {file}: {error.strerror}") from None
    except BaseException:
        _remove(made)
        raise


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Yields a hidden file beside `path`, which becomes `path` once it is complete and durable. If
    anything fails, no file is left."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o600))
        yield partial
        sync(partial)
        path.hardlink_to(partial)
        sync(path.parent)
    except FileExistsError:
        raise InvalidRequestError(f"{path} exists: name a file that does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        _remove(_files_of(partial))


def _files_of(database: Path) -> list[Path]:
    return [database.with_name(database.name + suffix) for suffix in _SUFFIXES]


def _remove(files: Sequence[Path]) -> None:
    """Removes exactly these files: the backup, or another one, may be beside them as
    `registry.db.bak`."""
    for file in files:
        file.unlink(missing_ok=True)
