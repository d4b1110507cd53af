"""Tests backups of the registry: one state of a database in use, restored into an empty one of
either kind."""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.privacy.budget import Budget
from actors.registry.backup import backup, restore
from actors.registry.registry import Registry
from actors.registry.schema import METADATA
from actors.storage.home import create
from support.databases import Postgres, url_of
from support.privacy_helpers import new_budget, private_config, registry
from tg_tinker import InvalidRequestError, StorageError
from tg_tinker.cli.main import main
from tg_tinker.errors import LedgerMismatchError
from tg_tinker.records.ledger import Ledger

SIGMA = {"noise_multiplier": 20.0}

pytestmark = pytest.mark.usefixtures("each_database")


@pytest.fixture
def budget(tmp_path: Path) -> Budget:
    """Returns the budget of a run that was charged three times."""
    budget = new_budget(registry(tmp_path / "home"), private_config(Path("none"), dp=SIGMA))
    for _ in range(3):
        charge(budget)
    budget.registry.api_keys.create("default", "laptop", ["a/model"], None)
    return budget


def charge(budget: Budget) -> str:
    receipt = budget.registry.ledgers.charge(
        budget.tenant, budget.dataset, budget.run_id, budget.epoch, secrets.token_hex(16),
        [bytes(16)], True, [("sha256:b", "sha256:g")],
    )  # fmt: skip
    return receipt.place


def rows(known: Registry) -> dict[str, list[tuple[object, ...]]]:
    with known.database.reading() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(table.select())), key=repr)
            for table in METADATA.sorted_tables
            if table.name != "registry"
        }


def elsewhere(kind: str, path: Path, postgres: Postgres) -> str:
    if kind == "sqlite":
        return f"sqlite:///{path}"
    return postgres.url(postgres.new_database())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_backup_of_either_kind_comes_back_as_either_kind_row_for_row(
    budget: Budget, tmp_path: Path, postgres: Postgres, kind: str
) -> None:
    file = tmp_path / "monday.db"
    reached = backup(url_of(tmp_path / "home"), file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "monday" in path.name] == ["monday.db"]
    after = charge(budget)
    url = elsewhere(kind, tmp_path / "other.db", postgres)
    assert restore(file, url) == reached
    restored = Registry(url, tmp_path / "home" / "keyring")
    now, then = rows(budget.registry), rows(restored)
    assert then["ledger_entries"] == now["ledger_entries"][:-1]
    assert {name: now[name] for name in ("runs", "keys", "api_keys", "datasets")} == {
        name: then[name] for name in ("runs", "keys", "api_keys", "datasets")
    }
    with pytest.raises(LedgerMismatchError):  # it knows less than whoever saw the last charge
        restored.ledgers.charge(
            budget.tenant, budget.dataset, budget.run_id, budget.epoch, "f" * 32, [bytes(16)],
            True, [], [after],
        )  # fmt: skip
    before = rows(restored)
    with pytest.raises(InvalidRequestError, match="rows already"):
        restore(file, url)
    assert rows(restored) == before


def test_a_backup_during_charges_is_one_state_of_the_database(
    budget: Budget, tmp_path: Path
) -> None:
    over = threading.Event()

    def spend() -> None:
        while not over.wait(0.01):  # the budget pays for 1,110 charges
            charge(budget)

    spender = threading.Thread(target=spend)
    spender.start()
    try:
        for name in ("a.db", "b.db", "c.db"):
            backup(url_of(tmp_path / "home"), tmp_path / name)
            restored = Registry(f"sqlite:///{tmp_path / name}", tmp_path / "home" / "keyring")
            entries = restored.ledgers.entries(budget.tenant, budget.dataset)
            charged = sum(entry["type"] == "charge" for entry in entries)
            assert len(Ledger.replay(entries).accounts) == 1
            assert len(rows(restored)["charges"]) == charged
    finally:
        over.set()
        spender.join()


