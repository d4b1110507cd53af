"""Measures the cost of a private step by size: tokens in a batch, rows at equal tokens, rank.

Each rank runs in its own process. Sizes take turns within every repeat, and a cost is compared with
the cost of the basis size in the same repeat. Memory is measured in the first repeat, in the order
of the sizes, as `child` describes.
"""

from __future__ import annotations

import numpy as np

from actors.engine.session import MAX_STREAM_TOKENS
from bench.loops import LoopSpec, uniform
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
    specs = {r: LoopSpec("ours", bench.model, rank=r, private=True) for r, *_ in wanted}
    commands = {f"rank{rank}": command(spec) for rank, spec in specs.items()}
    with opened(commands, OUTPUT / "logs" / "size") as sides:
        taken = [
            {size: asked(sides, "train" if turn else "peak of train", size) for size in wanted}
            for turn in shown_progress(bench.times(3), "sizes")
        ]
    memory = {size: found["bytes"] for size, found in taken[0].items()}
    costs = {size: [turn[size]["seconds"] / tokens(size) for turn in taken] for size in wanted}
    bench.sheets.append(sheet(costs, memory))
    bench.rows.append(flatness(costs))
    bench.sheets.append(slopes({s: m for s, m in memory.items() if is_batch(s)}))


def asked(sides: dict[str, Side], what: str, size: Size) -> dict[str, float]:
    rank, rows, length = size
    return sides[f"rank{rank}"].ask(what, uniform(rows, length))


def tokens(size: Size) -> int:
    return size[1] * size[2]


def is_batch(size: Size) -> bool:
    """Returns whether a size differs from the basis only in the tokens of a batch."""
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
    headings = (
        "tokens per batch",
        "rank",
        "per token",
        "relative to 8 x 128, rank 16",
        "peak of a step",
    )
    return Sheet("cost by size: private steps", headings, rows)


def flatness(costs: dict[Size, list[float]]) -> Row:
    """Returns the ratio of the highest to the lowest time per token, in batches of 512 or more."""
    relative = {
        tokens(size): ratios(cost, costs[BASIS]).middle
        for size, cost in costs.items()
        if is_batch(size) and tokens(size) >= FLAT_FROM
    }
    dear, cheap = max(relative, key=relative.__getitem__), min(relative, key=relative.__getitem__)
    return Row(
        "flat", f"time per token, batches of {FLAT_FROM} to {max(relative)} tokens",
        "the fastest of these", Spread.of([relative[dear] / relative[cheap]]),
        Goal(1.2, at_least=False), f"at {dear}", f"at {cheap}",
    )  # fmt: skip


def slopes(memory: dict[Size, int]) -> Sheet:
    """Returns how peak memory grows with the tokens of a batch, below and above a micro-batch."""
    peaks = {tokens(size): peak for size, peak in memory.items()}
    parts = {
        f"up to {MAX_STREAM_TOKENS}, one micro-batch": lambda n: n <= MAX_STREAM_TOKENS,
        f"from {MAX_STREAM_TOKENS} on": lambda n: n >= MAX_STREAM_TOKENS,
    }
    rows = [
        (name, *line({n: peaks[n] for n in peaks if within(n)})) for name, within in parts.items()
    ]
    headings = ("tokens per batch", "at 0 tokens", "per token", "largest deviation from the line")
    return Sheet("memory by size: rows of 128 tokens", headings, rows)


def line(peaks: dict[int, int]) -> tuple[str, str, str]:
    """Returns the start and slope of the line through these points, and the largest deviation."""
    at, found = np.array([*peaks], dtype=float), np.array([*peaks.values()], dtype=float)
    gradient, start = np.polyfit(at, found, 1)
    worst = float(np.abs(found / (start + gradient * at) - 1).max())
    return f"{start / 2**20:,.0f} MiB", f"{gradient / 2**10:,.0f} KiB", f"{worst:.0%}"


BENCH = Bench(
    "size",
    "the cost of a step by size: tokens, rows, rank",
    3.5,
    run,
    usual=True,
    workloads=("flat",),
)
