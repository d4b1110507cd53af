"""Tests that litellm completes, chats and streams through the provider `openai/`."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from support.serving import Direct, Server, installed

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Else its import asks the network for prices.
litellm = installed("litellm")
pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Say hello."}]
PROMPT = "The capital of France is"


@pytest.fixture
def base(server: Server) -> dict[str, Any]:
    return {
        "model": "openai/base", "api_base": server.url, "api_key": "none", "max_tokens": 6,
        "temperature": 0, "num_retries": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def hello(direct: Direct) -> str:
    return direct.answer("Say hello.", 6)


def test_completion(base: dict[str, Any], hello: str) -> None:
    found = litellm.completion(messages=HELLO, **base)
    assert found.choices[0].message.content == hello
    assert found.usage.completion_tokens == 6


def test_acompletion(base: dict[str, Any], hello: str) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(
            *(litellm.acompletion(messages=HELLO, **base) for _ in range(2))
        )

    assert [one.choices[0].message.content for one in asyncio.run(both())] == [hello, hello]


def test_streams(base: dict[str, Any], hello: str) -> None:
    asked = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}} | base
    *events, last = litellm.completion(**asked)
    assert "".join(one.choices[0].delta.content or "" for one in events) == hello
    assert last.usage.completion_tokens == 6

    async def joined() -> str:
        stream = await litellm.acompletion(**asked)
        found = [choice async for one in stream for choice in one.choices]
        return "".join(choice.delta.content or "" for choice in found)

    assert asyncio.run(joined()) == hello


@pytest.mark.parametrize("provider", ["openai", "text-completion-openai"])
def test_text_completion(base: dict[str, Any], direct: Direct, provider: str) -> None:
    asked = base | {"model": f"{provider}/base", "prompt": PROMPT}
    expected = direct.continued(direct.ids(PROMPT), 6)
    assert litellm.text_completion(**asked).choices[0].text == expected
    events = litellm.text_completion(**asked, stream=True)
    assert "".join(one.choices[0].text or "" for one in events) == expected


def test_text_completion_scores_a_prompt(base: dict[str, Any], direct: Direct) -> None:
    found = litellm.text_completion(
        **base | {"model": "text-completion-openai/base", "max_tokens": 0},
        prompt=PROMPT, echo=True, logprobs=1,
    )  # fmt: skip
    first, *scores = found.choices[0].logprobs.token_logprobs
    ids = direct.ids(PROMPT)
    assert first is None
    assert sum(scores) == pytest.approx(direct.score(ids[:1], ids[1:])[0], abs=1e-3)


def test_several_prompts_and_token_ids(base: dict[str, Any], direct: Direct) -> None:
    asked = base | {"model": "text-completion-openai/base"}
    found = litellm.text_completion(**asked, prompt=[PROMPT, "Two and two make"])
    expected = [direct.continued(direct.ids(text), 6) for text in (PROMPT, "Two and two make")]
    assert [one.text for one in found.choices] == expected
    assert (
        litellm.text_completion(**asked, prompt=direct.ids(PROMPT)).choices[0].text == expected[0]
    )


def test_fields_of_a_request(base: dict[str, Any], hello: str) -> None:
    found = litellm.completion(
        messages=HELLO, seed=1, stop=["\n\n\n"], user="ann", top_p=1, presence_penalty=0,
        frequency_penalty=0, logprobs=True, top_logprobs=2, tools=[], tool_choice="none",
        parallel_tool_calls=False, response_format={"type": "text"}, logit_bias={},
        metadata={"why": "test"}, **base,
    )  # fmt: skip
    (choice,) = found.choices
    assert choice.message.content == hello
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * 6


class Day(BaseModel):
    weekend: bool
    day: Literal["Monday", "Saturday"]


def test_structured_output(base: dict[str, Any]) -> None:
    asked = base | {"messages": HELLO, "max_tokens": 40}
    found = litellm.completion(**asked, response_format=Day).choices[0].message.content
    assert Day.model_validate_json(found)


def test_an_answer_goes_back_as_it_came(base: dict[str, Any], direct: Direct) -> None:
    answer = litellm.completion(messages=HELLO, **base).choices[0].message
    more = {"role": "user", "content": "And goodbye?"}
    found = litellm.completion(messages=[*HELLO, answer.model_dump(), more], **base)
    told = {"role": "assistant", "content": answer.content}
    expected = direct.continued(direct.chat_ids(HELLO[0], told, more), 6)
    assert found.choices[0].message.content == expected


def test_refusals_have_the_class_of_their_status(base: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="there is no model 'lost'"):
        litellm.completion(messages=HELLO, **base | {"model": "openai/lost"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=HELLO, **base | {"temperature": -1})
    with pytest.raises(litellm.BadRequestError, match="tools: not supported here"):
        litellm.completion(
            messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}], **base
        )


def test_the_models_of_a_server(server: Server) -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key="none",
        api_base=server.url,
    )  # fmt: skip
    assert found == ["base"]
