"""Draws pictures of a training run and of an audit into files.

Only this module imports matplotlib. It opens no window.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tg_tinker.errors import NotFoundError
from tg_tinker.records.planning import PrivacyPlan
from tg_tinker.storage.files import new_file

WINDOW = 10
"""The steps in the moving average of a long run. For a short run it is a quarter of its steps."""

_STEP, _AVERAGE, _BEFORE, _AFTER, _TEXT = "#a9c4e4", "#1f5fa8", "#8a8f98", "#2a8a4a", "#2b2f36"
_SPENT = "#b4541a"
_WRONG = "#c0272d"


def check_available() -> None:
    """Raises `NotFoundError` if matplotlib is not installed. Call it before hours of training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NotFoundError(
            "the plot needs matplotlib: install the extra 'demo' (in a clone: pip install -e"
            " '.[demo]')",
            details={"extra": "demo"},
        )


def plot_training(
    history: Sequence[tuple[int, float]],
    held_out_before: float,
    held_out_after: float,
    path: str | Path,
    model: str = "",
    epsilons: Sequence[float] = (),
    budget: float | None = None,
) -> Path:
    """Writes a plot of the training loss, its moving average, and the held-out losses.

    Args:
        history: (step, loss in nats per token) of each step, in order; may be empty. The loss
            of a step without rows is NaN and leaves a gap.
        held_out_before: the loss on held-out rows before the first of these steps.
        held_out_after: the loss on held-out rows after the last of these steps.
        path: the PNG file to write or overwrite.
        model: a short name for the title.
        epsilons: for a private run, the epsilon spent after each step. It has its own axis.
        budget: the epsilon that may be spent; None draws no budget.

    Returns:
        The path of the PNG file.
    """
    figure = _figure()
    axes = figure.add_subplot()
    _draw_training(axes, history)
    _draw_held_out(axes, history, held_out_before, held_out_after)
    steps = "1 step" if len(history) == 1 else f"{len(history)} steps"
    _dress(axes, f"{model or 'model'}, {steps}")
    if epsilons:
        _draw_epsilons(axes, history, epsilons, budget)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_TEXT)
    return _saved(figure, Path(path))


