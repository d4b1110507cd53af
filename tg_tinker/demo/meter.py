"""Shows the progress of the demo's training, and defines the record of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_MOST_LINES = 10  # maximum steps between two progress lines if the output is not a terminal


@dataclass(frozen=True)
class StepRecord:
    """The record of one finished step.

    Attributes:
        loss: the mean over the step's rows in nats per token; NaN if no row was drawn.
        seconds: the wall time of the step in seconds.
        epsilon: the epsilon spent from the dataset after this step; None without privacy.
    """

    step: int
    loss: float
    num_tokens: int
    seconds: float
    epsilon: float | None = None


class Meter:
    """The progress of training: a live bar on a terminal, else a line every few steps."""

    def __init__(self, console: Console, total: int, budget: float | None) -> None:
        self._console, self._total, self._budget = console, total, budget
        self._tokens, self._seconds, self._done = 0, 0.0, 0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[said]}  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task("training", total=total, said="loss -")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, record: StepRecord) -> None:
        self._done += 1
        self._tokens += record.num_tokens
        self._seconds += record.seconds
        said = self._said(record)
        self._bar.update(self._task, advance=1, said=said)
        every = min(_MOST_LINES, max(1, self._total // 10))
        if self._bar.disable and (self._done % every == 0 or self._done == self._total):
            left = self._seconds / self._done * (self._total - self._done)
            self._console.print(f"step {self._done}/{self._total}  {said}  {left:.0f} s left")

    def _said(self, record: StepRecord) -> str:
        loss = "- (no row drawn)" if math.isnan(record.loss) else f"{record.loss:.3f}"
        spent = "" if record.epsilon is None else f"  epsilon {record.epsilon:.2f}"
        of = "" if self._budget is None else f" of {self._budget:g}"
        speed = self._tokens / max(self._seconds, 1e-9)
        return f"loss {loss}{spent}{of}  {speed:,.0f} tokens/s"
