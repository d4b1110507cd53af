"""Connects a client to one training actor in one epoch: sends sealed calls and opens replies.

A call or its answer may be lost on the way while the actor is alive; `lost_calls` then delivers it.
When the actor itself is gone, every unanswered call ends with the same error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tg_tinker.client.lost_calls import LostCalls, open_reply
from tg_tinker.cluster.messages import Reply, Request
from tg_tinker.cluster.named_actors import ActorInfo
from tg_tinker.cluster.ray_calls import (
    ask,
    ask_again,
    check_process,
    dispatch,
    fetch,
    kill,
    send,
    split,
    when_done,
)
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    TGTinkerError,
    from_wire,
)
from tg_tinker.records.files import KeptHead
from tg_tinker.storage.envelope import seal_payload
from tg_tinker.types import PARKED, LoadStateResult, OptimStepResult

if TYPE_CHECKING:
    import ray

_SETTLE_S = 90.0

Explain = Callable[[ActorLostError, int], ActorLostError]
"""Maps a first error and the last seen step to the error that says which step to repeat from."""


class TrainingLink:
    """The connection of a client to one training actor in one epoch.

    Attributes:
        actor: the Ray handle of the actor.
        lost: the error of all calls that were lost with the actor; None while no loss is known.
        told: whether the caller has received this error. Only then may a later call go to another
            actor, because calls that were queued before must follow the lost calls.
    """

    def __init__(
        self, actor: Any, key: bytes, explain: Explain, kept: KeptHead | None = None
    ) -> None:
        self.actor = actor
        self.lost: ActorLostError | None = None
        self.told = False
        self._key = key
        self._explain = explain
        self._kept = kept
        self._seen = 0  # the last step in an answer
        self._sent: dict[str, tuple[Any, Request]] = {}  # by request id, until answered
        self._lost_calls = LostCalls(actor, key, self._sent)
        self._void: set[Any] = set()
        self._losing = threading.Lock()

    @property
    def ledger_place(self) -> str:
        """The last seen head position of the ledger, ``SEQ-HASH``; empty without a private run."""
        return self._kept.place if self._kept else ""

    # --- calls -------------------------------------------------------------------------------

    def send(self, request: Request) -> ray.ObjectRef[bytes]:
        """Sends a call and returns a ref to its answer; a save answers once it is durable."""
        name = request.request_id
        ref: ray.ObjectRef[bytes] = send(self.actor.call, seal_payload(self._key, request))
        self._sent[name] = ref, request
        if request.operation == "save_state":
            begun, ref = ref, send(self.actor.saved, name)
            self._sent[name] = ref, request
            when_done(begun, lambda: self._watch_beginning(begun, name))
        return ref

    def open(self, ref: Any, request_id: str, timeout: float | None = None) -> Reply:
        """Waits for the reply of a ref and returns it.

        Raises:
            FutureTimeoutError: there is no reply within `timeout` seconds.
            ActorLostError: the actor is gone, and the reply is lost.
            ClusterUnavailableError: the reply was lost on the way; a later call may still get it.
            InvalidRequestError: this process was forked, see `check_process`.
        """
        check_process()
        if ref in self._void and self.lost is not None:
            raise self.lost
        try:
            reply = self._reply(ref, request_id, timeout)
        except ActorLostError as error:
            raise self.loss(error) from None
        if reply.error is not None and reply.error[0] == ActorLostError.__name__:
            raise self.loss(from_wire(reply.error))
        self._sent.pop(request_id, None)
        self._note(reply)
        return reply

    def done(self, ref: Any, request_id: str) -> bool:
        """Returns whether a call has an answer or will never have an answer.

        A call that was lost on the way is not done: it is sent again in the background.
        """
        check_process()
        return ref in self._void or (bool(split([ref])[0]) and self._answered(ref, request_id))

    def when_done(self, ref: Any, request_id: str, work: Callable[[], object]) -> None:
        """Runs `work` on the dispatcher thread once the call is `done`.

        `work` also runs if a lost call cannot be sent again; `open` then raises that error.
        """

        def look() -> None:
            if self._answered(ref, request_id):
                work()
            else:
                search = self._lost_calls.search(request_id)
                search.add_done_callback(lambda _: dispatch(work))

        when_done(ref, look)

    @property
    def unanswered(self) -> int:
        """The number of calls whose answer was not taken; never less than `waiting`."""
        return len(self._sent)

    def waiting(self) -> int:
        """Returns the number of calls without an answer.

        This also forgets answered calls, and sends lost calls again.
        """
        names = {ref: name for name, (ref, _) in [*self._sent.items()]}
        done, pending = split([*names])
        return len(pending) + sum(not self._answered(ref, names[ref]) for ref in done)

    @property
    def parked(self) -> bool:
        """Whether the run is parked: the actor is gone and nothing was lost with it."""
        return self.lost is not None and self.lost.details.get("reason") == PARKED

    def park(self) -> None:
        """Records that the actor has parked its run, and ends the actor."""
        self.abandon(self.expect_loss(PARKED))
        kill(self.actor)

    def expect_loss(self, reason: str = "it did not answer") -> ActorLostError:
        """Returns the error to raise if the actor is gone.

        The caller asks for it before the run is recovered.
        """
        known = ActorLostError(reason, details={"reason": reason})
        return self.lost or self._explain(known, self._seen)

    def abandon(self, lost: ActorLostError) -> None:
        """Records that another actor has the run: later answers of this actor do not count."""
        sent = [(name, ref) for name, (ref, _) in [*self._sent.items()]]
        self._void |= {*split([ref for _, ref in sent])[1]}
        self._void |= {ref for name, ref in sent if self._lost_calls.looks_for(name)}
        with self._losing:
            self.lost = self.lost or lost
            self.told = True

    def loss(self, error: TGTinkerError) -> ActorLostError:
        """Returns the common error of all calls lost with this actor, and sets `told`."""
        with self._losing:
            if self.lost is None:
                known = error if isinstance(error, ActorLostError) else ActorLostError(str(error))
                self.lost = self._explain(known, self._seen)
            self.told = True
            return self.lost

    # --- outside the order of calls ----------------------------------------------------------

    def load(self, progress: Callable[[str], None]) -> Any:
        """Loads the model and returns its `ModelInfo`; `progress` receives a message per stage."""
        ref, heard = send(self.actor.load), 0
        loaded = False
        while not loaded:
            loaded = bool(split([ref], 0.3)[0])
            remarks = ask(self.actor.progress, heard)
            for remark in remarks:
                progress(remark)
            heard += len(remarks)
        return open_reply(self._key, fetch(ref)).unwrap()

    def description(self) -> Any:
        """Returns the `ModelInfo`; None while the model is loading."""
        sealed = ask(self.actor.description)
        return None if sealed is None else open_reply(self._key, sealed).unwrap()

    def tokenizer_files(self) -> dict[str, bytes]:
        files: dict[str, bytes] = open_reply(self._key, ask(self.actor.tokenizer)).unwrap()
        return files

    def info(self) -> ActorInfo:
        info: ActorInfo = ask(self.actor.info)
        return info

    def settle(self) -> bool:
        """Returns whether the registry has recorded the last completed step.

        Raises:
            FutureTimeoutError: the actor did not answer within `_SETTLE_S`.
        """
        return bool(ask_again(self.actor.settle, timeout=_SETTLE_S))

    def cancel(self, request_id: str) -> bool:
        return bool(ask(self.actor.cancel, request_id))

    # --- inside ------------------------------------------------------------------------------

    def _reply(self, ref: Any, request_id: str, timeout: float | None) -> Reply:
        limit = None if timeout is None else time.monotonic() + timeout
        if request_id not in self._lost_calls or split([ref])[0]:
            if (reply := self._arrived(ref, timeout)) is not None:
                return reply
            if self.told and self.lost is not None:  # another actor has the run
                raise self.lost
        search = self._lost_calls.search(request_id)
        left = None if limit is None else max(0.0, limit - time.monotonic())
        if not wait([search], left).done:
            raise FutureTimeoutError(
                "no answer within the timeout: the answer was lost on the way and is requested"
                " again; ask again for the result, or cancel the call"
            )
        self._lost_calls.taken(request_id)
        return search.result()

    def _arrived(self, ref: Any, timeout: float | None) -> Reply | None:
        """Returns the reply of a call from its ref; None if the reply was lost on the way."""
        with suppress(ClusterUnavailableError):
            reply = open_reply(self._key, fetch(ref, timeout))
            return reply if reply.final else None
        return None

    def _answered(self, ref: Any, request_id: str) -> bool:
        """Returns, for a ref that has arrived, whether its call has or will never have an answer.

        An answered call is forgotten, and a lost call is sent again.
        """
        reply = None
        with suppress(ActorLostError):  # `open` raises it
            reply = self._arrived(ref, 0)
            if reply is None and not self.told:
                reply = self._lost_calls.found(request_id)
                if reply is None:
                    return False
        if reply is not None:
            self._note(reply)
            self._sent.pop(request_id, None)
        return True

    def _watch_beginning(self, begun: Any, request_id: str) -> None:
        """Starts a search for a save whose call, or an earlier call, was lost.

        The ref of a save only waits for its end, so nothing else would send these calls again.
        """
        with suppress(ActorLostError):
            if request_id in self._sent and self._arrived(begun, 0) is None:
                self._lost_calls.search(request_id)

    def _note(self, reply: Reply) -> None:
        if isinstance(reply.value, OptimStepResult | LoadStateResult):
            self._seen = reply.value.step
        if reply.ledger_head and self._kept:
            self._kept.saw(reply.ledger_head)
