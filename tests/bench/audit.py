"""Measures the cost of an audit row: durable transactions on SQLite with and without the row.

A training actor calls `record` of the registry after each step. The transaction without an audit
row changes the same row of the same table and is as durable.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING, create
from bench.measure import Bench, Run, Sheet
from tg_tinker import TrainingConfig

CALLS = [("sha256:" + "a" * 64, "sha256:" + "b" * 64)] * 2
COUNT = 2000


def milliseconds(work: Callable[[int], object]) -> list[float]:
    found = []
    for number in range(COUNT):
        started = time.perf_counter()
        work(number)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def run(bench: Run) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be in memory
        bench.sheets.append(measured(Path(folder) / "home"))


def measured(home: Path) -> Sheet:
    create(home)
    registry = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    run = registry.runs.create("default", TrainingConfig(model_ref="m").model_dump_json())
    epoch = registry.runs.claim(run)
    rows = []
    for name, work in {
        "step recorded, no audit row": lambda step: registry.runs.record(
            run, epoch, step, "active"
        ),
        "step recorded, with its audit row": lambda step: registry.runs.record(
            run, epoch, step, "active", CALLS
        ),
        "audit row of a sample": lambda step: registry.audit_log.record_sample(
            "default", "sdk", f"{run}@{step}", 1, 64, "ok"
        ),
    }.items():
        found = milliseconds(work)
        p99 = statistics.quantiles(found, n=100)[98]
        rows.append((name, f"{statistics.median(found):.2f}", f"{p99:.2f}"))
    title = f"the audit log: {COUNT} of each, one after the other"
    return Sheet(title, ("transaction", "p50 ms", "p99 ms"), rows)


BENCH = Bench("audit", "the cost that an audit row adds to a transaction", 0.3, run)
