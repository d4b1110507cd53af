"""Tests the picture of a training run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tg_tinker.demo.plots import moving_average, plot_audit, plot_training

PNG = b"\x89PNG\r\n\x1a\n"


def size(path: Path) -> tuple[int, int]:
    """Returns width and height in pixels, from the header."""
    head = path.read_bytes()[:24]
    assert head.startswith(PNG)
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_average_is_centred_and_shorter_at_the_ends() -> None:
    assert moving_average([0, 2, 4, 6, 8], window=3) == [1, 2, 4, 6, 7]


def test_the_average_of_a_constant_is_the_constant() -> None:
    assert moving_average([3.0] * 25) == [3.0] * 25
    assert moving_average([]) == []


@pytest.mark.parametrize("steps", [0, 1, 60])
def test_a_png_is_written_for_any_number_of_steps(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "loss.png"
    history = [(i, 4 - i / 30) for i in range(1, steps + 1)]
    assert plot_training(history, 4.0, 2.0, path, model="m") == path
    width, height = size(path)
    assert width > height > 500


def test_the_picture_shows_the_figures(tmp_path: Path) -> None:
    history = [(i, 4 - i / 30) for i in range(1, 20)]
    pictures = [
        plot_training(shown, before, after, tmp_path / f"{i}.png", model=model).read_bytes()
        for i, (shown, before, after, model) in enumerate(
            [
                (history, 4.0, 2.0, "m"),
                (history[:-1], 4.0, 2.0, "m"),
                (history, 3.9, 2.0, "m"),
                (history, 4.0, 2.1, "m"),
                (history, 4.0, 2.0, "n"),
            ]
        )
    ]
    assert len(set(pictures)) == len(pictures)


def height_of(color: str, path: Path) -> float:
    """Returns the share of the picture's height that lines of a color span in its middle third."""
    picture = imread(path)[:, :, :3]
    third = picture.shape[1] // 3
    near = np.abs(picture[:, third : 2 * third] - to_rgb(color)).sum(axis=2) < 0.05
    rows = np.flatnonzero(near.any(axis=1))
    return float(np.ptp(rows)) / len(picture)


def test_steps_are_drawn_thin_and_rough_their_average_thick_and_smooth(tmp_path: Path) -> None:
    path = plot_training([(i, 2.0 + i % 2) for i in range(60)], 4.0, 1.0, tmp_path / "loss.png")
    assert height_of("#a9c4e4", path) > 0.2
    assert height_of("#1f5fa8", path) < 0.05


def test_a_second_run_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    plot_training([(1, 3.0)], 4.0, 2.0, str(path))
    assert size(path)


def test_no_window_and_no_global_state_is_touched(tmp_path: Path) -> None:
    code = (
        "import sys; from tg_tinker.demo.plots import plot_training;"
        "assert 'matplotlib' not in sys.modules;"
        f"plot_training([(1, 3.0)], 4.0, 2.0, {str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the picture of an audit -------------------------------------------------------------------

AUDIT: dict[str, Any] = {
    "scores_in": [1 + i / 10 for i in range(-20, 20)],
    "scores_out": [i / 10 for i in range(-20, 20)],
    "sigma": 2.0, "claimed": 2.0, "bound": 0.9, "verdict": "no violation found",
}  # fmt: skip


def test_an_audit_shows_each_of_its_figures(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"scores_in": [1.0]}, {"scores_out": [0.0]}, {"sigma": 1.0}, {"claimed": 1.0},
        {"bound": 1.5}, {"verdict": "VIOLATION: noise fit"},
    ]  # fmt: skip
    pictures = set()
    for number, change in enumerate(changes):
        path = plot_audit(**(AUDIT | change), path=tmp_path / f"{number}.png")
        width, height = size(path)
        assert width > height > 500
        pictures.add(path.read_bytes())
    assert len(pictures) == len(changes)


@pytest.mark.parametrize("scores", [[], [5e3, -5e3]], ids=["none", "far away"])
def test_an_audit_of_any_scores_is_drawn(tmp_path: Path, scores: list[float]) -> None:
    shown = AUDIT | {"scores_in": scores, "scores_out": scores, "bound": 0.0}
    assert size(plot_audit(**shown, path=tmp_path / "audit.png"))


def test_a_bound_above_the_claim_is_drawn_in_red(tmp_path: Path) -> None:
    def reds(bound: float) -> float:
        path = plot_audit(**(AUDIT | {"bound": bound}), path=tmp_path / "audit.png")
        return float((np.abs(imread(path)[:, :, :3] - to_rgb("#c0272d")).sum(axis=2) < 0.05).mean())

    assert reds(1.9) == 0
    assert reds(2.1) > 0.01
