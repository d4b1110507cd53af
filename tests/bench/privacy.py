"""Measures the cost of privacy: compares a private step with a plain one, and with Opacus."""

from __future__ import annotations

import secrets
import tempfile
from functools import partial
from pathlib import Path

import torch

from actors.privacy.clipping import ClippedSum, privatize
from bench.loops import LoopSpec, uniform
from bench.measure import Bench, Run, Sheet, Spread, timed
from bench.workloads import Workload, run_all
from support.privacy_helpers import new_budget, registry
from tg_tinker import DPConfig, TrainingConfig

UNIFORM = "uniform 8x128, private"

ours = partial(LoopSpec, "ours")
private = partial(LoopSpec, "ours", private=True)

WORKLOADS = (
    Workload("dp", UNIFORM, "the same, not private", uniform, private, ours, shows_memory=True),
    Workload(
        "dp-checkpointing", f"{UNIFORM}, activation checkpointing", "the same, not private",
        uniform, partial(private, checkpointing=True), partial(ours, checkpointing=True),
        shows_memory=True,
    ),
    Workload(
        "opacus-hooks", UNIFORM, "Opacus' hooks around PEFT", uniform,
        private, partial(LoopSpec, "opacus"), shows_memory=True,
    ),
    Workload(
        "opacus-ghost", UNIFORM, "Opacus' ghost clipping", uniform,
        private, partial(LoopSpec, "opacus-ghost"), shows_memory=True,
    ),
)  # fmt: skip


def run(bench: Run) -> None:
    run_all(WORKLOADS, bench)
    if not bench.only:
        bench.sheets.append(critical_path(bench.times(30)))


def critical_path(repeats: int) -> Sheet:
    """Times the charge of a step (SQLite, durable), its noise, and counting units of 1,024 rows."""
    found: list[tuple[str, ...]] = []

    def add(what: str, work: partial[object], times: int = repeats) -> None:
        taken = Spread.of(1e3 * timed(work) for _ in range(times))
        found.append((what, taken.shown(" ms", 1)))

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be in memory
        dp = DPConfig(noise_multiplier=10.0, target_epsilon=None, max_participations=10**6)
        config = TrainingConfig(model_ref="none", dp_config=dp)
        budget = new_budget(registry(Path(folder) / "home"), config)
        for count in (8, 1024):
            units = [secrets.token_bytes(16) for _ in range(count)]
            add(f"charge, {count} units", partial(budget.charge, units, noised=True))
            add(f"admit, {count} units", partial(budget.admit, units))
    for count in (1_843_200, 134_515_008):
        shapes = {f"p{i}": torch.zeros(count // 240) for i in range(240)}

        def noise(shapes: dict[str, torch.Tensor] = shapes) -> None:
            privatize(ClippedSum.zero(shapes, 1.0), sigma=1.0, divisor=8)

        few = repeats if count < 10**7 else 3
        add(f"noise, {count:,} parameters", partial(noise), few)
    return Sheet("work on the critical path of a step", ("what", "time"), found)


BENCH = Bench(
    "privacy",
    "a private step against one without privacy, and against Opacus; charge and noise",
    5,
    run,
    workloads=tuple(one.name for one in WORKLOADS),
)
