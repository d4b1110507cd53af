"""Tests PostgreSQL under the registry: the settings of its server, a lost server, one writer."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from actors.operations import doctor
from actors.privacy.budget import Budget
from actors.registry.database import REPLACED
from actors.registry.postgres import open_engine
from actors.registry.registry import Registry
from actors.storage import home
from support.databases import PASSWORD, Postgres, all_on, url_of
from support.listener import Listener
from support.privacy_helpers import new_budget, private_config, registry
from tg_tinker import DPBudgetExceededError, InvalidRequestError, ServiceClient, StorageError
from tg_tinker.cli.main import main
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.databases import check_database

BASE = "postgresql+psycopg://tg@127.0.0.1:5432/registry"
SPENT = private_config(Path("none"), dp={"noise_multiplier": 3.0})
_SPEND = """
import sys
from pathlib import Path
from actors.registry.registry import Registry
from tg_tinker import DPBudgetExceededError
url, place, run, epoch = sys.argv[1:]
known, made = Registry(url, Path(place) / "keyring"), 0
print(known.runs.of("default") != [], flush=True)
input()
while True:
    try:
        unit = (made % 7).to_bytes(16, "big")
        charge = ("default", "default", run, int(epoch), f"{run}{made}", [unit], True, [])
        known.ledgers.charge(*charge)
        made += 1
    except DPBudgetExceededError:
        break
print(made)
"""


def sole(place: Path) -> Registry:
    return Registry(url_of(place), place / "keyring", sole=True)


def charge(budget: Budget, charge_id: str | None = None) -> int:
    receipt = budget.registry.ledgers.charge(
        budget.tenant, budget.dataset, budget.run_id, budget.epoch,
        charge_id or secrets.token_hex(16), [bytes(16)], True, [],
    )  # fmt: skip
    return int(receipt.place.split("-")[0])


def charges(budget: Budget) -> int:
    entries = budget.registry.ledgers.entries(budget.tenant, budget.dataset)
    Ledger.replay(entries)
    return sum(entry["type"] == "charge" for entry in entries)


# --- one writer at most ---------------------------------------------------------------------


@pytest.mark.usefixtures("each_database")
def test_an_older_registry_changes_nothing_and_says_so(tmp_path: Path) -> None:
    place = tmp_path / "home"
    old = new_budget(registry(place), private_config(Path("none")))
    charge(old)
    new = sole(place)
    with pytest.raises(StorageError, match="another registry has taken over") as caught:
        charge(old)
    assert caught.value.details["reason"] == REPLACED
    with pytest.raises(StorageError, match="nothing was changed"):
        old.registry.runs.create("default", "{}")
    assert charges(old) == 1, "it may still read"
    new.runs.create("default", "{}")
    newest = sole(place)
    with pytest.raises(StorageError, match="taken over"):
        new.runs.claim(old.run_id)
    assert newest.runs.claim(old.run_id) == 2


@pytest.mark.usefixtures("each_database")
def test_two_processes_on_one_database_never_overspend_or_fork_a_ledger(tmp_path: Path) -> None:
    place = tmp_path / "home"
    known = registry(place)
    runs = [new_budget(known, SPENT) for _ in range(2)]
    spenders = [
        subprocess.Popen(
            [sys.executable, "-c", _SPEND, url_of(place), str(place), run.run_id, str(run.epoch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for run in runs
    ]  # fmt: skip
    assert [spender.stdout.readline() for spender in spenders] == ["True\n"] * 2
    for spender in spenders:
        spender.stdin.write("\n")
        spender.stdin.flush()
    made = [int(spender.communicate(timeout=120)[0]) for spender in spenders]
    assert sum(made) > 1  # on SQLite the faster one may take it all
    assert charges(runs[0]) == sum(made)
    with pytest.raises(DPBudgetExceededError):
        charge(runs[0])


# --- the server -----------------------------------------------------------------------------


@pytest.fixture
def server(postgres: Postgres) -> Iterator[Postgres]:
    with all_on(postgres):
        yield postgres


@pytest.mark.parametrize(
    ("name", "value"),
    [("synchronous_commit", "off"), ("synchronous_commit", "local"),
     ("default_transaction_read_only", "on")],
)  # fmt: skip
def test_a_database_that_may_lose_a_charge_is_refused(
    server: Postgres, tmp_path: Path, name: str, value: str
) -> None:
    home.create(tmp_path / "home")
    url = url_of(tmp_path / "home")
    database = server.of_home.pop(tmp_path / "home")  # spoiled for others
    server.execute(f"ALTER DATABASE {database} SET {name} = {value}")
    with pytest.raises(StorageError, match=f"{name.removeprefix('default_')} = {value}, it must"):
        Registry(url, tmp_path / "home" / "keyring")


def test_a_server_without_fsync_or_with_another_encoding_is_refused(
    server: Postgres, tmp_path: Path
) -> None:
    place = tmp_path / "home"
    home.create(place)
    name = f"t{secrets.token_hex(4)}"
    server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    with pytest.raises(StorageError, match="server_encoding = SQL_ASCII, it must be UTF8"):
        Registry(server.url(name), place / "keyring")
    server.execute("ALTER SYSTEM SET fsync = off")
    server.execute("SELECT pg_reload_conf()")
    try:
        while server.execute("SHOW fsync") != [("off",)]:  # the reload comes a moment later
            time.sleep(0.05)
        with pytest.raises(StorageError, match="fsync = off, it must be on"):
            Registry(server.url("postgres"), place / "keyring")
    finally:
        server.execute("ALTER SYSTEM RESET fsync")
        server.execute("SELECT pg_reload_conf()")


def test_a_server_that_dies_in_a_charge_fails_it_and_counts_what_it_committed(
    server: Postgres, tmp_path: Path
) -> None:
    budget = new_budget(registry(tmp_path / "home"), private_config(Path("none")))
    charge(budget, "before")
    settings = {"port": str(server.port), "listen_addresses": "127.0.0.1",
                "unix_socket_directories": ""}  # fmt: skip
    server.stop()
    with pytest.raises(StorageError, match="the registry's database refused") as caught:
        charge(budget, "lost")
    assert PASSWORD not in str(caught.value)
    assert "SELECT" not in str(caught.value)
    server.start(**settings)
    assert charges(budget) == 1
    assert charge(budget, "lost") == charge(budget, "lost"), "a repeat gets its receipt"
    assert charges(budget) == 2


def test_a_commit_whose_answer_is_lost_fails_and_counts_as_charged(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server commits, and its answer never arrives."""
    place = tmp_path / "home"
    budget = new_budget(registry(place), private_config(Path("none")))
    dialect = budget.registry.database.engine.dialect
    real = dialect.do_commit

    def lost(connection: Any) -> None:
        import psycopg

        real(connection)
        connection.driver_connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", lost)
    with pytest.raises(StorageError, match="whether a change was made is not known"):
        charge(budget, "lost")
    monkeypatch.undo()
    assert charges(budget) == 1, "the charge stands, though nobody drew noise for it"