def plot_audit(
    scores_in: Sequence[float],
    scores_out: Sequence[float],
    *,
    sigma: float,
    claimed: float,
    bound: float,
    verdict: str,
    path: str | Path,
) -> Path:
    """Writes a plot of the scores of an audit's canaries, measured and as the claim predicts them.

    Args:
        scores_in: the scores of the canaries that were in the step, in units of C; may be empty.
        scores_out: the scores of the canaries that were not in the step; may be empty.
        sigma: the noise multiplier of the claim.
        claimed: the claimed epsilon of one step.
        bound: the lower bound of epsilon that the attacker's correct guesses prove.
        verdict: the verdict for the title.
        path: the PNG file to write or overwrite.

    Returns:
        The path of the PNG file.
    """
    figure = _figure()
    upper, lower = figure.subplots(2, 1, height_ratios=[6, 1])
    _draw_scores(upper, scores_in, scores_out, sigma)
    _draw_bound(lower, bound, claimed)
    _title(upper, f"Privacy audit: {verdict}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=_TEXT)
    return _saved(figure, Path(path))


def plot_plan(plan: PrivacyPlan, path: str | Path) -> Path:
    """Writes a plot of the noise in each value by batch size, one line for each contract.

    Returns:
        The path of the PNG file.
    """
    figure = _figure()
    axes = figure.add_subplot()
    looks = {"participation": (_AVERAGE, "-"), "poisson": (_AFTER, "-"),
             "client_poisson": (_STEP, ":"), "worst_case": (_SPENT, "-")}  # fmt: skip
    for contract, (color, line) in looks.items():
        runs = [run for run in plan.runs if run.contract == contract]
        batches, noise = [run.batch_size for run in runs], [run.noise for run in runs]
        axes.plot(batches, noise, line, color=color, marker="o", label=contract)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.set_xlabel("batch size", color=_TEXT)
    axes.set_ylabel("noise in each value of a step", color=_TEXT)
    _title(axes, f"{plan.rows:,} rows, {plan.epochs} epochs, epsilon {plan.epsilon:g}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=_TEXT)
    return _saved(figure, Path(path))


def _saved(figure: Any, path: Path) -> Path:
    with new_file(path, replace=True) as file:
        figure.savefig(file, format="png")
    return path


def _figure() -> Any:
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(9, 5), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def moving_average(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Returns the mean over the `window` values around each position, over fewer near the ends.

    NaN values are left out. A mean over no value is NaN.
    """
    half = window // 2
    spans = [losses[max(0, i - half) : i + window - half] for i in range(len(losses))]
    known = [[loss for loss in span if not math.isnan(loss)] for span in spans]
    return [sum(span) / len(span) if span else math.nan for span in known]


def _draw_training(axes: Any, history: Sequence[tuple[int, float]]) -> None:
    steps, losses = [step for step, _ in history], [loss for _, loss in history]
    style = {"linewidth": 1.0, "marker": ".", "markersize": 3.0}
    axes.plot(steps, losses, color=_STEP, label="training loss of each step", **style)
    window = max(3, min(WINDOW, len(losses) // 4))
    label = f"training loss, moving average of {window} steps"
    axes.plot(steps, moving_average(losses, window), color=_AVERAGE, linewidth=2.4, label=label)


def _draw_held_out(
    axes: Any, history: Sequence[tuple[int, float]], before: float, after: float
) -> None:
    first, last = (history[0][0] - 1, history[-1][0]) if history else (0, 0)
    for step, loss, color, when in (
        (first, before, _BEFORE, "before"),
        (last, after, _AFTER, "after"),
    ):
        axes.axhline(loss, color=color, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1)
        label = f"held-out loss {when} training: {loss:.3f}"
        axes.plot([step], [loss], "o", color=color, markersize=8, zorder=4, label=label)


def _draw_epsilons(
    axes: Any, history: Sequence[tuple[int, float]], epsilons: Sequence[float], budget: float | None
) -> None:
    """Draws the privacy spent as stairs over all steps."""
    steps = [history[0][0] - 1, *(step for step, _ in history)]
    before = 0.0 if steps[0] == 0 else epsilons[0]
    right = axes.twinx()
    of = "" if budget is None else f" of {budget:g}"
    label = f"privacy spent: epsilon {epsilons[-1]:.2f}{of}"
    style = {"color": _SPENT, "linewidth": 1.6, "drawstyle": "steps-pre"}
    right.plot(steps, [before, *epsilons], label=label, **style)
    right.set_ylim(0, 1.25 * max(*epsilons, budget or 0.0))
    right.set_ylabel("epsilon spent", color=_SPENT)
    right.tick_params(colors=_SPENT)
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_color(_SPENT)
    axes.set_zorder(right.get_zorder() + 1)  # the losses lie above the stairs
    axes.patch.set_visible(False)


def _dress(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    _title(axes, title)
    axes.set_xlabel("optimizer step", color=_TEXT)
    axes.set_ylabel("loss (nats per token)", color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.margins(x=0.02)
    _plain(axes)


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, pad=12)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT)
    axes.set_axisbelow(True)


def _draw_scores(
    axes: Any, scores_in: Sequence[float], scores_out: Sequence[float], sigma: float
) -> None:
    """Draws both histograms and the curves of the claim over the same bins.

    The bins span all scores, and at least 4 sigma around both means.
    """
    scores = [*scores_in, *scores_out]
    low, high = min([-4 * sigma, *scores]), max([1 + 4 * sigma, *scores])
    bins = [low + (high - low) * place / 60 for place in range(61)]
    line = [low + (high - low) * place / 600 for place in range(601)]
    for values, mean, color, where in (
        (scores_out, 0.0, _BEFORE, "out of"),
        (scores_in, 1.0, _AVERAGE, "in"),
    ):
        if values:
            label = f"{len(values)} canaries {where} the step"
            axes.hist(values, bins, density=True, color=color, alpha=0.35, label=label)
        bell = [
            math.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
            for x in line
        ]
        axes.plot(line, bell, color=color, linewidth=2.0, label=f"as claimed, {where} the step")
    axes.set_xlabel("score: released value along the canary, in units of C", color=_TEXT)
    axes.set_ylabel("density", color=_TEXT)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.margins(x=0)
    _plain(axes)


def _draw_bound(axes: Any, bound: float, claimed: float) -> None:
    """Draws the epsilon that the guesses prove as a bar, and the claim that it must not exceed."""
    color = _AFTER if bound <= claimed else _WRONG
    axes.barh(
        [0], [bound], color=color, height=0.6, label=f"epsilon at least {bound:.2f} (95 % sure)"
    )
    axes.axvline(claimed, color=_TEXT, linewidth=2.5, label=f"epsilon claimed: {claimed:g}")
    axes.set_xlim(0, 1.25 * max(bound, claimed))
    axes.set_yticks([])
    axes.set_xlabel("epsilon of one step", color=_TEXT)
    _plain(axes)
