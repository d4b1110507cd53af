"""Tests calls that share a transaction.

No call is answered before the transaction is durable, no call undoes another, and no call that must
run once runs twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
import sqlalchemy as sa

from actors.registry.group_commit import MOST_STORES, MOST_TOGETHER, GroupCommit
from actors.registry.registry import Registry
from actors.storage.home import create
from support.databases import url_of
from support.privacy_helpers import new_budget, private_config, registry
from tg_tinker.errors import InternalError
from tg_tinker.records.audit_log import AuditRow, verify

pytestmark = pytest.mark.usefixtures("each_database")

US = "default"
CALLS = [("sha256:batch", "sha256:gradient")]


@pytest.fixture
def known(tmp_path: Path) -> Registry:
    return registry(tmp_path / "home")


@pytest.fixture
def run(known: Registry) -> str:
    run = known.runs.create(US, private_config(Path("none")).model_dump_json())
    known.runs.claim(run)
    return run


class Waiting:
    """Calls that are taken inside its `with` block. They all wait, and run at the block's end.

    Attributes:
        commits: the number of calls that were answered at each commit, which waits up
            to 20 seconds for as many as `answered` names.
    """

    def __init__(self, known: Registry, answered: Sequence[int] = ()) -> None:
        self.commits: list[int] = []
        self._expected = answered
        self._calls = GroupCommit(lambda: known)
        self._pool = ThreadPoolExecutor(32)
        self._begun, self._free = threading.Event(), threading.Event()
        known.runs.hold = self._hold  # type: ignore[attr-defined]
        sa.event.listen(known.database.engine, "commit", self._committed)

    def __enter__(self) -> Self:
        self._replies = [self._pool.submit(self._calls.take, ("runs.hold", ()))]
        assert self._begun.wait(30)
        return self

    def take(self, name: str, *arguments: Any) -> None:
        before = len(self._calls._waiting)
        self._replies.append(self._pool.submit(self._calls.take, (name, arguments)))
        while len(self._calls._waiting) == before:
            time.sleep(0.001)

    def __exit__(self, *exception: object) -> None:
        self._free.set()
        replies = [reply.result(30) for reply in self._replies[1:]]
        self.errors = [reply.error and reply.error[0] for reply in replies]
        self.values = [reply.value for reply in replies]
        self._pool.shutdown()

    def _hold(self) -> None:
        self._begun.set()
        assert self._free.wait(30)

    def _committed(self, connection: sa.Connection) -> None:
        time.sleep(0.1)  # A call that is answered too early returns meanwhile.
        expected = dict(enumerate(self._expected)).get(len(self.commits), 0)
        deadline = time.monotonic() + 20
        while (done := sum(reply.done() for reply in self._replies[1:])) < expected:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.commits.append(done)


class Failing:
    """A failure of the registry's next commits, on the way to the database."""

    def __init__(self, known: Registry, times: int = 1) -> None:
        self.left, self._real = times, known.database.engine.dialect.do_commit
        known.database.engine.dialect.do_commit = self._commit

    def _commit(self, connection: Any) -> None:
        if self.left:
            self.left -= 1
            raise sa.exc.OperationalError("commit", {}, OSError("the disk is full"))
        self._real(connection)


def rows(known: Registry) -> list[AuditRow]:
    found = [AuditRow.parse(line) for line in known.audit_log.rows(US, 0, 10_000)]
    verify(found)
    return found


def steps(known: Registry) -> list[Any]:
    return [row.details["step"] for row in rows(known) if row.event == "step"]


# --- one transaction -----------------------------------------------------------------------------


def test_calls_that_wait_share_a_commit_and_are_answered_after_it_in_order(
    known: Registry, run: str, tmp_path: Path
) -> None:
    waiting = Waiting(known)
    with waiting:
        for step in range(1, 6):
            waiting.take("runs.record", run, 1, step, "active", CALLS)
            waiting.take("runs.get", US, run)
    assert waiting.commits == [0]
    assert [info.step for info, _ in waiting.values[1::2]] == [1, 2, 3, 4, 5], "what was before it"
    assert steps(registry(tmp_path / "home")) == [1, 2, 3, 4, 5]


