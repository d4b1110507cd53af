"""Tests bodies of requests and the answers made from tokens, without a server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.http.openai import Answer, ChatBody, CompletionBody, SampleBody, best
from serve_app.http.refusals import parsed
from tg_tinker import InvalidRequestError
from tg_tinker.data.text import load_tokenizer, read_tokenizer
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import StreamChunk

COMPLETION = {"model": "base", "prompt": "abc"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
SAMPLE = {"model": "base", "prompts": "abc"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(read_tokenizer(tiny_model))


def params(given: dict[str, Any]) -> SamplingParams:
    body = json.dumps(given).encode()
    if "prompts" in given:
        return parsed(SampleBody, body).params()
    if "messages" in given:
        return parsed(ChatBody, body).params(100)
    return parsed(CompletionBody, body).params()


@pytest.mark.parametrize("right", [COMPLETION, CHAT, SAMPLE], ids=["text", "chat", "sample"])
class TestEveryRoute:
    def test_takes_biases_and_min_p(self, right: dict[str, Any]) -> None:
        found = params(right | {"logit_bias": {"5": 1, "70": -2.5}, "min_p": 0.05})
        assert found.logit_bias == {5: 1, 70: -2.5}
        assert found.min_p == 0.05

    @pytest.mark.parametrize(
        "bias",
        [
            {"PATIENT-4711": 1}, {"5.5": 1}, {"-1": 1}, {"\uff15": 1}, {"5": 101}, {"5": "x"},
            {"5": None}, {"5": True}, {"9999999999": 1}, {"9" * 400: 1}, [5, 1], "5", 5,
            dict.fromkeys(map(str, range(1025)), 1), dict.fromkeys(map(str, range(30_000)), 1),
        ],
        ids=lambda bias: str(bias)[:20],
    )  # fmt: skip
    def test_names_a_wrong_bias_and_repeats_nothing_of_it(
        self, right: dict[str, Any], bias: Any
    ) -> None:
        with pytest.raises(InvalidRequestError, match=r"^logit_bias\b.* must ") as refused:
            params(right | {"logit_bias": bias})
        assert refused.value.details["parameter"] == "logit_bias"
        assert "4711" not in refused.value.message
        assert len(refused.value.message) < 200

    def test_draws_best_of_completions(self, right: dict[str, Any]) -> None:
        n = "num_completions" if "prompts" in right else "n"
        assert params(right | {n: 2, "best_of": 5}).num_completions == 5
        assert params(right | {n: 2, "best_of": 2, "stream": True}).num_completions == 2
        for wrong in ({n: 3, "best_of": 2}, {n: 1, "best_of": 2, "stream": True}):
            with pytest.raises(InvalidRequestError, match=f"best_of: must be at least {n}, and"):
                params(right | wrong)
        for wrong in ({"best_of": 0}, {"best_of": 129}, {"best_of": "many"}):
            with pytest.raises(InvalidRequestError, match=r"^best_of: "):
                params(right | wrong)


def test_our_own_route_takes_every_parameter() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == set(SampleBody.model_fields) - {"model", "prompts", "stream", "best_of"}
    assert params(SAMPLE) == SamplingParams()


def chunk(index: int, *logprobs: float, end: str | None = "length") -> StreamChunk:
    return StreamChunk(
        text=f"{index} ", index=index, token_ids=[65] * len(logprobs), logprobs=[*logprobs],
        finish_reason=end,
    )  # fmt: skip


def test_the_best_completions_have_the_highest_mean_logprob() -> None:
    parts = [
        [chunk(0, -2.0)], [chunk(1, -1.0, end=None), chunk(1, -1.0, -1.0)], [chunk(2, -1.5)],
        [chunk(3, -9.0)], [chunk(4, -0.5, -0.5)], [chunk(5, -0.6)],
    ]  # fmt: skip
    assert [part[0].index for part in best(parts, drawn=3, kept=2)] == [1, 2, 4, 5]
    assert best(parts, drawn=3, kept=3) == parts


def test_kept_completions_are_numbered_anew_and_keep_their_echo(tokenizer: Any) -> None:
    body = CompletionBody(model="base", prompt=["a", "b"], best_of=2, echo=True)
    parts = [[chunk(0, -2.0)], [chunk(1, -1.0)], [chunk(2, -1.0)], [chunk(3, -2.0)]]
    found = Answer(body, tokenizer, ["a", "b"], "v").whole(best(parts, 2, 1), {})
    assert [(c["index"], c["text"]) for c in found["choices"]] == [(0, "a1 "), (1, "b2 ")]
