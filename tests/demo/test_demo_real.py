"""Tests `tg-tinker demo` itself: once with the real model, and Ctrl-C with real processes."""

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
from support.models import make_home
from support.processes import assert_all_end

pytestmark = [pytest.mark.program, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-c", "from tg_tinker.cli.main import main; main()", "demo"]
ROWS = [
    {"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}, of course."}
    for i in range(30)
]


def write_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_real_model_learns_is_saved_and_resumed(tmp_path: Path, converted_models: Path) -> None:
    """SmolLM2-135M is converted from its GGUF file, trained, sampled, saved, resumed and
    plotted."""
    output, home = tmp_path / "out", make_home(tmp_path / "home", converted_models)
    done = subprocess.run(
        [*COMMAND, "--steps", "6", "--batch-size", "6", "--data", str(write_rows(tmp_path)),
         "--output", str(output)],
        env=os.environ | {"TG_TINKER_HOME": str(home)},
        capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((output / "history.json").read_text())
    assert len(figures["steps"]) == 6
    # Six private steps are mostly noise: fourteen runs gave 0.68 to 0.87 of the loss before.
    assert figures["held_out_loss_after"] < 0.95 * figures["held_out_loss_before"]
    assert "Resumed in a new client: step 6" in done.stdout
    assert figures["artifact_id"] in done.stdout
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    sizes = [file.stat().st_size for file in converted_models.glob("[!.]*/model.safetensors")]
    assert max(sizes) > 500e6  # float32, dequantized


def test_ctrl_c_leaves_a_checkpoint_that_resumes_and_no_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = ["--model", str(tiny_model), "--rank", "4", "--max-length", "100",
               "--data", str(write_rows(tmp_path)), "--output", str(tmp_path / "out")]  # fmt: skip
    environment = os.environ | {"TG_TINKER_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [*COMMAND, *options, "--steps", "100000"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everything in the foreground
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130, rest
    (artifact,) = set(re.findall(r"art-\w+", rest))
    assert_all_end(process.pid, within_s=120)
    with clusters.forking():
        again = subprocess.run(
            [*COMMAND, *options, "--steps", "1", "--resume", artifact],
            env=environment | {clusters.FORKING: os.environ[clusters.FORKING]},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    reached = re.search(r"Step (\d+) is reached already", again.stdout)
    assert reached
    assert int(reached[1]) >= 20


@pytest.mark.parametrize("after_s", [0.5, 6.0])
def test_ctrl_c_before_there_is_a_client_ends_cleanly(
    tiny_model: Path, tmp_path: Path, after_s: float
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--model", str(tiny_model), "--rank", "4", "--output", str(tmp_path / "out"),
         "--data", str(write_rows(tmp_path))],
        env=os.environ | {"TG_TINKER_HOME": str(tmp_path / "home")},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    # While Python itself starts, the interpreter ends by the signal.
    assert process.returncode in (130, -signal.SIGINT), output
    assert_all_end(process.pid, within_s=120)
