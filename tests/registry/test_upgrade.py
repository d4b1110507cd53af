"""Tests a home of an earlier release: its database is upgraded as a whole or not at all, after a
backup."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from typer.testing import CliRunner

from actors.registry import backup, revisions
from actors.registry.database import Database
from actors.registry.registry import Registry
from actors.registry.schema import METADATA
from actors.registry.upgrade import upgrade
from actors.storage import home as homes
from actors.storage.home import DATABASE, KEYRING
from support.databases import url_of
from support.old_homes import EXPECTED, old_home, old_program, run_old
from tg_tinker import InvalidRequestError, StorageError
from tg_tinker.cli.main import main
from tg_tinker.cluster import cluster
from tg_tinker.records.audit_log import parse_rows, verify
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.databases import FIRST_REVISION, REVISION, revision_on_record

OLD = EXPECTED["tenants"]

OPENS = """
import sys
from pathlib import Path
from actors.registry import Registry
from tg_tinker import StorageError
assert Path(sys.modules["tg_tinker"].__file__).is_relative_to(Path.cwd())
home = Path(sys.argv[1])
try:
    known = Registry(f"sqlite:///{home / 'registry.db'}", home / "keyring")
    print("opened", flush=True)
    input()
    known.create_run("default", '{"model_ref": "m"}')
    print("changed")
except StorageError as error:
    print("refused:", error.message)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return old_home(tmp_path / "old")


def url(home: Path) -> str:
    return f"sqlite:///{home / DATABASE}"


def dump(file: Path) -> list[str]:
    """Returns tables and rows as SQL; does not create a file that is missing."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return list(database.iterdump())


def rows(home: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Returns all rows by table, without the row that names the holder of the database."""
    with closing(sqlite3.connect(home / DATABASE)) as database:
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        tables = METADATA.tables.keys() & names - {"registry"}
        return {
            name: sorted(database.execute(f"SELECT * FROM {name}"), key=repr)  # noqa: S608
            for name in tables
        }


# --- what an upgrade does ------------------------------------------------------------------------


def test_the_fixture_is_of_the_first_revision(home: Path) -> None:
    assert revision_on_record(home / DATABASE) == FIRST_REVISION
    assert "generation" in "".join(dump(home / DATABASE))


def test_an_old_database_is_refused_untouched_until_it_is_upgraded(home: Path) -> None:
    before = (home / DATABASE).read_bytes()
    for looks_only in (False, True):
        with pytest.raises(StorageError, match=r"older release.*registry upgrade") as caught:
            Registry(url(home), home / KEYRING, looks_only=looks_only)
        assert caught.value.details == {"reason": "older", "revision": FIRST_REVISION}
    assert (home / DATABASE).read_bytes() == before


def test_an_upgrade_loses_no_row_and_leaves_a_backup(home: Path, tmp_path: Path) -> None:
    before, old = rows(home), dump(home / DATABASE)
    kept = tmp_path / "before.db"
    assert upgrade(url(home), kept) == (FIRST_REVISION, REVISION)
    after = rows(home)
    keys, older = after.pop("api_keys"), before.pop("api_keys")
    assert after.pop("unit_sums")
    datasets = after.pop("datasets")
    assert datasets == [(*row, None, None) for row in before.pop("datasets")]
    assert after == before
    assert keys == [(*row, None) for row in older], "without MACs until a registry opens it"
    assert revision_on_record(home / DATABASE) == REVISION
    assert (kept.stat().st_mode & 0o777) == 0o600
    tables = {line for line in old if line.startswith("INSERT") and '"registry"' not in line}
    assert tables <= set(dump(kept))
    assert revision_on_record(kept) == FIRST_REVISION


