"""The registry's database: its engine, its transactions, and what it refuses, as typed errors.

Every change is one transaction that locks and reads the one row of `registry` first. So changes
come one after the other, whoever makes them: on SQLite the transaction is immediate anyway, on
PostgreSQL the row is the lock, and what is read after it is what was committed last. Serialisable
transactions would need every change to be repeatable from outside; this needs nothing of it.

The row's fencing token fences: a registry that finds another one than it began with changes
nothing.
Changes that follow one another may share a transaction, see `together`.
Parameters never show in errors. Tables are in `schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from actors.registry import postgres
from actors.registry.revisions import check_revision, create_tables
from actors.registry.schema import OWNER
from tg_tinker.errors import StorageError
from tg_tinker.storage.databases import SQLITE

_NOT_OURS = ("42501", "42P01")
"""SQLSTATE of a missing privilege and of a lost table: PostgreSQL calls both defects of ours."""

REPLACED = "replaced"
"""`details["reason"]` of the `StorageError` of a registry that another one has fenced."""

DAMAGED = "damaged"
"""The same of the `StorageError` of a file that is none of SQLite's, or no whole one."""

_REMEMBERED = "what to remember once this change is durable"
_BROKEN = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_DURABLE = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")

_OWN = sa.select(OWNER.c.fencing_token).with_for_update()


@dataclass
class _Group:
    """Changes that share a transaction, which begins with the first of them."""

    ends: ExitStack = field(default_factory=ExitStack)
    tx: sa.Connection | None = None
    spoiled: bool = False
    then: list[Callable[[], None]] = field(default_factory=list)


class Database:
    """One database, opened.

    Attributes:
        engine: of changes; for tests and `close`.
        looks_only: whether the database, its tables and its mode stay as they are: a change raises
            StorageError.
    """

    def __init__(
        self, database: str, *, looks_only: bool = False, other_revisions: bool = False
    ) -> None:
        """
        Args:
            other_revisions: it may be of another release, or have no tables yet: for who copies or
                upgrades it, and changes nothing else.

        Raises:
            StorageError: of another release; damaged; or it does not exist.
        """
        self.looks_only = looks_only
        self._group: _Group | None = None
        check = _check_of(database)  # opening makes a -wal
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
        """Ends all connections."""
        self.engine.dispose()

    @contextmanager
    def change(self) -> Iterator[sa.Connection]:
        """One transaction, as exclusive as an immediate one of SQLite.

        Raises:
            StorageError: another registry has taken over; or see `typed_refusal`.
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
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """What was committed; within `together` also what its changes have made so far."""
        with typed_refusal():
            if (group := self._group) is None or group.tx is None:
                with self._reader.connect() as connection:
                    yield connection
                return
            with _spoiling(group):
                yield group.tx

    @contextmanager
    def upgrading(self) -> Iterator[sa.Connection]:
        """One transaction that may change tables, and that nobody else's change comes between.
        Foreign keys are not looked at inside: `check_references` is for its end."""
        with typed_refusal(), self.engine.connect() as connection:
            on_sqlite = connection.dialect.name == "sqlite"
            if on_sqlite:  # before it begins: SQLite ignores it within a transaction
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
        """At the end of `upgrading`; PostgreSQL looks at each statement.

        Raises:
            StorageError: a row refers to one that is not there.
        """
        if tx.dialect.name == "sqlite" and tx.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise StorageError(
                "the registry's database has rows that refer to others which are not there: it was"
                " not upgraded. Put a backup back with `tg-tinker registry restore`"
            )

    def fence_others(self) -> None:
        """From now on registries that were opened earlier change nothing."""
        with self.change() as tx:
            tx.execute(OWNER.update().values(fencing_token=self._token + 1))
        self._token += 1

    def _check_own(self, tx: sa.Connection) -> None:
        now = tx.execute(_OWN).scalar()
        if now != self._token:
            raise StorageError(
                f"another registry has taken over this database (fencing token {now}, this one has"
                f" {self._token}): nothing was changed. Use the cluster that was started last;"
                " if that one has ended, restart this one",
                details={"reason": REPLACED},
            )


def once_durable(tx: sa.Connection, then: Callable[[], None]) -> None:
    """Calls `then` once the change `tx` is durable, never if it is undone: for what a process
    remembers of its changes."""
    tx.info[_REMEMBERED].append(then)


def _call_all(remembered: list[Callable[[], None]]) -> None:
    for then in remembered:
        then()


@contextmanager
def together(database: Database) -> Iterator[None]:
    """Until it ends, the changes are one transaction; then they are durable. One that is refused
    is undone alone. For a database that one thread uses.

    Raises:
        StorageError: a statement failed, and nothing was changed; or the end did, and nobody knows.
            Nothing that was learnt inside may be told to anybody.
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
    """After a statement that failed nobody knows which of those before it the database keeps:
    SQLite may have ended the transaction, PostgreSQL undoes it when it is told to commit."""
    _refuse_spoiled(group)  # outside of any transaction a change would be durable at once
    try:
        yield
    except sa.exc.DBAPIError:
        group.spoiled = True
        raise


