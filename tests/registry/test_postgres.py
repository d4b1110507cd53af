"""Tests PostgreSQL under the registry: the settings of its server, a lost server, one writer."""

from __future__ import annotations

import re
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from actors.operations import doctor
from actors.privacy.budget import Budget
from actors.registry.database import REPLACED, typed_refusal
from actors.registry.postgres import LIMITS, NEEDED, check_settings, open_engine
from actors.registry.refusals import refusal_of
from actors.registry.registry import Registry
from actors.registry.scratch import scratch_registry
from actors.storage import home
from support.databases import PASSWORD, USER, Postgres, all_on, pgbouncer, url_of
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


# --- why it refuses ---------------------------------------------------------------------------


def refused(url: str) -> str:
    """Returns what the registry says of a server that refuses; nothing of the server's own text."""
    with pytest.raises(StorageError) as caught, typed_refusal():
        open_engine(url).connect()
    assert PASSWORD not in caught.value.message
    assert "FATAL" not in caught.value.message
    assert caught.value.__suppress_context__
    return caught.value.message


def test_a_server_that_refuses_a_connection_is_told_apart(server: Postgres, tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("*:*:*:*:wrong\n")
    (tmp_path / "pass").chmod(0o600)
    here = f"postgresql+psycopg://tg@127.0.0.1:{server.port}/postgres"
    login = f"LOGIN PASSWORD '{PASSWORD}'"
    server.execute(f"CREATE ROLE few {login} CONNECTION LIMIT 0")
    server.execute(f"CREATE ROLE away NO{login}")
    found = {
        "password is wrong": refused(f"{here}?passfile={tmp_path / 'pass'}"),
        "or missing": refused(f"{here}?passfile={tmp_path / 'none'}"),
        "no database of this name": refused(server.url("nosuch")),
        "no user of this name": refused(server.url("postgres", "away")),
        "no more connections": refused(server.url("postgres", "few")),
        "offers no TLS": refused(server.url("postgres") + "&sslmode=require"),
        "nobody listens": refused("postgresql+psycopg://tg@127.0.0.1:1/registry"),
        "host and port": refused(f"postgresql+psycopg://tg@/registry?host={tmp_path}"),
    }
    assert [says for says, message in found.items() if says not in message] == []


@pytest.mark.parametrize(("text", "says"), [
    ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "tg"', "pg_hba.conf"),
    ("FATAL:  remaining connection slots are reserved for superuser", "no more connections"),
    ("FATAL:  sorry, too many clients already", "no more connections"),
    ("FATAL:  the database system is starting up", "starting or stopping"),
    ("FATAL:  the database system is shutting down", "starting or stopping"),
    ("FATAL:  the database system is in recovery mode", "starting or stopping"),
    ("SSL error: certificate verify failed", "is not trusted"),
    ('server certificate for "a" does not match host name "b"', "is not trusted"),
    ('root certificate file "/x" does not exist', "files for TLS"),
    ("failed to resolve host 'db': [Errno -2] Name or service not known", "has no address"),
    ('could not translate host name "db" to address: x', "has no address"),
    ("connection timeout expired", "in time"),
    ("FATAL:  no such database: x", "no database of this name"),
    ("FATAL:  unsupported startup parameter: options", "pooler"),
    ("FATAL:  Passwort-Authentifizierung", "not known here"),
])  # fmt: skip
def test_the_texts_of_servers_and_poolers_are_understood(text: str, says: str) -> None:
    refusal = refusal_of(sa.exc.OperationalError("SELECT 4711", {}, ValueError(text)))
    assert says in refusal.text + refusal.remedy


@pytest.mark.parametrize(("before", "statement", "says"), [
    ("SET TRANSACTION READ ONLY", "CREATE TABLE x (y int)", "a standby, or writes are"),
    ("SET LOCAL statement_timeout = 10", "SELECT pg_sleep(5)", "was too slow"),
    ("SET ROLE pg_monitor", "CREATE TABLE x (y int)", "may not do this"),
    ("SELECT 1", "SELECT * FROM nosuch", "table is missing"),
    ("SELECT 1", "EXECUTE nosuch", "a pooler"),
])  # fmt: skip
def test_statements_that_the_server_refuses_are_told_apart(
    server: Postgres, before: str, statement: str, says: str
) -> None:
    with open_engine(server.url("postgres")).connect() as connection:
        connection.exec_driver_sql(before)
        with pytest.raises(StorageError, match=says), typed_refusal():
            connection.exec_driver_sql(statement)


def test_sqlite_that_refuses_is_told_apart(tmp_path: Path) -> None:
    place = tmp_path / "home"
    known = scratch_registry(place)
    locker = sqlite3.connect(place / "registry.db", isolation_level=None)
    known.database.engine.dispose()
    with closing(locker), known.database.engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        locker.execute("BEGIN IMMEDIATE")
        connection.exec_driver_sql("PRAGMA busy_timeout=0")
        with pytest.raises(StorageError, match="another program locks"), typed_refusal():
            connection.exec_driver_sql("BEGIN IMMEDIATE")


# --- a pooler between -----------------------------------------------------------------------


def through(port: int, url: str) -> str:
    return re.sub(r"@127.0.0.1:\d+", f"@127.0.0.1:{port}", url)


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_that_drops_the_limits_is_refused(
    server: Postgres, tmp_path: Path, mode: str
) -> None:
    """A registry that freezes in a change would hold the one lock for good."""
    home.create(tmp_path / "home")
    name = server.new_database()
    url = server.url(name)
    with pgbouncer(server, mode) as port:
        with pytest.raises(StorageError, match=r"lock_timeout = 0, although .* has set 30s") as was:
            Registry(through(port, url), tmp_path / "home" / "keyring")
        assert "pgbouncer" in was.value.message
    assert server.execute("SELECT * FROM pg_tables WHERE schemaname = 'public'", name) == []


def test_a_pooler_that_does_not_know_the_limits_has_its_own_sentence(server: Postgres) -> None:
    with pgbouncer(server, "transaction", ignored="extra_float_digits") as port:
        assert "a pooler in front" in refused(through(port, server.url("postgres")))


def test_a_pooler_is_fine_where_the_server_sets_the_limits_for_the_user(
    server: Postgres, tmp_path: Path
) -> None:
    """With `pool_mode = session`, as docs/storage.md says."""
    home.create(tmp_path / "home")
    url = url_of(tmp_path / "home")
    for name, limit in LIMITS.items():
        server.execute(f"ALTER ROLE {USER} SET {name} = '{limit}'")
    try:
        with pgbouncer(server, "session") as port:
            known = Registry(through(port, url), tmp_path / "home" / "keyring", sole=True)
            for _ in range(8):  # the driver prepares a statement that it has seen five times
                known.runs.create("default", "{}")
            assert known.audit_log.head("default").seq == 8
            known.close()
    finally:
        server.execute(f"ALTER ROLE {USER} RESET ALL")


@pytest.mark.parametrize("name", LIMITS)
def test_any_limit_that_is_dropped_is_noticed(name: str) -> None:
    class Dropping:
        """A connection whose server has forgotten one setting."""

        def execute(self, _: str) -> Any:
            found = {"server_version_num": "150000"} | {k: v[0] for k, v in NEEDED.items()}
            return SimpleNamespace(fetchone=lambda: [*(found | LIMITS | {name: "0"}).values()])

        def rollback(self) -> None:
            pass

    with pytest.raises(StorageError, match=f"{name} = 0, although"):
        check_settings(Dropping(), None)


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
