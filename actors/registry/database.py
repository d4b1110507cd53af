"""Opens the registry's database, runs its transactions, and reports its failures as typed errors.

Every change is one transaction that first locks and reads the single row of the table `registry`.
Therefore changes run one after the other, whoever makes them. On SQLite the transaction is
immediate anyway. On PostgreSQL the row is the lock, and reads that follow it see the last commit.
Serializable transactions would require that callers can repeat every change; this lock does not.

The row holds a fencing token. A registry that finds another token than the one it started with
changes nothing. Consecutive changes may share a transaction; see `together`. Errors never show
parameters. The tables are in `schema`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from actors.registry import postgres
from actors.registry.refusals import is_known, refusal_of
from actors.registry.request_rows import RequestRows
from actors.registry.revisions import check_revision, create_tables
from actors.registry.schema import OWNER
from tg_tinker.errors import StorageError
from tg_tinker.storage.databases import revision_on_record
from tg_tinker.storage.sqlite_files import sqlite_file

REPLACED = "replaced"
"""`details["reason"]` of the `StorageError` that a fenced registry raises."""

DAMAGED = "damaged"
"""`details["reason"]` of the `StorageError` for a file that is no SQLite database, or an incomplete
one."""

MISREAD = "misread"
"""`details["reason"]` of the `StorageError` of `refuse_misread`."""

_BESIDE = ("keyring", "audit.pub")
"""Files of which one at least is beside the registry of a home."""

_REMEMBERED = "what to remember once this change is durable"
_REQUESTS = "the requests whose rows wait"
_BROKEN = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_DURABLE = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")

_OWN = sa.select(OWNER.c.fencing_token).with_for_update()


@dataclass
class _Group:
    """Changes that share one transaction. The transaction begins with the first change."""

    ends: ExitStack = field(default_factory=ExitStack)
    tx: sa.Connection | None = None
    spoiled: bool = False
    then: list[Callable[[], None]] = field(default_factory=list)


class Database:
    """An open database.

    Attributes:
        engine: The engine for changes; for tests and `close`.
        looks_only: Whether the database, its tables and its journal mode stay as they are. A change
            then raises StorageError.
        requests: The requests that need rows in the audit log.
    """

    def __init__(
        self, database: str, *, looks_only: bool = False, other_revisions: bool = False
    ) -> None:
        """Opens a database. Creates missing tables unless `looks_only` or `other_revisions` is set.

        Args:
            other_revisions: Accepts a database of another release, or one without tables. This is
                for callers that copy or upgrade the database and change nothing else.

        Raises:
            StorageError: The database is of another release, is damaged, or does not exist.
        """
        self.looks_only = looks_only
        self._group: _Group | None = None
        self.requests = RequestRows()
        # Before the database is opened, because opening creates a -wal file.
        check = _check_of(database)
        self.engine, self._reader = _opened(database, looks_only)
        with self.reading() as connection:
            if check and connection.exec_driver_sql(check).scalar() != "ok":
                raise _damaged()
            if not other_revisions:
                check_revision(connection)
        if not (looks_only or other_revisions):
            self._take()

    def _take(self) -> None:
        with typed_refusal(), self.engine.begin() as tx:
            if tx.dialect.name == "postgresql":
                postgres.hold_for_opening(tx)
            check_revision(tx)
            create_tables(tx)
            self._token = _token(tx)

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    @contextmanager
    def change(self) -> Iterator[sa.Connection]:
        """Runs one change in a transaction, as exclusive as an immediate transaction of SQLite.

        Raises:
            StorageError: Another registry has taken over, or the database failed; see
                `typed_refusal`.
        """
        with self._transaction() as tx:
            remembered: list[Callable[[], None]] = []
            tx.info[_REMEMBERED] = remembered
            yield tx
        if self._group is None:
            _call_all(remembered)
        else:
            self._group.then.extend(remembered)

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with typed_refusal():
            if (group := self._group) is None:
                with self._begun() as connection:
                    yield connection
                return
            if group.tx is None:
                group.tx = group.ends.enter_context(self._begun())
            with _spoiling(group), group.tx.begin_nested():
                yield group.tx

    @contextmanager
    def _begun(self) -> Iterator[sa.Connection]:
        with self.engine.begin() as connection:
            self._check_own(connection)
            connection.info[_REQUESTS] = self.requests
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Yields a connection that sees committed rows. Within `together`, it also sees the changes
        made so far."""
        with typed_refusal():
            if (group := self._group) is None or group.tx is None:
                with self._reader.connect() as connection:
                    connection.info[_REQUESTS] = self.requests
                    yield connection
                return
            with _spoiling(group):
                yield group.tx

    @contextmanager
    def upgrading(self) -> Iterator[sa.Connection]:
        """Runs one transaction that may change tables; no other change runs meanwhile. SQLite
        checks no foreign keys inside: call `check_references` at the end."""
        with typed_refusal(), self.engine.connect() as connection:
            on_sqlite = connection.dialect.name == "sqlite"
            # Before the transaction begins: SQLite ignores this setting within one.
            if on_sqlite:
                connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
            try:
                with connection.begin():
                    if not on_sqlite:
                        postgres.hold_for_upgrade(connection)
                    yield connection
            finally:
                if on_sqlite:
                    connection.connection.cursor().execute("PRAGMA foreign_keys=ON")

    def check_references(self, tx: sa.Connection) -> None:
        """Checks foreign keys at the end of `upgrading`. PostgreSQL checks them at each statement.

        Raises:
            StorageError: A row refers to a missing row.
        """
        if tx.dialect.name == "sqlite" and tx.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise StorageError(
                "the registry's database has rows that refer to missing rows: it was not upgraded."
                " Restore a backup with `tg-tinker registry restore`"
            )

    def once_durable(self, then: Callable[[], None]) -> None:
        """Calls `then` once the changes made so far are durable: at once, or at the end of
        `together` unless it fails."""
        if self._group is None:
            then()
        else:
            self._group.then.append(then)

    def fence_others(self) -> None:
        """Fences registries that were opened earlier: they can change nothing from now on."""
        with self.change() as tx:
            tx.execute(OWNER.update().values(fencing_token=self._token + 1))
        self._token += 1

    def _check_own(self, tx: sa.Connection) -> None:
        now = tx.execute(_OWN).scalar()
        if now != self._token:
            raise StorageError(
                f"another registry has taken over this database (its fencing token is {now}, that"
                f" of this registry is {self._token}): nothing was changed. Use the cluster that"
                " was started last; if that cluster has ended, restart this one",
                details={"reason": REPLACED},
            )