def test_a_transaction_ends_after_so_many_calls(known: Registry, run: str) -> None:
    waiting = Waiting(known, answered=[0, MOST_TOGETHER])
    with waiting:
        for step in range(1, MOST_TOGETHER + 3):
            waiting.take("runs.record", run, 1, step, "active")
    assert waiting.commits == [0, MOST_TOGETHER]


def test_a_refused_call_undoes_itself_alone(known: Registry, run: str) -> None:
    budget = new_budget(known, private_config(Path("none"), dp={"max_participations": 1}))
    unit = [bytes(16)]
    charge = US, budget.dataset, budget.run_id, budget.epoch
    known.ledgers.charge(*charge, "first", unit, True, CALLS)
    before = known.ledgers.entries(US, budget.dataset)
    waiting = Waiting(known)
    with waiting:
        waiting.take("runs.record", run, 1, 1, "active", CALLS)
        waiting.take("ledgers.charge", *charge, "second", [*unit, bytes(range(16))], True, CALLS)
        waiting.take("runs.record", run, 1, 2, "active", CALLS)
        waiting.take("runs.claim", "tc-unknown")
        waiting.take("ledgers.charge", *charge, "third", [bytes(range(16))], True, CALLS)
    assert waiting.commits == [0]
    assert waiting.errors == [None, "DPBudgetExceededError", None, "InternalError", None]
    assert steps(known) == [1, 2]
    added = known.ledgers.entries(US, budget.dataset)[len(before) :]
    assert [entry["charge"] for entry in added] == ["third"], "its unit was free"
    refused = [row.subject for row in rows(known) if row.outcome != "ok"]
    assert refused == [budget.dataset]


# --- a database that fails -----------------------------------------------------------------------


def test_a_call_that_the_database_refuses_fails_alone(known: Registry, run: str) -> None:
    publish = US, run, 1, "art-1", 0, 10, True, b"{}", "k1"
    known.artifacts.publish(*publish)
    waiting = Waiting(known)
    with waiting:
        waiting.take("runs.record", run, 1, 1, "active", CALLS)
        waiting.take("artifacts.publish", *publish[:-2], b"other", "k1")
        waiting.take("runs.record", run, 1, 2, "active", CALLS)
    assert waiting.errors == [None, "InternalError", None]
    assert steps(known) == [1, 2]


def test_a_read_that_the_database_refuses_takes_no_change_with_it(
    known: Registry, run: str
) -> None:
    """PostgreSQL commits nothing of a transaction in which a statement has failed, and does not
    report that."""
    waiting = Waiting(known)
    with waiting:
        waiting.take("runs.record", run, 1, 1, "active", CALLS)
        waiting.take("audit_log.rows", US, 0, -1)
        waiting.take("runs.record", run, 1, 2, "active", CALLS)
    assert waiting.errors[::2] == [None, None]
    assert steps(known) == [1, 2]


@pytest.mark.sqlite_only
def test_a_statement_that_ends_the_transaction_takes_no_other_call_with_it(
    known: Registry, run: str
) -> None:
    """SQLite ends the transaction by itself when its disk is full."""
    with known.database.engine.begin() as tx:
        tx.exec_driver_sql(
            "CREATE TRIGGER full BEFORE UPDATE ON runs WHEN NEW.step = 2"
            " BEGIN SELECT RAISE(ROLLBACK, 'full'); END"
        )
    waiting = Waiting(known)
    with waiting:
        for step in (1, 2, 3):
            waiting.take("runs.record", run, 1, step, "active", CALLS)
    assert waiting.errors == [None, "InternalError", None]
    assert steps(known) == [1, 3]


def test_after_a_failed_commit_nobody_is_answered_before_another(known: Registry, run: str) -> None:
    waiting = Waiting(known)
    with waiting:
        for step in (1, 2, 3):
            waiting.take("runs.record", run, 1, step, "active", CALLS)
        Failing(known)
    assert waiting.errors == [None] * 3
    assert waiting.commits == [0, 0, 0, 0], "the one that failed, and one for each"
    assert steps(known) == [1, 2, 3]


