"""The registry's actor under the calls of 50 training actors: how long each of them waits.

Each client is a thread that notes a step, with its row of the audit log, or
asks for its run, in turn; the rate is that of all of them. A call that is late starts late: its
time counts from when it was due. `--database URL` measures another database than SQLite.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tg_tinker import ServiceClient, TrainingConfig

CALLS = [("sha256:" + "a" * 64, "sha256:" + "b" * 64)] * 2
CLIENTS, RATES, SECONDS = 50, (50, 100, 200, 1000), 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be in memory
        os.environ["TG_TINKER_HOME"] = f"{folder}/home"
        with ServiceClient("local", database=parser.parse_args().database) as service:
            Console().print(measured(service))


def measured(service: ServiceClient) -> Table:
    table = Table("calls/s due", "done", "p50 ms", "p99 ms", title=f"{CLIENTS} clients")
    for rate in RATES:
        waits, took = waited(service._registry, rate)
        done = len(waits) / took
        p99 = statistics.quantiles(waits, n=100)[98]
        table.add_row(str(rate), f"{done:.0f}", f"{statistics.median(waits):.1f}", f"{p99:.1f}")
    return table


def waited(registry: Any, rate: int) -> tuple[list[float], float]:
    config = TrainingConfig(model_ref="m").model_dump_json()
    runs = [registry.create_run("default", config) for _ in range(CLIENTS)]
    for run in runs:
        registry.claim(run)
    found: list[float] = []
    start = time.perf_counter() + 0.1
    threads = [
        threading.Thread(target=client, args=(registry, run, start + number / rate, rate, found))
        for number, run in enumerate(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - start


def client(registry: Any, run: str, start: float, rate: int, found: list[float]) -> None:
    for number in range(rate * SECONDS // CLIENTS):
        due = start + number * CLIENTS / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        if number % 2:
            registry.run("default", run)
        else:
            registry.record(run, 1, number, "active", CALLS)
        found.append(1e3 * (time.perf_counter() - due))


if __name__ == "__main__":
    main()