def once_durable(tx: sa.Connection, then: Callable[[], None]) -> None:
    """Calls `then` once the change `tx` is durable, and never if the change is undone. Processes
    use this for what they remember of their changes."""
    tx.info[_REMEMBERED].append(then)


def requests_of(connection: sa.Connection) -> RequestRows:
    """Returns the requests that need rows, of the process that reads or changes."""
    found: RequestRows = connection.info[_REQUESTS]
    return found


def _call_all(remembered: list[Callable[[], None]]) -> None:
    for then in remembered:
        then()


@contextmanager
def together(database: Database) -> Iterator[None]:
    """Runs the changes inside in one transaction, which becomes durable at the end. A refused
    change is undone alone. Only one thread may use the database.

    Raises:
        StorageError: A statement failed, and nothing was changed; or the commit failed, and it is
            unknown whether anything was changed. In both cases the results obtained inside must not
            be reported to anyone.
    """
    group = database._group = _Group()
    try:
        with typed_refusal(), group.ends:
            yield
            _refuse_spoiled(group)
    finally:
        database._group = None
    _call_all(group.then)


@contextmanager
def _spoiling(group: _Group) -> Iterator[None]:
    """Marks the group as spoiled when a statement fails. It is then unknown which earlier
    statements the database keeps: SQLite may have ended the transaction, and PostgreSQL undoes it
    at the commit."""
    # The transaction may have ended: a further change would be durable at once.
    _refuse_spoiled(group)
    try:
        yield
    except sa.exc.DBAPIError:
        group.spoiled = True
        raise


def _refuse_spoiled(group: _Group) -> None:
    if group.spoiled:
        raise StorageError(
            "a statement of another call failed, and the shared transaction with it: repeat this"
            " call"
        )


