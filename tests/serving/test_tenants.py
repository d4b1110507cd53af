"""Tests two tenants at one server: a name of the other tenant answers exactly as a name that
never existed.

Over HTTP that is a promise, for every route. Over the SDK, where a tenant is a label inside one
trust domain, it prevents mistakes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from actors.registry.registry import PARTS, Registry
from actors.storage.home import DATABASE, create
from serve_app.http.access import HttpOptions
from serve_app.http.routes import BODY_S, LOOKUPS, MOST_WAITING, api
from serve_app.replica import replica as serve_replica
from serve_app.replica.engines import AT_ONCE, Fetches
from serve_app.replica.replica import TEXTS, Replica
from serve_app.replica.sources import Source, Sources
from serve_app.replica.threads import TenantThreads
from support.http_calls import post, scraped
from support.processes import free_port, pid_of
from tg_tinker import (
    DPConfig,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    ResourceConfig,
    ServiceClient,
    TGTinkerError,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.sampling import SamplingParams
from tg_tinker.storage.databases import default_database

BODIES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("GET", "/healthz"): None,
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/{model}"): None,
    ("POST", "/v1/completions"): {"prompt": "abc", "max_tokens": 2},
    ("POST", "/v1/chat/completions"): {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
    },
    ("POST", "/v1/sample"): {"prompts": "abc", "max_tokens": 2},
}  # fmt: skip
"""All routes, and what is sent there beside the name; `{model}` is the name."""

BY_THE_WAY = {"date", "server"}
"""Headers that no name has a part in."""

NEVER = "0" * 8


class Theirs(NamedTuple):
    """The names of the other tenant, by kind. Each has the form of a name that never existed."""

    runs: list[str]
    artifacts: list[str]
    datasets: list[str]
    keys: list[str]


class Both(NamedTuple):
    url: str
    mine: ServiceClient
    own: TrainingClient
    key: str
    neighbor: ServiceClient
    their_key: str
    theirs: Theirs


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def ask(
    url: str, method: str, path: str, key: str | None, body: dict[str, Any] | None = None,
    **more: str,
) -> Answer:  # fmt: skip
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return Answer(found.status, _told(found.headers), found.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, _told(error.headers), error.read().decode())


def _told(headers: Any) -> dict[str, str]:
    """Returns the headers, without the value of an id that is drawn for each request."""
    names = {name.lower(): value for name, value in headers.items()}
    return {
        name: "drawn" if name == "x-request-id" else value
        for name, value in names.items() if name not in BY_THE_WAY
    }  # fmt: skip


def masked(answer: Answer, name: str) -> Answer:
    return answer._replace(body=answer.body.replace(name, "NAME"))


def never(name: str) -> str:
    """Returns a name of the same form and length that nobody has."""
    return name[: -len(NEVER)] + NEVER


def config(model: Path, dataset: str = "", **values: Any) -> TrainingConfig:
    dp = DPConfig(sampling="worst_case", noise_multiplier=2.0, target_epsilon=None)
    return TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=2), batch_size=2,
        resources=ResourceConfig(num_cpus=0), **values,
        **({"dataset_id": dataset, "dp_config": dp} if dataset else {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(embedded: None, tiny_model: Path) -> Iterator[Both]:
    with ServiceClient(address="local") as mine, ServiceClient(tenant="neighbor") as neighbor:
        key, _ = mine.create_api_key()
        url = mine.serve_http(str(tiny_model), port=free_port()).removesuffix("/v1")
        with mine.create_training_client(config(tiny_model)) as own:
            their_key, theirs = furnish(neighbor, tiny_model)
            # What a sampler could remember of them, it remembers.
            for model in (theirs.runs[0], theirs.artifacts[0]):
                body = {"model": model, "prompt": "abc", "max_tokens": 1}
                assert ask(url, "POST", "/v1/completions", their_key, body).status == 200
            yield Both(url, mine, own, key, neighbor, their_key, theirs)


def furnish(neighbor: ServiceClient, model: Path) -> tuple[str, Theirs]:
    """Makes runs that live, are parked and are closed, and artifacts that exist, have expired
    and are deleted."""
    clients = [
        neighbor.create_training_client(config(model, dataset=dataset))
        for dataset in ("wards-47110000", "", "")
    ]
    artifacts = []
    for tc in clients:
        tc.forward_backward({"input_ids": [[5, 6, 7], [8, 9]]})
        tc.optim_step().result()
        artifacts.append(tc.save_state().artifact_id)
    clients[1].park()
    clients[2].close()
    neighbor.set_expiry(artifacts[1], datetime.now(UTC) + timedelta(seconds=0.2))
    neighbor.delete_artifact(artifacts[2])
    their_key, used = neighbor.create_api_key()
    _, revoked = neighbor.create_api_key()
    neighbor.revoke_api_key(revoked.key_id)
    _, scoped = neighbor.create_api_key(models=[artifacts[0]])
    keys = [used.key_id, revoked.key_id, scoped.key_id]
    return their_key, Theirs([tc.id for tc in clients], artifacts, ["wards-47110000"], keys)


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_route_is_in_the_matrix() -> None:
    paths = api.openapi()["paths"].items()
    routes = {(method.upper(), path) for path, methods in paths for method in methods}
    assert routes == set(BODIES)


VERSIONS = ("", "@1", "@0", "@>=1", "@>=999", "@x")


def names(theirs: Theirs, versions: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str]]:
    """Yields their name and a name of the same form that never existed, for every kind of name."""
    for name in (*theirs.runs, *theirs.artifacts, *theirs.datasets, *theirs.keys, "neighbor"):
        for version in versions:
            yield f"{name}{version}", f"{never(name)}{version}"


@pytest.mark.slow
def test_a_name_of_the_other_tenant_answers_as_one_that_never_was(both: Both) -> None:
    narrow, _ = both.mine.create_api_key(models=[*both.theirs.runs, *both.theirs.artifacts])
    answers = []
    for (method, path), body in BODIES.items():
        for key in (both.key, narrow, None, "nonsense"):
            valid = key in (both.key, narrow)  # else a request ends before its model is read
            for theirs, nobodys in names(both.theirs, VERSIONS if valid else ("", "@1")):
                first, second = (
                    ask(both.url, method, path.replace("{model}", name), key,
                        body if body is None else {"model": name, **body})
                    for name in (theirs, nobodys)
                )  # fmt: skip
                assert masked(first, theirs) == masked(second, nobodys), (path, theirs)
                named = body is not None or "{model}" in path
                answers.append((path, named, valid, first.status))
                if not named:
                    break
    assert {a[3] for a in answers if a[1] and a[2]} == {404}
    assert {a[3] for a in answers if a[0] != "/healthz" and not a[2]} == {401}


PAGES: list[dict[str, str]] = [
    {"Host": "127.0.0.1.evil.example:8000", "Origin": "http://127.0.0.1.evil.example:8000"},
    {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"},
    {"Origin": "null", "Content_Type": "text/plain"},
    {"Origin": "https://evil.example", "Content_Type": "application/x-www-form-urlencoded"},
]
"""Headers of what web pages make browsers send. They add no key."""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_learns_nothing_and_a_key_alone_decides(both: Both, page: dict[str, str]) -> None:
    kind = page.get("Content_Type", "application/json")
    for (method, path), body in BODIES.items():
        if path == "/healthz":
            continue
        statuses = []
        for key in (None, both.key):
            first, second = (
                ask(both.url, method, path.replace("{model}", name), key,
                    body and {"model": name, **body}, **page)
                for name in (both.theirs.runs[0], never(both.theirs.runs[0]))
            )  # fmt: skip
            assert masked(first, both.theirs.runs[0]) == masked(second, never(both.theirs.runs[0]))
            assert not [name for name in first.headers if name.startswith("access-control")]
            statuses.append(first.status)
        named = 200 if path == "/v1/models" else 404
        assert statuses == [401, 415 if body and kind != "application/json" else named]


@pytest.mark.slow
def test_a_run_that_the_database_gives_to_another_tenant_is_not_sampled(
    both: Both, home: Path
) -> None:
    """Whoever writes the database of the registry cannot grant what he has no key for."""
    run = both.theirs.runs[0]

    def give_to(tenant: str) -> None:
        with closing(sqlite3.connect(home / DATABASE)) as database:
            assert (
                database.execute("UPDATE runs SET tenant = ? WHERE id = ?", (tenant, run)).rowcount
                == 1
            )
            database.commit()

    body = {"model": run, "prompt": "abc", "max_tokens": 2}
    give_to("default")
    try:
        assert ask(both.url, "POST", "/v1/completions", both.key, body).status == 404
    finally:
        give_to("neighbor")
    assert ask(both.url, "POST", "/v1/completions", both.their_key, body).status == 200


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_name_in_any_other_place_changes_nothing(both: Both, stream: bool) -> None:
    """This covers streams, unknown paths and methods, and names in other fields than the
    model's."""
    for theirs, nobodys in names(both.theirs):
        for path in ("/v1/completions", "/v1/sample"):
            sent = [{"model": n, **(BODIES["POST", path] or {}), "stream": stream}
                    for n in (theirs, nobodys)]  # fmt: skip
            pair = [ask(both.url, "POST", path, both.key, one) for one in sent]
            assert masked(pair[0], theirs) == masked(pair[1], nobodys)
            assert pair[0].status == 404
        for method, where in (("GET", "/v1/models/"), ("DELETE", "/v1/models/"), ("GET", "/v1/")):
            pair = [ask(both.url, method, f"{where}{n}", both.key) for n in (theirs, nobodys)]
            assert masked(pair[0], theirs) == masked(pair[1], nobodys)
            assert pair[0].status in (404, 405)