def test_an_upgraded_home_says_what_it_said(home: Path, tmp_path: Path) -> None:
    upgrade(url(home), tmp_path / "before.db")
    registry = Registry(url(home), home / KEYRING)
    for tenant, expected in OLD.items():
        runs = {run.training_client_id: run for run in registry.runs.of(tenant)}
        for name, run in expected["runs"].items():
            found = runs[run["id"]]
            if name == "lost":  # whether its actor lives is not in the database
                continue
            assert (found.status, found.step) == (run["status"], run["step"])
        for name, ledger in expected["datasets"].items():
            replayed = Ledger.replay(registry.ledgers.entries(tenant, name))
            assert f"{replayed.length - 1}-{replayed.head}" == ledger["place"]
        told = [*parse_rows(registry.audit_log.rows(tenant, 0, 10_000))]
        verify(told)
        assert told.pop().event == "api_key.seal"
        assert (told[-1].seq, told[-1].hash) == (
            expected["audit_log"]["rows"], expected["audit_log"]["head"],
        )  # fmt: skip
    assert registry.data_keys.key_ids() == ["k1", "k2"]
    registry.runs.create("default", '{"model_ref": "m"}')  # and goes on


def test_old_uses_become_sums_of_each_unit(home: Path, tmp_path: Path) -> None:
    """Only of runs that count uses: an asserted sample pays by steps."""
    upgrade(url(home), tmp_path / "before.db")
    with closing(sqlite3.connect(home / DATABASE)) as database:
        uses = database.execute("SELECT run_id, unit, uses FROM unit_uses").fetchall()
        sums = database.execute("SELECT tenant, dataset, unit, spent FROM unit_sums").fetchall()
    costs = {
        OLD["default"]["runs"]["participation"]["id"]: ("default", "people", 1 / 4),
        OLD["clinic"]["runs"]["unlimited"]["id"]: ("clinic", "sandbox", 1.0),
    }
    expected = [
        (*costs[run][:2], unit, count * costs[run][2]) for run, unit, count in uses if run in costs
    ]
    assert sorted(sums) == sorted(expected)
    assert len(expected) < len(uses)


def test_an_open_run_of_the_old_release_goes_on_in_the_stream_of_draws(
    home: Path, tmp_path: Path
) -> None:
    """Its old charges count as used and unbound: their draws follow from no key."""
    upgrade(url(home), tmp_path / "before.db")
    known, run = Registry(url(home), home / KEYRING), OLD["default"]["runs"]["poisson"]["id"]
    epoch = known.runs.claim(run)
    old = known.ledgers.entries("default", "letters")
    units = [bytes([number]) * 16 for number in range(8)]
    assert known.ledgers.admit("default", "letters", run, units) == set()  # and writes nothing
    assert known.ledgers.entries("default", "letters") == old
    told = known.ledgers.draw("default", "letters", run, epoch, b"".join(units))
    known.ledgers.charge(
        "default", "letters", run, epoch, "f" * 32, [units[at] for at in told.drawn], True, [], (),
        (told.position, told.units),
    )  # fmt: skip
    entries = known.ledgers.entries("default", "letters")
    assert entries[: len(old)] == old
    assert [entry["type"] for entry in entries[len(old) :]] == ["upgrade", "draw", "charge"]
    ledger = Ledger.replay(entries)
    assert (told.position, ledger.position, ledger.unbound) == (3, 4, 3)
    assert ledger.epsilon > OLD["default"]["datasets"]["letters"]["total_epsilon"]


def test_a_second_upgrade_does_nothing_and_writes_no_backup(home: Path, tmp_path: Path) -> None:
    upgrade(url(home), tmp_path / "before.db")
    assert upgrade(url(home), tmp_path / "again.db") == (REVISION, REVISION)
    assert not (tmp_path / "again.db").exists()


def test_an_upgrade_without_room_for_a_backup_does_not_happen(home: Path, tmp_path: Path) -> None:
    before = dump(home / DATABASE)
    (tmp_path / "there").touch()
    with pytest.raises(InvalidRequestError, match="exists"):
        upgrade(url(home), tmp_path / "there")
    with pytest.raises(StorageError, match="cannot write"):
        upgrade(url(home), tmp_path / "no" / "folder.db")
    assert dump(home / DATABASE) == before


