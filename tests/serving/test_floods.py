"""Tests that no body, whatever its shape, holds up the requests of others.

The event loop of a replica serves all tenants. So what a body costs there is measured, as the time
of its thread, not by the clock. The rest happens in threads of the tenant.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from actors.sampling import text as sampling_text
from actors.sampling.requests import Token
from actors.sampling.text import LIGHT, Completions, is_light
from serve_app import application
from serve_app.http import refusals, routes
from serve_app.http.access import KEYS_WORTH, MOST_OF_TENANT, Access, Caller, HttpOptions
from serve_app.http.bodies import MOST_PARTS, value_of
from serve_app.http.openai import Answer, Body, ChatBody, CompletionBody, SampleBody
from serve_app.http.refusals import parsed
from support.replicas import OneReplica, answering, home_with_registry, routes_of
from tg_tinker.data import text
from tg_tinker.data.text import load_tokenizer, read_tokenizer
from tg_tinker.errors import InvalidRequestError, QueueFullError
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import StreamChunk

MOST_LOOP_S, MOST_BYTES = 0.2, 64 * 2**20
ROOM = 2**20 - 200


def filled(item: str, between: str = ",") -> str:
    return between.join([item] * ((ROOM - 2) // (len(item) + len(between))))


def nested(opening: str, closing: str, levels: int = 150) -> str:
    return f"[{filled(opening * levels + '0' + closing * levels)}]"


SHAPES = {
    "objects": f"[{filled('{}')}]",
    "lists": f"[{filled('[]')}]",
    "numbers": f"[{filled('0')}]",
    "numbers and a text": f'[{filled("0")[:-5]},"x"]',
    "fractions": f"[{filled('1.5')}]",
    "lists of a number": f"[{filled('[0]')}]",
    "objects of a number": f"[{filled(json.dumps({'': 0}))}]",
    "nulls": f"[{filled('null')}]",
    "empty texts": f"[{filled(json.dumps(''))}]",
    "texts": f"[{filled(json.dumps('a'))}]",
    "parts": f"[{filled(json.dumps({'type': 'text', 'text': ''}))}]",
    "wrong parts": f"[{filled(json.dumps({'type': 0}))}]",
    "messages": f"[{filled(json.dumps({'role': 'user', 'content': ''}))}]",
    "nested objects": nested('{"":', "}"),
    "nested lists": nested("[", "]"),
    "one deep list": "[" * (ROOM // 2) + "]" * (ROOM // 2),
    "no end": "[" * ROOM,
    "many keys": "{" + ",".join(f'"{i:x}":0' for i in range(100_000)) + "}",
    "many empty keys": "{" + filled('"":0') + "}",
    "some keys": "{" + ",".join(f'"{i:x}":{{}}' for i in range(MOST_PARTS // 2 - 10)) + "}",
    "a text": json.dumps("a" * ROOM),
    "brackets in a text": json.dumps("[{:" * (ROOM // 3)),
    "a text of escapes": f'"{filled(chr(92) + "n", "")}"',
    "a text of long escapes": f'"{filled(chr(92) + "u00e9", "")}"',
    "a text with a wide character": '"' + "a" * (ROOM - 4) + '\N{OTTER}"',
    "a text without end": '"' * 3 + "a" * ROOM,
    "quotes": '"' * ROOM,
    "backslashes": '"' + "\\" * ROOM,
    "a number": "1" * ROOM,
    "a fraction": "0." + "1" * ROOM,
    "a small number": "1e-" + "9" * ROOM,
    "long numbers": f"[{filled('9' * 4000)}]",
    "blanks": "[" + " " * (ROOM - 2) + "]",
}  # fmt: skip


class Place(NamedTuple):
    """A place in a body. `around` has an @ there."""

    kind: type[Body]
    path: str
    around: str

    def holding(self, shape: str) -> bytes:
        return self.around.replace("@", shape).encode()


RIGHT: dict[type[Body], tuple[str, dict[str, Any]]] = {
    CompletionBody: ("/v1/completions", {"model": "base", "prompt": "a"}),
    ChatBody: (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "a"}]},
    ),
    SampleBody: ("/v1/sample", {"model": "base", "prompts": "a"}),
}
INSIDE = {
    "messages": ['[{"role":"user","content":@}]', '[{"role":@,"content":"a"}]', "[@]",
                 '[{"role":"user","content":[@]}]', '[{"role":"user","content":[{"type":"text",'
                 '"text":@}]}]', '[{"role":"user","content":"a","name":@}]'],
    "prompt": ["[@]", "[[@]]"],
    "prompts": ["[@]"],
    "stop": ["[@]"],
    "stop_sequences": ["[@]"],
    "logit_bias": ['{"5":@}'],
    "response_format": ['{"type":@}', '{"type":"json_schema","json_schema":@}',
                        '{"type":"json_schema","json_schema":{"schema":@}}',
                        '{"type":"json_schema","json_schema":{"schema":{"enum":@}}}'],
    "json_schema": ['{"enum":@}'],
    "stream_options": ['{"include_usage":@}'],
}  # fmt: skip
"""Places inside of fields."""


def places() -> Iterator[Place]:
    """Yields each field of each body, the places inside of it, and the body itself."""
    for kind, (path, right) in RIGHT.items():
        names = [field.alias or name for name, field in kind.model_fields.items()]
        for name in [*names, "metadata", "tools", "unheard_of"]:
            for inside in ["@", *INSIDE.get(name, [])]:
                rest = json.dumps({key: right[key] for key in right if key != name})
                yield Place(kind, path, f'{rest[:-1]},"{name}":{inside}}}')
        yield Place(kind, path, "@")


PLACES = [*places()]
SOME = [place for place in PLACES if any(
    name in place.around for name in ('"stop":', "prompt", "metadata", "messages", "schema", "bias")
)][::4]  # fmt: skip
"""Enough places for requests as a whole: the cost of parsing is that of the other places."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(read_tokenizer(tiny_model))