def test_where_no_commit_succeeds_every_call_fails(known: Registry, run: str) -> None:
    waiting = Waiting(known)
    with waiting:
        for step in (1, 2, 3):
            waiting.take("runs.record", run, 1, step, "active", CALLS)
        failing = Failing(known, 1000)
    failing.left = 0
    assert waiting.errors == ["StorageError"] * 3
    assert steps(known) == []
    with Waiting(known) as waiting:
        waiting.take("runs.record", run, 1, 1, "active", CALLS)
    assert steps(known) == [1], "it goes on"


def test_what_must_not_be_made_twice_is_not(known: Registry, run: str) -> None:
    waiting = Waiting(known)
    with waiting:
        waiting.take("runs.record", run, 1, 1, "active", CALLS)
        waiting.take("runs.create", US, "{}")
        waiting.take("runs.record", run, 1, 2, "active", CALLS)
        Failing(known, 2)
    assert waiting.errors == ["StorageError"] * 2 + [None]
    assert len([row for row in rows(known) if row.event == "run.create"]) == 1


def test_a_fenced_registry_changes_nothing_for_anybody(
    known: Registry, run: str, tmp_path: Path
) -> None:
    Registry(url_of(tmp_path / "home"), tmp_path / "home" / "keyring", sole=True)
    waiting = Waiting(known)
    with waiting:
        waiting.take("runs.record", run, 1, 1, "active", CALLS)
        waiting.take("runs.get", US, run)
        waiting.take("runs.record", run, 1, 2, "active", CALLS)
    assert waiting.errors == ["StorageError", None, "StorageError"]
    assert steps(known) == []


# --- what waits for a store ----------------------------------------------------------------------


class Silent:
    """A store that answers once it may."""

    def __init__(self) -> None:
        self.asked, self.may = threading.Semaphore(0), threading.Event()

    def audit_heads(self, tenant: str) -> list[str]:
        self.asked.release()
        assert self.may.wait(30)
        return []


def test_a_store_that_does_not_answer_holds_up_no_other_call(
    known: Registry, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = Silent(), GroupCommit(lambda: known)
    monkeypatch.setattr(known.heads, "_open_store", lambda _: store)
    meeting = ("heads.meet_store", (US, "gs://silent"))
    with ThreadPoolExecutor(MOST_STORES) as pool:
        replies = [pool.submit(calls.take, meeting) for _ in range(MOST_STORES)]
        for _ in range(MOST_STORES):
            assert store.asked.acquire(timeout=30)
        assert calls.take(("runs.record", (run, 1, 1, "active", CALLS))).unwrap()
        assert calls.take(("heads.met", (US, "gs://silent"))).unwrap() is False
        busy = calls.take(meeting)
        assert busy.error
        assert busy.error[0] == "StorageError"
        store.may.set()
        assert [reply.result(30).unwrap() for reply in replies] == [{}] * MOST_STORES
    assert calls.take(meeting).unwrap() == {}
    assert calls.take(("heads.met", (US, "gs://silent"))).unwrap() is True


# --- what may be called -------------------------------------------------------------------------


def test_what_is_not_public_cannot_be_called(known: Registry) -> None:
    waiting = Waiting(known)
    with waiting:
        for name in ("runs._writer", "database.change", "runs.no_such_method"):
            waiting.take(name)
    assert waiting.errors == ["InternalError"] * 3
    assert waiting.commits == []


def test_a_remote_call_reaches_public_methods_of_parts_alone(tmp_path: Path) -> None:
    create(tmp_path / "home")
    calls = GroupCommit(lambda: Registry(url_of(tmp_path / "home"), tmp_path / "home" / "keyring"))
    assert calls.take(("runs.of", ("default",))).unwrap() == []
    for name in (
        "close",
        "database.close",
        "runs._database",
        "runs.__init__",
        "runs",
        "heads._met",
    ):
        with pytest.raises(InternalError):
            calls.take((name, ())).unwrap()
