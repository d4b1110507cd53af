"""Compares a step through the SDK and Ray, both calls awaited, with the plain loop without them."""

from __future__ import annotations

from functools import partial

from bench.loops import LoopSpec, uniform
from bench.measure import Bench
from bench.training import PLAIN_LOOP, plain
from bench.workloads import Workload, run_all

sdk = partial(LoopSpec, "sdk", private=True)

WORKLOADS = (
    Workload(
        "sdk-uniform", "uniform 8x128, private, through the SDK", PLAIN_LOOP, uniform, sdk, plain,
    ),
    Workload(
        "sdk-row32", "one row of 32 tokens, private, through the SDK, awaited", PLAIN_LOOP,
        partial(uniform, 1, 32), sdk, plain, repeats=9,
    ),
)  # fmt: skip

BENCH = Bench(
    "sdk",
    "a step through the SDK and Ray against the plain loop without them",
    1.5,
    partial(run_all, WORKLOADS),
    usual=True,
    workloads=tuple(one.name for one in WORKLOADS),
)
