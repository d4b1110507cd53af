"""The registry's database: its engine, its transactions, and what it refuses, as typed errors.

Every change is one immediate transaction, and parameters never show in errors. Its tables are
in `registry` (runs, artifacts) and `budgets` (ledgers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tg_tinker.errors import StorageError

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
)


class Database:
    """One database, opened; the tables must be declared before."""

    def __init__(self, database: str) -> None:
        self._engine = sa.create_engine(database, hide_parameters=True)
        self._reader = self._engine.execution_options(reading=True)
        if self._engine.dialect.name == "sqlite":
            _make_sqlite_durable(self._engine, database)
        with _typed_refusal():
            _refuse_older(self._engine)
            METADATA.create_all(self._engine)

    def close(self) -> None:
        """Ends all connections."""
        self._engine.dispose()

    @contextmanager
    def _change(self) -> Iterator[sa.Connection]:
        """One immediate transaction."""
        with _typed_refusal(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _typed_refusal(), self._reader.connect() as connection:
            yield connection


@contextmanager
def _typed_refusal() -> Iterator[None]:
    """A full disk, a locked or a damaged database becomes a typed error without its SQL."""
    try:
        yield
    except sa.exc.DatabaseError as error:
        if isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError):
            raise  # a defect of ours
        raise StorageError(
            f"the registry's database refused ({type(error.orig).__name__}): check its disk, that"
            " no other program holds it, and that its file is whole"
        ) from None


def _refuse_older(engine: sa.Engine) -> None:
    """Before 1.0 no database is converted; one with other columns would fail call by call."""
    there = sa.inspect(engine)
    for name in METADATA.tables.keys() & {*there.get_table_names()}:
        found = {column["name"] for column in there.get_columns(name)}
        if missing := {*METADATA.tables[name].columns.keys()} - found:
            raise StorageError(
                f"the registry was made by an older version of TG-Tinker (table {name} has no"
                f" {', '.join(sorted(missing))}): it is as it was. Use that version with it, or"
                " begin a new home with TG_TINKER_HOME"
            )


def _make_sqlite_durable(engine: sa.Engine, database: str) -> None:
    """WAL with synchronous=FULL, immediate transactions; the file must exist (`home.create`)."""
    path = Path(database.removeprefix("sqlite:///"))
    if not path.exists():
        raise StorageError(
            f"the registry {path} does not exist: put its backup back, or run `tg-tinker init` in"
            " a new home. A new registry would forget every run"
        )

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's `begin` below says BEGIN, not sqlite3
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
