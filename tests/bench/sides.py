"""Runs processes that are measured in turns.

Each side of a comparison is a fresh process. It holds its model for the whole workload and waits
between its turns, so that the sides share neither memory nor threads. The process reads one JSON
object per line ({"do": "train", "rows": [...]}) and answers with one. `child` is the program for
our side and the plain loop; `tinker_client` is the program for peers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.process import SPIN
from bench.loops import LoopSpec, Rows

TESTS = Path(__file__).parents[1]


class SideError(Exception):
    """A side has ended. The message is the last line that it wrote."""


class Side:
    """One process. Its answers are dicts with `seconds`, `cpu_seconds`, `loss` or `bytes`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log.open("w+b")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Waits until the process has loaded its model."""
        self._answer()

    def ask(self, what: str, rows: Rows) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": what, "rows": rows}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideError(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SideError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        written = self._log.read().decode(errors="replace").strip().splitlines()
        return written[-1] if written else "the process ended and wrote no message"


def command(spec: LoopSpec) -> list[str]:
    """Returns the command that starts a side.

    Only our engine gets the thread setting of our actors, because no user's own loop sets it.
    """
    spin = [f"{name}={value}" for name, value in SPIN.items() if spec.loop == "ours"]
    return ["env", *spin, sys.executable, "-m", "bench.child", json.dumps(asdict(spec))]


@contextmanager
def opened(commands: Mapping[str, Sequence[str]], logs: Path) -> Iterator[dict[str, Side]]:
    """Starts all sides of a workload at once, and yields them when they are ready.

    They end with the block.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sides = {}
        for name, one in commands.items():
            sides[name] = Side(one, logs / f"{name}.log")
            stack.callback(sides[name].close)
        for side in sides.values():
            side.wait()
        yield sides
