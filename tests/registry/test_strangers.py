"""Tests lookups of what another tenant owns: each leaves a row in the owner's log, after an answer
that tells nothing."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa

from actors.artifacts import adapters, copies, delete, fetch
from actors.operations import verify
from actors.registry import request_rows
from actors.registry.group_commit import GroupCommit
from actors.registry.lookups import ANYONE
from actors.registry.registry import PARTS, Registry
from actors.registry.request_rows import (
    MOST_OF_CALLER,
    MOST_OF_TENANT,
    WINDOW_S,
    Request,
    RequestRows,
)
from actors.registry.rollback import meet
from actors.storage.manifest import DATA_KEY
from serve_app.replica.sources import Sources
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.audit import CONFIG, rows_of, seen
from support.databases import url_of
from tg_tinker import ServiceClient
from tg_tinker.errors import NotFoundError, StorageError, TGTinkerError
from tg_tinker.storage.envelope import context_of, new_key
from tg_tinker.types import ArtifactQuery

THEM = "bank"
NEVER = {"artifact": "art-none", "run": "tc-none"}
NAMES = {"artifact_id": "artifact", "source_id": "artifact", "run_id": "run"}
"""The parameters of the registry's methods that name an artifact or a run."""


@pytest.fixture(autouse=True)
def met(service: Service) -> None:
    meet(service.registry, service.store, THEM)


# --- every method of the registry ----------------------------------------------------------------


def asking() -> list[str]:
    """Returns the remote methods by which a tenant names an artifact or a run."""
    found = []
    for part, kind in PARTS.items():
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            taken = inspect.signature(method).parameters.keys()
            if name[0] != "_" and NAMES.keys() & taken and {"tenant", "shown"} & taken:
                found.append(f"{part}.{name}")
    return [*found, "catalogue.find", "ledgers.open_account"]


def arguments(service: Service, method: Callable[..., Any], given: dict[str, Any]) -> list[Any]:
    """Returns arguments for a method: those given, and plausible ones for the rest."""
    values: dict[str, Any] = {
        "tenant": THEM, "epoch": service.epoch, "labels": {}, "when": None, "models": [],
        "manifest": b"{}", "wrapped": b"{}", "held": b"", "store": service.store.root, "units": [],
        "step": 1, "size_bytes": 1, "include_optimizer": True, "key_id": "k1", "before": "x",
        "stored_as": "x.2", "dataset": "patients", "charge_id": "c", "noised": True, "calls": [],
        "others": [], "places": {}, "who": "sdk", "under": "k0", "config": CONFIG,
        "event": "artifact.delete", "known": [], "query": ArtifactQuery(),
        "sigma": 1.0, "told": None, "unit": None,
    }  # fmt: skip
    taken = [*inspect.signature(method).parameters]
    return [(values | given)[name] for name in taken]


def asks(service: Service, method: str, names: dict[str, str]) -> Iterator[Callable[[], Any]]:
    """Yields the calls of a method by the other tenant, one for each parameter that names."""
    part, name = method.split(".")
    called = getattr(getattr(service.registry, part), name)
    keys, mine = service.registry.data_keys, service.registry.runs.create(THEM, CONFIG)
    epoch = service.registry.runs.claim(mine)
    own = {"run_id": mine, "epoch": epoch, "artifact_id": "art-new", "source_id": "art-new"}
    run = keys.capability(THEM, mine, epoch)
    if method == "catalogue.find":
        for query in (ArtifactQuery(run=names["run"]), ArtifactQuery(after=names["artifact"])):
            yield lambda query=query: called(THEM, query)
        return
    if method == "ledgers.open_account":
        yield lambda: called(THEM, "patients", {"type": "open", "run": names["run"]})
        return
    taken = inspect.signature(called).parameters.keys()
    for parameter in NAMES.keys() & taken:
        for shown in (run, keys.reader(THEM), keys.keeper(THEM)) if "shown" in taken else (None,):
            given = own | {"shown": shown, parameter: names[NAMES[parameter]]}
            yield lambda given=given: called(*arguments(service, called, given))