@contextmanager
def typed_refusal() -> Iterator[None]:
    """Turns a full disk, a lost server or a damaged database into a typed error without the text of
    the database."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlite_errorname", "") in _BROKEN:
            raise _damaged() from None
        defect = isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError)
        if defect and not is_known(error):
            raise
        refusal, state = refusal_of(error), getattr(error.orig, "sqlstate", None)
        lost = " The connection was lost: whether a change was made is not known." * (
            error.connection_invalidated
        )
        raise StorageError(
            f"the registry's database refused ({type(error.orig).__name__}"
            f"{f', SQLSTATE {state}' if state else ''}): {refusal.text}.{lost} Next:"
            f" {refusal.remedy}"
        ) from None


def _opened(database: str, looks_only: bool) -> tuple[sa.Engine, sa.Engine]:
    """Returns the engine for changes and the engine for reading."""
    if (file := _file_of(database)) is None:
        engine = postgres.open_engine(database)
        reader = postgres.reading(engine)
        return reader if looks_only else engine, reader
    if not file.exists():
        raise StorageError(
            f"the registry {file} does not exist: restore its backup, or run `tg-tinker init` in"
            " a new home. A new registry knows none of the earlier runs"
        )
    refuse_misread(database)
    # Not by the text of the URL, which SQLAlchemy reads by rules of its own.
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(file)), hide_parameters=True)
    _prepare_sqlite(engine, ("query_only=ON",) if looks_only else _DURABLE)
    return engine, engine.execution_options(reading=True)


def _check_of(database: str) -> str:
    """Returns the statement that checks a SQLite database before anything else reads it; empty for
    PostgreSQL.

    Others may copy, cut or mix the files of SQLite. A -wal file that exists may belong to another
    copy. Only the full check, which compares tables with indexes, detects that: 0.26 s for 100 MB.
    After a clean end there is no -wal file, and the quick check takes 0.06 s.
    """
    if (file := _file_of(database)) is None:
        return ""
    whole = file.with_name(f"{file.name}-wal").exists()
    return f"PRAGMA {'integrity' if whole else 'quick'}_check(1)"


def _damaged() -> StorageError:
    return StorageError(
        "the registry's database is damaged, or is beside the -wal file of another copy. Move"
        " registry.db, registry.db-wal and registry.db-shm to another folder, then restore a backup"
        " with `tg-tinker registry restore`",
        details={"reason": DAMAGED},
    )


def _token(tx: sa.Connection) -> int:
    """Returns the fencing token for a registry that opens the database now."""
    if tx.execute(_OWN).scalar() is None:
        tx.execute(OWNER.insert().values(id=1, fencing_token=0))
    return int(tx.execute(_OWN).scalar_one())


def _file_of(database: str) -> Path | None:
    """Returns the SQLite file of a URL, as SQLite finds it; None for PostgreSQL.

    SQLAlchemy drops ``link/..`` from a path before SQLite sees it, so links are followed here.
    """
    file = sqlite_file(database)
    return None if file is None else Path(os.path.realpath(file))


def refuse_misread(database: str) -> None:
    """Refuses a URL of an empty SQLite file whose rows an older release has put elsewhere.

    Commit 22e0997 put the path into a URL as text, and SQLAlchemy read it back as another one:
    ``/data/what?v=1/registry.db`` stayed empty, and its rows went into ``/data/what``. They are not
    moved here: another home may have used that file too.

    Raises:
        StorageError: There is such a file.
    """
    file = sqlite_file(database)
    if file is None or not file.is_file() or file.stat().st_size:
        return
    misread = Path(sa.make_url(f"sqlite:///{file}").database or file)
    if misread == file or revision_on_record(misread) is None:
        return
    if any((misread.parent / name).exists() for name in _BESIDE):
        return  # It is the registry of another home.
    raise StorageError(
        f"an older release has kept the registry of this home in {misread}, because it misread the"
        f" path {file}, which is empty: end all programs that use this home, move that file, with"
        f" its -wal and -shm if they are there, to {file}, and chmod 600 it. If it belongs to"
        " another home, move it away",
        details={"reason": MISREAD},
    )


def _prepare_sqlite(engine: sa.Engine, pragmas: Sequence[str]) -> None:
    """Makes all transactions of changes immediate."""

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, record: Any) -> None:
        # The listener for `begin` below sends BEGIN, so sqlite3 must not.
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
