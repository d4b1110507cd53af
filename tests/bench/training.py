"""Compares our training step with the loop that a user would write by hand."""

from __future__ import annotations

from functools import partial

from bench.loops import LoopSpec, ragged, uniform
from bench.measure import Bench, Goal
from bench.workloads import Workload, run_all

PLAIN_LOOP = "plain padded transformers + PEFT loop"

ours = partial(LoopSpec, "ours")
private = partial(LoopSpec, "ours", private=True)
plain = partial(LoopSpec, "plain")

WORKLOADS = (
    Workload(
        "ragged", "ragged chats (8 rows, 32-256 tokens, 60 % masked), private", PLAIN_LOOP, ragged,
        private, plain, speed=Goal(1.6), memory=Goal(0.6, at_least=False), quick=True,
    ),
    Workload(
        "uniform", "uniform 8x128, all labeled, private", PLAIN_LOOP, uniform,
        private, plain, speed=Goal(1.0), quick=True,
    ),
    Workload(
        "row32", "one row of 32 tokens, private", PLAIN_LOOP, partial(uniform, 1, 32),
        private, plain, repeats=9,
    ),
    Workload(
        "row4096", "4096 tokens in one row, private", PLAIN_LOOP, partial(uniform, 1, 4096),
        private, plain, speed=Goal(1.0), memory=Goal(0.5, at_least=False), repeats=2,
    ),
    Workload(
        "eval", "eval mode, ragged chats", "plain no-grad padded loop", ragged,
        ours, plain, work="evaluate", speed=Goal(1.6), quick=True,
    ),
    Workload(
        "full", "full fine-tuning, uniform 8x128, not private", "plain transformers loop", uniform,
        partial(ours, rank=None), partial(plain, rank=None), speed=Goal(1.0),
    ),
    Workload(
        "threads", "uniform 8x128, private, on 2 threads", "the same on 1 thread (ideal: 2x)",
        uniform, partial(private, threads=2), partial(private, threads=1), speed=Goal(1.7),
    ),
)  # fmt: skip

BENCH = Bench(
    "training",
    "a step against the plain loop: the goals",
    8.5,
    partial(run_all, WORKLOADS),
    usual=True,
    workloads=tuple(one.name for one in WORKLOADS),
)