@pytest.mark.parametrize("method", asking())
def test_whatever_names_another_tenants_artifact_or_run_leaves_a_row(
    service: Service, method: str
) -> None:
    names = {"artifact": service.publish(), "run": service.run}
    calls = [*asks(service, method, names)]
    assert calls
    for call in calls:
        before = len(seen(service.registry))
        service.registry.database.requests._seen.clear()  # else a repeat is only counted
        with suppress(TGTinkerError, sa.exc.IntegrityError):  # the database keeps ids unique
            call()
        found = seen(service.registry)[before:]
        assert found
        for who, event, subject, outcome in found:
            assert (who, outcome) == (ANYONE, "access_denied")
            assert (event, subject) in [(f"{kind}.ask", name) for kind, name in names.items()]
        assert THEM not in str(found)


@pytest.mark.parametrize("method", asking())
def test_a_name_that_never_was_leaves_no_row_and_the_same_answer(
    service: Service, method: str
) -> None:
    names = {"artifact": service.publish(), "run": service.run}
    pairs = zip(asks(service, method, names), asks(service, method, NEVER), strict=True)
    for foreign, never in pairs:
        said, before = [], len(seen(service.registry))
        for call in (never, foreign):
            try:
                said.append(repr(call()))
            except Exception as error:
                said.append(f"{type(error).__name__}: {getattr(error, 'message', '')}")
            if call is never:
                assert len(seen(service.registry)) == before
        for kind, name in names.items():
            said[1] = said[1].replace(name, NEVER[kind])
        if method in TAKEN:
            continue
        assert said[0] == said[1]


TAKEN = {"artifacts.publish", "artifacts.publish_copy", "data_keys.new"}
"""They are given a name for something new, so they say that a name is taken."""


# --- every way of a client -----------------------------------------------------------------------


