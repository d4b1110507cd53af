"""Tests that what is running ends with the access of its caller: streams and long answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from actors.registry.registry import Registry
from serve_app.http import access as http_access
from serve_app.http import routes
from serve_app.http.access import Access, HttpOptions
from serve_app.http.refusals import error_event
from support.replicas import Answer, OneReplica, answering, home_with_registry
from tg_tinker.data.text import load_tokenizer, read_tokenizer
from tg_tinker.errors import AccessDeniedError, RollbackError

ENDLESS = {"model": "base", "max_tokens": 16_000}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", **ENDLESS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], **ENDLESS},
    "/v1/sample": {"prompts": "a", **ENDLESS},
}
NOTICED_S = 30.0


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return home_with_registry(tmp_path_factory.mktemp("ended") / "home")


@pytest.fixture
def one(
    registry: Registry, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OneReplica]:
    """Yields a server without the seconds in which it trusts a key."""
    monkeypatch.setattr(http_access, "_KNOWN_S", 0.1)
    tokenizer = load_tokenizer(read_tokenizer(tiny_model))
    options = HttpOptions(tenant=tmp_path.name, open=True)
    with answering(OneReplica(registry, tokenizer, tmp_path, options)) as here:
        here.letter_s = 0.01
        yield here


def test_a_revoked_key_is_noticed_within_five_seconds() -> None:
    assert http_access._KNOWN_S + routes.LOOK_S <= 4.5  # the check itself takes time, too


async def until_it_ends(
    one: OneReplica, path: str, headers: dict[str, str], stream: bool, end: Callable[[], object]
) -> Answer:
    """Sends a request that would run for minutes, calls `end` after a while, and returns how the
    request ends."""
    body = json.dumps({**BODIES[path], "stream": stream}).encode()
    asked = asyncio.ensure_future(one.ask("POST", path, headers, body))
    begun = one.begun
    while one.begun == begun:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert not asked.done()
    end()
    return await asyncio.wait_for(asked, NOTICED_S)


def denied(answer: Answer, stream: bool) -> bool:
    """Returns whether an answer has ended as it must when the access does."""
    if not stream:
        return (answer.status, answer.error["code"]) == (401, "access_denied")
    *events, last, empty = answer.body.decode().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    return len(events) > 5 and error["code"] == "access_denied" and empty == ""


def key_of(one: OneReplica, **options: Any) -> tuple[dict[str, str], str]:
    key, info = one.registry.api_keys.create(
        "tenant", "", options.get("models", []), options.get("days", 1)
    )
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}, info.key_id


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", BODIES)
def test_what_runs_ends_with_its_key(one: OneReplica, path: str, stream: bool) -> None:
    one.replica._access = Access(one.registry, HttpOptions(), "nowhere")
    headers, key_id = key_of(one)
    end = lambda: one.registry.api_keys.revoke("tenant", key_id)  # noqa: E731
    answer = asyncio.run(until_it_ends(one, path, headers, stream, end))
    assert denied(answer, stream), answer
    assert not +one.replica._access._at_once
    assert not +one.replica._access._of_tenant


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_what_runs_ends_where_its_key_expires(one: OneReplica, stream: bool) -> None:
    one.replica._access = Access(one.registry, HttpOptions(), "nowhere")
    headers, _ = key_of(one, days=1.5 / 86_400)
    answer = asyncio.run(until_it_ends(one, "/v1/completions", headers, stream, lambda: None))
    assert denied(answer, stream), answer


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_what_runs_without_a_key_ends_with_the_first_key(one: OneReplica, stream: bool) -> None:
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    tenant = one.replica._options.tenant
    end = lambda: one.registry.api_keys.create(tenant, "", [], 1)  # noqa: E731
    answer = asyncio.run(until_it_ends(one, "/v1/completions", headers, stream, end))
    assert denied(answer, stream), answer


def test_what_waits_in_silence_ends_with_its_key(one: OneReplica) -> None:
    """Such a request waits for a slot, perhaps for minutes."""
    one.letter_s = 600.0
    one.replica._access = Access(one.registry, HttpOptions(), "nowhere")
    headers, key_id = key_of(one)
    end = lambda: one.registry.api_keys.revoke("tenant", key_id)  # noqa: E731
    answer = asyncio.run(until_it_ends(one, "/v1/completions", headers, False, end))
    assert denied(answer, False), answer


def test_other_keys_of_the_tenant_go_on(one: OneReplica) -> None:
    one.replica._access = Access(one.registry, HttpOptions(), "nowhere")
    (first, key_id), (second, _) = key_of(one), key_of(one)

    async def both() -> tuple[Answer, Answer]:
        body = json.dumps({**BODIES["/v1/completions"], "max_tokens": 150}).encode()
        other = asyncio.ensure_future(one.ask("POST", "/v1/completions", second, body))
        end = lambda: one.registry.api_keys.revoke("tenant", key_id)  # noqa: E731
        return await until_it_ends(one, "/v1/completions", first, True, end), await other

    ended, whole = asyncio.run(both())
    assert denied(ended, True)
    assert whole.status == 200


# --- how often the registry is asked --------------------------------------------------------------


def run_checks(work: Callable[[Access], Awaitable[object]], refused: bool = False) -> list[str]:
    """Returns the keys that a registry is asked about while `work` uses an access."""
    asked: list[str] = []

    def check(token: str, tenant: str) -> Any:
        asked.append(token)
        if refused:
            raise AccessDeniedError("no")
        return "tenant", SimpleNamespace(key_id="1", models=())

    registry: Any = SimpleNamespace(
        api_keys=SimpleNamespace(check=check), heads=SimpleNamespace(met=lambda *_: True)
    )
    asyncio.run(work(Access(registry, HttpOptions(), "nowhere")))  # type: ignore[arg-type]
    return asked


def request(token: str) -> Request:
    headers = [(b"authorization", f"Bearer {token}".encode())]
    return Request({"type": "http", "headers": headers})


def test_all_streams_of_a_key_share_its_checks() -> None:
    async def work(access: Access) -> None:
        callers = await asyncio.gather(*(access.caller(request("k")) for _ in range(50)))
        for _ in range(100):
            await asyncio.gather(*(access.still(caller) for caller in callers))

    assert run_checks(work) == ["k"]


def test_refused_keys_are_asked_about_again_and_not_kept() -> None:
    async def work(access: Access) -> None:
        for _ in range(3):
            with pytest.raises(AccessDeniedError):
                await access.caller(request("wrong"))
        assert access._known == {}

    assert run_checks(work, refused=True) == ["wrong"] * 3


def test_who_leaves_during_a_check_ends_it_for_no_other() -> None:
    async def work(access: Access) -> None:
        first, second = (asyncio.ensure_future(access.caller(request("k"))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).key_id == "1"

    assert run_checks(work) == ["k"]


def test_a_caller_prints_no_key() -> None:
    assert "secret" not in repr(http_access.Caller("us", "1", (), "tgt-1-secret"))


def test_a_stream_tells_a_client_nothing_about_an_older_registry() -> None:
    found = error_event(RollbackError("the head t/us/heads/4711 states another row"))
    assert "4711" not in json.dumps(found)
    assert "older copy" in found["error"]["message"]