def test_two_upgrades_at_once_are_one(home: Path, tmp_path: Path) -> None:
    """The second upgrade finds the work done, and writes no backup."""
    with ThreadPoolExecutor(3) as pool:
        done = [*pool.map(lambda _: upgrade(url(home), tmp_path / "before.db"), range(3))]
    assert sorted(done) == [(FIRST_REVISION, REVISION), (REVISION, REVISION), (REVISION, REVISION)]
    with closing(sqlite3.connect(home / DATABASE)) as database:
        (token,) = database.execute("SELECT fencing_token FROM registry").fetchone()
    with closing(sqlite3.connect(old_home(tmp_path / "again") / DATABASE)) as database:
        assert database.execute("SELECT generation FROM registry").fetchone() == (token - 3,)


def test_nobody_changes_a_row_between_the_backup_and_the_upgrade(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a change would be missing from the backup."""
    written = backup.write_backup

    def meanwhile(old: sa.Connection, path: Path) -> Any:
        done = written(old, path)
        with (
            closing(sqlite3.connect(home / DATABASE, timeout=0.1)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("UPDATE runs SET step = step + 1")
        return done

    monkeypatch.setattr("actors.registry.upgrade.write_backup", meanwhile)
    assert upgrade(url(home), tmp_path / "before.db") == (FIRST_REVISION, REVISION)


@pytest.mark.parametrize("found", ["", "('0002'), ('0001')", "('')"])
def test_a_record_that_is_damaged_is_called_so(home: Path, tmp_path: Path, found: str) -> None:
    upgrade(url(home), tmp_path / "before.db")
    with closing(sqlite3.connect(home / DATABASE)) as database:
        database.execute("DELETE FROM registry_revision")
        if found:
            database.execute(f"INSERT INTO registry_revision VALUES {found}")  # noqa: S608
        database.commit()
    for act in (
        lambda: Registry(url(home), home / KEYRING),
        lambda: upgrade(url(home), tmp_path / "other.db"),
    ):
        with pytest.raises(StorageError, match=r"damaged.*must have one row"):
            act()
    assert not (tmp_path / "other.db").exists()


def test_tables_of_others_and_tables_that_were_never_needed_hold_up_nothing(
    home: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(home / DATABASE)) as database:
        database.execute("CREATE TABLE theirs (odd, odder BLORB)")
        database.execute("INSERT INTO theirs VALUES (1, 2)")
        database.execute("DROP TABLE orphans")
        database.commit()
    assert upgrade(url(home), tmp_path / "before.db") == (FIRST_REVISION, REVISION)
    with closing(sqlite3.connect(home / DATABASE)) as database:
        assert database.execute("SELECT * FROM theirs").fetchall() == [(1, 2)]
    known = Registry(url(home), home / KEYRING)
    assert known.orphans.of("default") == {}
    assert backup.restore(tmp_path / "before.db", f"sqlite:///{tmp_path / 'restored.db'}")


def test_rows_that_refer_to_nothing_stop_it(home: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(home / DATABASE)) as database:
        database.execute("INSERT INTO artifact_labels VALUES ('art-none', 'a', 'b')")
        database.commit()
    before = dump(home / DATABASE)
    for _ in range(2):
        with pytest.raises(StorageError, match="refer to missing rows"):
            upgrade(url(home), tmp_path / "before.db")
        assert not (tmp_path / "before.db").exists()  # or each try would leave one
    assert dump(home / DATABASE) == before


def test_a_database_of_a_newer_release_is_refused_untouched(home: Path, tmp_path: Path) -> None:
    upgrade(url(home), tmp_path / "before.db")
    with closing(sqlite3.connect(home / DATABASE)) as database:
        database.execute("UPDATE registry_revision SET version_num = '9999'")
        database.commit()
    before = dump(home / DATABASE)
    for act in (
        lambda: Registry(url(home), home / KEYRING),
        lambda: upgrade(url(home), tmp_path / "newer.db"),
        lambda: backup.backup(url(home), tmp_path / "newer.db"),
    ):
        with pytest.raises(StorageError, match=r"newer release|cannot be upgraded"):
            act()
    assert dump(home / DATABASE) == before
    assert not (tmp_path / "newer.db").exists()


# --- tables, on each database --------------------------------------------------------------------


def emptied(place: Path) -> str:
    """Returns the database of a home without tables.

    A server's database may have those of an earlier test.
    """
    with (
        closing(Database(url_of(place), other_revisions=True)) as found,
        found.engine.begin() as tx,
    ):
        METADATA.drop_all(tx)
        revisions.VERSIONS.drop(tx, checkfirst=True)
    return url_of(place)


@pytest.mark.usefixtures("each_database")
def test_the_newest_revision_makes_what_the_schema_declares(tmp_path: Path) -> None:
    homes.create(tmp_path / "home")
    with closing(Database(emptied(tmp_path / "home"), other_revisions=True)) as empty:
        with empty.engine.begin() as tx:
            revisions.run_revisions(tx)
        with empty.engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": revisions.VERSIONS.name}
            )
            assert compare_metadata(context, METADATA) == []
            assert revisions.revision_of(connection) == REVISION


@pytest.mark.usefixtures("each_database")
def test_a_new_home_has_the_tables_of_an_upgraded_one(tmp_path: Path) -> None:
    homes.create(tmp_path / "home")
    Registry(emptied(tmp_path / "home"), tmp_path / "home" / KEYRING).close()
    with closing(Database(url_of(tmp_path / "home"), looks_only=True)) as new, new.reading() as one:
        assert (
            compare_metadata(
                MigrationContext.configure(one, opts={"version_table": revisions.VERSIONS.name}),
                METADATA,
            )
            == []
        )
        assert revisions.revision_of(one) == REVISION


@pytest.mark.usefixtures("each_database")
def test_a_backup_of_an_older_release_is_restored_and_upgraded(tmp_path: Path) -> None:
    older = old_home(tmp_path / "old")
    backup.backup(url(older), tmp_path / "older.db")
    homes.create(tmp_path / "home")
    reached = backup.restore(tmp_path / "older.db", url_of(tmp_path / "home"))
    assert len(reached) == sum(len(t["datasets"]) + 1 for t in OLD.values())
    shutil.copy(older / KEYRING, tmp_path / "home" / KEYRING)
    known = Registry(url_of(tmp_path / "home"), tmp_path / "home" / KEYRING)
    assert len(known.runs.of("default")) == len(OLD["default"]["runs"])
    with closing(Database(url_of(tmp_path / "home"), looks_only=True)) as new, new.reading() as one:
        assert (
            compare_metadata(
                MigrationContext.configure(one, opts={"version_table": revisions.VERSIONS.name}),
                METADATA,
            )
            == []
        )


@pytest.mark.usefixtures("each_database")
def test_an_old_database_of_either_kind_is_upgraded(tmp_path: Path) -> None:
    """The database is as the first release left it: its tables and rows, and no revision on
    record."""
    older = old_home(tmp_path / "old")
    place = tmp_path / "home"
    homes.create(place)
    source = sa.create_engine(url(older))
    with (
        closing(Database(emptied(place), other_revisions=True)) as new,
        new.engine.begin() as tx, source.connect() as old,
    ):  # fmt: skip
        revisions.run_revisions(tx, FIRST_REVISION)
        revisions.VERSIONS.drop(tx)
        for table in backup._tables(old).values():
            for row in old.execute(sa.select(table)).mappings():
                tx.execute(table.insert(), dict(row))
    source.dispose()
    assert upgrade(url_of(place), tmp_path / "before.db") == (FIRST_REVISION, REVISION)
    shutil.copy(older / KEYRING, place / KEYRING)
    known = Registry(url_of(place), place / KEYRING)
    with known.database.reading() as connection:
        total = "SELECT count(*), sum(spent) FROM unit_sums"
        assert tuple(connection.exec_driver_sql(total).one()) == (8, 5.5)
    for tenant, expected in OLD.items():
        assert len(known.runs.of(tenant)) == len(expected["runs"])
        assert known.audit_log.rows(tenant, 0, 10_000)


# --- killed, and met by the old program ----------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_statement_it_is_the_old_database_or_the_new_one(
    home: Path, tmp_path: Path
) -> None:
    old = dump(home / DATABASE)
    whole = old_home(tmp_path / "whole")
    upgrade(url(whole), tmp_path / "whole.db")
    new = dump(whole / DATABASE)
    assert new != old
    seen, at, died = [], 0, True
    # A process that is small and has upgraded once: each fork of this one would take a second.
    again = url(old_home(tmp_path / "again")), tmp_path / "again.db"
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=upgrade, initargs=again) as small:
        while died:
            died = small.submit(_killed_at, home, tmp_path / f"{at}.db", at).result()
            found = dump(home / DATABASE)
            assert found in (old, new), at
            seen.append(found == new)
            at += 1
            if found == new and died:  # the last statement was through: again from the beginning
                shutil.rmtree(home)
                old_home(home)
    assert at > 20
    assert seen[0] is False
    assert seen[-1] is True
    assert revision_on_record(home / DATABASE) == REVISION


def _killed_at(home: Path, kept: Path, at: int) -> bool:
    """Upgrades in a process that dies after a statement; returns False if it finished."""
    child = os.fork()
    if not child:
        left = iter(range(at, -1, -1))

        def step(*_: object, **__: object) -> None:
            if next(left, None) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        for event in ("after_cursor_execute", "commit"):
            sa.event.listen(sa.Engine, event, step)
        try:
            upgrade(url(home), kept)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_the_old_program_refuses_an_upgraded_home(home: Path, tmp_path: Path) -> None:
    program = old_program(tmp_path / "program")
    upgrade(url(home), tmp_path / "before.db")
    before = dump(home / DATABASE)
    said, error = run_old(program, OPENS, str(home)).communicate("\n", timeout=120)
    assert said.startswith("refused: the registry was made by an older version"), error
    assert dump(home / DATABASE) == before


def test_an_old_program_that_runs_changes_nothing_from_then_on(home: Path, tmp_path: Path) -> None:
    running = run_old(old_program(tmp_path / "program"), OPENS, str(home))
    assert running.stdout is not None
    assert running.stdout.readline() == "opened\n", running.communicate()
    upgrade(url(home), tmp_path / "before.db")
    before = dump(home / DATABASE)
    said, error = running.communicate("\n", timeout=120)
    assert said.startswith("refused:"), error
    assert dump(home / DATABASE) == before


def test_the_old_program_opens_the_backup(home: Path, tmp_path: Path) -> None:
    """A return to the old program loses what was done since, and nothing else."""
    upgrade(url(home), tmp_path / "before.db")
    shutil.copy(tmp_path / "before.db", home / DATABASE)
    program = old_program(tmp_path / "program")
    said, error = run_old(program, OPENS, str(home)).communicate("\n", timeout=120)
    assert said == "opened\nchanged\n", error


# --- by itself -----------------------------------------------------------------------------------


def test_the_home_of_a_cluster_that_runs_is_not_upgraded_unasked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs of that cluster would end with their next change."""
    before = dump(home / DATABASE)
    monkeypatch.setattr(cluster, "read", lambda home: SimpleNamespace(address="127.0.0.1:6379"))
    with pytest.raises(StorageError, match=r"tg-tinker down.*registry upgrade"):
        cluster._upgrade(home / DATABASE)
    assert dump(home / DATABASE) == before
    monkeypatch.setattr(cluster, "read", lambda home: None)
    cluster._upgrade(home / DATABASE)
    assert revision_on_record(home / DATABASE) == REVISION
    assert len([*home.glob("registry-0001-*.db")]) == 1


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("TG_TINKER_HOME", str(home))
    return lambda *words: CliRunner().invoke(main, ["registry", *words])


def test_the_command_upgrades_once_and_says_where_the_backup_is(
    at_home: Callable[..., Any], home: Path
) -> None:
    said = at_home("upgrade")
    assert said.exit_code == 0, said.output
    found = re.search(r"from revision 0001 to \d{4}\. The backup is (\S+)", said.output)
    assert found
    assert revision_on_record(Path(found[1])) == FIRST_REVISION
    assert Path(found[1]).parent == home
    again = at_home("upgrade")
    assert again.output == f"Nothing to do: the database has revision {REVISION} already\n"
    assert len([*home.glob("registry-*.db")]) == 1
