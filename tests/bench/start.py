"""Measures how fast a client starts, its memory on the node, and the overhead of Ray on its calls.

Starts are measured in this process on an embedded cluster, without the time of `ray.init`. The
first start finds no process that has imported the libraries; later starts do. Memory is
`Private_Clean + Private_Dirty` of `smaps_rollup`, which would be free without this client.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.engine.model import save_tiny_llama
from actors.training.actor import IDLE_S
from bench.loops import LoopSpec, uniform
from bench.measure import SCREEN, Bench, Goal, Run, Sheet, Spread
from bench.sides import command, opened
from bench.workloads import OUTPUT, Turns, Workload, run_all
from tg_tinker import LoRAConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.client.home import init_home
from tg_tinker.storage.home import home_directory

WAIT_S = 12.0
"""The wait for the spare process to finish its imports, which occupy a core."""

CLIENTS, STARTS = 4, 7

RATIO = Workload(
    "start-sdk", "uniform 8x128 through the SDK and Ray, not private", "the same engine in process",
    uniform, lambda model: LoopSpec("sdk", model), lambda model: LoopSpec("ours", model),
    speed=Goal(1 / 1.03), repeats=9,
)  # fmt: skip


def run(asked: Run) -> None:
    run_all([RATIO], asked)
    asked.sheets.append(calls(asked.times(200)))
    asked.sheets += starts(asked.model, asked.times(STARTS))


# --- calls -----------------------------------------------------------------------------------


def calls(count: int) -> Sheet:
    """Times steps with almost no work, both calls awaited, so that the overhead remains."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(save_tiny_llama(Path(folder), 259))
        sides = {name: command(LoopSpec(name, model)) for name in ("sdk", "ours")}
        one = Workload("start-calls", "", "", lambda: uniform(1, 8), RATIO.ours, RATIO.theirs)
        with (
            opened(sides, OUTPUT / "logs" / "start-calls") as both,
            Turns(both, one, count) as turns,
        ):
            rows = [([5, 6, 7, 8], [5, 6, 7, 8])]
            turns.take("train", rows)
            time.sleep(WAIT_S)
            taken = [turns.take("train", rows) for _ in range(count)]
    sdk, own = (sorted(1e3 * t[name]["seconds"] for t in taken) for name in ("sdk", "ours"))
    return Sheet(
        f"forward_backward + optim_step awaited, {count} times, milliseconds",
        ("", "through the SDK", "in process", "added", "goal"),
        [
            (f"p{part}", *(f"{value:.1f}" for value in (a, b, a - b)), f"<= {goal}")
            for part, goal in ((50, 10), (95, 20))
            for a, b in [(sdk[len(sdk) * part // 100], own[len(own) * part // 100])]
        ],
    )  # fmt: skip


# --- starts ----------------------------------------------------------------------------------


def starts(model: str, count: int) -> list[Sheet]:
    config = TrainingConfig(model_ref=model, lora_config=LoRAConfig())
    with local_service() as service:
        first, cold = created(service, config)
        clients, warm = [first], []
        while len(warm) < count:
            time.sleep(WAIT_S)
            tc, seconds = created(service, config)
            warm.append(seconds)
            SCREEN.print(f"start {len(warm)} of {count}: {seconds:.2f} s")
            if len(clients) < CLIENTS:
                clients.append(tc)
            else:
                tc.close()
        memory = added(clients)
    found = Spread.of(warm)
    return [
        Sheet(
            "start of a new client, seconds from the call to its return",
            ("start", "median [min..max]", "goal"),
            [
                ("first client on its node", f"{cold:.2f}", "< 8"),
                ("later client", found.shown(), "< 3"),
            ],
        ),
        memory,
    ]


def created(service: ServiceClient, config: TrainingConfig) -> tuple[TrainingClient, float]:
    started = time.perf_counter()
    tc = service.create_training_client(config)
    return tc, time.perf_counter() - started


def added(clients: list[TrainingClient]) -> Sheet:
    rows = [("loaded", *(f"{private(tc):.0f}" for tc in clients))]
    for ids in ([[5] * 128], [[5] * 128] * 8):
        for tc in clients:
            tc.forward_backward({"input_ids": ids}).result()
            tc.optim_step().result()
        time.sleep(2.5 * IDLE_S)
        what = f"idle after a step of {len(ids)}x128"
        rows.append((what, *(f"{private(tc):.0f}" for tc in clients)))
    names = tuple(f"client {number}" for number in range(1, len(clients) + 1))
    return Sheet("private memory of clients of one base model, MB (goal: 350)", ("", *names), rows)


def private(tc: TrainingClient) -> float:
    """Returns the private memory of a client's process, in megabytes."""
    pid = ray.get(tc._calls.link.actor.__ray_call__.remote(lambda self: os.getpid()))
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


@contextmanager
def local_service() -> Iterator[ServiceClient]:
    """Yields a client on a new home that has the models that are already converted."""
    models, before = home_directory() / "models", os.environ.get("TG_TINKER_HOME")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        home = Path(folder) / "home"
        init_home(home)
        (home / "models").symlink_to(models)
        os.environ["TG_TINKER_HOME"] = str(home)
        try:
            with ServiceClient(address="local") as service:
                yield service
        finally:
            restored(before)


def restored(before: Any) -> None:
    os.environ.pop("TG_TINKER_HOME")
    if before is not None:
        os.environ["TG_TINKER_HOME"] = before


BENCH = Bench(
    "start", "the start of a client, its memory, and the overhead of Ray on its calls", 3, run,
    workloads=(RATIO.name,),
)  # fmt: skip
