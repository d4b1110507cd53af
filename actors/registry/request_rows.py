"""Limits the rows of the audit log that record requests, and counts the requests without a row.

A row about a change is never limited: `AuditWriter.note` writes it with the change. A row about a
request only says that somebody asked: samples, refusals, lookups of what others own. One caller
could ask often enough to fill the disk with such rows. Therefore each caller, and each tenant, has
a number of them per window. At the end of the window one more row states how many were left out.

Some rows wait until their request is answered. A row that was written before the answer would tell
by the time of the answer that there is something to record.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

WINDOW_S = 60.0
"""The seconds of a window. The first request after a window begins the next one."""

MOST_OF_CALLER = 60
"""The largest number of rows of one event by one caller in the log of a tenant, per window."""

MOST_OF_TENANT = 240
"""The largest number of rows about requests in the log of a tenant, per window."""

WAIT_S = 0.25
"""The seconds after which rows that wait are written."""

MORE = "more"
"""The detail of a row that states how many requests were left out."""

_MOST_WAITING = 1_000
"""The largest number of different requests that wait. Of further ones the subject is lost."""


class Request(NamedTuple):
    """A request as its row records it, in the log of `tenant`."""

    tenant: str
    who: str
    event: str
    subject: str
    outcome: str


@dataclass
class LeftOut:
    """Requests of one caller, event and outcome that have no row of their own."""

    request: Request
    amounts: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request, amounts: Mapping[str, int]) -> None:
        self.amounts.update(amounts)
        if request.subject != self.request.subject:
            self.request = self.request._replace(subject="")


class RequestRows:
    """What a process remembers of the requests of the last window. Nothing of it is in the
    database."""

    def __init__(self) -> None:
        self._ends = -math.inf
        self._seen: set[Request] = set()
        self._rows: Counter[tuple[str, ...]] = Counter()
        self._left: dict[Request, LeftOut] = {}
        self._ended: list[LeftOut] = []
        self._asked: Counter[Request | None] = Counter()
        self._asked_at = 0.0

    # --- rows at once ------------------------------------------------------------------------

    def admits(self, request: Request, *, repeats: bool = False) -> bool:
        """Returns whether a request gets a row of its own, and then counts this row.

        Args:
            repeats: True gives the same request several rows. False gives it one in a window.
        """
        self._end_window()
        if request in self._seen and not repeats:
            return False
        counts = (request[:3], MOST_OF_CALLER), (request[:1], MOST_OF_TENANT)
        if any(self._rows[group] >= most for group, most in counts):
            return False
        self._seen.add(request)
        self._rows.update(group for group, _ in counts)
        return True

    def leave_out(
        self, request: Request, times: int = 1, amounts: Mapping[str, int] | None = None
    ) -> None:
        """Counts a request that `admits` refused a row.

        Args:
            amounts: What the row at the end of the window adds up beside the requests.
        """
        left = self._left.setdefault(request._replace(subject=""), LeftOut(request))
        left.add(request, {MORE: times, **(amounts or {})})

    # --- rows after the answer ---------------------------------------------------------------

    def ask(self, request: Request | None) -> None:
        """Remembers a request whose row is written after its answer. None is a request that leaves
        no row. It waits too, so that both cost the same."""
        if request is not None and len(self._asked) >= _MOST_WAITING:
            request = request._replace(subject="")
        self._asked_at = self._asked_at if self._asked else time.monotonic()
        self._asked[request] += 1

    def due_s(self) -> float | None:
        """Returns the seconds until something is to be written; None if nothing waits."""
        if self._asked or self._ended:
            return max(0.0, self._asked_at + WAIT_S - time.monotonic())
        return max(0.0, self._ends - time.monotonic()) if self._left else None

    def waiting(self, whole: bool) -> tuple[dict[Request | None, int], list[LeftOut]]:
        """Returns the requests that wait, with their numbers, and what ended windows left out.

        Args:
            whole: True ends the window, because nothing comes after it.
        """
        self._end_window(now=whole)
        return dict(self._asked), [*self._ended]

    def written(self, asked: Mapping[Request | None, int], ended: list[LeftOut]) -> None:
        """Forgets what `waiting` returned, once its rows are durable."""
        self._asked = Counter(self._asked - Counter(asked))
        self._ended = self._ended[len(ended) :]

    def _end_window(self, *, now: bool = False) -> None:
        if not now and time.monotonic() < self._ends:
            return
        self._ends = time.monotonic() + WINDOW_S
        self._ended += self._left.values()
        self._seen, self._rows, self._left = set(), Counter(), {}