@pytest.fixture(scope="module")
def one(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneReplica]:
    folder = tmp_path_factory.mktemp("one")
    with answering(OneReplica(home_with_registry(folder / "home"), tokenizer, folder)) as here:
        yield here


def headers_of(one: OneReplica, tenant: str = "default") -> dict[str, str]:
    key, _ = one.registry.api_keys.create(tenant, "", [], 1)
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


# --- bounds ---------------------------------------------------------------------------------------


def bodies(kind: type[Body] = Body) -> Iterator[type[Body]]:
    for below in kind.__subclasses__():
        yield below
        yield from bodies(below)


def unbounded(schema: Any, path: str) -> Iterator[str]:
    """Yields the places of a format that take a text, list or object of any size.

    What a function of ours reads is bounded by it, and what is below `Any` by `value_of`.
    """
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from unbounded(part, path)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if kind in ("str", "list", "dict", "set", "frozenset", "tuple", "bytes", "generator"):
        if "max_length" not in schema:
            yield f"{path}: {kind} without max_length"
        if kind == "list" and not schema.get("fail_fast"):
            yield f"{path}: list without fail_fast"
    if kind == "model-field" or path == "":
        path = path or "body"
    for name, part in schema.items():
        if name not in ("metadata", "keys_schema", "serialization", "cls", "config"):
            yield from unbounded(part, f"{path}.{name}")


@pytest.mark.parametrize("kind", [*bodies()])
def test_every_list_text_and_object_of_every_body_has_a_bound(kind: type[Body]) -> None:
    assert [*unbounded(kind.__pydantic_core_schema__, "")] == []


def test_a_format_without_a_bound_is_noticed() -> None:
    class Loose(Body):
        texts: list[str]
        more: dict[str, int]

    assert len([*unbounded(Loose.__pydantic_core_schema__, "")]) == 4


def test_every_route_with_a_body_has_a_format_here() -> None:
    paths = {route.path for route in routes_of(routes.api) if "POST" in route.methods}
    assert paths == {path for path, _ in RIGHT.values()}


def test_parts_are_counted_outside_of_texts_before_anything_is_built() -> None:
    code = {"prompt": '{[":\\' * 50_000, "model": "a"}
    assert value_of(json.dumps(code).encode()) == code
    most = [{}] * (MOST_PARTS - 1)
    assert value_of(json.dumps(most).encode()) == most
    for many in ([*most, {}], [*most, []], dict.fromkeys(map(str, range(MOST_PARTS)))):
        with pytest.raises(InvalidRequestError, match="the body has more than 32,768 objects"):
            value_of(json.dumps(many).encode())


