"""Tests that inspect-ai evaluates a task of its own against the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from support.serving import Direct, Server, installed

inspect_ai = installed("inspect_ai")
pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "openai-api/tinker/base", "openai-api-completions/tinker/base"
"""The providers for a server that speaks as OpenAI does. `openai/` takes every model that it does
not know for one of OpenAI's newest, and sends neither its temperature nor chat completions."""

QUESTIONS = ("Say hello.", "What is 1 + 1?", "Which day follows Monday?")
BEGINNINGS = ("The capital of France is", "1, 2, 3,", "Once upon a")


def evaluated(
    server: Server, folder: Path, name: str, targets: dict[str, str], **config: Any
) -> Any:
    """Returns the log of a task: texts, and what their answers must be."""
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    task = inspect_ai.Task(
        dataset=[Sample(input=text, target=target) for text, target in targets.items()],
        solver=generate(),
        scorer=match(location="exact"),
    )
    model = get_model(
        name, base_url=server.url, api_key="none", memoize=False,
        config=GenerateConfig(**{"max_tokens": 6, "temperature": 0, "max_retries": 0} | config),
    )  # fmt: skip
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none")
    assert log.status == "success", log.error
    return log


@pytest.fixture(scope="module")
def answers(direct: Direct) -> dict[str, str]:
    return {text: direct.answer(text, 6) for text in QUESTIONS}


def test_a_task_is_solved_and_scored(
    server: Server, answers: dict[str, str], tmp_path: Path
) -> None:
    log = evaluated(server, tmp_path, CHAT, answers | {QUESTIONS[-1]: "Nonsense"})
    assert [one.output.completion for one in log.samples] == list(answers.values())
    assert [one.scores["match"].value for one in log.samples] == ["C", "C", "I"]
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(2 / 3)
    (usage,) = log.stats.model_usage.values()
    assert 0 < usage.output_tokens <= 18


def test_settings_of_a_model(server: Server, answers: dict[str, str], tmp_path: Path) -> None:
    log = evaluated(
        server, tmp_path, CHAT, answers, top_p=1.0, top_k=1, seed=1, stop_seqs=["\n\n\n"],
        frequency_penalty=0.0, presence_penalty=0.0, logit_bias={5: -100.0}, logprobs=True,
        top_logprobs=2, num_choices=2, parallel_tool_calls=False,
    )  # fmt: skip
    for sample, answer in zip(log.samples, answers.values(), strict=True):
        assert [one.message.text for one in sample.output.choices] == [answer] * 2
        scored = sample.output.choices[0].logprobs.content
        assert "".join(one.token for one in scored).startswith(answer)
        assert {len(one.top_logprobs) for one in scored} == {2}


class Day(BaseModel):
    weekend: bool
    day: Literal["Monday", "Saturday"]


def test_a_response_schema(server: Server, answers: dict[str, str], tmp_path: Path) -> None:
    from inspect_ai.model import ResponseSchema
    from inspect_ai.util import json_schema

    schema = ResponseSchema(name="day", json_schema=json_schema(Day))
    log = evaluated(server, tmp_path, CHAT, answers, response_schema=schema, max_tokens=40)
    for sample in log.samples:
        assert Day.model_validate_json(sample.output.completion)


def test_raw_completions(server: Server, direct: Direct, tmp_path: Path) -> None:
    expected = {text: direct.continued(direct.ids(text), 6) for text in BEGINNINGS}
    log = evaluated(server, tmp_path, COMPLETIONS, expected, logprobs=True)
    assert [one.output.completion for one in log.samples] == list(expected.values())
    for sample, (text, answer) in zip(log.samples, expected.items(), strict=True):
        scored = sample.output.choices[0].logprobs.content
        score, _ = direct.score(direct.ids(text), direct.ids(answer))
        assert sum(one.logprob for one in scored) == pytest.approx(score, abs=1e-3)
