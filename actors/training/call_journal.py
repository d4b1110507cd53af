"""Calls of one actor: their order, their repeats, their cancellation.

It knows no operation; what becomes of a call is up to the function that it is run with.
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
"""How long a call is waited for, before it is asked for again. Its client may have ended before it
sent it again, or it was refused; and a thread waits."""

Check = Callable[[], None]
Run = Callable[[Request, Check], Any]

KEPT_REPLIES = 2000
"""Of one client object; more than the calls that may wait on it: nothing pending is forgotten
because another one is busy."""

KEPT_HANDLES = 64
"""Client objects whose replies are kept: those that have called last."""


class CallJournal:
    """Runs each request once; a repeat gets the stored reply.

    `run` and `admit` belong to the training thread. `cancel` and `stored` may be called from any
    thread meanwhile.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._next: dict[str, int] = {}  # never forgotten, or an old call would be run again
        self._replies: dict[str, Reply] = {}
        self._kept: OrderedDict[str, deque[str]] = OrderedDict()  # request ids of each handle
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._replied = threading.Condition()

    def run(self, request: Request, work: Run) -> Reply:
        """The reply to a request, from `work` or, for a repeat, from memory."""
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
        """Refuses a call of another epoch, and one whose predecessor has not arrived yet."""
        if request.epoch != self._epoch:
            raise ActorLostError(
                f"this client belongs to epoch {request.epoch}, the actor to {self._epoch}: get a"
                " new client with service.get_training_client"
            )
        expected = self._next.get(request.handle, 0)
        if request.sequence != expected:
            raise ServiceError(
                f"call {request.sequence} of this client arrived where {expected} was due: an"
                " earlier call was lost; get a new client with service.get_training_client",
                code=OUT_OF_TURN,
                details={"due": expected},
            )
        self._next[request.handle] = expected + 1

    def cancel(self, request_id: str) -> bool:
        """Asks a call to stop; false if it has answered already."""
        if request_id in self._replies:
            return False
        self._cancelled[request_id] = None
        while len(self._cancelled) > KEPT_REPLIES:
            self._cancelled.popitem(last=False)
        return True

    def check_cancelled(self, request_id: str) -> None:
        if request_id in self._cancelled:
            raise FutureCancelledError("the call was cancelled before it changed anything")

    def wait(self, request_id: str, timeout_s: float = PATIENCE_S) -> Reply:
        """The reply to a request that has arrived or will; an error once it has not for so long."""
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
    raise ServiceError(f"call {request_id} has not come yet: ask again", code=NOT_YET)
