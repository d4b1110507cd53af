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

from tg_tinker.cluster.messages import OUT_OF_TURN, Reply, Request, Saving
from tg_tinker.cluster.ray_calls import ask, left
from tg_tinker.errors import ClusterUnavailableError, FutureTimeoutError, TGTinkerError
from tg_tinker.storage.envelope import open_payload, seal_payload

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
        self._searches: dict[str, Future[Reply]] = {}
        self._waiting: deque[str] = deque()
        self._working = False
        self._lock = threading.Lock()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._searches

    def looks_for(self, request_id: str) -> bool:
        """Whether a search goes on, or has failed."""
        search = self._searches.get(request_id)
        return search is not None and (not search.done() or _failed(search))

    def search(self, request_id: str) -> Future[Reply]:
        """The search for an answer, begun by this if there is none.

        It ends with a reply, with `ActorLostError`, or with `ClusterUnavailableError` where nothing
        gets through: that stays until somebody has `taken` it.
        """
        with self._lock:
            if request_id not in self._searches:
                self._begin(request_id)
            return self._searches[request_id]

    def found(self, request_id: str) -> Reply | None:
        """What the search has found so far. Begins one where there is none, or it has failed.

        Raises:
            ActorLostError: so it ended.
        """
        with self._lock:
            search = self._searches.get(request_id)
            if search is None or _failed(search):
                self._begin(request_id)
                return None
            return search.result() if search.done() else None

    def taken(self, request_id: str) -> None:
        """Somebody was told what came of it: a reply is forgotten, after a failure it goes on."""
        with self._lock:
            search = self._searches.get(request_id)
            if search is not None and _failed(search):
                self._begin(request_id)
            elif search is not None and search.done():
                del self._searches[request_id]

    # --- the thread --------------------------------------------------------------------------

    def _begin(self, request_id: str) -> None:
        """Call it with the lock held."""
        if not self._working:
            threading.Thread(target=self._work, daemon=True).start()
            self._working = True
        self._searches[request_id] = Future()
        self._waiting.append(request_id)

    def _work(self) -> None:
        while (request_id := self._next()) is not None:
            try:
                found = self._found(request_id)
            except BaseException as error:  # Ray ends a waiting thread with SystemExit
                self._end(request_id, error)
            else:
                if found is None:
                    self._waiting.append(request_id)
                    time.sleep(_PAUSE_S)
                else:
                    self._searches[request_id].set_result(found)

    def _next(self) -> str | None:
        with self._lock:
            self._working = bool(self._waiting)
            return self._waiting.popleft() if self._working else None

    def _end(self, request_id: str, error: BaseException) -> None:
        """A search fails, and where nothing gets through all others with it."""
        if not isinstance(error, TGTinkerError):
            error = ClusterUnavailableError(
                f"the answer to this call cannot be asked for ({type(error).__name__}): has this"
                " process left its Ray cluster?"
            )
        ended = [request_id]
        if isinstance(error, ClusterUnavailableError) and request_id in self._sent:
            with self._lock:
                ended += self._waiting
                self._waiting.clear()
        for one in ended:
            self._searches[one].set_exception(error)

    def _found(self, request_id: str) -> Reply | None:
        """None of a save that goes on."""
        if (stored := self._stored(request_id)) is not None:
            return stored
        _, request = self._sent.get(request_id, (None, None))
        if request is None:
            raise ClusterUnavailableError("the answer to this call was lost on the way")
        reply = self._again(request)
        return None if isinstance(reply.value, Saving) else reply

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
                    return reply
                if due > reached:  # some of those before it have arrived: it is within reach
                    attempt, reached = 0, due
                for earlier in self._between(request, due):
                    self._call(earlier)
            except ClusterUnavailableError as error:
                if left(error):
                    raise
                time.sleep(_PAUSE_S * attempt)
        raise ClusterUnavailableError(
            f"{TRIES} times a call or its answer was lost on the way to the actor: ask again"
        )

    def _between(self, request: Request, due: int) -> list[Request]:
        known = [sent for _, sent in [*self._sent.values()] if sent.handle == request.handle]
        return [sent for sent in known if due <= sent.sequence < request.sequence]

    def _call(self, request: Request) -> Reply:
        return open_reply(self._key, ask(self._actor.call, seal_payload(self._key, request)))


def open_reply(key: bytes, sealed: bytes) -> Reply:
    reply: Reply = open_payload(key, sealed)
    return reply


def _failed(search: Future[Reply]) -> bool:
    return search.done() and isinstance(search.exception(), ClusterUnavailableError)


def _due(reply: Reply) -> int | None:
    """The number of the call that the actor has to get first; None where it has run this one."""
    return int(reply.error[2]["due"]) if reply.error and reply.code == OUT_OF_TURN else None