def ways(service: Service, name: str, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    registry, root, known = service.registry, str(service.root), service.registry.catalogue
    mine = registry.runs.create(THEM, CONFIG)
    actor = registry.data_keys.capability(THEM, mine, registry.runs.claim(mine))
    sources = Sources(registry, new_key(), "tg", root, "some/model")
    return {
        "export": lambda: adapters.export_adapter(registry, root, THEM, name, tmp_path / "out"),
        "delete": lambda: delete.delete(registry, root, THEM, name),
        "delete --lost": lambda: delete.delete(registry, root, THEM, name, lost=True),
        "shred": lambda: delete.shred(registry, root, THEM, name),
        "verify": lambda: [*verify.verify(registry, root, THEM, name)],
        "load_state": lambda: fetch.fetch(registry, service.store, actor, name),
        "copy": lambda: copies.copy(registry, root, THEM, name),
        "reseal": lambda: copies.reseal(registry, root, THEM, name),
        "info": lambda: known.get(THEM, name),
        "labels": lambda: known.set_labels(THEM, name, {"a": "b"}),
        "expiry": lambda: known.set_expiry(THEM, name, datetime(2099, 1, 1, tzinfo=UTC)),
        "list": lambda: known.find(THEM, ArtifactQuery(after=name)),
        "http": lambda: sources.find(THEM, (), name, "api-key 7"),
        "http with a key of its own": lambda: sources.find(THEM, (name,), name, "api-key 7"),
    }


def test_each_way_to_ask_for_an_artifact_leaves_a_row(service: Service, tmp_path: Path) -> None:
    for way in ways(service, "", tmp_path):
        artifact = service.publish()
        with pytest.raises(NotFoundError):
            ways(service, artifact, tmp_path)[way]()
        assert seen(service.registry)[-1] == (ANYONE, "artifact.ask", artifact, "access_denied"), (
            way
        )
        service.registry.artifacts.delete(TENANT, artifact)
        with pytest.raises(NotFoundError):  # a deleted artifact keeps its owner
            ways(service, artifact, tmp_path)[way]()
    run = service.run
    for ask in (
        lambda: service.registry.runs.get(THEM, run),
        lambda: service.registry.runs.resume_point(THEM, run),
    ):
        service.registry.database.requests._seen.clear()
        with pytest.raises(NotFoundError):
            ask()
        assert seen(service.registry)[-1] == (ANYONE, "run.ask", run, "access_denied")


def test_what_a_tenant_asks_of_its_own_leaves_no_such_row(service: Service) -> None:
    artifact = service.publish()
    service.registry.artifacts.delete(TENANT, artifact)
    for name in (artifact, "art-none"):
        with pytest.raises(NotFoundError):
            service.fetch(name)
    assert not [row for row in seen(service.registry) if row[1].endswith(".ask")]


# --- after the answer ----------------------------------------------------------------------------


def stored(registry: Registry, tenant: str = TENANT) -> int:
    """Returns the number of rows in the database, without writing those that wait."""
    return registry.audit_log.head(tenant).seq


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_row_comes_after_the_answer_and_by_itself(service: Service) -> None:
    registry, artifact = service.registry, service.publish()
    calls, before = GroupCommit(lambda: registry), stored(registry)
    reply = calls.take(("catalogue.get", (THEM, artifact)))
    assert reply.error
    assert stored(registry) == before
    soon(lambda: stored(registry) == before + 1)
    calls.close()


def test_a_name_that_never_was_costs_the_disk_the_same(service: Service) -> None:
    """Else the time of the next answers would tell whether a row was written."""
    registry, artifact = service.registry, service.publish()
    commits: list[int] = []
    sa.event.listen(registry.database.engine, "commit", lambda _: commits.append(1))
    made = {}
    for name in ("art-none", artifact):
        with pytest.raises(NotFoundError):
            registry.catalogue.get(THEM, name)
        assert not commits
        registry.audit_log.settle()
        made[name], commits = len(commits), commits.clear() or commits
    assert made == {"art-none": 1, artifact: 1}
    registry.audit_log.settle()
    assert not commits


def test_a_registry_that_is_closed_writes_what_waits(service: Service) -> None:
    artifact = service.publish()
    calls = GroupCommit(lambda: service.registry)
    for _ in range(3):
        calls.take(("catalogue.get", (THEM, artifact)))
    calls.close()
    again = Registry(url_of(service.home), service.home / "keyring")
    last = rows_of(again)[-2:]
    assert [(row.event, row.details) for row in last] == [
        ("artifact.ask", {}), ("artifact.ask", {"more": 2}),
    ]  # fmt: skip
    assert {row.subject for row in last} == {artifact}


def test_a_row_that_the_disk_refuses_is_written_later(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, artifact = service.registry, service.publish()
    with pytest.raises(NotFoundError):
        registry.catalogue.get(THEM, artifact)
    before = stored(registry)

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(registry.audit_log._writer, "note", full)
        with pytest.raises(StorageError):
            registry.audit_log.settle()
        assert registry.audit_log.rows(TENANT, 0, 10), "what is there can be read"
    assert stored(registry) == before
    registry.close()
    again = Registry(url_of(service.home), service.home / "keyring")
    (row,) = rows_of(again)[before:]
    assert (row.event, row.subject) == ("artifact.ask", artifact)


def test_a_client_that_leaves_has_the_rows_that_wait_written() -> None:
    """Ray ends the process of the registry without a word."""
    for connected, embedded in ((True, True), (True, False), (False, False)):
        done: list[Any] = []
        client = object.__new__(ServiceClient)
        client._cluster = cast(
            "Any",
            SimpleNamespace(
                connected=connected,
                embedded=embedded,
                close=lambda done=done: done.append("left"),
                end_http=lambda: None,
            ),
        )
        client._registry = cast(
            "Any", SimpleNamespace(settle=lambda whole, done=done: done.append(whole))
        )
        client.close()
        assert done == [embedded, "left"] if connected else ["left"]


# --- limits --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(request_rows.time, "monotonic", lambda: now[0])
    return now


def next_window(registry: Registry, clock: list[float]) -> None:
    registry.audit_log.settle()
    clock[0] += WINDOW_S
    registry.audit_log.settle()


def test_a_key_that_samples_without_end_leaves_rows_without_number_but_no_amount(
    service: Service, clock: list[float]
) -> None:
    registry, before = service.registry, len(rows_of(service.registry))
    for _ in range(1000):
        registry.audit_log.record_sample(TENANT, "api-key 7", "base", 2, 30, "ok")
    next_window(registry, clock)
    rows = rows_of(registry)[before:]
    assert len(rows) == MOST_OF_CALLER + 1
    assert rows[-1].details == {
        "more": 1000 - MOST_OF_CALLER,
        "prompts": 2 * 940,
        "tokens": 30 * 940,
    }
    assert (rows[-1].event, rows[-1].subject, rows[-1].who) == ("sample", "base", "api-key 7")
    for name in ("prompts", "tokens"):
        assert (
            sum(int(row.details[name]) for row in rows) == {"prompts": 2000, "tokens": 30_000}[name]
        )
    registry.audit_log.record_sample(TENANT, "api-key 7", "base", 2, 30, "ok")
    assert rows_of(registry)[-1].details == {"prompts": 2, "tokens": 30}


def test_many_keys_of_a_tenant_share_a_limit_and_leave_that_of_others(
    service: Service, clock: list[float]
) -> None:
    registry, before = service.registry, len(rows_of(service.registry))
    for key in range(2 * MOST_OF_TENANT):
        registry.audit_log.record_sample(TENANT, f"api-key {key % 24}", "base", 1, 1, "ok")
    assert len(rows_of(registry)) - before == MOST_OF_TENANT
    registry.audit_log.record_sample(THEM, "api-key 7", "base", 1, 1, "ok")
    assert len(rows_of(registry, THEM)) == 1
    next_window(registry, clock)
    rows = rows_of(registry)[before:]
    assert len(rows) == MOST_OF_TENANT + 24
    assert sum(int(row.details.get("more", 1)) for row in rows) == 2 * MOST_OF_TENANT


def test_rows_that_matter_have_no_limit(service: Service, clock: list[float]) -> None:
    registry = service.registry
    for _ in range(2 * MOST_OF_TENANT):
        registry.audit_log.record_sample(TENANT, "sdk", "base", 1, 1, "ok")
    before = len(rows_of(registry))
    for _ in range(MOST_OF_CALLER + 40):
        registry.runs.create(TENANT, CONFIG)
    artifact = service.publish()
    registry.audit_log.record_export(TENANT, artifact)
    registry.api_keys.revoke(TENANT, registry.api_keys.create(TENANT, "", [], None)[1].key_id)
    events = [row.event for row in rows_of(registry)[before:]]
    assert events[MOST_OF_CALLER + 40 :] == [
        "artifact.save", "artifact.export", "api_key.create", "api_key.revoke",
    ]  # fmt: skip


def test_a_stranger_who_asks_for_everything_is_counted(
    service: Service, clock: list[float]
) -> None:
    registry = service.registry
    runs = [registry.runs.create(TENANT, CONFIG) for _ in range(99)]
    before = len(rows_of(registry))
    for _ in range(3):
        for run in runs:
            with pytest.raises(NotFoundError):
                registry.runs.get(THEM, run)
    next_window(registry, clock)
    rows = rows_of(registry)[before:]
    assert len(rows) == MOST_OF_CALLER + 1
    assert sum(int(row.details.get("more", 1)) for row in rows) == 3 * 99
    assert rows[-1].subject == "", "several"


def test_what_waits_is_bounded(clock: list[float]) -> None:
    waiting = RequestRows()
    for number in range(5000):
        waiting.ask(Request("clinic", ANYONE, "run.ask", f"tc-{number}", "access_denied"))
    asked, _ = waiting.waiting(whole=False)
    assert len(asked) == request_rows._MOST_WAITING + 1
    assert sum(asked.values()) == 5000


def test_contexts_do_not_open_for_a_stranger_who_has_the_wrapped_key(service: Service) -> None:
    artifact = service.publish()
    wrapped = service.store.read_key(TENANT, artifact)
    assert context_of(THEM, artifact, DATA_KEY) != context_of(TENANT, artifact, DATA_KEY)
    for ask in (service.registry.data_keys.held, service.registry.data_keys.rewrapped):
        with pytest.raises(TGTinkerError):
            ask(THEM, artifact, wrapped)
    assert seen(service.registry)[-1][1:3] == ("artifact.ask", artifact)
