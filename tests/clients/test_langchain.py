"""Tests that the chat models and completions of langchain-openai work, as its users call them."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from support.serving import Direct, Server, installed

langchain_openai = installed("langchain_openai")
pytestmark = pytest.mark.slow

HELLO, DAY = "Say hello.", "Which day follows Monday?"
PROMPT, NUMBERS = "The capital of France is", "1, 2, 3,"


@pytest.fixture
def options(server: Server) -> dict[str, Any]:
    return {
        "model": "base", "base_url": server.url, "api_key": "none", "max_tokens": 6,
        "temperature": 0, "max_retries": 0,
    }  # fmt: skip


@pytest.fixture
def chat(options: dict[str, Any]) -> Any:
    return langchain_openai.ChatOpenAI(**options)


@pytest.fixture
def completions(options: dict[str, Any]) -> Any:
    return langchain_openai.OpenAI(**options)


# --- chats ---------------------------------------------------------------------------------------


def test_invoke(chat: Any, direct: Direct) -> None:
    found = chat.invoke(HELLO)
    assert found.content == direct.answer(HELLO, 6)
    assert found.usage_metadata["output_tokens"] == 6
    assert found.response_metadata["finish_reason"] == "length"


def test_stream(chat: Any, direct: Direct) -> None:
    *chunks, _ = events = list(chat.stream(HELLO, stream_usage=True))
    assert len(chunks) >= 6
    assert "".join(one.content for one in events) == direct.answer(HELLO, 6)
    assert [one.usage_metadata["output_tokens"] for one in events if one.usage_metadata] == [6]


def test_batch(chat: Any, direct: Direct) -> None:
    expected = [direct.answer(text, 6) for text in (HELLO, DAY)]
    assert [one.content for one in chat.batch([HELLO, DAY])] == expected


def test_async(chat: Any, direct: Direct) -> None:
    async def both() -> tuple[str, str]:
        whole = await chat.ainvoke(HELLO)
        return whole.content, "".join([one.content async for one in chat.astream(HELLO)])

    assert asyncio.run(both()) == (direct.answer(HELLO, 6),) * 2


def test_logprobs(options: dict[str, Any], direct: Direct) -> None:
    chat = langchain_openai.ChatOpenAI(**options, logprobs=True, top_logprobs=2)
    found = chat.invoke(HELLO)
    scored = found.response_metadata["logprobs"]["content"]
    context = direct.chat_ids({"role": "user", "content": HELLO})
    score, greedy = direct.score(context, direct.ids(found.content))
    assert greedy
    assert sum(one["logprob"] for one in scored) == pytest.approx(score, abs=1e-3)
    assert [len(one["top_logprobs"]) for one in scored] == [2] * 6


def test_a_conversation_with_names_and_its_own_answers(chat: Any, direct: Direct) -> None:
    first = chat.invoke([("system", "Be brief."), ("user", HELLO)])
    system, user, answer, more = (
        {"role": role, "content": text}
        for role, text in (
            ("system", "Be brief."), ("user", HELLO), ("assistant", first.content), ("user", DAY),
        )
    )  # fmt: skip
    found = chat.invoke([system, user | {"name": "ann"}, first, more])
    expected = direct.continued(direct.chat_ids(system, user, answer, more), 6)
    assert found.content == expected


def test_fields_of_a_request(options: dict[str, Any], direct: Direct) -> None:
    chat = langchain_openai.ChatOpenAI(
        **options, seed=1, stop=["\n\n\n"], top_p=1, presence_penalty=0, frequency_penalty=0,
        store=False, metadata={"why": "test"}, service_tier="auto", logit_bias={},
        model_kwargs={"user": "ann"},
    )  # fmt: skip
    assert chat.bind(tools=[], tool_choice="none").invoke(HELLO).content == direct.answer(HELLO, 6)


def test_a_format_that_is_text(options: dict[str, Any], direct: Direct) -> None:
    """It goes through the client's parser, which refuses answers that end at their limit."""
    answer = direct.answer(HELLO, 6)
    chat = langchain_openai.ChatOpenAI(**options, stop=[answer[3:6]])
    found = chat.bind(response_format={"type": "text"}).invoke(HELLO)
    assert found.content == answer[:3]


def test_several_answers(options: dict[str, Any]) -> None:
    from langchain_core.messages import HumanMessage

    chat = langchain_openai.ChatOpenAI(**options | {"n": 2, "temperature": 1, "seed": 1})
    (found,) = chat.generate([[HumanMessage(HELLO)]]).generations
    assert len(found) == 2


class Day(BaseModel):
    """Says which day it is."""

    weekend: bool
    day: Literal["Monday", "Saturday"]


@pytest.mark.parametrize("asked", [{}, {"strict": True}, {"method": "json_schema"}])
def test_structured_output(options: dict[str, Any], asked: dict[str, Any]) -> None:
    chat = langchain_openai.ChatOpenAI(**options | {"max_tokens": 40})
    structured = chat.with_structured_output(Day, **asked)
    found = structured.invoke(DAY)
    assert isinstance(found, Day)
    *_, streamed = structured.stream(DAY)
    assert streamed == found


def test_json_of_any_form(options: dict[str, Any]) -> None:
    chat = langchain_openai.ChatOpenAI(**options | {"max_tokens": 120})
    found = chat.with_structured_output(None, method="json_mode").invoke(f"{DAY} Say it in JSON.")
    assert isinstance(found, dict)


def test_tools_are_refused_by_name(chat: Any) -> None:
    tool = {"name": "look_up", "description": "Looks up a word.", "parameters": {}}
    with pytest.raises(Exception, match="tools: not supported here") as refused:
        chat.bind_tools([tool]).invoke(HELLO)
    assert refused.value.status_code == 400


# --- completions ---------------------------------------------------------------------------------


def test_completions(completions: Any, direct: Direct) -> None:
    expected = [direct.continued(direct.ids(text), 6) for text in (PROMPT, NUMBERS)]
    assert completions.invoke(PROMPT) == expected[0]
    assert "".join(completions.stream(PROMPT)) == expected[0]
    assert completions.batch([PROMPT, NUMBERS]) == expected
    assert asyncio.run(completions.ainvoke(PROMPT)) == expected[0]


def test_scored_completions(options: dict[str, Any], direct: Direct) -> None:
    completions = langchain_openai.OpenAI(**options, logprobs=2, logit_bias={}, seed=1)
    ((found,),) = completions.generate([PROMPT]).generations
    ids = direct.ids(PROMPT)
    score, _ = direct.score(ids, direct.ids(found.text))
    scored = found.generation_info["logprobs"]
    assert sum(scored["token_logprobs"]) == pytest.approx(score, abs=1e-3)
    starts = scored["text_offset"]
    ends = [*starts[1:], len(found.text)]
    assert [found.text[a:b] for a, b in zip(starts, ends, strict=True)] == scored["tokens"]
