"""Tests completions that are JSON texts of a schema, whatever a model draws."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from actors.engine.model import Base
from actors.sampling import grammar as grammars
from actors.sampling.engine import SlotEngine
from actors.sampling.grammar import Grammar, Grammars
from actors.sampling.text import Completions, join
from support.models import make_pieces
from support.sampling import Reader, finish
from tg_tinker import InvalidRequestError
from tg_tinker.data.text import load_tokenizer
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import Sample

pytest.importorskip("llguidance", reason="tg-tinker[structured] is not installed")

EOS = 258
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u00e9"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Base:
    return Base.load(str(tiny_model), cache=tmp_path)


@pytest.fixture
def tokenizer(base: Base) -> Any:
    return load_tokenizer(base.tokenizer_files())


@pytest.fixture
def schemas(base: Base, tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, base.vocab_size, base.eos_ids)


def sample(
    base: Base, tokenizer: Any, schema: Mapping[str, Any], prompts: list[str], **values: Any
) -> list[Sample]:
    params = SamplingParams(**({"max_tokens": 100, "json_schema": schema} | values))
    compiled = Grammars(tokenizer, base.vocab_size, base.eos_ids).compiled(schema)
    call, engine = Completions(tokenizer, prompts, params, grammar=compiled), SlotEngine(base)
    engine.submit_all(call.requests)
    chunks = []
    while call.open:
        engine.step()
        chunks += call.take()
    return join(prompts, params.num_completions, [(chunk, 0.0) for chunk in chunks])


def allowed(one: Grammar) -> set[int]:
    found = one.allowed(259)
    assert found is not None
    return set(found.nonzero()[0].tolist())


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [
    {"temperature": 0}, {"temperature": 1.0}, {"temperature": 3.0}, {"top_k": 2},
    {"top_p": 0.3}, {"min_p": 0.5}, {"repetition_penalty": 1.5}, {"logit_bias": {5: 100, EOS: 100}},
], ids=str)  # fmt: skip
def test_every_answer_matches_or_is_cut(base: Base, tokenizer: Any, values: dict[str, Any]) -> None:
    found = sample(base, tokenizer, PERSON, ["abc", "x"], num_completions=8, seed=1, **values)
    for one in found:
        if one.finish_reason == "length":
            assert one.num_tokens == 100
            continue
        person = json.loads(one.completion)
        assert list(person) == ["name", "age", "tags"]
        assert len(person["name"]) <= 6
        assert 0 <= person["age"] <= 150
        assert set(person["tags"]) <= {"a", "b\u00e9"}
    assert sum(one.finish_reason == "stop" for one in found) > len(found) // 2
    assert values == {"temperature": 0} or len({one.completion for one in found}) > 1


def test_any_object_is_one_and_ends_with_it(base: Base, tokenizer: Any) -> None:
    # A tiny model closes no bracket by itself.
    close = {tokenizer('}"')["input_ids"][i]: 4 for i in (0, 1)}
    found = sample(
        base, tokenizer, {"type": "object"}, ["a"], num_completions=8, seed=2, logit_bias=close
    )
    ended = [one for one in found if one.finish_reason == "stop"]
    assert ended
    for one in ended:
        assert isinstance(json.loads(one.completion), dict)
        assert one.completion.endswith("}")
        assert EOS not in one.token_ids


def test_what_could_go_on_ends_with_the_end_of_the_text(base: Base, tokenizer: Any) -> None:
    one_or_more = {"type": "integer", "minimum": 1}  # Nothing could follow a 0.
    (one,) = sample(base, tokenizer, one_or_more, ["a"], logit_bias={EOS: 100})
    assert one.finish_reason == "eos"
    assert one.token_ids[-1] == EOS
    assert isinstance(json.loads(one.completion), int)


def test_the_longest_answer_may_be_complete(base: Base, tokenizer: Any) -> None:
    (one,) = sample(base, tokenizer, {"const": "ab"}, ["a"], max_tokens=4)
    assert (one.completion, one.finish_reason) == ('"ab"', "stop")
    (cut,) = sample(base, tokenizer, {"const": "ab"}, ["a"], max_tokens=3)
    assert (cut.completion, cut.finish_reason) == ('"ab', "length")


def test_logprobs_are_the_models_own(base: Base, tokenizer: Any) -> None:
    (one,) = sample(base, tokenizer, PERSON, ["abc"], temperature=0)
    ids = torch.tensor([[*tokenizer("abc")["input_ids"], *one.token_ids]])
    with torch.no_grad():
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    rows = torch.log_softmax(logits, -1)[2:-1]
    said = rows.gather(1, ids[0, 3:, None])[:, 0]
    assert one.logprobs == pytest.approx(said.tolist(), abs=1e-4)


def test_schemas_side_by_side_and_none(base: Base, tokenizer: Any, schemas: Grammars) -> None:
    engine, readers = SlotEngine(base), []
    for number, schema in enumerate((PERSON, None, {"enum": ["yes", "no"]}, {"type": "boolean"})):
        params = SamplingParams(60, seed=4, json_schema=schema, num_completions=2)
        reader = Reader([65, 66, number], params)
        reader.request.grammar = None if schema is None else schemas.compiled(schema)
        readers.append(reader)
        engine.submit(reader.request)
    finish(engine)

    def texts(reader: Reader) -> list[str]:
        return [tokenizer.decode(reader.ids(index), skip_special_tokens=True) for index in (0, 1)]

    for text in texts(readers[0]):
        assert text.startswith("{")
    assert {json.loads(text) for text in texts(readers[2])} <= {"yes", "no"}
    assert {json.loads(text) for text in texts(readers[3])} <= {True, False}
    plain, alone = (
        SlotEngine(base),
        Reader([65, 66, 1], SamplingParams(60, seed=4, num_completions=2)),
    )
    plain.submit(alone.request)
    finish(plain)
    assert [alone.ids(i) for i in (0, 1)] == [readers[1].ids(i) for i in (0, 1)]
    assert engine.load.free == 8


def test_no_answer_consists_of_spaces(schemas: Grammars, tokenizer: Any) -> None:
    one = schemas.compiled({"type": "object"})
    brace, space, line, tab = (tokenizer(char)["input_ids"][0] for char in "{ \n\t")
    assert allowed(one) == {brace}
    one.push(brace)
    assert allowed(one) >= {space, line}
    assert tab not in allowed(one)
    spaced, lined = one.copy(), one.copy()
    spaced.push(space)
    assert not allowed(spaced) & {space, line}
    lined.push(line)
    for _ in range(16):
        assert space in allowed(lined)
        lined.push(space)
    assert not allowed(lined) & {space, line}


def test_special_tokens_and_ids_without_a_token_are_no_text(base: Base, tokenizer: Any) -> None:
    grown = Grammars(tokenizer, base.vocab_size + 5, {EOS, 256}).compiled({"type": "string"})
    grown.push(tokenizer('"')["input_ids"][0])
    found = grown.allowed(300)
    assert found is not None
    assert not found[256:].any()
    assert found[:256].any()
    grown.push(tokenizer('"')["input_ids"][0])
    assert grown.complete


def test_a_token_that_ends_texts_is_no_part_of_one(base: Base, tokenizer: Any) -> None:
    """Else a model whose end is a plain character would cut its own JSON."""
    letter = tokenizer("a")["input_ids"][0]
    one = Grammars(tokenizer, base.vocab_size, {letter}).compiled({"type": "string"})
    one.push(tokenizer('"')["input_ids"][0])
    assert letter not in allowed(one)


def test_a_model_without_an_end_is_complete_where_its_json_is(base: Base, tokenizer: Any) -> None:
    base.eos_ids = frozenset()
    (one,) = sample(base, tokenizer, {"enum": [True]}, ["a"])
    assert (one.completion, one.finish_reason) == ("true", "stop")


@pytest.mark.parametrize("schema", [PERSON, {"enum": ["a ab", {"a b": [" a", None]}]}], ids=str)
def test_sentencepiece_tokens_write_json_too(schema: dict[str, Any]) -> None:
    pieces, random = make_pieces(), Random(1)
    compiled = Grammars(pieces, 270, {pieces.eos_token_id}).compiled(schema)
    ended = 0
    for _ in range(20):
        one, ids = compiled.copy(), list[int]()
        while not one.complete and len(ids) < 300:
            found = one.allowed(270)
            assert found is not None
            ids.append(random.choice(found.nonzero()[0].tolist()))
            one.push(ids[-1])
        ended += one.complete
        if one.complete:
            json.loads(pieces.decode(ids, clean_up_tokenization_spaces=False))
    assert ended > 5


# --- schemas from strangers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"oneOf": [{"minimum": 1}, {"maximum": 5}]}, "oneOf"),
        ({"type": "string", "format": "PATIENT"}, "format"),
        ({"type": "string", "pattern": "PATIENT(?=a)"}, "pattern"),
        ({"type": "string", "pattern": "(" * 300 + ")" * 300}, "pattern"),
        ({"type": "PATIENT"}, ""),
        ({"properties": [1]}, "properties"),
        ({"$ref": "#/$defs/PATIENT"}, ""),
        ({"$ref": "#"}, ""),
        ({"type": "object", "properties": {"PATIENT": False}, "required": ["PATIENT"]}, "required"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_and_not_repeated(
    schemas: Grammars, schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequestError, match="wrong or cannot be followed") as refused:
        schemas.compiled(schema)
    assert "PATIENT" not in refused.value.message
    assert named in refused.value.message


@pytest.mark.parametrize("value", [3, 7, 997, 999_983, 0.07, 1e-7, 10**9])
def test_multiples_that_would_never_be_compiled_are_refused_at_once(
    schemas: Grammars, value: float
) -> None:
    """Several of them together took minutes and gigabytes."""
    inner = {"anyOf": [{"type": "number", "multipleOf": value}, {"type": "null"}]}
    for schema in (inner, {"type": "array", "items": {"allOf": [inner]}}, {"$defs": {"a": inner}}):
        with pytest.raises(InvalidRequestError, match="power of ten"):
            schemas.compiled(schema)


def test_cents_and_a_property_of_that_name_are_followed(schemas: Grammars) -> None:
    assert schemas.compiled({"type": "number", "multipleOf": 0.01, "minimum": 0})
    assert schemas.compiled({"properties": {"multipleOf": {"type": "integer"}}})


def test_no_reference_is_fetched(schemas: Grammars) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        for where in (f"http://127.0.0.1:{port}/a.json", "file:///etc/hostname"):
            with pytest.raises(InvalidRequestError, match="cannot be followed"):
                schemas.compiled({"$ref": where})
        with pytest.raises(TimeoutError):
            server.accept()


COSTLY: dict[str, dict[str, Any]] = {
    "long repetition": {"type": "string", "pattern": "^x{30000}$"},
    "long text": {"enum": ["x" * 30_000]},
    "one of many the same": {
        "$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 50}},
        "$ref": "#/$defs/a",
    },
    "many": {"anyOf": [{"type": "string", "pattern": f"^([a-z]|x)*{i}[^q]{{0,30}}(a|b)*y$"}
                       for i in range(200)]},
    "backtracking": {"type": "string", "pattern": "^(a|b)*a(a|b){300}$"},
    "nested repetitions": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "many items": {"type": "array", "items": {}, "minItems": 10**6, "maxItems": 10**9},
    "no end": {"$ref": "#"},
    "crossed": {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}, "required": [f"p{i}_{j}"]}
                                     for j in range(8)]} for i in range(8)]},
    "deep": json.loads('{"items":' * 63 + "{}" + "}" * 63),
    "far": {"type": "integer", "minimum": -(10**18), "maximum": 10**18},
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_schema_is_refused_or_bounded(
    schemas: Grammars, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline ends the test where nothing bounds the work; the time itself is not asserted."""
    monkeypatch.setattr(grammars, "START_S", 30.0)  # the library's own limits alone
    SamplingParams(json_schema=COSTLY[name])
    done = threading.Event()

    def follow() -> None:
        try:
            one = schemas.compiled(COSTLY[name])
            for _ in range(100):
                if (found := one.allowed(259)) is None or not found[:256].any():
                    break
                one.push(int(found.nonzero()[0][0]))
        except InvalidRequestError:
            pass
        done.set()

    threading.Thread(target=follow, daemon=True).start()
    assert done.wait(60)


