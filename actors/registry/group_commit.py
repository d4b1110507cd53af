"""Calls of many clients to one registry: in turn, and those that wait in one transaction.

A commit costs what the disk takes, however much is in it. So the calls that arrive while one is
on its way share the next.
"""

from __future__ import annotations

import threading
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

MOST_TOGETHER = 16
"""Calls of one transaction: the first of them waits for the last."""

Call = tuple[str, tuple[Any, ...]]
"""The part of `Registry` and its public method, `PART.METHOD`, and the arguments."""


@dataclass
class _Taken:
    call: Call
    reply: Reply | None = None


class GroupCommit:
    """Runs calls one at a time, in the order of `take`, in whose threads they come. What a call
    has changed is durable when its reply is there; one that fails undoes no other."""

    def __init__(self, open_registry: Callable[[], Registry]) -> None:
        """
        Args:
            open_registry: tried by every call until it succeeds, so that a mended keyring or disk
                is seen.
        """
        self._open = open_registry
        self._registry: Registry | None = None
        self._waiting: deque[_Taken] = deque()
        self._turn = threading.Lock()

    def take(self, call: Call) -> Reply:
        """Runs a call, and those that have come before it."""
        mine = _Taken(call)
        self._waiting.append(mine)
        while mine.reply is None:
            with self._turn:
                if mine.reply is None:
                    self._serve()
        return mine.reply

    def _serve(self) -> None:
        taken = [self._waiting.popleft() for _ in range(min(MOST_TOGETHER, len(self._waiting)))]
        for one, reply in zip(taken, self._replies([one.call for one in taken]), strict=True):
            one.reply = reply

    def _replies(self, calls: list[Call]) -> list[Reply]:
        if len(calls) > 1 and not any(name in ONCE for name, _ in calls):
            with suppress(Exception):  # each learns by itself whether it was the cause
                return self._joint(calls)
        return [self._reply(call) for call in calls]

    def _joint(self, calls: list[Call]) -> list[Reply]:
        """Of calls that may all be made twice."""
        self._registry = self._registry or self._open()
        with together(self._registry.database):
            return [self._reply(call) for call in calls]

    def _reply(self, call: Call) -> Reply:
        name, arguments = call
        return reply_of(lambda: self._method(name)(*arguments))

    def _method(self, name: str) -> Any:
        self._registry = self._registry or self._open()
        part, _, method = name.partition(".")
        if part not in PARTS or method.startswith("_"):
            raise AttributeError(name)
        return getattr(getattr(self._registry, part), method)
