"""Reports the steps of a run to the registry: each step once, in order, beside training.

No reply to a client waits for these reports, except after a silence of the registry. While the
registry or its database refuses, the notes wait here. They are sent before any newer note.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

StepCalls = list[tuple[str, str]]
"""The (batch hash, gradient hash) of each call of a step."""

MOST_WAITING = 4000
"""The number of notes that are kept until the registry takes them.

Only a run without privacy reaches it: while the database refuses, no step can be charged.
"""

ASK_AFTER_S = 10.0
"""Seconds without an answer of the registry after which an actor asks whether it still has its run.

The value is below the silence after which another actor takes the run over (`Cluster.silent_s`). So
an actor that was frozen for that long asks before it continues.
"""

ANSWER_S = 5.0
"""Seconds to wait for each of two answers. A registry that does not answer ends no training."""


@dataclass(frozen=True)
class _Note:
    step: int
    status: str
    calls: StepCalls | None
    left_out: int = 0


class StepNotes:
    """The notes of one actor. The training thread calls `note`; any thread may call the rest.

    Attributes:
        replaced: whether the registry has reported that another actor has the run.
    """

    def __init__(self, record: Callable[[int, str, StepCalls | None, int], bool]) -> None:
        """
        Args:
            record: `Runs.record` of this run and epoch.
        """
        self.replaced = False
        self._record = record
        # The time of the last request that was answered. The clock runs while the process is
        # stopped.
        self._asked = time.monotonic()
        self._newest = _Note(0, "active", None)
        self._waiting: deque[_Note] = deque()
        self._told = 0
        # Guards both ends of the queue.
        self._ends = threading.Lock()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="noting")
        self._sent: Future[None] = Future()
        self._sent.set_result(None)

    def note(self, step: int, status: str, calls: StepCalls | None = None) -> None:
        """Queues a note of the run's progress behind the waiting notes, and starts to send them.

        Args:
            calls: the hashes of the step that was just completed; None if no step was made.
        """
        with self._ends:
            self._newest = _Note(step, status, calls)
            self._append(self._newest)
        self.send()

    def ask(self) -> None:
        """Updates `replaced` if the registry has not answered for `ASK_AFTER_S`."""
        # Twice, because the first answer may be one from before a freeze.
        for _ in range(2):
            if time.monotonic() - self._asked <= ASK_AFTER_S:
                return
            # Repeats the newest note. A note of the present step would make the step known to the
            # registry, and a known step gets no row.
            with self._ends:
                self._append(replace(self._newest, calls=None))
            self.send()
            wait([self._sent], ANSWER_S)
        # Without an answer, training continues until the next silence.
        self._asked = time.monotonic()

    def send(self) -> None:
        """Starts to send the waiting notes, unless an attempt that has not begun will send them."""
        if self._sent.running() or self._sent.done():
            self._sent = self._sender.submit(self._send)

    def settle(self, timeout_s: float) -> bool:
        """Tries once more, and returns whether the registry has taken all notes that wait now."""
        with self._ends:
            due = self._told + len(self._waiting)
        self.send()
        wait([self._sent], timeout_s)
        # Newer notes may have been added meanwhile.
        return self._told >= due or not self._waiting

    def _append(self, note: _Note) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is not None and note.calls is None and _place(last) == _place(note):
            return  # Calls that fail change nothing, and there may be any number of these calls.
        full = len(self._waiting) >= MOST_WAITING
        if full and last is not None and None not in (last.calls, note.calls):
            self._waiting.pop()
            note = _Note(note.step, note.status, note.calls, last.left_out + 1)
        self._waiting.append(note)

    def _send(self) -> None:
        """Sends the waiting notes in order; a note that is refused stays first in the queue."""
        while self._waiting:
            # The time is taken before the request, so that a freeze from now on counts.
            first, asked = self._waiting[0], time.monotonic()
            newest = self._record(first.step, first.status, first.calls, first.left_out)
            with self._ends:
                self._waiting.popleft()
                self._told += 1
                if not newest:
                    self.replaced = True
                    self._waiting.clear()
            # Last, because a thread that sees a recent time relies on `replaced`.
            self._asked = asked


def _place(note: _Note) -> tuple[int, str]:
    return note.step, note.status
