"""Measures how long the calls of 50 training actors wait for the registry's actor.

Every client alternates between two calls: it records a step, with its row of the audit log, and it
reads its run. The time of a call counts from when the call was due, even if it started late. So if
calls are due faster than they are answered, times only grow with the length of the measurement. The
goal is 1,000 calls/s, with 99 of 100 calls answered within 20 ms. The clients are threads of five
processes, and have no engine.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from bench.measure import Bench, Run, Sheet, shown_progress
from tg_tinker import ServiceClient, TrainingConfig
from tg_tinker.cluster.remote_registry import RemoteRegistry

CALLS = [("sha256:" + "a" * 64, "sha256:" + "b" * 64)] * 2
CLIENTS, PROCESSES, SECONDS = 50, 5, 10
RATES = (100, 300, 500, 1000, None)
"""Calls per second of all clients together. None means that each answer starts the next call."""


@ray.remote(num_cpus=0)
class Clients:
    """A process with some of the clients."""

    def __init__(self, actor: Any) -> None:
        self._registry = RemoteRegistry(actor)

    def waited(self, runs: Sequence[str], starts: Sequence[float], pace: float) -> list[float]:
        """Returns the milliseconds of each call.

        Args:
            pace: the seconds from one call of a client to its next.
        """
        with ThreadPoolExecutor(len(runs)) as pool:
            found = pool.map(lambda run, start: self._client(run, start, pace), runs, starts)
            return [wait for waits in found for wait in waits]

    def _client(self, run: str, start: float, pace: float) -> list[float]:
        found: list[float] = []
        due, number = start, 0
        while due < start + SECONDS:
            time.sleep(max(0.0, due - time.perf_counter()))
            if number % 2:
                self._registry.runs.get("default", run)
            else:
                self._registry.runs.record(run, 1, number, "active", CALLS)
            now = time.perf_counter()
            found.append(1e3 * (now - due))
            due, number = (due + pace if pace else now), number + 1
        return found


def waited(registry: Any, clients: Sequence[Any], rate: int | None) -> tuple[list[float], float]:
    """Returns the milliseconds of all calls, and the number of answered calls per second."""
    config = TrainingConfig(model_ref="m").model_dump_json()
    runs = [registry.runs.create("default", config) for _ in range(CLIENTS)]
    for run in runs:
        registry.runs.claim(run)
    pace = CLIENTS / rate if rate else 0.0
    begin = time.perf_counter() + 0.5
    starts = [begin + number * pace / CLIENTS for number in range(CLIENTS)]
    refs = [
        one.waited.remote(runs[i::PROCESSES], starts[i::PROCESSES], pace)
        for i, one in enumerate(clients)
    ]
    waits = [wait for found in ray.get(refs) for wait in found]
    return waits, len(waits) / (time.perf_counter() - begin)


def measured(name: str, registry: Any) -> Sheet:
    clients = [Clients.remote(registry.actor) for _ in range(PROCESSES)]  # type: ignore[attr-defined]
    rows = []
    for i in shown_progress(len(RATES), name):
        waits, answered = waited(registry, clients, RATES[i])
        p50, p99 = statistics.median(waits), statistics.quantiles(waits, n=100)[98]
        due = f"{RATES[i]:,}" if RATES[i] else "no limit"
        rows.append((due, f"{answered:,.0f}", f"{p50:.1f}", f"{p99:.1f}", f"{max(waits):.1f}"))
    title = f"the registry on {name}: {CLIENTS} clients (goal: 1,000 calls/s, p99 20 ms)"
    return Sheet(title, ("calls/s due", "answered", "p50 ms", "p99 ms", "max ms"), rows)


def run(bench: Run) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be in memory
        os.environ["TG_TINKER_HOME"] = f"{folder}/home"
        with ServiceClient("local") as service:
            bench.sheets.append(measured("SQLite", service._registry))


BENCH = Bench("registry", "the registry under the calls of 50 training actors", 1.5, run)
