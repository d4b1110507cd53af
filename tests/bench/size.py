"""What a private step costs at other sizes: tokens in a batch, rows at equal tokens, rank.

Each rank is a process of its own; sizes take turns within every repeat, and a cost is that of its
repeat's neighbours. Memory is measured first, sizes ascending, as `child` says.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from bench.loops import LoopSpec, Rows, uniform
from bench.measure import Bench, Goal, Row, Run, Sheet, Spread, ratios, shown_progress
from bench.sides import Side, command, opened
from bench.workloads import OUTPUT

TOKENS = (256, 512, 1024, 2048, 4096, 8192)
FLAT_FROM = 512
SHAPES = ((1, 1024), (8, 128), (64, 16))
RANKS = (4, 16, 64, 128)
RANK = 16
LENGTH = 128

Size = tuple[int, int, int]
"""(rank, rows, tokens in a row)."""

BASIS: Size = (RANK, 8, LENGTH)


def sizes(quick: bool) -> list[Size]:
    tokens = [n for n in TOKENS if not quick or n <= 2048]
    found = [(RANK, n // LENGTH, LENGTH) for n in tokens]
    found += [(RANK, *shape) for shape in SHAPES]
    found += [(rank, 8, LENGTH) for rank in ((RANK,) if quick else RANKS)]
    return list(dict.fromkeys(found))


def run(bench: Run) -> None:
    wanted = sizes(bench.quick)
    with ExitStack() as stack:
        sides = {rank: started(stack, bench.model, rank) for rank in {size[0] for size in wanted}}
        memory = {s: sides[s[0]].ask("peak of train", rows_of(s))["bytes"] for s in wanted}
        times: dict[Size, list[float]] = {size: [] for size in wanted}
        for _ in shown_progress(bench.times(3), "sizes"):
            for size in wanted:
                times[size].append(sides[size[0]].ask("train", rows_of(size))["seconds"])
    costs = {size: [t / tokens(size) for t in taken] for size, taken in times.items()}
    bench.sheets.append(sheet(costs, memory))
    bench.rows.append(flatness(costs))
    bench.sheets.append(slope({s: m for s, m in memory.items() if is_batch(s)}))


def started(stack: ExitStack, model: str, rank: int) -> Side:
    spec = LoopSpec("ours", model, rank=rank, private=True)
    logs = OUTPUT / "logs" / f"size-rank{rank}"
    return stack.enter_context(opened({"ours": command(spec)}, logs))["ours"]


def rows_of(size: Size) -> Rows:
    return uniform(size[1], size[2])


def tokens(size: Size) -> int:
    return size[1] * size[2]


def is_batch(size: Size) -> bool:
    """One of the sizes that differ in the tokens of a batch alone."""
    return size[0] == RANK and size[2] == LENGTH


def sheet(costs: dict[Size, list[float]], memory: dict[Size, int]) -> Sheet:
    rows = [
        (
            f"{tokens(size)} ({size[1]} x {size[2]})", str(size[0]),
            Spread.of(1e3 * c for c in cost).shown(" ms"), ratios(cost, costs[BASIS]).shown("x"),
            f"{memory[size] / 2**20:,.0f} MiB",
        )
        for size, cost in costs.items()
    ]  # fmt: skip
    headings = ("tokens of a batch", "rank", "per token", "of 8 x 128, rank 16", "peak of a step")
    return Sheet("cost against size: private steps", headings, rows)


def flatness(costs: dict[Size, list[float]]) -> Row:
    """The dearest token of a batch of 512 or more over the cheapest."""
    relative = {
        tokens(size): ratios(cost, costs[BASIS]).middle
        for size, cost in costs.items()
        if is_batch(size) and tokens(size) >= FLAT_FROM
    }
    dear, cheap = max(relative, key=relative.__getitem__), min(relative, key=relative.__getitem__)
    return Row(
        "flat", f"time per token, batches of {FLAT_FROM} to {max(relative)} tokens",
        "the cheapest of them", Spread.of([relative[dear] / relative[cheap]]),
        Goal(1.2, at_least=False), f"at {dear}", f"at {cheap}",
    )  # fmt: skip


def slope(memory: dict[Size, int]) -> Sheet:
    """A straight line through peak memory against the tokens of a batch."""
    at = np.array([tokens(size) for size in memory], dtype=float)
    found = np.array(list(memory.values()), dtype=float)
    gradient, start = np.polyfit(at, found, 1)
    worst = float(np.abs(found / (start + gradient * at) - 1).max())
    row = (f"{start / 2**20:,.0f} MiB", f"{gradient / 2**10:.1f} KiB", f"{worst:.0%}")
    headings = ("at no token", "per token of a batch", "furthest from the line")
    return Sheet("memory against size: rows of 128 tokens", headings, [row])


BENCH = Bench(
    "size", "cost against size: tokens, rows, rank", 5, run, usual=True, workloads=("flat",)
)
