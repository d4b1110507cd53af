"""Tests that no web page makes a browser use a server without keys, or any server unasked.

`tests/system/test_browser.py` tries the same in a browser.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.http.access import Access, HttpOptions
from serve_app.http.routes import api
from support.replicas import OneReplica, answering, home_with_registry, routes_of
from tg_tinker.data.text import load_tokenizer, read_tokenizer

HERE = {"Host": "localhost:8000"}
JSON = {"Content-Type": "application/json"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "base", "prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {
        "model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}],
    },
    "/v1/sample": {"model": "base", "prompts": "a", "max_tokens": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneReplica]:
    """Yields a server without keys."""
    folder = tmp_path_factory.mktemp("open")
    tokenizer = load_tokenizer(read_tokenizer(tiny_model))
    registry = home_with_registry(folder / "home")
    with answering(OneReplica(registry, tokenizer, folder, HttpOptions(open=True))) as here:
        yield here


def asked(one: OneReplica, *headers: tuple[str, str]) -> set[int]:
    """Returns the statuses of all routes that use a model or list models."""
    found = set()
    for route in routes_of(api):
        for method in route.methods - {"HEAD"}:
            if route.path == "/healthz":
                continue
            body = json.dumps(BODIES[route.path]).encode() if method == "POST" else b""
            pairs = [*headers, *JSON.items()]
            path = route.path.replace("{model:path}", "base")
            found.add(asyncio.run(one.ask(method, path, pairs, body)).status)
    return found


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.0.0.1.:80",
     "127.1:8000", "127.200.3.4", "2130706433", "0x7f.1", "[::1]", "[::1]:8000",
     "[0:0:0:0:0:0:0:1]:1", "[::ffff:127.0.0.1]:8000"],
)  # fmt: skip
def test_a_program_on_this_machine_is_answered(one: OneReplica, host: str) -> None:
    assert asked(one, ("Host", host)) == {200}


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1.evil.example:8000", "127.evil.example", "evil.example", "localhost.evil.example",
     "evil.localhost", "127.0.0.1evil", "127.0.0.1-evil.example", "1270.0.0.1", "128.0.0.1",
     "0.0.0.0", "[::]", "[::ffff:10.0.0.1]", "[::ffff:7f00:1].evil", "[fe80::1]", "10.0.0.7:8000",
     "localhost:evil", "localhost:8000:1", "localhost:123456", "evil.example@127.0.0.1",
     "127.0.0.1@evil.example", "127.0.0.1/evil", "127.0.0.1?evil", "127.0.0.1#evil", "127.0.0.1\\e",
     "127.0.0.1 evil", "127.0.0.1,evil.example", "localhost\t", "[::1", "::1", "[::1%25lo]", "",
     " ", ":8000", ".", "loc\u017fhost", "\uff11\uff12\uff17.0.0.1"],
)  # fmt: skip
def test_any_other_name_is_refused(one: OneReplica, host: str) -> None:
    raw = host.encode().decode("latin-1")
    assert asked(one, ("Host", raw)) == {401}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Host", "localhost"), ("Host", "evil.example")],
        [("Host", "evil.example"), ("Host", "localhost")],
        [("Host", "evil.example"), ("X-Forwarded-Host", "localhost")],
        [("Host", "evil.example"), ("Forwarded", "host=localhost")],
        [("Host", "evil.example"), ("Authorization", "Bearer tgt-1-2")],
    ],
)
def test_only_the_one_host_counts(one: OneReplica, headers: list[tuple[str, str]]) -> None:
    assert asked(one, *headers) == {401}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "*"},
        {"Origin": "http://localhost"}, {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1:8000"}, {"Origin": "http://localhost:8000.evil.example"},
        {"Origin": "http://localhost:8000/"}, {"Origin": "http://evil@localhost:8000"},
        {"Origin": "file://"}, {"Origin": "http://localhost:8000, https://evil.example"},
        {"Origin": "ftp://localhost:8000"}, {"Origin": "localhost:8000"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "anything"}, {"Sec-Fetch-Site": ""},
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)  # fmt: skip
def test_a_page_of_another_origin_is_refused(one: OneReplica, headers: dict[str, str]) -> None:
    assert asked(one, *HERE.items(), *headers.items()) == {401}


def test_two_origins_are_one_too_many(one: OneReplica) -> None:
    origins = [("Origin", "http://localhost:8000"), ("Origin", "https://evil.example")]
    for pair in (origins, origins[::-1]):
        assert asked(one, *HERE.items(), *pair) == {401}


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://localhost:8000"},
    ],
    ids=str,
)  # fmt: skip
def test_the_own_origin_is_answered(one: OneReplica, headers: dict[str, str]) -> None:
    assert asked(one, *HERE.items(), *headers.items()) == {200}


@pytest.mark.parametrize("keyed", [False, True], ids=["open", "with a key"])
@pytest.mark.parametrize(
    "kinds",
    [["text/plain"], ["application/x-www-form-urlencoded"], ["multipart/form-data; boundary=x"], [],
     [""], ["text/plain; application/json"], ["application/jsonx"], ["text/json"], ["json"],
     ["application/json", "text/plain"], ["text/plain", "application/json"],
     ["application/json, text/plain"], ["text/plain, application/json"]],
    ids=str,
)  # fmt: skip
def test_a_body_of_a_type_that_pages_send_unasked_is_refused(
    one: OneReplica, tmp_path: Path, keyed: bool, kinds: list[str]
) -> None:
    headers = [*HERE.items(), *(("Content-Type", kind) for kind in kinds)]
    options = HttpOptions(open=not keyed)
    one.replica._access = Access(one.registry, options, str(tmp_path))
    if keyed:
        key, _ = one.registry.api_keys.create("another", "", [], 1)
        headers.append(("Authorization", f"Bearer {key}"))
    for route in routes_of(api):
        if "POST" in route.methods:
            body = json.dumps(BODIES[route.path]).encode()
            answer = asyncio.run(one.ask("POST", route.path, headers, body))
            assert (answer.status, answer.error["code"]) == (415, "wrong_content_type")
            assert "Content-Type: application/json" in answer.error["message"]
    one.replica._access = Access(one.registry, HttpOptions(open=True), str(tmp_path))


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", " application/json ;x"]
)
def test_json_may_have_parameters(one: OneReplica, kind: str) -> None:
    body = json.dumps(BODIES["/v1/sample"]).encode()
    headers = HERE | {"Content-Type": kind}
    assert asyncio.run(one.ask("POST", "/v1/sample", headers, body)).status == 200


def test_no_route_redirects_or_lets_a_page_of_another_origin_read(one: OneReplica) -> None:
    """A redirect would lead to the host that the request names."""
    page = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type", **HERE, **JSON}  # fmt: skip
    for route in routes_of(api):
        path = route.path.replace("{model:path}", "base")
        for where in (path, f"{path}/", f"/{path}", f"{path}//", f"{path}/.."):
            for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE"):
                answer = asyncio.run(one.ask(method, where, page, b"{}"))
                assert not 300 <= answer.status < 400, (method, where)
                names = {name.lower() for name in answer.headers}
                assert not {name for name in names if name.startswith("access-control")}
                assert "location" not in names
                read = answer.status == 200
                assert not read or path == "/healthz"
