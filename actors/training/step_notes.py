"""What a training actor tells the registry of its run: each step once, in order, beside training.

No answer waits for it, except after a silence. While the registry or its database refuses, what it
has not heard waits here, and is told before anything newer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

StepCalls = list[tuple[str, str]]
"""(batch hash, gradient hash) of each call of a step."""

MOST_WAITING = 4000
"""Notes that are kept until the registry takes them. Only a run without privacy gets so far: where
the database refuses, nothing can be charged."""

ASK_AFTER_S = 10.0
"""Without an answer of the registry, after which an actor asks whether it still has its run. Less
than the silence after which another takes the run over (`Cluster.silent_s`): who was frozen for so
long asks."""

ANSWER_S = 5.0
"""How long it waits to be told, twice. A registry that says nothing ends no training."""


@dataclass(frozen=True)
class _Note:
    step: int
    status: str
    calls: StepCalls | None
    left_out: int = 0


class StepNotes:
    """Notes of one actor. `note` belongs to the training thread, all else to any.

    Attributes:
        replaced: the registry has said that another actor has the run.
    """

    def __init__(self, record: Callable[[int, str, StepCalls | None, int], bool]) -> None:
        """
        Args:
            record: `Runs.record` of this run and epoch.
        """
        self.replaced = False
        self._record = record
        # Of the last question with an answer. The clock goes on while the process is stopped.
        self._asked = time.monotonic()
        self._newest = _Note(0, "active", None)
        self._waiting: deque[_Note] = deque()
        self._told = 0
        self._ends = threading.Lock()  # of the queue: both are moved
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="noting")
        self._sent: Future[None] = Future()
        self._sent.set_result(None)

    def note(self, step: int, status: str, calls: StepCalls | None = None) -> None:
        """Tells how far the run is, after what waits.

        Args:
            calls: of the step that was just completed; None where no step was made.
        """
        with self._ends:
            self._newest = _Note(step, status, calls)
            self._append(self._newest)
        self.send()

    def ask(self) -> None:
        """Brings `replaced` up to date if the registry has answered nothing lately."""
        for _ in range(2):  # what comes first may be an answer from before a freeze
            if time.monotonic() - self._asked <= ASK_AFTER_S:
                return
            with self._ends:  # not how far the run is now: a step that is known gets no row
                self._append(replace(self._newest, calls=None))
            self.send()
            wait([self._sent], ANSWER_S)
        self._asked = time.monotonic()  # given up: training goes on until the next silence

    def send(self) -> None:
        """Tries to tell what waits. A try that has not begun yet will tell it all."""
        if self._sent.running() or self._sent.done():
            self._sent = self._sender.submit(self._send)

    def settle(self, timeout_s: float) -> bool:
        """Tries once more; whether the registry has heard of everything that waits now by then."""
        with self._ends:
            due = self._told + len(self._waiting)
        self.send()
        wait([self._sent], timeout_s)
        return self._told >= due or not self._waiting  # others may have come meanwhile

    def _append(self, note: _Note) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is not None and note.calls is None and _place(last) == _place(note):
            return  # calls that fail change nothing, and there may be any number of them
        full = len(self._waiting) >= MOST_WAITING
        if full and last is not None and None not in (last.calls, note.calls):
            self._waiting.pop()
            note = _Note(note.step, note.status, note.calls, last.left_out + 1)
        self._waiting.append(note)

    def _send(self) -> None:
        """Tells what waits until something is refused, which then stays the first."""
        while self._waiting:
            first, asked = self._waiting[0], time.monotonic()  # before: a freeze from now on counts
            newest = self._record(first.step, first.status, first.calls, first.left_out)
            with self._ends:
                self._waiting.popleft()
                self._told += 1
                if not newest:
                    self.replaced = True
                    self._waiting.clear()
            self._asked = asked  # last: who sees it fresh looks at `replaced`


def _place(note: _Note) -> tuple[int, str]:
    return note.step, note.status
