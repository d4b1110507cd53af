"""Tests `examples/canary.py`: its measure by hand, and the program on a model made on the spot."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import ModuleType

import pytest

from support import clusters
from tg_tinker.data.batch import IGNORED

EXAMPLES = Path(__file__).parents[1] / "examples"


def load() -> ModuleType:
    """Returns the example as a module; it imports train_chat.py, which is beside it."""
    spec = importlib.util.spec_from_file_location("canary", EXAMPLES / "canary.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["canary"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        spec.loader.exec_module(module)
    return module


canary = load()


class Letters:
    """A tokenizer with one token per character; `pairs` become one token each."""

    def __init__(self, *pairs: str) -> None:
        self._pairs = pairs

    def __call__(self, text: str) -> dict[str, list[int]]:
        for number, pair in enumerate(self._pairs):
            text = text.replace(pair, chr(1000 + number))
        return {"input_ids": [ord(letter) for letter in text]}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / "canary.py"), *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    own = {"RAY_ADDRESS": "local", "COLUMNS": "100", "TG_TINKER_HOME": str(home)}
    return os.environ | own


def run(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(home), capture_output=True, text=True, timeout=240
    )


# --- the measure -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("true_loss", "others", "expected"),
    [(0.5, [1.0, 2.0], 1), (1.5, [1.0, 2.0], 2), (3.0, [1.0, 2.0], 3), (1.0, [1.0], 1)],
)
def test_rank_counts_the_likelier_ones(
    true_loss: float, others: list[float], expected: int
) -> None:
    assert canary.rank(true_loss, others) == expected


def test_exposure_is_all_bits_at_rank_one_and_none_at_the_last() -> None:
    assert canary.exposure(1, 127) == 7.0
    assert canary.exposure(64, 127) == 1.0
    assert canary.exposure(128, 127) == 0.0


def test_labels_stand_on_the_code_alone() -> None:
    ids, labels = canary.encode_code(Letters(), "code is ", "0417")
    assert bytes(ids).decode() == "code is 0417"
    assert labels == [IGNORED] * 8 + ids[8:]


def test_a_token_across_the_border_belongs_to_the_code() -> None:
    ids, labels = canary.encode_code(Letters(" 0"), "code is ", "0417")
    assert ids[7] == labels[7] == 1000
    assert labels[:7] == [IGNORED] * 7


def test_planted_rows_are_distinct_and_the_same_for_the_same_seed() -> None:
    planted = canary.make_secrets(8, seed=0)
    assert len({secret.name for secret in planted}) == 8
    assert len({secret.code for secret in planted}) == 8
    assert all(len(secret.code) == 4 and secret.name in secret.prefix for secret in planted)
    assert planted == canary.make_secrets(8, seed=0) != canary.make_secrets(8, seed=1)


def test_other_codes_are_distinct_and_never_the_true_one() -> None:
    for secret in canary.make_secrets(8, seed=0):
        others = canary.other_codes(secret, 9_999)
        assert len(set(others)) == 9_999
        assert secret.code not in others
        assert canary.other_codes(secret, 3) == canary.other_codes(secret, 3)


def test_notes_are_distinct_and_hold_no_digit() -> None:
    assert len(set(canary.NOTES)) == len(canary.NOTES) >= 300
    assert not any(letter.isdigit() for note in canary.NOTES for letter in note)


def test_a_number_above_what_there_is_is_refused() -> None:
    assert canary.at_most(8)("8") == 8
    with pytest.raises(ArgumentTypeError, match="9 is above 8"):
        canary.at_most(8)("9")


# --- the program -----------------------------------------------------------------------------


def test_help_teaches_by_example(tmp_path: Path) -> None:
    shown = run(tmp_path, "--help").stdout
    assert "examples:" in shown
    assert shown.count("python examples/canary.py") >= 3


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--secrets", "9"], 2, "9 is above 8"),
        (["--epochs", "0"], 2, "0 is below 1"),
        (["--epsilon", "-1"], 1, "error: DPConfig: target_epsilon"),
        (["--output", "/dev/null/no"], 1, "error: cannot write"),
    ],
)
def test_a_wrong_option_is_named_before_anything_starts(
    arguments: list[str], status: int, said: str, tmp_path: Path
) -> None:
    done = run(tmp_path / "home", "--model", "none", *arguments)
    assert not (tmp_path / "home").exists()
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.program
def test_the_program_writes_figures_that_fit_together(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with clusters.forking():
        done = run(
            tmp_path / "home", "--model", tiny_model, "--output", output, "--notes", 40,
            "--secrets", 3, "--candidates", 7, "--epochs", 1, "--private-batch-size", 16,
            "--epsilon", 5,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "ranks.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((output / "ranks.json").read_text())
    assert (figures["rows"], figures["epochs"], figures["candidates"]) == (43, 1, 7)
    assert 0 < figures["epsilon"] <= 5
    assert figures["delta"] < 1 / 43
    assert set(figures["held_out_loss"]) == set(canary.RUNS)
    for name in canary.RUNS:
        ranks = [secret["ranks"][name] for secret in figures["secrets"]]
        assert all(1 <= rank <= 8 for rank in ranks)
        assert figures["exposure_bits"][name] == [3 - math.log2(rank) for rank in ranks]
    firsts = sum(secret["ranks"][canary.OPEN] == 1 for secret in figures["secrets"])
    assert f"Without privacy {firsts} of 3 codes" in done.stdout


@pytest.mark.program
def test_a_signal_ends_it_with_its_status_and_no_output(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # A lost terminal tells the whole process group, so the program gets its own.
    with subprocess.Popen(
        command("--model", tiny_model, "--output", output, "--epochs", 1000),
        env=environment(tmp_path / "home"), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as program:  # fmt: skip
        assert program.stderr is not None
        assert "made a new home" in program.stderr.readline()  # the service is there
        os.killpg(program.pid, signal.SIGHUP)
        said = program.stderr.read()
        assert program.wait(120) == 129, said
    assert "Traceback" not in said
    assert list(output.iterdir()) == []