def _refuse_spoiled(group: _Group) -> None:
    if group.spoiled:
        raise StorageError("another call's statement failed, and the transaction with it: repeat")


@contextmanager
def typed_refusal() -> Iterator[None]:
    """A full disk, a lost server, a damaged database become a typed error without their texts."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlite_errorname", "") in _BROKEN:
            raise _damaged() from None
        state = getattr(error.orig, "sqlstate", None)
        defect = isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError)
        if defect and state not in _NOT_OURS:
            raise
        lost = " The server was lost: whether a change was made is not known." * (
            error.connection_invalidated
        )
        raise StorageError(
            f"the registry's database refused ({type(error.orig).__name__}"
            f"{f', SQLSTATE {state}' if state else ''}).{lost} Check that it runs and is"
            " whole, its disk, that no other program holds it, and that its user may create and"
            " change tables"
        ) from None


def _opened(database: str, looks_only: bool) -> tuple[sa.Engine, sa.Engine]:
    """The engine of changes, and that of reading."""
    if not database.startswith(SQLITE):
        engine = postgres.open_engine(database)
        reader = postgres.reading(engine)
        return reader if looks_only else engine, reader
    engine = sa.create_engine(database, hide_parameters=True)
    _prepare_sqlite(engine, database, ("query_only=ON",) if looks_only else _DURABLE)
    return engine, engine.execution_options(reading=True)


def _check_of(database: str) -> str:
    """What to ask SQLite, whose file others may copy, cut and mix, before anything else.

    A -wal that is there may be of another copy. That shows only where tables and indexes are
    compared: 0.26 s for 100 MB. After a clean end, 0.06 s.
    """
    if not database.startswith(SQLITE):
        return ""
    whole = Path(f"{database.removeprefix(f'{SQLITE}/')}-wal").exists()
    return f"PRAGMA {'integrity' if whole else 'quick'}_check(1)"


def _damaged() -> StorageError:
    return StorageError(
        "the registry's database is damaged, or lies beside the -wal of another copy. Move"
        " registry.db, registry.db-wal and registry.db-shm out of the way, and put a backup back"
        " with `tg-tinker registry restore`",
        details={"reason": DAMAGED},
    )


def _token(tx: sa.Connection) -> int:
    """That of a registry that is opened now."""
    if tx.execute(_OWN).scalar() is None:
        tx.execute(OWNER.insert().values(id=1, fencing_token=0))
    return int(tx.execute(_OWN).scalar_one())


def _prepare_sqlite(engine: sa.Engine, database: str, pragmas: Sequence[str]) -> None:
    """Immediate transactions; the file must exist (`home.create`)."""
    path = Path(database.removeprefix("sqlite:///"))
    if not path.exists():
        raise StorageError(
            f"the registry {path} does not exist: put its backup back, or run `tg-tinker init` in"
            " a new home. A new registry would forget every run"
        )

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's `begin` below says BEGIN, not sqlite3
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
