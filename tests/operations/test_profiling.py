"""Tests the profile of a step: the parts are those of the real step, and add up to the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel
from typer.testing import CliRunner

from actors.engine import model, optim, timing
from actors.engine import session as engine
from actors.engine.timing import Stage, measured, stage
from actors.operations import profile
from actors.operations.profile import OTHER, profile_steps
from actors.privacy import budget, clipping
from actors.privacy import session as private
from actors.process import SPIN
from tg_tinker import DPConfig, InvalidRequestError, LoRAConfig, TrainingConfig

WORDS = ["--rows", "2", "--tokens", "8", "--rank", "2", "--steps", "1"]
PRIVATE_ONLY = {Stage.CLIP, Stage.CHARGE, Stage.NOISE}
KINDS = pytest.mark.parametrize("private_run", [True, False], ids=["private", "plain"])


def small(tiny_model: Path, private_run: bool) -> TrainingConfig:
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
    return TrainingConfig(
        model_ref=str(tiny_model),
        lora_config=LoRAConfig(rank=2),
        dp_config=dp if private_run else None,
    )


@KINDS
def test_every_part_of_a_step_has_its_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_run: bool
) -> None:
    config = small(tiny_model, private_run)
    stepped = []
    real = profile._step
    monkeypatch.setattr(
        profile,
        "_step",
        lambda session, batch: (stepped.append(len(batch)), real(session, batch)),
    )
    found = profile_steps(config, tmp_path, rows=3, tokens=8, steps=2)
    assert stepped == [3] * 3  # one of them to warm up
    assert list(found) == [*Stage, OTHER]
    for part in Stage:
        assert (found[part] > 0) == (private_run or part not in PRIVATE_ONLY)
    assert found[OTHER] >= 0  # parts within one another would count twice


@KINDS
def test_each_part_has_the_time_of_its_own_work_and_no_other(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_run: bool
) -> None:
    """The clock advances by one function of each part only, and by another amount in each."""
    clock = [0.0]

    def takes(seconds: float, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def slow(*arguments: Any, **options: Any) -> Any:
            clock[0] += seconds
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    session: ModuleType = private if private_run else engine
    takes(1, LlamaModel, "forward")
    takes(2, model, "head_losses")
    takes(4, torch.Tensor, "backward")
    takes(8, clipping.UnitGradients, "clip_into")
    takes(16, session, "resolve_batch_hash")
    takes(32, session, "gradient_hash")
    takes(64, budget.Budget, "charge")
    takes(128, private, "privatize")
    takes(256, optim.Optimizer, "step")
    takes(512, engine.Session, "_losses")
    monkeypatch.setattr(timing, "_now", lambda: clock[0])
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = profile_steps(small(tiny_model, private_run), tmp_path, rows=3, tokens=8, steps=2)
    assert found == {
        Stage.FORWARD: 1, Stage.HEAD: 2, Stage.BACKWARD: 4,
        Stage.CLIP: 8 * private_run, Stage.HASH: 16 + 32, Stage.CHARGE: 64 * private_run,
        Stage.NOISE: 128 * private_run, Stage.OPTIMIZER: 256, OTHER: 512,
    }  # fmt: skip


@KINDS
def test_rows_longer_than_the_context_are_refused(
    tiny_model: Path, tmp_path: Path, private_run: bool
) -> None:
    """A private step would leave these rows out, so the measured time would be that of no row at
    all."""
    with pytest.raises(InvalidRequestError, match="130 tokens, but the model's context is 128"):
        profile_steps(small(tiny_model, private_run), tmp_path, rows=1, tokens=130, steps=1)


def test_parts_are_timed_only_where_someone_asks() -> None:
    with measured() as spent:
        with stage(Stage.CLIP):
            pass
        assert set(spent) == {Stage.CLIP}
    with stage(Stage.NOISE):
        pass
    assert set(spent) == {Stage.CLIP}


def test_the_command_prints_percents_of_the_step(
    tiny_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tg_tinker.cli.main import main

    words = ["profile", "--model", str(tiny_model), *WORDS]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    assert "a step of 16 tokens" in found.stdout
    percents = [line.split("│")[3] for line in found.stdout.splitlines() if line.startswith("│")]
    assert sum(map(float, percents)) == pytest.approx(100, abs=1)
    found = CliRunner().invoke(main, [*words, "--json"])
    assert set(json.loads(found.stdout)) == {*Stage, OTHER}


WATCHED = """
import os, sys
def watch(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print("torch with", os.environ.get("GOMP_SPINCOUNT"), file=sys.stderr)
sys.addaudithook(watch)
from tg_tinker.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"GOMP_SPINCOUNT": "7"}], ids=["unset", "the-user's"])
def test_threads_are_told_to_sleep_soon_before_torch_loads(
    tiny_model: Path, home: Path, asked: dict[str, str]
) -> None:
    """The threads sleep as in a training actor: spinning threads take a core from other
    programs."""
    environment = {name: value for name, value in os.environ.items() if name not in SPIN} | asked
    command = [sys.executable, "-c", WATCHED, "profile", "--model", str(tiny_model), *WORDS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("torch with")]
    assert "Warning" not in done.stderr  # of a library, at which a user can do nothing
    assert told == [f"torch with {(SPIN | asked)['GOMP_SPINCOUNT']}"]
