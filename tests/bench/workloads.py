"""Describes a comparison of two sides as data, and runs all comparisons in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench.loops import LoopSpec, Rows
from bench.measure import SCREEN, Goal, Row, Run, Spread, ratios
from bench.sides import Side, SideError, command, opened

OUTPUT = Path("bench-output")
SAME_LOSS = 1e-3
"""The allowed relative difference of the sides' first losses, which differ by rounding only."""


@dataclass(frozen=True)
class Workload:
    """One comparison.

    Attributes:
        what, against: the texts in the table.
        ours, theirs: the two loops. A time ratio is theirs / ours, so above 1 ours is faster.
        work: train or evaluate.
        speed: the goal of the time ratio, or None if it has no goal.
        memory: the goal of the ratio of both processes' peak memory, ours / theirs.
        shows_memory: whether the table shows memory even without a goal.
        repeats: the timed turns of each side. Memory is measured too in the first of these.
        quick: whether the workload is part of `--quick`.
    """

    name: str
    what: str
    against: str
    rows: Callable[[], Rows]
    ours: Callable[[str], LoopSpec]
    theirs: Callable[[str], LoopSpec]
    work: str = "train"
    speed: Goal | None = None
    memory: Goal | None = None
    shows_memory: bool = False
    repeats: int = 5
    quick: bool = False


def chosen(workloads: Sequence[Workload], run: Run) -> list[Workload]:
    if run.only:
        return [one for one in workloads if one.name in run.only]
    return [one for one in workloads if one.quick or not run.quick]


def run_all(workloads: Sequence[Workload], run: Run) -> None:
    for one in chosen(workloads, run):
        try:
            run.rows += compared(one, run)
        except SideError as error:
            run.rows.append(
                Row(one.name, one.what, one.against, None, one.speed, remark=str(error))
            )


def compared(one: Workload, run: Run) -> list[Row]:
    """Returns the rows of one workload: time, and memory if requested."""
    commands = {"ours": command(one.ours(run.model)), "theirs": command(one.theirs(run.model))}
    rows, repeats = one.rows(), run.times(one.repeats)
    SCREEN.print(f"{one.name}: starting both sides")
    with opened(commands, OUTPUT / "logs" / one.name) as sides, Turns(sides, one, repeats) as turns:
        check_losses({name: found["loss"] for name, found in turns.take("evaluate", rows).items()})
        peaks = turns.take(f"peak of {one.work}", rows)
        later = [turns.take(one.work, rows) for _ in range(repeats - 1)]
    times = {name: [turn[name]["seconds"] for turn in (peaks, *later)] for name in sides}
    found = [time_row(one, times)]
    if one.memory or one.shows_memory:
        found += memory_rows(one, peaks["ours"], peaks["theirs"])
    return found


class Turns(Progress):
    """A progress bar that asks one side after the other."""

    def __init__(self, sides: dict[str, Side], one: Workload, repeats: int) -> None:
        super().__init__(console=SCREEN)
        self._sides, self._order = sides, list(sides)
        self._bar = self.add_task(one.name, total=len(sides) * (repeats + 1))

    def take(self, what: str, rows: Rows) -> dict[str, dict[str, Any]]:
        """Returns an answer of each side. The order changes from turn to turn."""
        found = {}
        for name in self._order:
            found[name] = self._sides[name].ask(what, rows)
            self.advance(self._bar)
        self._order.reverse()
        return found


def check_losses(losses: dict[str, float]) -> None:
    """Raises SideError unless both sides compute the same loss: else times cannot be compared."""
    first, *others = losses.values()
    if not all(math.isclose(first, other, rel_tol=SAME_LOSS) for other in others):
        told = ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
        raise SideError(f"the sides do not compute the same loss: {told}")


def time_row(one: Workload, times: dict[str, list[float]]) -> Row:
    mine, theirs = Spread.of(times["ours"]), Spread.of(times["theirs"])
    return Row(
        one.name, one.what, one.against, ratios(times["theirs"], times["ours"]), one.speed,
        mine.shown(" s"), theirs.shown(" s"),
    )  # fmt: skip


def memory_rows(one: Workload, ours: dict[str, int], theirs: dict[str, int]) -> list[Row]:
    """Returns two rows: memory of the whole process, which has the goal, and of the step alone."""
    return [
        Row(
            f"{one.name}-{name}", f"{one.what}: {what}", one.against,
            Spread.of([ours[key] / theirs[key]]), goal,
            f"{ours[key] / 2**20:,.0f} MiB", f"{theirs[key] / 2**20:,.0f} MiB",
        )
        for name, what, key, goal in (
            ("memory", "peak memory of the process", "process_bytes", one.memory),
            ("step-memory", "peak memory of the step alone", "bytes", None),
        )
    ]  # fmt: skip
