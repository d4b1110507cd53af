"""Runs the calls of many clients on one registry in order; waiting calls share a transaction.

A commit costs the same disk time however much it contains. Therefore the calls that arrive during
one commit share the next commit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from actors.process import reply_of
from actors.registry.database import together
from actors.registry.registry import PARTS, Registry
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.remote_registry import ONCE
from tg_tinker.errors import StorageError

MOST_TOGETHER = 16
"""The largest number of calls in one transaction: the first call waits for the last."""

Call = tuple[str | Callable[[], Any], tuple[Any, ...]]
"""The name ``PART.METHOD`` of a part of `Registry` and its public method, and the arguments. Work
of this process has no name and no arguments."""

MOST_STORES = 16
"""The number of calls that may wait for stores at a time."""

_BESIDE = "heads.meet_store"

_SETTLE: Call = ("audit_log.settle", ())
_RETRY_S = 10.0
"""The seconds after which rows are written that the database has refused."""


@dataclass
class _Taken:
    call: Call
    reply: Reply | None = None


class GroupCommit:
    """A queue that runs calls one at a time, in the order of `take`, in the threads of its callers.
    The changes of a call are durable when its reply is there. A call that fails undoes no other
    call."""

    def __init__(self, open_registry: Callable[[], Registry]) -> None:
        """
        Args:
            open_registry: Opens the registry. Each call tries it until it succeeds once, so that a
                repaired keyring or disk takes effect.
        """
        self._open = open_registry
        self._registry: Registry | None = None
        self._waiting: deque[_Taken] = deque()
        self._serving = False
        self._changed = threading.Condition()
        self._stores = threading.BoundedSemaphore(MOST_STORES)
        self._timer: tuple[float, threading.Timer] | None = None
        self._retry_at = 0.0

    def take(self, call: Call) -> Reply:
        """Runs a call, after all calls that came before it, and returns its reply."""
        if call[0] == _BESIDE:
            return reply_of(lambda: self._beside(*call[1]))
        mine = _Taken(call)
        self._waiting.append(mine)
        while mine.reply is None:
            with self._changed:
                # An answered call must not wait for the next transaction, as it would for a lock.
                self._changed.wait_for(lambda: mine.reply is not None or not self._serving)
                if mine.reply is not None:
                    break
                self._serving = True
            try:
                self._serve()
            finally:
                with self._changed:
                    self._serving = False
                    self._changed.notify_all()
        return mine.reply

    def _beside(self, *arguments: Any) -> Any:
        """Runs a call of `_BESIDE`, which waits for a store, in the thread of its caller. Other
        calls go on; this one takes a turn among them for each of its uses of the database."""
        if not self._stores.acquire(blocking=False):
            raise StorageError(
                f"the registry waits for {MOST_STORES} stores already: repeat the call, and check"
                " that the stores answer"
            )
        try:
            return self._in_turn(lambda: self._method(_BESIDE))(*arguments)
        finally:
            self._stores.release()

    def _in_turn(self, work: Callable[[], Any]) -> Any:
        return self.take((work, ())).unwrap()

    def _serve(self) -> None:
        taken = [self._waiting.popleft() for _ in range(min(MOST_TOGETHER, len(self._waiting)))]
        for one, reply in zip(taken, self._replies([one.call for one in taken]), strict=True):
            one.reply = reply
            if one.call == _SETTLE and reply.error is not None:
                self._retry_at = time.monotonic() + _RETRY_S
        if self._registry is not None:
            self._settle_within(self._registry.database.requests.due_s())

    def _settle_within(self, due_s: float | None) -> None:
        """Has a thread write the rows that wait for the answers of their requests.

        It takes its turn among the calls. Only the thread that serves calls this."""
        if due_s is None:
            return
        now = time.monotonic()
        at = max(now + due_s, self._retry_at)
        if self._timer is not None:
            if now < self._timer[0] <= at:
                return
            self._timer[1].cancel()
        timer = threading.Timer(at - now, self.take, [_SETTLE])
        timer.daemon = True
        self._timer = at, timer
        timer.start()

    def close(self) -> None:
        """Writes the rows that wait, and closes the registry. No call may follow."""
        if self._timer is not None:
            self._timer[1].cancel()
        if self._registry is not None:
            self._registry.close()

    def _replies(self, calls: list[Call]) -> list[Reply]:
        if len(calls) > 1 and not any(name in ONCE for name, _ in calls):
            # After a failure each call runs alone, and so learns whether it was the cause.
            with suppress(Exception):
                return self._joint(calls)
        return [self._reply(call) for call in calls]

    def _joint(self, calls: list[Call]) -> list[Reply]:
        """Runs calls that may all run twice in one transaction, and returns their replies."""
        self._registry = self._registry or self._opened()
        with together(self._registry.database):
            return [self._reply(call) for call in calls]

    def _reply(self, call: Call) -> Reply:
        name, arguments = call
        if callable(name):
            return reply_of(name)
        return reply_of(lambda: self._method(name)(*arguments))

    def _opened(self) -> Registry:
        registry = self._open()
        registry.take_turns(self._in_turn)
        return registry

    def _method(self, name: str) -> Any:
        self._registry = self._registry or self._opened()
        part, _, method = name.partition(".")
        if part not in PARTS or method.startswith("_"):
            raise AttributeError(name)
        return getattr(getattr(self._registry, part), method)
