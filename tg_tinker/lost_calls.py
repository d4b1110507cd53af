"""Calls whose answer did not arrive though their actor lives: asked for, and sent again.

A call goes out again under its old number: the actor answers what it has run from memory and
refuses what is not yet its turn, so each call is run once and in order. One thread does this for
all calls of a link, while there are any: whoever wants an answer waits no longer than they say.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from tg_tinker.envelope import open_payload, seal_payload
from tg_tinker.errors import ClusterUnavailableError, FutureTimeoutError
from tg_tinker.ray_calls import ask
from tg_tinker.wire import NOT_YET, OUT_OF_TURN, Reply, Request, Saving

TRIES = 8
"""Times that a call is sent, without getting on, before its actor counts as unreachable."""

_STORED_S = 30.0
_PAUSE_S = 0.2


class LostCalls:
    """Those of one link.

    Args:
        sent: (ref, request) by request id, of calls without an answer; the link keeps it.
    """

    def __init__(self, actor: Any, key: bytes, sent: Mapping[str, tuple[Any, Request]]) -> None:
        self._actor, self._key, self._sent = actor, key, sent
        self._answers: dict[str, Future[Reply]] = {}
        self._waiting: deque[str] = deque()
        self._working = False
        self._lock = threading.Lock()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._answers

    def recall(self, request_id: str) -> Future[Reply]:
        """The answer to a lost call: what came of it so far, or of a new search.

        It may end with `ActorLostError`, or with `ClusterUnavailableError` where nothing gets
        through; after `forget` it is searched anew.
        """
        with self._lock:
            if request_id not in self._answers:
                self._answers[request_id] = Future()
                self._waiting.append(request_id)
                if not self._working:
                    self._working = True
                    threading.Thread(target=self._work, daemon=True).start()
            return self._answers[request_id]

    def forget(self, request_id: str) -> None:
        """After somebody took what came of it."""
        with self._lock:
            if request_id in self._answers and self._answers[request_id].done():
                del self._answers[request_id]

    # --- the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while (request_id := self._next()) is not None:
            answer = self._answers[request_id]
            try:
                answer.set_result(self._found(request_id))
            except Exception as error:
                answer.set_exception(error)

    def _next(self) -> str | None:
        with self._lock:
            self._working = bool(self._waiting)
            return self._waiting.popleft() if self._working else None

    def _found(self, request_id: str) -> Reply:
        if (stored := self._stored(request_id)) is not None:
            return stored
        _, request = self._sent.get(request_id, (None, None))
        if request is None:
            raise ClusterUnavailableError("the answer to this call was lost on the way")
        return self._again(request)

    def _stored(self, request_id: str) -> Reply | None:
        with suppress(ClusterUnavailableError, FutureTimeoutError):
            sealed = ask(self._actor.stored, request_id, timeout=_STORED_S)
            return None if sealed is None else open_reply(self._key, sealed)
        return None

    def _again(self, request: Request) -> Reply:
        """Sends a call once more, and before it those of its handle that the actor misses."""
        attempt, reached = 0, -1
        while attempt < TRIES:
            attempt += 1
            try:
                reply = self._call(request)
                due = _due(reply)
                if due is None:
                    return self._when_saved(request, reply)
                if due > reached:  # some of those before it have arrived: it is within reach
                    attempt, reached = 0, due
                for earlier in self._between(request, due):
                    self._call(earlier)
            except ClusterUnavailableError:
                time.sleep(_PAUSE_S * attempt)
        raise ClusterUnavailableError(
            f"{TRIES} times a call or its answer was lost on the way to the actor: ask again"
        )

    def _between(self, request: Request, due: int) -> list[Request]:
        known = [sent for _, sent in [*self._sent.values()] if sent.handle == request.handle]
        return [sent for sent in known if due <= sent.sequence < request.sequence]

    def _call(self, request: Request) -> Reply:
        return open_reply(self._key, ask(self._actor.call, seal_payload(self._key, request)))

    def _when_saved(self, request: Request, reply: Reply) -> Reply:
        """Of a save its end is asked for, not its beginning."""
        if not isinstance(reply.value, Saving):
            return reply
        return open_reply(self._key, ask(self._actor.saved, request.request_id))


def open_reply(key: bytes, sealed: bytes) -> Reply:
    reply: Reply = open_payload(key, sealed)
    return reply


def answers(reply: Reply) -> bool:
    """Whether it says what became of the call, not only that it has to come again."""
    return reply.error is None or reply.error[2].get("code") not in (OUT_OF_TURN, NOT_YET)


def _due(reply: Reply) -> int | None:
    """The number of the call that the actor has to get first; None where it has run this one."""
    if reply.error is None or reply.error[2].get("code") != OUT_OF_TURN:
        return None
    return int(reply.error[2]["due"])