def test_what_is_no_json_is_told_and_not_repeated() -> None:
    for wrong in (b"4711", b'{"prompt": "4711', b'{"4711": 4711 4711}', b"{4711}", b"\xff4711", b"",
                  b'"\\u4711\\ud83d"', b"[" * 1000 + b"4711", b'{"a": 47.11.4711}'):  # fmt: skip
        with pytest.raises(InvalidRequestError) as refused:
            parsed(CompletionBody, wrong)
        assert "4711" not in refused.value.message
        assert refused.value.__context__ is None
        assert len(refused.value.message) < 200


# --- what a body costs ----------------------------------------------------------------------------


def errors_of(place: Place, shape: str) -> int:
    try:
        place.kind.model_validate(value_of(place.holding(shape)))
    except ValidationError as error:
        return error.error_count()
    except InvalidRequestError:
        pass
    return 0


@pytest.mark.parametrize("shape", ["empty texts", "numbers", "some keys"])
def test_no_shape_in_any_place_makes_many_errors(shape: str) -> None:
    """All errors are built before the first of them is shown."""
    for place in PLACES:
        assert errors_of(place, SHAPES[shape]) < 100, place


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_takes_much_memory(shape: str) -> None:
    for around in ('{"model":"base","prompt":@}', '{"model":"base","metadata":@}', "@"):
        content = around.replace("@", SHAPES[shape]).encode()
        tracemalloc.start()
        try:
            parsed(CompletionBody, content)
        except InvalidRequestError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MOST_BYTES, around


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_holds_the_event_loop(one: OneReplica, shape: str) -> None:
    headers = headers_of(one)

    async def slowest() -> tuple[float, Place]:
        found = []
        for place in SOME:
            before = time.thread_time()
            answer = await one.ask("POST", place.path, headers, place.holding(SHAPES[shape]))
            found.append((time.thread_time() - before, place))
            assert answer.status in (200, 400), place
            assert len(answer.body) < 10_000
        return max(found, key=lambda one: one[0])

    took, where = asyncio.run(slowest())
    assert took < MOST_LOOP_S, where


def test_a_body_in_many_small_pieces_is_refused(one: OneReplica) -> None:
    body, headers = b" " * 2**14, headers_of(one)
    answer = asyncio.run(one.ask("POST", "/v1/sample", headers, body, piece=1))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert "8,192 pieces" in answer.error["message"]
    assert asyncio.run(one.ask("POST", "/v1/sample", headers, body, piece=4)).status == 400