@pytest.mark.slow
def test_a_key_of_the_other_tenant_that_is_not_whole_answers_as_one_that_never_was(
    both: Both,
) -> None:
    """The id of a key may be known: lists and the audit log of its tenant show it."""
    for (method, path), body in BODIES.items():
        body = body and {"model": "base", **body}
        for key_id in both.theirs.keys:
            tokens = [f"tgt-{one}-{'s' * 43}" for one in (key_id, never(key_id))]
            first, second = (ask(both.url, method, path, token, body) for token in tokens)
            assert first == second
            assert first.status == (200 if path == "/healthz" else 401)


@pytest.mark.slow
def test_one_tenant_takes_no_place_of_the_other_to_wait_for_a_step(both: Both) -> None:
    def wait(key: str, run: str) -> int:
        body = {"model": f"{run}@>=99999", "prompt": "abc"}
        return ask(both.url, "POST", "/v1/completions", key, body).status

    with ThreadPoolExecutor(MOST_WAITING + 1) as pool:
        mine = [pool.submit(wait, both.key, both.own.id) for _ in range(MOST_WAITING)]
        time.sleep(2)  # each waits for ten seconds
        assert wait(both.their_key, both.theirs.runs[0]) == 409
        assert {one.result() for one in mine} <= {409, 429}


