"""Finds the answers of calls whose answer did not arrive although their actor is alive.

A lost call is sent again under its old number. The actor stores the replies of the calls that it
has run, and refuses a call that is out of order. So each call runs once and in order. A single
background thread searches for all lost calls of a link, so a caller waits no longer than its own
timeout.
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
"""The number of attempts without progress after which the actor counts as unreachable."""

_STORED_S = 30.0
_PAUSE_S = 0.2


class LostCalls:
    """The lost calls of one link.

    Args:
        actor: the Ray handle of the training actor.
        key: the transport key.
        sent: the (ref, request) of each unanswered call, by request id. The link updates this
            mapping.
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
        """Returns whether a search for this call is running or has failed."""
        search = self._searches.get(request_id)
        return search is not None and (not search.done() or _failed(search))

    def search(self, request_id: str) -> Future[Reply]:
        """Returns the search for an answer, and starts the search if there is none.

        The search ends with a reply, with `ActorLostError`, or with `ClusterUnavailableError` if no
        call reaches the actor. Such a failure stays until `taken` is called.
        """
        with self._lock:
            if request_id not in self._searches:
                self._begin(request_id)
            return self._searches[request_id]

    def found(self, request_id: str) -> Reply | None:
        """Returns the reply that a search has found; None while the search is running.

        Starts a search if there is none, or if the last search failed.

        Raises:
            ActorLostError: the search found that the actor is gone.
        """
        with self._lock:
            search = self._searches.get(request_id)
            if search is None or _failed(search):
                self._begin(request_id)
                return None
            return search.result() if search.done() else None

    def taken(self, request_id: str) -> None:
        """Records that a caller has received the outcome of a search.

        A reply is then forgotten, and a failed search starts again.
        """
        with self._lock:
            search = self._searches.get(request_id)
            if search is not None and _failed(search):
                self._begin(request_id)
            elif search is not None and search.done():
                del self._searches[request_id]

    # --- the thread --------------------------------------------------------------------------

    def _begin(self, request_id: str) -> None:
        """Starts a search; the caller must hold the lock."""
        if not self._working:
            threading.Thread(target=self._work, daemon=True).start()
            self._working = True
        self._searches[request_id] = Future()
        self._waiting.append(request_id)

    def _work(self) -> None:
        while (request_id := self._next()) is not None:
            try:
                found = self._found(request_id)
            except BaseException as error:  # Ray ends waiting threads with SystemExit
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
        """Fails a search with an error.

        If the actor cannot be reached, all waiting searches fail with the same error.
        """
        if not isinstance(error, TGTinkerError):
            error = ClusterUnavailableError(
                f"the answer to this call cannot be requested ({type(error).__name__}): check"
                " whether this process has left its Ray cluster"
            )
        ended = [request_id]
        if isinstance(error, ClusterUnavailableError) and request_id in self._sent:
            with self._lock:
                ended += self._waiting
                self._waiting.clear()
        for one in ended:
            self._searches[one].set_exception(error)

    def _found(self, request_id: str) -> Reply | None:
        """Returns the reply to a lost call; None for a save that is still running."""
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
        """Sends a call again, after the earlier calls of its handle that the actor lacks."""
        attempt, reached = 0, -1
        while attempt < TRIES:
            attempt += 1
            try:
                reply = self._call(request)
                due = _due(reply)
                if due is None:
                    return reply
                if due > reached:  # progress: some of the earlier calls have arrived
                    attempt, reached = 0, due
                for earlier in self._between(request, due):
                    self._call(earlier)
            except ClusterUnavailableError as error:
                if left(error):
                    raise
                time.sleep(_PAUSE_S * attempt)
        raise ClusterUnavailableError(
            f"a call to the actor or its answer was lost on the way {TRIES} times: ask again for"
            " the result"
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
    """Returns the number of the call that the actor needs first; None if it has run this call."""
    return int(reply.error[2]["due"]) if reply.error and reply.code == OUT_OF_TURN else None
