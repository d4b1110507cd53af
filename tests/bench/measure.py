"""Defines ratios of interleaved repeats with their spread, goals, and the results of a bench."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

SCREEN = Console(stderr=True)
"""The console for progress and messages. Only tables go to standard output."""


@dataclass(frozen=True)
class Spread:
    """The median of some values, with the smallest and the largest value."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def shown(self, unit: str = "", digits: int = 2) -> str:
        low, high = f"{self.low:.{digits}f}", f"{self.high:.{digits}f}"
        return f"{self.middle:.{digits}f}{unit} [{low}..{high}]"


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Returns the ratios of each repeat's two times.

    The two times of a repeat are neighbors, so that a change of the machine's speed cancels out.
    """
    return Spread.of(a / b for a, b in zip(over, under, strict=True))


@dataclass(frozen=True)
class Goal:
    """A bound on the median of a ratio: at least (speed) or at most (memory, overhead)."""

    bound: float
    at_least: bool = True

    def met(self, ratio: Spread) -> bool:
        return ratio.middle >= self.bound if self.at_least else ratio.middle <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}x"


@dataclass(frozen=True)
class Row:
    """A line of the one table.

    Attributes:
        ratio: None if it could not be measured; then `remark` says why.
        ours, theirs: the absolute medians of the two sides, in words.
    """

    name: str
    what: str
    against: str
    ratio: Spread | None
    goal: Goal | None = None
    ours: str = ""
    theirs: str = ""
    remark: str = ""

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not run"
        if self.goal is None:
            return ""
        return "met" if self.goal.met(self.ratio) else "missed"


@dataclass(frozen=True)
class Sheet:
    """Another table: its title, headings and cells."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Run:
    """The options of a bench, and its results.

    Attributes:
        repeats: the requested number; None leaves the number to each workload.
        only: the names of single workloads to run; empty means all.
    """

    model: str
    repeats: int | None = None
    quick: bool = False
    only: frozenset[str] = frozenset()
    rows: list[Row] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)

    def times(self, usual: int) -> int:
        return self.repeats or (min(usual, 2) if self.quick else usual)


@dataclass(frozen=True)
class Bench:
    """One bench of the program.

    Attributes:
        about: a summary for `--help`.
        minutes: the duration on two quiet cores, with the usual repeats.
        usual: whether a plain `make bench` runs it; else `--only` or `--all` does.
        workloads: the names that `--only` accepts besides the name of the bench.
    """

    name: str
    about: str
    minutes: float
    run: Callable[[Run], None]
    usual: bool = False
    workloads: tuple[str, ...] = ()


def shown_progress(repeats: int, label: str) -> Iterator[int]:
    return iter(track(range(repeats), label, console=SCREEN))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int, label: str
) -> dict[str, list[float]]:
    """Returns the seconds of each side.

    The sides run one after the other in every repeat, after one repeat that is not timed.
    """
    for side in sides.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in shown_progress(repeats, label):
        for name, side in sides.items():
            times[name].append(timed(side))
    return times


def beside_the_first(
    title: str, times: Mapping[str, Sequence[float]], *, tokens: int | None = None
) -> Sheet:
    """Returns the times, and their ratios to the first side.

    If `tokens`, the number of tokens of one run, is given, the sheet also has tokens per second.
    """
    first = next(iter(times.values()))
    headings = ("side", "time", "ratio to the first", *(("tokens/s",) if tokens else ()))
    rows = []
    for name, taken in times.items():
        middle = Spread.of(taken)
        more = (f"{tokens / middle.middle:.1f}",) if tokens else ()
        rows.append((name, middle.shown(" s"), ratios(taken, first).shown("x"), *more))
    return Sheet(title, headings, rows)


def as_json(thing: Any) -> Any:
    """Returns a dataclass as a dict, for `json.dumps(default=...)`; adds the verdict of a row."""
    found = dict(vars(thing))
    return found | {"verdict": thing.verdict} if isinstance(thing, Row) else found
