"""Tests that every method of OpenAI's own client works that has a route on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from support.serving import Direct, Server, installed

openai = installed("openai")
pytestmark = pytest.mark.slow

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
PROMPT = "The capital of France is"
ASKED: dict[str, Any] = {"model": "base", "max_tokens": 6, "temperature": 0}


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def hello(direct: Direct) -> str:
    return direct.answer("Say hello.", 6)


@pytest.fixture(scope="module")
def paris(direct: Direct) -> str:
    return direct.continued(direct.ids(PROMPT), 6)


# --- models --------------------------------------------------------------------------------------


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there is no model 'lost/@>=7'"):
        client.models.retrieve("lost/@>=7")


# --- completions ---------------------------------------------------------------------------------


def test_completions(client: Any, paris: str) -> None:
    found = client.completions.create(prompt=PROMPT, **ASKED)
    assert found.choices[0].text == paris
    events = client.completions.create(prompt=PROMPT, stream=True, **ASKED)
    assert "".join(event.choices[0].text for event in events) == paris


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_an_echo_with_logprobs(client: Any, direct: Direct, max_tokens: int) -> None:
    found = client.completions.create(
        prompt=PROMPT, echo=True, logprobs=2, **ASKED | {"max_tokens": max_tokens}
    )
    (choice,) = found.choices
    ids = direct.ids(PROMPT)
    drawn = direct.ids(choice.text)[len(ids) :]
    scored = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert len(drawn) == max_tokens
    assert len(scored.tokens) == len(ids) + max_tokens
    assert "".join(scored.tokens) == choice.text
    ends = [*scored.text_offset[1:], len(choice.text)]
    pairs = zip(scored.text_offset, ends, strict=True)
    assert [choice.text[start:end] for start, end in pairs] == scored.tokens
    assert (scored.token_logprobs[0], scored.top_logprobs[0]) == (None, None)
    score, _ = direct.score(ids[:1], ids[1:] + drawn)
    assert sum(scored.token_logprobs[1:]) == pytest.approx(score, abs=1e-3)
    for token, value, top in zip(
        scored.tokens[1:], scored.token_logprobs[1:], scored.top_logprobs[1:], strict=True
    ):
        assert top[token] == value  # Also where others are likelier.
        assert len(top) >= 2


# --- chats ---------------------------------------------------------------------------------------


def test_chat(client: Any, hello: str) -> None:
    found = client.chat.completions.create(messages=HELLO, **ASKED)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", hello)
    assert choice.finish_reason == "length"
    assert found.usage.completion_tokens == 6
    events = client.chat.completions.create(messages=HELLO, stream=True, **ASKED)
    assert "".join(event.choices[0].delta.content or "" for event in events) == hello


def test_the_stream_helper(client: Any, hello: str) -> None:
    """The helper refuses answers that end at their limit, so this one ends at a stop."""
    asked = ASKED | {"max_tokens": 20, "stop": hello[3:6], "logprobs": True}
    with client.chat.completions.stream(
        messages=HELLO, stream_options={"include_usage": True}, **asked
    ) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert found.choices[0].message.content == hello[:3]
    assert found.usage.completion_tokens == len(found.choices[0].logprobs.content)
    assert {"chunk", "content.delta", "content.done", "logprobs.content.done"} <= kinds


def test_parse_without_a_format(client: Any, hello: str) -> None:
    found = client.chat.completions.parse(messages=HELLO, **ASKED | {"stop": hello[3:6]})
    assert found.choices[0].message.content == hello[:3]


class Day(BaseModel):
    weekend: bool
    day: Literal["Monday", "Saturday"]


def test_parse_and_stream_a_model_of_pydantic(client: Any) -> None:
    asked = ASKED | {"messages": HELLO, "response_format": Day, "max_tokens": 40}
    parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(parsed, Day)
    with client.chat.completions.stream(**asked) as stream:
        last = stream.get_final_completion()
    assert last.choices[0].message.parsed == parsed


# --- what all of them have -----------------------------------------------------------------------


def test_raw_and_streaming_responses(client: Any, hello: str, paris: str) -> None:
    raw = client.chat.completions.with_raw_response.create(messages=HELLO, **ASKED)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == hello
    with client.completions.with_streaming_response.create(prompt=PROMPT, **ASKED) as response:
        assert response.parse().choices[0].text == paris
    assert client.models.with_raw_response.list().parse().data[0].id == "base"
    assert client.with_options(timeout=60).models.retrieve("base").id == "base"


def test_async(server: Server, hello: str, paris: str) -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(messages=HELLO, stream=True, **ASKED)
            joined = "".join([event.choices[0].delta.content or "" async for event in stream])
            texts, chats = await asyncio.gather(
                client.completions.create(prompt=PROMPT, **ASKED),
                client.chat.completions.create(messages=HELLO, **ASKED),
            )
            async with client.chat.completions.stream(
                messages=HELLO, **ASKED | {"stop": hello[3:6]}
            ) as helper:
                last = await helper.get_final_completion()
            listed = [model.id async for model in client.models.list()]
            return [
                listed, (await client.models.retrieve("base")).id, joined,
                texts.choices[0].text, chats.choices[0].message.content,
                last.choices[0].message.content,
            ]  # fmt: skip

    expected = [["base"], "base", hello, paris, hello, hello[:3]]
    assert asyncio.run(all_of_them()) == expected


def test_what_has_no_route_is_a_typed_error(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="base", input="hello")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="base", input="hello")
    with pytest.raises(openai.BadRequestError, match="tools: not supported here"):
        client.chat.completions.create(
            messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}], **ASKED
        )
