"""Keeps the calls of one actor in order, answers repeats and records cancellations.

The journal knows no operation. The function that is passed to `CallJournal.run` does the work.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from actors.process import reply_of
from tg_tinker.cluster.messages import NOT_YET, OUT_OF_TURN, Reply, Request
from tg_tinker.errors import ActorLostError, FutureCancelledError, ServiceError

PATIENCE_S = 60.0
"""How long `wait` waits for a call that has not arrived; after that the client asks again.

The call may never arrive: its client may have ended, or the call was refused. A thread of the actor
waits meanwhile.
"""

Check = Callable[[], None]
Run = Callable[[Request, Check], Any]

KEPT_REPLIES = 2000
"""Replies that are kept for each client object.

The number exceeds the calls that may be pending on one client object. So no pending reply is
forgotten because another client is busy.
"""

KEPT_HANDLES = 64
"""The number of client objects whose replies are kept: those that called most recently."""


class CallJournal:
    """A journal that runs each request once and answers a repeat with the stored reply.

    Only the training thread calls `run` and `admit`. Any thread may call `cancel`, `wait` and
    `stored` at the same time.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        # The next sequence number of each handle. If one were forgotten, an old call would run
        # again.
        self._next: dict[str, int] = {}
        self._replies: dict[str, Reply] = {}
        # The request ids of each handle.
        self._kept: OrderedDict[str, deque[str]] = OrderedDict()
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._replied = threading.Condition()

    def run(self, request: Request, work: Run) -> Reply:
        """Returns the reply to a request, from `work` or, for a repeat, from memory."""
        known = self._replies.get(request.request_id)
        if known is not None:
            return known
        refusal = reply_of(lambda: self.admit(request))
        if refusal.error is not None:
            return refusal
        reply = reply_of(
            lambda: work(request, lambda: self.check_cancelled(request.request_id)),
            request.request_id,
        )
        with self._replied:
            self._remember(request, reply)
            self._replied.notify_all()
        self._cancelled.pop(request.request_id, None)
        return reply

    def admit(self, request: Request) -> None:
        """Checks the epoch and the sequence number of a call, and expects the next number.

        Raises:
            ActorLostError: the call belongs to another epoch.
            ServiceError: an earlier call of the same handle has not arrived.
        """
        if request.epoch != self._epoch:
            raise ActorLostError(
                f"this client belongs to epoch {request.epoch}, the actor to {self._epoch}: get a"
                " new client with service.get_training_client"
            )
        expected = self._next.get(request.handle, 0)
        if request.sequence != expected:
            raise ServiceError(
                f"call {request.sequence} of this client arrived where {expected} was due, so an"
                " earlier call was lost: get a new client with service.get_training_client",
                code=OUT_OF_TURN,
                details={"due": expected},
            )
        self._next[request.handle] = expected + 1

    def cancel(self, request_id: str) -> bool:
        """Requests that a call stops; returns False if the call is answered already."""
        if request_id in self._replies:
            return False
        self._cancelled[request_id] = None
        while len(self._cancelled) > KEPT_REPLIES:
            self._cancelled.popitem(last=False)
        return True

    def check_cancelled(self, request_id: str) -> None:
        if request_id in self._cancelled:
            raise FutureCancelledError("the call was canceled before it changed anything")

    def wait(self, request_id: str, timeout_s: float = PATIENCE_S) -> Reply:
        """Waits for a request and returns its reply; after `timeout_s`, returns an error reply."""
        with self._replied:
            if self._replied.wait_for(lambda: request_id in self._replies, timeout_s):
                return self._replies[request_id]
        return reply_of(lambda: _not_yet(request_id))

    def stored(self, request_id: str) -> Reply | None:
        return self._replies.get(request_id)

    def _remember(self, request: Request, reply: Reply) -> None:
        self._replies[request.request_id] = reply
        ids = self._kept.setdefault(request.handle, deque())
        ids.append(request.request_id)
        self._kept.move_to_end(request.handle)
        if len(ids) > KEPT_REPLIES:
            del self._replies[ids.popleft()]
        if len(self._kept) > KEPT_HANDLES:
            _, forgotten = self._kept.popitem(last=False)
            for request_id in forgotten:
                del self._replies[request_id]


def _not_yet(request_id: str) -> None:
    raise ServiceError(f"call {request_id} has not arrived yet: ask again", code=NOT_YET)
