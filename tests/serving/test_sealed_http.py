"""Tests the two ends of the way between Serve's proxy and a replica, joined without Serve."""

from __future__ import annotations

import asyncio
import json
import pickle
from typing import Any

import pytest

from serve_app.http.sealed import MOST_HEAD_BYTES, ProxyEnd, ReplicaEnd, middlewares
from tg_tinker.errors import IntegrityError

SECRET = b"the patient Zebulon Quillfeather"
ROUTES = {"/": "tg-tinker-ns-1", "/others": "billing", "/others/tg": "tg-tinker-ns-2"}


class Between:
    """Serve between the two ends.

    It answers the request for routes, and pickles what passes in both directions.
    """

    def __init__(self, app: Any, routes: Any = ROUTES) -> None:
        self.app, self.seen, self.scope, self.routes = app, bytearray(), {}, routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/-/routes":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(self.routes).encode()})
            return
        self.scope = scope

        async def carried() -> Any:
            return self._carried(await receive())

        async def back(message: Any) -> None:
            await send(self._carried(message))

        await self.app(scope, carried, back)

    def _carried(self, message: Any) -> Any:
        pickled = pickle.dumps(message)
        self.seen += pickled
        return pickle.loads(pickled)  # noqa: S301


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers each message of the body with the same message, then with an empty one."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    while True:
        message = await receive()
        await send({"type": "http.response.body", "body": message["body"], "more_body": True})
        if not message.get("more_body"):
            break
    await send({"type": "http.response.body", "body": b""})


def ask(app: Any, path: str = "/v1/completions", **more: Any) -> list[Any]:
    """Returns what a client gets for a body of two parts."""
    parts = [{"type": "http.request", "body": SECRET, "more_body": True},
             {"type": "http.request", "body": b"!", "more_body": False}]  # fmt: skip
    got: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        got.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []} | more
    asyncio.run(app(scope, receive, send))
    return got


def both_ends(app: Any = echo) -> tuple[Between, Any]:
    between = Between(ReplicaEnd(app))
    (middleware,) = middlewares()
    return between, middleware.cls(between)


def test_what_a_client_gets_is_as_without_the_ends_and_nothing_between_is_readable() -> None:
    between, app = both_ends()
    assert ask(app) == ask(echo)
    assert SECRET not in between.seen
    assert len(between.seen) > 2 * len(SECRET)


def test_each_request_has_a_key_of_its_own() -> None:
    between, app = both_ends()
    ask(app)
    first = between.scope["extensions"]
    ask(app)
    assert first != between.scope["extensions"]
    assert len(first["tg_tinker.key"]) == 32


@pytest.mark.parametrize(
    ("path", "sealed"),
    [("/v1/x", True), ("/", True), ("/others", False), ("/others/x", False), ("/othersx", True),
     ("/others/tg/v1", True), ("/others/tg", True)],
)  # fmt: skip
def test_only_requests_of_our_applications_are_touched(path: str, sealed: bool) -> None:
    between = Between(echo)
    app = ProxyEnd(between)
    ask(app, path)
    assert (SECRET not in between.seen) == sealed
    assert ("extensions" in between.scope) == sealed


def test_a_proxy_without_an_application_asks_to_come_later() -> None:
    """As while a server starts or stops; Serve itself answers 404, as if a client had mistyped."""
    between = Between(echo, routes={})
    start, body = ask(ProxyEnd(between))
    assert (start["status"], (b"retry-after", b"1") in start["headers"]) == (503, True)
    assert json.loads(body["body"])["error"]["code"] == "no_application"
    assert between.scope == {}


def test_a_replica_behind_another_proxy_refuses_before_it_answers() -> None:
    start, body = ask(ReplicaEnd(echo))
    assert start["status"] == 503
    error = json.loads(body["body"])["error"]
    assert error["code"] == "proxy_in_clear"
    assert "serve_app.http.sealed:middlewares" in error["message"]


def test_an_answer_of_serve_itself_passes() -> None:
    async def timed_out(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 408, "headers": []})
        await send({"type": "http.response.body", "body": b"timed out"})

    assert [*ask(ProxyEnd(Between(timed_out)))][1]["body"] == b"timed out"


def test_a_changed_body_is_no_body() -> None:
    async def change(scope: Any, receive: Any, send: Any) -> None:
        async def changed() -> Any:
            message = await receive()
            return message | {"body": message["body"][:-1] + b"?"}

        await ReplicaEnd(echo)(scope, changed, send)

    with pytest.raises(IntegrityError):
        ask(ProxyEnd(Between(change)))


def test_a_head_that_would_not_stay_inline_is_refused() -> None:
    for more in (
        {"headers": [(b"authorization", b"x" * MOST_HEAD_BYTES)]},
        {"query_string": b"x" * (MOST_HEAD_BYTES + 1)},
        {"raw_path": b"x" * (MOST_HEAD_BYTES + 1)},
    ):
        between, app = both_ends()
        assert ask(app, **more)[0]["status"] == 431
        assert not between.seen
    assert ask(both_ends()[1], headers=[(b"a", b"x" * 30_000)])[0]["status"] == 200