@pytest.mark.slow
def test_a_frozen_run_of_one_tenant_holds_nobody_else_up(both: Both) -> None:
    """Each request for this run waits in a thread, for two minutes at most."""
    frozen = pid_of(both.own)
    body = {"prompt": "abc", "max_tokens": 2}
    others = {**body, "model": both.theirs.runs[0]}
    with ThreadPoolExecutor(LOOKUPS + 1) as pool:
        os.kill(frozen, signal.SIGSTOP)
        try:
            own = {**body, "model": both.own.id}
            mine = [
                pool.submit(ask, both.url, "POST", "/v1/completions", both.key, own)
                for _ in range(LOOKUPS + 1)
            ]
            time.sleep(2)
            found = ask(both.url, "POST", "/v1/completions", both.their_key, others)
            assert not any(one.done() for one in mine)
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert found.status == 200
        assert {one.result().status for one in mine} == {200}


FLOODS = [
    b'{"model": "base", "%s": [%s]}' % (field, b",".join([item] * (2**20 // (len(item) + 2))))
    for field in (b"prompt", b"prompts", b"messages", b"stop", b"logit_bias")
    for item in (b"{}", b"[]", b"0")
] + [json.dumps({"model": "base", "prompt": "hello world " * 80_000}).encode()]
"""Bodies of nearly 1 MiB that cost more to read than to send."""


@pytest.mark.slow
def test_floods_of_one_tenant_stop_no_other(both: Both) -> None:
    def flood(number: int) -> set[int]:
        paths = [path for method, path in BODIES if method == "POST"]
        url = f"{both.url}{paths[number % len(paths)]}"
        return {post(url, both.key, body)[0] for body in FLOODS}

    short = {"model": "base", "prompt": "abc", "max_tokens": 1}
    with ThreadPoolExecutor(24) as pool:
        floods = [pool.submit(flood, number) for number in range(24)]
        answered = 0
        while not all(one.done() for one in floods):
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("POST", "/v1/completions", short),
            ):
                assert ask(both.url, method, path, both.their_key, body).status == 200
                answered += 1
        assert answered > 1
        assert set().union(*(one.result() for one in floods)) <= {400, 429}
    assert ask(both.url, "GET", "/healthz", None).status == 200


@pytest.mark.slow
def test_bodies_that_do_not_end_take_no_more_places_than_their_key_has(both: Both) -> None:
    url = urllib.parse.urlsplit(both.url)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {both.key}"
        "\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    most = HttpOptions().most_at_once
    with ExitStack() as stack:
        senders = [
            stack.enter_context(socket.create_connection((url.hostname or "", url.port or 0)))
            for _ in range(most + 8)
        ]
        for sender in senders:
            sender.sendall(head.encode())
        answered: list[socket.socket] = []
        deadline = time.monotonic() + BODY_S / 2
        while len(answered) < 8 and time.monotonic() < deadline:
            answered, _, _ = select.select(senders, [], [], 0.1)
            time.sleep(0.1)
        assert [one.recv(12) for one in answered] == [b"HTTP/1.1 429"] * 8
        short = {"model": "base", "prompt": "abc", "max_tokens": 1}
        assert ask(both.url, "POST", "/v1/completions", both.key, short).status == 429
        assert ask(both.url, "GET", "/v1/models", both.key).status == 429
        assert ask(both.url, "POST", "/v1/completions", both.their_key, short).status == 200
    deadline = time.monotonic() + BODY_S + 5
    while (status := ask(both.url, "POST", "/v1/completions", both.key, short).status) == 429:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert status == 200


def test_weights_that_do_not_come_for_one_tenant_hold_nobody_else_up() -> None:
    """A frozen run hands out no weights, and its tenant may send many requests."""
    frozen, added = threading.Event(), []
    here: Any = SimpleNamespace(has=lambda name, shared: False, add=added.append)

    def weights(name: str) -> Source:
        get: Any = lambda: (name == "theirs" or frozen.wait(30)) and name  # noqa: E731
        return Source(name, name, True, get)

    async def fetch() -> None:
        fetches = Fetches(here)
        names = [f"own-{number}" for number in range(AT_ONCE + 1)]
        mine = [asyncio.ensure_future(fetches.ahead(weights(name), "us")) for name in names]
        await asyncio.wait_for(fetches.ahead(weights("theirs"), "them"), 20)
        assert added == ["theirs"]
        frozen.set()
        await asyncio.gather(*mine)
        assert sorted(added) == [*names, "theirs"]
        await fetches.ahead(weights("theirs"), "them")  # it has left the engine since
        assert sorted(added) == [*names, "theirs", "theirs"]

    asyncio.run(fetch())


def test_a_schema_that_takes_long_is_refused_and_holds_up_its_tenant_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, on_the_loop = threading.Event(), []

    def compiled(schema: dict[str, Any]) -> Any:
        on_the_loop.append(threading.current_thread() is threading.main_thread())
        return schema == {} or (go.wait(30) and schema)

    replica: Any = SimpleNamespace(
        texts=TenantThreads(TEXTS, "text"),
        _schemas=TenantThreads(1, "schema"),
        _grammars=SimpleNamespace(prepare=lambda: None, compiled=compiled),
    )
    monkeypatch.setattr(serve_replica, "COMPILE_S", 1.0)
    slow, quick = (SamplingParams(json_schema=one) for one in ({"enum": [1]}, {}))

    async def ask() -> None:
        for params in (slow, quick):  # the second one waits for the thread of the first
            with pytest.raises(InvalidRequestError, match="not compiled within 1 s"):
                await Replica._compiled(replica, "us", params)
        assert await asyncio.wait_for(Replica._compiled(replica, "them", quick), 20)
        assert await Replica._compiled(replica, "us", SamplingParams()) is None
        go.set()

    try:
        asyncio.run(ask())
    finally:
        go.set()
    assert not any(on_the_loop)


@pytest.mark.slow
def test_lists_hold_what_is_ones_own(both: Both) -> None:
    def listed(key: str) -> set[str]:
        found = json.loads(ask(both.url, "GET", "/v1/models", key).body)["data"]
        return {model["id"] for model in found}

    assert listed(both.key) == {"base", both.own.id}
    saved = {a.artifact_id for a in both.neighbor.list_artifacts() if not a.expired}
    assert len(saved) == 2  # to be parked is to be saved
    assert listed(both.their_key) == {"base", both.theirs.runs[0], *saved}
    narrow, _ = both.mine.create_api_key(models=[both.theirs.runs[0], both.theirs.artifacts[0]])
    assert listed(narrow) == {"base"}


@pytest.mark.slow
def test_metrics_and_the_other_log_name_nobody(both: Both) -> None:
    body = {"model": both.theirs.runs[0], "prompt": "abc", "max_tokens": 2}
    assert ask(both.url, "POST", "/v1/completions", both.their_key, body).status == 200
    assert ask(both.url, "POST", "/v1/completions", both.key, body).status == 404
    scraped(both.mine, "ray_tg_tinker_refused_total")
    found = "".join(
        urllib.request.urlopen(url, timeout=10).read().decode() for url in both.mine.metrics_urls()
    )
    assert "ray_tg_tinker_new_tokens_total" in found
    own = repr(both.mine.audit_log(limit=10_000))
    assert both.own.id in own
    theirs = {name for kind in both.theirs for name in kind} | {"neighbor"}
    for name in theirs | {both.own.id}:
        assert name not in found, name
    for name in theirs:
        assert name not in own, name


@pytest.mark.slow
def test_the_owner_learns_that_somebody_asked_over_http(both: Both) -> None:
    """The row follows the answer. Of what was asked for a moment ago it may only state the number,
    so every test before this one may have left it."""
    names = {both.theirs.runs[0]: "run.ask", both.theirs.artifacts[0]: "artifact.ask"}
    for name in names:
        body = {"model": name, "prompt": "abc", "max_tokens": 2}
        assert ask(both.url, "POST", "/v1/completions", both.key, body).status == 404
    rows = both.neighbor.audit_log(limit=10_000)
    found = {(row.subject, row.event) for row in rows if row.who == "anyone"}
    assert found >= {*names.items()}
    assert not [row for row in both.mine.audit_log(limit=10_000) if row.subject in names]


# --- what a name costs ---------------------------------------------------------------------------


@dataclass
class WatchedPart:
    """A part of a registry that notes each query."""

    name: str
    part: Any
    asked: list[str]

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.asked.append(f"{self.name}.{method}")
            return getattr(self.part, method)(*arguments)

        return call


class Watched:
    """A registry that notes each query. Equal numbers of equal queries take the same time."""

    def __init__(self, registry: Registry) -> None:
        self.asked: list[str] = []
        for name in PARTS:
            setattr(self, name, WatchedPart(name, getattr(registry, name), self.asked))


def test_for_a_name_of_the_other_tenant_the_same_is_asked_as_for_one_that_never_was(
    tmp_path: Path,
) -> None:
    create(tmp_path / "home")
    registry = Registry(default_database(tmp_path / "home"), tmp_path / "home/keyring")
    run = registry.runs.create("neighbor", config(Path("m")).model_dump_json())
    epoch = registry.runs.claim(run)
    artifact = "art-" + "1" * 16
    registry.artifacts.publish("neighbor", run, epoch, artifact, 1, 10, True, b"{}", "k1")
    watched = Watched(registry)
    sources = Sources(watched, b"k", "space", str(tmp_path), "m")  # type: ignore[arg-type]
    for name in (run, artifact):
        for version in ("", "@1", "@>=1", "@x"):
            found = []
            for one in (name, never(name)):
                watched.asked.clear()
                with pytest.raises(NotFoundError) as refused:
                    sources.find("default", (), f"{one}{version}", "api-key 1")
                found.append((str(refused.value).replace(one, "NAME"), [*watched.asked]))
                assert watched.asked
            assert found[0] == found[1]


# --- over the SDK --------------------------------------------------------------------------------


@pytest.mark.slow
def test_over_the_sdk_a_label_stops_mistakes(both: Both, tmp_path: Path) -> None:
    mine, theirs = both.mine, both.theirs
    calls: list[tuple[str, Callable[[str], Any]]] = [
        *((run, call) for run in theirs.runs for call in (
            mine.describe_training_client, mine.get_training_client, mine.park_training_client,
            mine.close_training_client,
        )),
        *((artifact, call) for artifact in theirs.artifacts for call in (
            mine.get_artifact, mine.delete_artifact, mine.copy_artifact, mine.reseal_artifact,
            mine.shred_artifact, both.own.load_state,
            lambda one: mine.set_labels(one, {"a": "b"}), lambda one: mine.set_expiry(one, None),
            lambda one: mine.export_adapter(one, tmp_path / "adapter"),
        )),
        *((dataset, mine.privacy_report) for dataset in theirs.datasets),
        *((key_id, mine.revoke_api_key) for key_id in theirs.keys),
    ]  # fmt: skip
    for name, call in calls:
        told = []
        for one in (name, never(name)):
            with pytest.raises(TGTinkerError) as refused:
                call(one)
            error = refused.value
            details = json.dumps(error.details).replace(one, "NAME")
            told.append((type(error), error.code, str(error).replace(one, "NAME"), details))
        assert told[0] == told[1], (name, call)
        assert told[0][0] is NotFoundError
        assert not re.search("tenant|neighbor", told[0][2])
    assert {client.training_client_id for client in mine.list_training_clients()} == {both.own.id}
    assert mine.list_artifacts() == []
    living = both.neighbor.describe_training_client(theirs.runs[0])
    assert (living.status, living.reason) == ("active", "")


@pytest.mark.slow
def test_a_data_set_of_one_name_is_two(both: Both, tiny_model: Path) -> None:
    (name,) = both.theirs.datasets
    spent = both.neighbor.privacy_report(name).total_epsilon
    with both.mine.create_training_client(config(tiny_model, dataset=name)) as tc:
        assert tc.privacy is not None
        assert tc.privacy.used == 0
        tc.forward_backward({"input_ids": [[5, 6, 7], [8, 9]]})
        tc.optim_step().result()
    assert both.neighbor.privacy_report(name).total_epsilon == spent
