"""Tests the programs under `examples/` as a user runs them: as processes, with their own home."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import clusters

EXAMPLES = Path(__file__).parents[1] / "examples"


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *map(str, arguments)]


def run(environment: dict[str, str], name: str, *arguments: object) -> str:
    with clusters.forking():
        environment = environment | {clusters.FORKING: os.environ[clusters.FORKING]}
        done = subprocess.run(
            command(name, *arguments), env=environment, capture_output=True, text=True, timeout=240
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output: str) -> dict[int, str]:
    """Returns the loss and norm that were printed for each step."""
    return {int(step): rest for step, rest in re.findall(r"^step (\d+)  (.+)$", output, re.M)}


def processes_of(home: Path) -> list[int]:
    """Returns every process that was started with this home directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(home).encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended while we looked, or is not ours
    return found


@pytest.mark.parametrize("name", ["train_chat.py", "resume.py"])
def test_help_teaches_by_example(name: str) -> None:
    asked = command(name, "--help")
    shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown
    assert shown.count(f"python examples/{name}") >= 3


def test_wrong_data_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        command("train_chat.py", "--data", tmp_path / "none.jsonl"), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no file")
    assert done.stderr.count("\n") == 1


@pytest.mark.program
def test_an_interrupted_run_saves_and_resumes_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    home, data = tmp_path / "home", tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} + {i}?", "completion": f"{2 * i}."} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"TG_TINKER_HOME": str(home), "RAY_ADDRESS": "local"}
    options = ["--model", tiny_model, "--data", data, "--batch-size", 2, "--max-length", 100]

    # A signal to the whole process group, as of a terminal, reaches the program alone.
    with subprocess.Popen(
        command("train_chat.py", *options, "--steps", 100_000),
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as training:  # fmt: skip
        assert training.stdout is not None
        for line in training.stdout:
            if line.startswith("step 3 "):
                os.killpg(training.pid, signal.SIGTERM)
                break
        interrupted = training.stdout.read()
        assert training.wait(120) == 143
    saved = re.search(r"^saved art-\w+ at step (\d+)", interrupted, re.M)
    assert saved is not None, interrupted
    step = int(saved[1])
    assert 3 <= step < 100_000

    resumed = run(environment, "resume.py", "--data", data, "--steps", 2)
    assert f"is at step {step}" in resumed
    straight = run(environment, "train_chat.py", *options, "--steps", step + 2)
    assert losses(resumed) == {n: losses(straight)[n] for n in (step + 1, step + 2)}

    deadline = time.monotonic() + 60
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(1)
    assert processes_of(home) == []