# --- who uses it ----------------------------------------------------------------------------


@pytest.mark.slow
def test_programs_commands_and_doctor_use_the_database_that_the_variable_names(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "home"
    monkeypatch.setenv("TG_TINKER_HOME", str(place))
    monkeypatch.setenv("TG_TINKER_DATABASE", url_of(place))
    with ServiceClient(address="local") as service:
        service.register_dataset("clinic", 1.5)
        for words in (["privacy", "report", "clinic"], ["registry", "check"]):
            done = CliRunner().invoke(main, words, env={"RAY_ADDRESS": "local"})
            assert done.exit_code == 0, done.output
            assert PASSWORD not in done.output
        with ServiceClient(database=url_of(place)) as named:
            assert named.privacy_report("clinic").target_epsilon == 1.5
    assert (place / "registry.db").stat().st_size == 0, "nothing went into the home's file"
    found = {f.check: f for f in doctor.examine(place, str(place / "keyring"), str(tmp_path / "s"))}
    assert found["registry"].status == found["keyring and registry"].status == doctor.OK
    assert url_of(place) in found["registry"].message
    monkeypatch.setenv("TG_TINKER_DATABASE", BASE.replace("tg@", "tg:secret-4711@"))
    with pytest.raises(InvalidRequestError, match="hold no password") as caught:
        ServiceClient(address="local")
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize("variable", ["PGHOSTADDR", "PGHOST", "PGSERVICE"])
def test_only_the_url_says_which_server_gets_the_registry(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq takes PGHOSTADDR instead of the URL's host, perhaps for another machine in clear."""
    service = tmp_path / "services"
    service.write_text("[elsewhere]\nhost=127.0.0.2\nhostaddr=127.0.0.2\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    monkeypatch.setenv(variable, "elsewhere" if variable == "PGSERVICE" else "127.0.0.2")
    with Listener(b"", "127.0.0.2") as elsewhere:
        for host in ("127.0.0.1", "localhost"):  # where nobody listens at this port
            url = f"postgresql+psycopg://tg@{host}:{elsewhere.port}/registry?connect_timeout=2"
            with pytest.raises(OperationalError):
                open_engine(url).connect()
    assert elsewhere.heard == b""


# --- the URL --------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [
    "postgresql+psycopg://tg:secret-4711@127.0.0.1/registry",
    BASE + "?password=secret-4711",
    BASE + "?options=-csynchronous_commit%3Doff",
    BASE + "?service=secret-4711",
])  # fmt: skip
def test_a_secret_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"hold no password.*PGPASSFILE") as caught:
        check_database(url)
    assert "4711" not in str(caught.value)


def test_a_remote_database_says_whether_it_is_encrypted() -> None:
    remote = BASE.replace("127.0.0.1", "db.example")
    with pytest.raises(InvalidRequestError, match="needs sslmode"):
        check_database(remote)
    with pytest.raises(InvalidRequestError, match="needs sslmode"):
        check_database(BASE.replace("127.0.0.1", "127.example.org"))
    for url in (BASE, remote + "?sslmode=verify-full", "sqlite:////home/registry.db"):
        assert check_database(url) == url
    for url in ("mysql://tg@127.0.0.1/registry", "postgresql+psycopg://tg@127.0.0.1", "x", ""):
        with pytest.raises(InvalidRequestError, match="a database URL is sqlite:///FILE, or"):
            check_database(url)
