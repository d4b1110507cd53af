"""One picture of a training run, as a PNG. The only door to matplotlib, and never to a screen."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tg_tinker.errors import NotFoundError

WINDOW = 10
"""Steps in the moving average."""

_STEP, _AVERAGE, _BEFORE, _AFTER, _TEXT = "#a9c4e4", "#1f5fa8", "#8a8f98", "#2a8a4a", "#2b2f36"


def check_available() -> None:
    """Raises `NotFoundError` where matplotlib is not installed, before hours of training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NotFoundError(
            "the plot needs matplotlib: pip install 'tg-tinker[demo]'", details={"extra": "demo"}
        )


def plot_training(
    history: Sequence[tuple[int, float]],
    held_out_before: float,
    held_out_after: float,
    path: str | Path,
    model: str = "",
) -> Path:
    """Writes training loss per step, its moving average and held-out loss before and after.

    Args:
        history: (step, loss in nats per token) of each step, in order; may be empty.
        held_out_before: loss on rows never trained on, before the first of these steps.
        held_out_after: the same after the last.
        path: the PNG to write or overwrite.
        model: a short name for the title.
    """
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(9, 5), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_training(axes, history)
    _draw_held_out(axes, history, held_out_before, held_out_after)
    steps = "1 step" if len(history) == 1 else f"{len(history)} steps"
    _dress(axes, f"{model or 'model'}, {steps}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_TEXT)
    figure.savefig(path)
    return Path(path)


def moving_average(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean over the `window` values around each place, over those there are near the ends."""
    half = window // 2
    spans = [losses[max(0, i - half) : i + window - half] for i in range(len(losses))]
    return [sum(span) / len(span) for span in spans]


def _draw_training(axes: Any, history: Sequence[tuple[int, float]]) -> None:
    steps, losses = [step for step, _ in history], [loss for _, loss in history]
    style = {"linewidth": 1.0, "marker": ".", "markersize": 3.0}
    axes.plot(steps, losses, color=_STEP, label="training loss of each step", **style)
    label = f"training loss, mean of {WINDOW} steps around"
    axes.plot(steps, moving_average(losses), color=_AVERAGE, linewidth=2.4, label=label)


def _draw_held_out(
    axes: Any, history: Sequence[tuple[int, float]], before: float, after: float
) -> None:
    first, last = (history[0][0] - 1, history[-1][0]) if history else (0, 0)
    for step, loss, colour, when in (
        (first, before, _BEFORE, "before"),
        (last, after, _AFTER, "after"),
    ):
        axes.axhline(loss, color=colour, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1)
        label = f"held-out loss {when} training: {loss:.3f}"
        axes.plot([step], [loss], "o", color=colour, markersize=8, zorder=4, label=label)


def _dress(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, pad=12)
    axes.set_xlabel("optimizer step", color=_TEXT)
    axes.set_ylabel("loss (nats per token)", color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
