"""Runs one measured side: `python -m bench.child SPEC`, see `sides`.

Memory is measured as follows. Before the measured steps, the process touches all its weights and
makes one step on sixteen tokens, so that libraries and optimizer state are loaded. It returns free
memory to the system, records its resident memory (`rest`), resets the kernel's high-water mark
(`clear_refs`) and makes two whole steps. `bytes` is the mark minus `rest`, and `process_bytes` is
the mark itself. `seconds` is the time of the second step, which is as warm as any later step.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.loops import Loop, LoopSpec, Rows, build


def peak(work: Callable[[], object]) -> dict[str, float]:
    """Does this work twice; returns resident bytes before, peak bytes, and the second time in s."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    rest = resident("VmRSS")
    work()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    high = resident("VmHWM")
    return {"rest": rest, "bytes": high - rest, "process_bytes": high, "seconds": seconds}


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def touch_weights(loop: Loop) -> None:
    """Reads every page of the weights, so that a mapped file is resident before the step."""
    model = getattr(loop, "model", None)
    for parameter in model.parameters() if model is not None else ():
        parameter.detach().sum()


def turn(loop: Loop, asked: dict[str, Any]) -> dict[str, Any]:
    what, rows = asked["do"], [(ids, labels) for ids, labels in asked["rows"]]
    if what.startswith("peak of "):
        work: Callable[[Rows], float] = getattr(loop, what.removeprefix("peak of "))
        start = rows[0][0][:16]
        work([(start, start)])
        return peak(lambda: work(rows))
    started, cpu = time.perf_counter(), time.process_time()
    loss = getattr(loop, what)(rows)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "loss": loss,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    from actors.engine.model import use_threads
    from tg_tinker.client.home import init_home

    spec = LoopSpec(**json.loads(sys.argv[1]))
    use_threads(spec.threads)
    loop = build(spec, init_home() / "models")
    try:
        touch_weights(loop)
        answer({"ready": True})
        for line in sys.stdin:
            answer(turn(loop, json.loads(line)))
    finally:
        if hasattr(loop, "close"):
            loop.close()


if __name__ == "__main__":
    main()
