"""Where a step's time goes: all parts of the real step, which add up to the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors import profiling
from actors.profiling import OTHER, profile_steps
from actors.stages import Stage, measured, stage
from tg_tinker import DPConfig, LoRAConfig, TrainingConfig

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

    words = ["profile", "--model", str(tiny_model), "--rows", "2", "--tokens", "8", "--rank", "2",
             "--steps", "1"]  # fmt: skip
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    assert "a step of 16 tokens" in found.stdout
    percents = [line.split("│")[3] for line in found.stdout.splitlines() if line.startswith("│")]
    assert sum(map(float, percents)) == pytest.approx(100, abs=1)
    found = CliRunner().invoke(main, [*words, "--json"])
    assert set(json.loads(found.stdout)) == {*Stage, OTHER}
