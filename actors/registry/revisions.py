"""Reads the revision of a database's tables, refuses other releases, and runs revisions.

Alembic runs the files of `migrations` in order, and stores the number of the last one in the
database. By default it commits after each file on SQLite. Here it receives a connection with a
transaction already open, so a process that is killed at any point leaves the old database or the
new one.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from actors.registry.schema import METADATA
from tg_tinker.errors import StorageError
from tg_tinker.storage.databases import FIRST_REVISION, REVISION, REVISION_TABLE

VERSIONS = sa.Table(
    REVISION_TABLE,
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name=f"{REVISION_TABLE}_pkc"),
)
"""Alembic's table, under a name that no other program uses."""

_FOLDER = Path(__file__).with_name("migrations")


def revision_of(connection: sa.Connection) -> str | None:
    """Returns the revision of a database; None if the database has no tables yet.

    Raises:
        StorageError: The database was made before the first release whose homes can be upgraded, or
            its stored revision is damaged.
    """
    names = {*sa.inspect(connection).get_table_names()}
    if VERSIONS.name in names:
        found = connection.execute(sa.select(VERSIONS.c.version_num)).scalars().all()
        if len(found) != 1 or not found[0]:
            raise StorageError(
                f"the registry's database is damaged: its table {VERSIONS.name} must have one row,"
                f" and has {len(found)}. Restore a backup with `tg-tinker registry restore`"
            )
        return str(found[0])
    if not names & METADATA.tables.keys():
        return None
    _refuse_before_first(connection, names)
    return FIRST_REVISION


def check_revision(connection: sa.Connection) -> None:
    """Refuses a database of another release, whose statements could fail one by one in unclear
    ways.

    Raises:
        StorageError: The database is older or newer; nothing was changed.
    """
    found = revision_of(connection)
    if found in (None, REVISION):
        return
    if found in known_revisions():
        raise StorageError(
            f"the registry's database is of an older release of TG-Tinker (revision {found}, this"
            f" release has {REVISION}), and nothing was changed. Stop the programs of the older"
            " release, then run `tg-tinker registry upgrade`, which writes a backup and upgrades"
            " the database",
            details={"reason": "older", "revision": found},
        )
    refuse_newer(found)


def refuse_newer(found: str | None) -> None:
    """Raises StorageError for a revision that this release does not know."""
    if found is None or found in known_revisions():
        return
    raise StorageError(
        f"the registry's database is of a newer release of TG-Tinker (revision {found}, this"
        f" release has {REVISION}), and nothing was changed: use the newer release, or restore the"
        " backup that was written before the upgrade",
        details={"reason": "newer", "revision": found},
    )


def create_tables(tx: sa.Connection) -> None:
    """Creates the missing tables of a database that is of this release or has no tables."""
    is_new = revision_of(tx) is None
    METADATA.create_all(tx)
    if is_new:
        VERSIONS.create(tx)
        tx.execute(VERSIONS.insert().values(version_num=REVISION))


def run_revisions(tx: sa.Connection, to: str = REVISION) -> None:
    """Runs all revisions after the database's own, up to `to`, within a transaction.

    Raises:
        StorageError: The database has a revision that this release does not know.
    """
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("version_locations", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    with EnvironmentContext(config, script, fn=lambda at, _: script._upgrade_revs(to, at)) as run:
        run.configure(connection=tx, version_table=VERSIONS.name)
        try:
            run.run_migrations()
        except CommandError as error:
            raise StorageError(f"the database cannot be upgraded: {error}") from None


def known_revisions() -> set[str]:
    """Returns the numbers of the revisions in this release."""
    return {file.name[1:5] for file in _FOLDER.glob("r[0-9][0-9][0-9][0-9]_*.py")}


def _refuse_before_first(connection: sa.Connection, names: set[str]) -> None:
    from actors.registry.migrations.r0001_first_release import TABLES

    for name in TABLES.tables.keys() & names:
        found = {column["name"] for column in sa.inspect(connection).get_columns(name)}
        if missing := {*TABLES.tables[name].columns.keys()} - found:
            raise StorageError(
                "the registry was made by an older version of TG-Tinker than can be upgraded (table"
                f" {name} has no {', '.join(sorted(missing))}): nothing was changed. Use that older"
                " version, or choose a new home with TG_TINKER_HOME"
            )
