"""Where a step's time goes: all parts of the real step, which add up to the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors import profiling
from actors.process import SPIN
from actors.profiling import OTHER, profile_steps
from actors.stages import Stage, measured, stage
from tg_tinker import DPConfig, LoRAConfig, TrainingConfig

WORDS = ["--rows", "2", "--tokens", "8", "--rank", "2", "--steps", "1"]
PRIVATE_ONLY = {Stage.CLIP, Stage.CHARGE, Stage.NOISE}


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_every_part_of_a_step_has_its_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
    config = TrainingConfig(
        model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2), dp_config=dp if private else None
    )
    stepped = []
    real = profiling._step
    monkeypatch.setattr(
        profiling,
        "_step",
        lambda session, batch: (stepped.append(len(batch)), real(session, batch)),
    )
    found = profile_steps(config, tmp_path, rows=3, tokens=8, steps=2)
    assert stepped == [3] * 3  # one of them to warm up
    assert list(found) == [*Stage, OTHER]
    for part in Stage:
        assert (found[part] > 0) == (private or part not in PRIVATE_ONLY)
    assert found[OTHER] >= 0  # parts within one another would count twice


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
    from tg_tinker.cli import main

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
from tg_tinker.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("asked", [{}, {"GOMP_SPINCOUNT": "7"}], ids=["unset", "the-user's"])
def test_threads_are_told_to_sleep_soon_before_torch_loads(
    tiny_model: Path, home: Path, asked: dict[str, str]
) -> None:
    """As in a training actor: spinning, they take a core from whoever else computes here."""
    environment = {name: value for name, value in os.environ.items() if name not in SPIN} | asked
    command = [sys.executable, "-c", WATCHED, "profile", "--model", str(tiny_model), *WORDS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("torch with")]
    assert told == [f"torch with {(SPIN | asked)['GOMP_SPINCOUNT']}"]
