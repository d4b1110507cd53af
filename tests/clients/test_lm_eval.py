"""Tests that lm-evaluation-harness, unmodified, finds here what it would find in the model itself.

Its tasks are defined by the files in `harness/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.serving import Direct, Server, installed

installed("lm_eval.models.openai_completions")
pytestmark = pytest.mark.slow

TASKS = Path(__file__).parent / "harness"
CLOSE = 1e-3

WAYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "token ids": ({"tokenized_requests": True}, []),
    "texts": ({"tokenized_requests": False}, []),
    "many at once": ({"num_concurrent": 2}, ["--batch_size", "4"]),
}
"""How completions are asked for -> the arguments of the model, and the options of the program."""


def evaluate(
    folder: Path, model: str, tasks: list[str], arguments: dict[str, Any], *options: str
) -> dict[str, list[Any]]:
    """Returns the samples of each task."""
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", listed,
        "--tasks", *tasks, "--output_path", folder, "--log_samples", *options,
    ]  # fmt: skip
    offline = {"HF_HOME": str(folder / "hub"), "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        command, cwd=TASKS, env=os.environ | offline, capture_output=True, text=True, timeout=240
    )
    told = [line for line in done.stderr.splitlines() if "request failed" in line]
    assert done.returncode == 0, told or done.stderr[-500:]
    return {
        path.name.split("_")[1]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*/samples_*.jsonl")
    }


def asked(sample: Any) -> list[list[Any]]:
    """Returns the arguments of each request of a sample."""
    return [list(one.values()) for one in sample["arguments"].values()]


def cut(text: str) -> str:
    """Returns what is before the first stop of `answers.yaml`."""
    return text.partition("\n")[0].partition(".")[0]


def check_choices(samples: list[Any], direct: Direct) -> None:
    assert len(samples) == 3
    for sample in samples:
        scored = sample["filtered_resps"]
        for (context, after), (logprob, greedy) in zip(asked(sample), scored, strict=True):
            score, likeliest = direct.score(direct.ids(context), direct.ids(after))
            assert float(logprob) == pytest.approx(score, abs=CLOSE)
            assert str(greedy) == str(likeliest)


@pytest.fixture
def completions(server: Server) -> dict[str, Any]:
    return {
        "model": "base", "base_url": f"{server.url}/completions", "tokenizer": server.model,
        "max_retries": 1,
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_completions(way: str, completions: dict[str, Any], direct: Direct, tmp_path: Path) -> None:
    arguments, options = WAYS[way]
    tasks = ["choices.yaml", "whole.yaml", "answers.yaml"]
    found = evaluate(tmp_path, "local-completions", tasks, completions | arguments, *options)
    check_choices(found["choices"], direct)
    for sample in found["whole"]:
        ((text,),) = asked(sample)
        score, _ = direct.score([direct.tokenizer.bos_token_id], direct.ids(text))
        assert float(sample["filtered_resps"][0]) == pytest.approx(score, abs=CLOSE)
    for sample in found["answers"]:
        ((question, _),) = asked(sample)
        assert sample["filtered_resps"] == [cut(direct.continued(direct.ids(question), 10))]


def test_choices_in_a_chat(completions: dict[str, Any], direct: Direct, tmp_path: Path) -> None:
    """The harness renders the chat itself, with special tokens, and sends their ids."""
    found = evaluate(
        tmp_path, "local-completions", ["choices.yaml"], completions, "--apply_chat_template"
    )
    assert "<|im_start|>" in asked(found["choices"][0])[0][0]
    check_choices(found["choices"], direct)


def test_chat_completions(server: Server, direct: Direct, tmp_path: Path) -> None:
    arguments = {
        "model": "base", "base_url": f"{server.url}/chat/completions", "max_retries": 1,
        "num_concurrent": 2,
    }  # fmt: skip
    found = evaluate(
        tmp_path, "local-chat-completions", ["answers.yaml"], arguments, "--apply_chat_template"
    )
    for sample in found["answers"]:
        expected = direct.answer(sample["doc"]["question"], 10)
        assert sample["filtered_resps"] == [cut(expected)]
