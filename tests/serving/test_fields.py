"""Tests which fields of OpenAI's requests are taken, ignored and refused, without a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from openai.types import chat, completion_create_params
from openai.types.chat import chat_completion_stream_options_param as stream_options
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.shared_params import response_format_json_schema

from serve_app.http.fields import FIELDS, Rule
from serve_app.http.openai import (
    ChatBody,
    CompletionBody,
    JsonSchema,
    Message,
    ResponseFormat,
    StreamOptions,
    TextPart,
)
from serve_app.http.refusals import parsed
from tg_tinker import InvalidRequestError

BODIES: list[tuple[Any, dict[str, Any]]] = [
    (CompletionBody, {"model": "base", "prompt": "abc"}),
    (ChatBody, {"model": "base", "messages": [{"role": "user", "content": "hi"}]}),
]
PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"


def parse(body: Any, given: dict[str, Any]) -> Any:
    return parsed(body, json.dumps(given).encode())


def with_field(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns a body with a field of this path; the first message and its first part take it."""
    place, _, name = path.rpartition(".")
    copy: dict[str, Any] = json.loads(json.dumps(body))
    if place == "messages":
        copy["messages"][0][name] = value
    elif place == "messages.content":
        part = {"type": "text", "text": "hi", name: value}
        copy["messages"][0]["content"] = [part]
    elif place == "stream_options":
        copy |= {"stream": True, "stream_options": {name: value}}
    elif place == "response_format.json_schema":
        form = {"schema": {"type": "object"}, name: value}
        copy["response_format"] = {"type": "json_schema", "json_schema": form}
    else:
        copy[name] = value
    return copy


def that_can_have(path: str) -> list[tuple[Any, dict[str, Any]]]:
    return BODIES[1:] if path.startswith("messages") else BODIES


# --- the table is complete -----------------------------------------------------------------------


def of_the_client() -> Iterator[str]:
    """Yields the paths of all fields that the installed client can send."""
    for module in (completion_create_params, chat_create_params):
        for kind in ("Base", "NonStreaming", "Streaming"):
            yield from getattr(module, f"CompletionCreateParams{kind}").__annotations__
    for message in get_args(chat.ChatCompletionMessageParam):
        yield from (f"messages.{name}" for name in message.__annotations__)
    for name in chat.ChatCompletionContentPartTextParam.__annotations__:
        yield f"messages.content.{name}"
    for name in stream_options.ChatCompletionStreamOptionsParam.__annotations__:
        yield f"stream_options.{name}"
    for form in get_args(chat_create_params.ResponseFormat):
        yield from (f"response_format.{name}" for name in form.__annotations__)
    for name in response_format_json_schema.JSONSchema.__annotations__:
        yield f"response_format.json_schema.{name}"


def test_every_field_of_the_installed_client_has_a_rule() -> None:
    assert set(of_the_client()) - set(FIELDS) == set()


def test_fields_have_an_effect_where_they_are_defined_and_only_there() -> None:
    parts = (Message, TextPart, StreamOptions, ResponseFormat, JsonSchema)
    defined = {
        body.prefix + (field.alias or name)
        for body in (CompletionBody, ChatBody, *parts)
        for name, field in body.model_fields.items()
    }
    assert defined == {name for name, rule in FIELDS.items() if rule.has_effect}


# --- by value ------------------------------------------------------------------------------------

EXAMPLES: dict[Any, list[Any]] = {
    str: ["", "alice"], bool: [True, False], dict: [{}, {"a": {"b": [1]}}],
}  # fmt: skip
NOTHING = [
    (path, value)
    for path, rule in FIELDS.items()
    for one in rule.nothing
    for value in EXAMPLES.get(one if isinstance(one, type) else None, [one])
]


@pytest.mark.parametrize(("path", "value"), NOTHING, ids=str)
def test_what_asks_for_nothing_changes_nothing(path: str, value: Any) -> None:
    for body, right in that_can_have(path):
        absent = parse(body, with_field(right, path, None))
        assert parse(body, with_field(right, path, value)) == absent


@pytest.mark.parametrize("path", FIELDS)
def test_null_is_a_field_that_is_absent(path: str) -> None:
    if FIELDS[path].has_effect:
        return
    for body, right in that_can_have(path):
        assert parse(body, with_field(right, path, None))


ANYTHING = [0, 1, 2.5, -1, True, False, "", "x", "none", [], [{}], ["text"], {}, {"a": 1}]


@pytest.mark.parametrize("path", [path for path in FIELDS if not FIELDS[path].has_effect])
def test_any_other_value_is_refused_by_name_with_what_to_do(path: str) -> None:
    ignored = [value for name, value in NOTHING if name == path]
    refused = 0
    for body, right in that_can_have(path):
        for value in ANYTHING:
            if any(json.dumps(value) == json.dumps(one) for one in ignored):
                continue
            if type(value) in FIELDS[path].nothing:
                continue
            with pytest.raises(InvalidRequestError) as error:
                parse(body, with_field(right, path, value))
            told = error.value.message
            name = path.rpartition(".")[2]
            assert told.endswith(f"{name}: not supported here: {FIELDS[path].advice}")
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("messages.tool_calls", [{"id": "1"}]),
        ("modalities", ["text", "audio"]),
        ("suffix", "the end"),
        ("service_tier", "priority"),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("stream_options.include_obfuscation", True),
        ("prediction", {"type": "content", "content": "x"}),
    ],
)
def test_what_would_have_an_effect_is_refused(path: str, value: Any) -> None:
    for body, right in that_can_have(path):
        with pytest.raises(InvalidRequestError, match=r"not supported here: \w"):
            parse(body, with_field(right, path, value))


def test_numbers_and_truth_values_are_not_mixed_up() -> None:
    """`true == 1` in Python, so a careless comparison takes `logprobs: 0` for `logprobs: false`."""
    completion, right = BODIES[0]
    assert parse(completion, right | {"logprobs": False}).logprobs is None
    assert parse(completion, right | {"logprobs": 0}).logprobs == 0
    for path, value in (("store", 1), ("parallel_tool_calls", 0), ("user", 1)):
        with pytest.raises(InvalidRequestError, match=path):
            parse(completion, right | {path: value})


def test_an_unknown_field_is_refused_by_name_only() -> None:
    for body, right in BODIES:
        with pytest.raises(InvalidRequestError, match=r"^surprise: not supported here$"):
            parse(body, right | {"surprise": 1})


# --- the page ------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    words = {str: "any text", dict: "any object", bool: "`true`, `false`"}
    return words[value] if isinstance(value, type) else f"`{json.dumps(value)}`"


def row(path: str, rule: Rule) -> str:
    return f"| `{path}` | {', '.join(map(shown, rule.nothing)) or 'none'} | {rule.advice} |"


def test_the_page_lists_every_field_that_is_ignored_or_refused() -> None:
    lines = PAGE.read_text().splitlines()
    start = lines.index("| Field | Values that are ignored | Instead of any other value |") + 2
    expected = [row(path, rule) for path, rule in FIELDS.items() if not rule.has_effect]
    assert lines[start : start + len(expected)] == expected
    assert not lines[start + len(expected)].startswith("|")


def test_the_page_names_every_field_with_an_effect() -> None:
    routes = "".join(re.findall(r"^\| `POST /v1/.*$", PAGE.read_text(), re.M))
    for path, rule in FIELDS.items():
        if rule.has_effect and "." not in path:
            assert f"`{path}`" in routes, path