def test_a_schema_that_takes_too_long_ends_its_request_alone(
    base: Base, schemas: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compiled = SlotEngine(base), schemas.compiled(PERSON)
    monkeypatch.setattr(grammars, "START_S", 0.0)
    monkeypatch.setattr(grammars, "TOKEN_S", 0.0)
    other = Reader([65, 66], SamplingParams(20, seed=1))
    costly = Reader([65, 66], SamplingParams(20, json_schema=PERSON))
    costly.request.grammar = compiled
    engine.submit(other.request)
    engine.submit(costly.request)
    finish(engine)
    (error,) = [token.error for token in costly.tokens]
    assert isinstance(error, InvalidRequestError)
    assert "too much work" in error.message
    assert other.ends
    assert engine.load.free == 8


def test_all_completions_of_a_request_share_its_time(schemas: Grammars) -> None:
    first = schemas.compiled(PERSON)
    second = first.copy()
    first._spent.seconds = 60.0
    assert second.allowed(259) is None
    assert second.error is not None
    assert schemas.compiled(PERSON).allowed(259) is not None


def test_a_schema_sets_no_options_of_the_library(schemas: Grammars) -> None:
    with pytest.raises(InvalidRequestError, match="x-guidance"):
        schemas.compiled(PERSON | {"x-guidance": {"coerce_one_of": True}})


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"enum": ["x" * 2**15]}, "more than 32768"),
        (json.loads('{"items":' * 64 + "{}" + "}" * 64), "more than 64 levels"),
        ({"const": float("nan")}, "JSON values"),
        ({"const": {1, 2}}, "JSON values"),
        ([1], "must be an object"),
        ("{}", "must be an object"),
        (True, "must be an object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_schema_or_too_large_is_refused_before_anything_runs(
    schema: Any, told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"json_schema.*{told}"):
        SamplingParams(json_schema=schema)


def test_a_schema_without_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["items"] = endless
    with pytest.raises(InvalidRequestError, match="JSON values"):
        SamplingParams(json_schema=endless)
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequestError, match="json_schema"):
        SamplingParams(json_schema=deep)


@pytest.mark.parametrize("stops", [{"stop_sequences": ("}",)}, {"stop_token_ids": (5,)}])
def test_stops_beside_a_schema_are_refused(stops: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="leave stop sequences and stop tokens out"):
        SamplingParams(json_schema=PERSON, **stops)


def test_compiling_threads_share_one_vocabulary(schemas: Grammars) -> None:
    found, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: found.append(schemas.prepare())))
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(deadline - time.monotonic())
    assert len(found) == 4
    assert len({id(one) for one in found}) == 1