def test_what_fails_leaves_no_file_and_changes_no_database(budget: Budget, tmp_path: Path) -> None:
    url, file = url_of(tmp_path / "home"), tmp_path / "b.db"
    backup(url, file)
    whole = file.read_bytes()
    with pytest.raises(InvalidRequestError, match="name a file that does not"):
        backup(url, file)
    assert file.read_bytes() == whole
    with pytest.raises(StorageError, match="cannot write"):
        backup(url, tmp_path / "nowhere" / "b.db")
    with pytest.raises(InvalidRequestError, match="no backup"):
        restore(tmp_path / "none.db", f"sqlite:///{tmp_path / 'new.db'}")
    with sqlite3.connect(file) as damaged:  # a run that no artifact may name
        damaged.execute("DROP TABLE runs")
    with pytest.raises(StorageError):
        restore(file, f"sqlite:///{tmp_path / 'new.db'}")
    assert not list(tmp_path.glob("new.db*")), "an empty registry would begin anew"
    (tmp_path / "cut.db").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError):
        restore(tmp_path / "cut.db", f"sqlite:///{tmp_path / 'new.db'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.db", "cut.db", "home"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full")], ids=["keys", "disk"])
def test_a_restore_that_fails_removes_what_it_made_and_nothing_beside_it(
    budget: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file, new = tmp_path / "new.db.bak", tmp_path / "new.db"
    backup(url_of(tmp_path / "home"), file)
    (tmp_path / "new.db.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (file, tmp_path / "new.db.txt")}

    def fails(*_: object) -> None:
        assert new.exists()
        raise error

    monkeypatch.setattr("actors.registry.backup._copy", fails)
    with pytest.raises((KeyboardInterrupt, StorageError)):
        restore(file, f"sqlite:///{new}")
    assert {path: path.read_bytes() for path in tmp_path.glob("new.db*")} == before


@pytest.mark.parametrize("name", ["b[1].db", "b*.db", "?"])
def test_a_backup_of_any_name_is_the_only_file_it_leaves(
    budget: Budget, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    backup(url_of(tmp_path / "home"), folder / name)
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    "content", [b"my notes\n" * 500, b"", None], ids=["text", "empty", "other"]
)
def test_a_file_that_is_no_backup_is_named_and_not_the_registry(
    each_database: None, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "notes"
    if content is None:
        with sqlite3.connect(file) as other:
            other.execute("CREATE TABLE recipes (name TEXT)")
    else:
        file.write_bytes(content)
    create(tmp_path / "home")
    with pytest.raises(StorageError, match=f"{file} is no backup of a registry.*another backup"):
        restore(file, url_of(tmp_path / "home"))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit_rows SET row = 'no row'", "DELETE FROM runs",
        "UPDATE runs SET created_at = 'Monday'", "UPDATE runs SET status = CAST(x'ff41' AS TEXT)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_backup_with_rows_that_are_none_is_named_and_leaves_the_database_empty(
    budget: Budget, tmp_path: Path, postgres: Postgres, kind: str, damage: str
) -> None:
    file, url = tmp_path / "b.db", elsewhere(kind, tmp_path / "other.db", postgres)
    backup(url_of(tmp_path / "home"), file)
    whole = file.read_bytes()
    with closing(sqlite3.connect(file)) as edited, edited:
        edited.execute(damage)
    with pytest.raises(StorageError, match=rf"{file} is no backup of a registry, or .* damaged"):
        restore(file, url)
    file.write_bytes(whole)
    restore(file, url)


def test_the_commands_tell_where_each_chain_ends(
    budget: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path / "home"))
    file, other = str(tmp_path / "m.db"), f"sqlite:///{tmp_path / 'other.db'}"
    asked = ["registry", "backup", file, "--database", url_of(tmp_path / "home")]
    made = CliRunner().invoke(main, asked)
    assert made.exit_code == 0, made.output
    put = CliRunner().invoke(main, ["registry", "restore", file, "--database", other])
    assert put.exit_code == 0, put.output
    for said in (made.output, put.output):
        assert "ledger of default" in said
        assert "audit log" in said
        assert " 4-" in said  # after 0: registered, 1: opened, three charges
    assert "tg-tinker registry check" in put.output
    again = CliRunner().invoke(main, ["registry", "restore", file, "--database", other])
    assert again.exit_code == 1
    assert "restore into an empty database" in again.output


@pytest.mark.parametrize("each_database", ["sqlite"], indirect=True)
def test_a_program_that_makes_backups_knows_every_table(each_database: None) -> None:
    """The rooms that are imported declare the tables."""
    code = (
        "import actors.registry.backup; from actors.registry.schema import METADATA;"
        "print(' '.join(sorted(METADATA.tables)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert said.split() == sorted(METADATA.tables)