def test_a_text_much_longer_than_the_context_is_not_encoded(
    one: OneReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is encoded, a text takes hundreds of times its own memory."""
    sizes: list[int] = []
    plain = text.plain_tokens
    monkeypatch.setattr(
        sampling_text, "plain_tokens", lambda t, part: (sizes.append(len(part)), plain(t, part))[1]
    )
    long, headers, begun = "hello world " * 80_000, headers_of(one), one.begun
    talk = [
        {"role": "user", "content": long[:500_000]},
        {"role": "user", "content": long[:400_000]},
    ]
    for path, rest in (
        ("/v1/completions", {"prompt": ["a", long]}),
        ("/v1/completions", {"prompt": [1] * 200_000, "echo": True}),
        ("/v1/chat/completions", {"messages": talk}),
        ("/v1/sample", {"prompts": long}),
    ):
        body = json.dumps({"model": "base", **rest}).encode()
        answer = asyncio.run(one.ask("POST", path, headers, body))
        assert (answer.status, one.begun) == (400, begun)
        assert "longer than the context of 128" in answer.error["message"]
    assert sum(sizes) == 3 * sampling_text.PIECE


def test_a_text_that_may_fit_is_left_to_the_engine(tokenizer: Any) -> None:
    sampling_text.check_length(tokenizer, "a" * 20_000, 20_000)
    sampling_text.check_length(tokenizer, [1] * 128, 128)
    with pytest.raises(InvalidRequestError, match="longer than the context of 17000"):
        sampling_text.check_length(tokenizer, "a" * 20_000, 17_000)
    with pytest.raises(InvalidRequestError, match="longer than the context of 128"):
        sampling_text.check_length(tokenizer, [1] * 129, 128)


# --- whose threads, and how many requests ---------------------------------------------------------


def test_bodies_are_parsed_and_answers_are_written_in_threads_of_the_tenant(
    one: OneReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, headers = [], headers_of(one)

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            called.append((name, threading.current_thread().name))
            return function(*arguments, **options)

        return call

    # Serve copies the names that the routes use, so what they call is replaced and not their names.
    patched = [(refusals, "value_of"), (Answer, "__init__"), (Answer, "event"), (Answer, "whole")]
    patched += [(kind, "params") for kind in RIGHT] + [(CompletionBody, "prompts")]
    for place, name in [*patched, (ChatBody, "plain_messages")]:
        monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
    for path, right in RIGHT.values():
        for stream in (False, True):
            body = json.dumps({**right, "max_tokens": 3, "stream": stream}).encode()
            assert asyncio.run(one.ask("POST", path, headers, body)).status == 200
    assert {name for name, _ in called} == {name for _, name in patched} | {"plain_messages"}
    # Only what is light is written outside of them.
    outside = {name for name, thread in called if thread.split("_")[0] not in ("text", "answer")}
    assert outside == {"event"}


def test_only_few_tokens_without_stops_are_read_outside_of_threads(tokenizer: Any) -> None:
    def light(tokens: int, **options: Any) -> bool:
        call = Completions(tokenizer, [[65]], SamplingParams(**options))
        for _ in range(tokens):
            call.requests[0].deliver(Token(token_id=66))
        return call.light

    assert light(LIGHT)
    assert not light(LIGHT + 1)
    assert light(3, top_logprobs=20)
    assert not light(4, top_logprobs=20)
    assert not light(1, stop_sequences=("a",))


def test_only_short_chunks_are_written_outside_of_threads() -> None:
    def light(tokens: int, top: int = 0, scores: tuple[float, ...] | None = None) -> bool:
        tops = [((66, -1.0),) * top] * tokens if top else []
        return is_light(
            StreamChunk("a", 0, [66] * tokens, [-1.0] * tokens, top_logprobs=tops,
                        prompt_logprobs=scores)
        )  # fmt: skip

    assert light(LIGHT)
    assert not light(LIGHT + 1)
    assert light(3, top=20)
    assert not light(4, top=20)
    assert not light(1, scores=(0.0,))


def test_a_refused_body_does_not_wait_in_memory_behind_others(
    one: OneReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from a body is checked in the turn in which the body is parsed."""
    turns, run = [], one.replica.texts.run
    monkeypatch.setattr(one.replica.texts, "run", lambda *job: turns.append(job) or run(*job))
    headers = headers_of(one)
    for path, right in RIGHT.values():
        turns.clear()
        body = json.dumps({**right, "max_tokens": 1}).encode()
        assert asyncio.run(one.ask("POST", path, headers, body)).status == 200
        assert len(turns) == 1, path


def test_a_tenant_with_many_keys_does_not_fill_a_replica() -> None:
    registry: Any = None
    access = Access(registry, HttpOptions(most_at_once=2), "nowhere")
    mine = [Caller("us", f"key-{number}") for number in range(16)]
    taken = [caller for caller in mine[:KEYS_WORTH] for _ in range(2)]
    for caller in taken:
        access.enter(caller, 1)
    with pytest.raises(QueueFullError, match="8 requests of all keys of this tenant"):
        access.enter(mine[-1], 1)
    with pytest.raises(QueueFullError, match="2 requests of this key"):
        access.enter(mine[0], 1)
    access.enter(Caller("them", "key"), 1)
    access.leave(taken[0])
    access.enter(mine[-1], 1)
    assert 2 * MOST_OF_TENANT <= application.MOST_ONGOING


def test_a_tenant_with_large_limits_leaves_half_of_a_replica() -> None:
    registry: Any = None
    access = Access(registry, HttpOptions(most_at_once=500), "nowhere")
    for _ in range(MOST_OF_TENANT):
        access.enter(Caller("us", "key"), 1)
    with pytest.raises(QueueFullError, match="256 requests of all keys"):
        access.enter(Caller("us", "key"), 1)
