"""Runs the HTTP application in this process: without Serve, a cluster or a model.

The routes, the checks and the limits are the real ones. The registry is a real database, and the
engine draws the same letter again and again.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from ray import serve

from actors.registry.registry import Registry
from actors.storage.home import create
from serve_app.http.access import Access, HttpOptions
from serve_app.http.routes import LOOKUPS, HttpReplica, api
from serve_app.http.sealed import _KEY, _opened
from serve_app.replica.replica import TEXTS
from serve_app.replica.threads import TenantThreads
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.envelope import new_key
from tg_tinker.types import StreamChunk

CONTEXT = 128


class Answer(NamedTuple):
    """What a client gets. `lines` are the events of a stream."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def home_with_registry(folder: Path) -> Registry:
    create(folder)
    return Registry(default_database(folder), folder / "keyring")


class OneReplica:
    """A replica whose engine draws a letter every `letter_s` seconds, up to `max_tokens`."""

    def __init__(
        self, registry: Registry, tokenizer: Any, folder: Path, options: HttpOptions | None = None
    ) -> None:
        self.registry, self.begun, self.letter_s = registry, 0, 0.0
        options = options or HttpOptions()
        self.replica: Any = object.__new__(HttpReplica.__mro__[1])  # Without what Serve adds.
        self.replica.__dict__.update(
            registry=registry,
            tokenizer=tokenizer,
            engines=SimpleNamespace(alive=True, base=SimpleNamespace(context_length=CONTEXT)),
            sources=SimpleNamespace(names=lambda *_: ["base"], store=str(folder / "store")),
            texts=TenantThreads(TEXTS, "text"),
            answers=TenantThreads(TEXTS, "answer"),
            begin=self._begin,
            follow=self._follow,
            _options=options,
            _access=Access(registry, options, str(folder / "store")),
            _lookups=TenantThreads(LOOKUPS, "lookup"),
            _waiting=Counter(),
        )

    async def _begin(self, source: Any, prompts: Any, params: Any, *_: Any) -> Any:
        self.begun += 1
        call = SimpleNamespace(version="base", count=params.num_completions, left=params.max_tokens)
        return SimpleNamespace(call=call, prompt_tokens=len(prompts[0]), prompts=len(prompts))

    async def _follow(self, running: Any, *_: Any) -> AsyncGenerator[StreamChunk, None]:
        while running.call.left:
            running.call.left -= 1
            await asyncio.sleep(self.letter_s)
            reason = None if running.call.left else "length"
            yield StreamChunk(text="a", index=0, token_ids=[64], logprobs=[0.0],
                              finish_reason=reason)  # fmt: skip

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | list[tuple[str, str]] = (),  # type: ignore[assignment]
        body: bytes = b"",
        piece: int = 2**20,
    ) -> Answer:
        """Sends one request in pieces of so many bytes, and returns the whole answer."""
        key, got = new_key(), []
        pairs = [*(headers.items() if isinstance(headers, Mapping) else headers)]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 9),
            "headers": [(name.lower().encode(), value.encode()) for name, value in pairs],
            "extensions": {_KEY: key},
        }  # fmt: skip
        ended = asyncio.Event()
        pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
        parts = [{"type": "http.request", "body": one, "more_body": True} for one in pieces[::-1]]
        parts.insert(0, {"type": "http.request", "body": b"", "more_body": False})

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            got.append(_opened(key, message))

        await api(scope, receive, send)
        ended.set()
        start, *rest = got
        names = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], names, b"".join(part["body"] for part in rest))


def routes_of(application: Any) -> Iterator[Any]:
    """Yields the routes of an application, also those of routers in it."""
    parts = [*application.routes]
    while parts:
        part = parts.pop()
        parts += getattr(getattr(part, "original_router", None), "routes", [])
        if hasattr(part, "endpoint"):
            yield part


@contextmanager
def answering(replica: OneReplica) -> Iterator[OneReplica]:
    """Makes the routes call this replica, as Serve does."""
    with pytest.MonkeyPatch.context() as patch:
        context = SimpleNamespace(servable_object=replica.replica)
        patch.setattr(serve, "get_replica_context", lambda: context)
        yield replica
