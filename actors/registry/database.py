"""The registry's database: its engine, its transactions, and what it refuses, as typed errors.

Every change is one transaction that locks and reads the one row of `registry` first. So changes
come one after the other, whoever makes them: on SQLite the transaction is immediate anyway, on
PostgreSQL the row is the lock, and what is read after it is what was committed last. Serialisable
transactions would need every change to be repeatable from outside; this needs nothing of it.

The row's generation fences: a registry that found another one than it began with changes nothing.
Changes that follow one another may share a transaction, see `together`.
Parameters never show in errors. Tables are declared in the rooms of their duties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from actors.registry import postgres
from tg_tinker.errors import ActorLostError, NotFoundError, StorageError
from tg_tinker.storage.databases import SQLITE

_NOT_OURS = ("42501", "42P01")
"""SQLSTATE of a missing privilege and of a lost table: PostgreSQL calls both defects of ours."""

REPLACED = "replaced"
"""`details["reason"]` of the `StorageError` of a registry that another one has fenced."""

DAMAGED = "damaged"
"""The same of the `StorageError` of a file that is none of SQLite's, or no whole one."""

_BROKEN = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_DURABLE = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")

METADATA = sa.MetaData()

RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("config", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended", sa.String),  # why it has no actor on purpose; null while it should have one
    sa.Column("resume_from", sa.String),  # artifact saved or loaded last; null is the base model
)


OWNER = sa.Table(
    "registry",
    METADATA,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
    sa.Column("generation", sa.Integer, nullable=False),
)
_OWN = sa.select(OWNER.c.generation).with_for_update()


@dataclass
class _Group:
    """Changes that share a transaction, which begins with the first of them."""

    ends: ExitStack = field(default_factory=ExitStack)
    tx: sa.Connection | None = None
    spoiled: bool = False
    then: list[Callable[[], None]] = field(default_factory=list)


class Database:
    """One database, opened; the tables must be declared before."""

    _looks_only = False
    """Whether the database, its tables and its mode stay as they are."""

    def __init__(self, database: str) -> None:
        self._group: _Group | None = None
        check = _check_of(database)  # opening makes a -wal
        self._engine, self._reader = _opened(database, self._looks_only)
        with self._reading() as connection:
            if check and connection.exec_driver_sql(check).scalar() != "ok":
                raise _damaged()
            refuse_older(connection)
        if not self._looks_only:
            self._take()

    def _take(self) -> None:
        with typed_refusal(), self._engine.begin() as tx:
            if tx.dialect.name == "postgresql":
                postgres.hold_for_opening(tx)
            refuse_older(tx)
            METADATA.create_all(tx)
            self._generation = _generation(tx)

    def close(self) -> None:
        """Ends all connections."""
        self._engine.dispose()

    @contextmanager
    def _change(self) -> Iterator[sa.Connection]:
        """One transaction, as exclusive as an immediate one of SQLite.

        Raises:
            StorageError: another registry has taken over; or see `typed_refusal`.
        """
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
        with self._engine.begin() as connection:
            self._check_own(connection)
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """What was committed; within `together` also what its changes have made so far."""
        with typed_refusal():
            if (group := self._group) is None or group.tx is None:
                with self._reader.connect() as connection:
                    yield connection
                return
            with _spoiling(group):
                yield group.tx

    def _once_durable(self, then: Callable[[], None]) -> None:
        """After a change: what must not be remembered of one that is undone."""
        if self._group is None:
            then()
        else:
            self._group.then.append(then)

    def _fence_others(self) -> None:
        """From now on registries that were opened earlier change nothing."""
        with self._change() as tx:
            tx.execute(OWNER.update().values(generation=self._generation + 1))
        self._generation += 1

    def _check_own(self, tx: sa.Connection) -> None:
        now = tx.execute(_OWN).scalar()
        if now != self._generation:
            raise StorageError(
                f"another registry has taken over this database (generation {now}, this one is"
                f" {self._generation}): nothing was changed. Use the cluster that was started last;"
                " if that one has ended, restart this one",
                details={"reason": REPLACED},
            )


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
    for then in group.then:
        then()


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


def _generation(tx: sa.Connection) -> int:
    """That of a registry that is opened now."""
    if tx.execute(_OWN).scalar() is None:
        tx.execute(OWNER.insert().values(id=1, generation=0))
    return int(tx.execute(_OWN).scalar_one())


def check_epoch(tx: sa.Connection, tenant: str, run_id: str, epoch: int) -> None:
    """Refuses an actor that is not its run's newest one."""
    current = tx.execute(
        sa.select(RUNS.c.epoch).where(RUNS.c.id == run_id, RUNS.c.tenant == tenant)
    ).scalar()
    if current is None:
        raise NotFoundError(f"no training client {run_id!r} of this tenant")
    if current != epoch:
        raise ActorLostError(
            f"this actor (epoch {epoch}) was replaced by epoch {current}: it may not charge,"
            " publish or load; use get_training_client to reach the new one"
        )


def refuse_older(connection: sa.Connection) -> None:
    """Before 1.0 no database is converted; one with other columns would fail call by call."""
    there = sa.inspect(connection)
    for name in METADATA.tables.keys() & {*there.get_table_names()}:
        found = {column["name"] for column in there.get_columns(name)}
        if missing := {*METADATA.tables[name].columns.keys()} - found:
            raise StorageError(
                f"the registry was made by an older version of TG-Tinker (table {name} has no"
                f" {', '.join(sorted(missing))}): it is as it was. Use that version with it, or"
                " begin a new home with TG_TINKER_HOME"
            )


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
