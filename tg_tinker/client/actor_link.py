"""One training actor in one epoch, as a client reaches it: sealed calls out, replies back.

A call or its answer may be lost on the way while the actor lives; `lost_calls` gets it through.
When the actor itself is gone, every call that has no answer ends with one and the same error.
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
"""(what is known of the loss, the last step seen) -> the error that says from where to repeat."""


class TrainingLink:
    """See the module.

    Attributes:
        actor: its handle.
        lost: the error of the calls that were lost with it; None while it lives, as far as known.
        told: the caller was told of it. Only then may a next call go to another actor: calls that
            were queued before are meant to follow those that were lost.
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
        self._seen = 0  # the last step that an answer told of
        self._sent: dict[str, tuple[Any, Request]] = {}  # by request id, until answered
        self._lost_calls = LostCalls(actor, key, self._sent)
        self._void: set[Any] = set()
        self._losing = threading.Lock()

    @property
    def ledger_place(self) -> str:
        """Where the ledger of a private run was last seen to end."""
        return self._kept.place if self._kept else ""

    # --- calls -------------------------------------------------------------------------------

    def send(self, request: Request) -> ray.ObjectRef[bytes]:
        """A ref to the answer; of a save it comes when it is durable."""
        name = request.request_id
        ref: ray.ObjectRef[bytes] = send(self.actor.call, seal_payload(self._key, request))
        self._sent[name] = ref, request
        if request.operation == "save_state":
            begun, ref = ref, send(self.actor.saved, name)
            self._sent[name] = ref, request
            when_done(begun, lambda: self._watch_beginning(begun, name))
        return ref

    def open(self, ref: Any, request_id: str, timeout: float | None = None) -> Reply:
        """The reply behind a ref.

        Raises:
            FutureTimeoutError: nothing within `timeout` seconds.
            ActorLostError: the actor is gone, and the reply with it.
        """
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
        """Whether a call has its answer, or will have none. One that was lost on the way has not:
        it is sent again meanwhile."""
        return ref in self._void or (bool(split([ref])[0]) and self._answered(ref, request_id))

    def when_done(self, ref: Any, request_id: str, work: Callable[[], object]) -> None:
        """Runs `work` on the dispatcher thread once `done`, or a lost call could not be sent again:
        what it takes then is that error."""

        def look() -> None:
            if self._answered(ref, request_id):
                work()
            else:
                search = self._lost_calls.search(request_id)
                search.add_done_callback(lambda _: dispatch(work))

        when_done(ref, look)

    @property
    def unanswered(self) -> int:
        """How many calls nobody has taken an answer of; at least those that `waiting` counts."""
        return len(self._sent)

    def waiting(self) -> int:
        """How many calls have no answer yet. Forgets those that have one, and sends those again
        that were lost."""
        names = {ref: name for name, (ref, _) in [*self._sent.items()]}
        done, pending = split([*names])
        return len(pending) + sum(not self._answered(ref, names[ref]) for ref in done)

    @property
    def parked(self) -> bool:
        """Whether the actor is gone and nothing was lost with it."""
        return self.lost is not None and self.lost.details.get("reason") == PARKED

    def park(self) -> None:
        """After the actor has parked its run."""
        self.abandon(self.expect_loss(PARKED))
        kill(self.actor)

    def expect_loss(self, reason: str = "it did not answer") -> ActorLostError:
        """What to tell if the actor turns out to be gone; asked before the run comes back."""
        known = ActorLostError(reason, details={"reason": reason})
        return self.lost or self._explain(known, self._seen)

    def abandon(self, lost: ActorLostError) -> None:
        """Another actor has the run: no answer of this one that is still to come counts."""
        sent = [(name, ref) for name, (ref, _) in [*self._sent.items()]]
        self._void |= {*split([ref for _, ref in sent])[1]}
        self._void |= {ref for name, ref in sent if self._lost_calls.looks_for(name)}
        with self._losing:
            self.lost = self.lost or lost
            self.told = True

    def loss(self, error: TGTinkerError) -> ActorLostError:
        """The one error of all calls that this actor has lost; told to the caller by this."""
        with self._losing:
            if self.lost is None:
                known = error if isinstance(error, ActorLostError) else ActorLostError(str(error))
                self.lost = self._explain(known, self._seen)
            self.told = True
            return self.lost

    # --- beside the calls --------------------------------------------------------------------

    def load(self, progress: Callable[[str], None]) -> Any:
        """Loads the model, telling `progress` what takes time; a `ModelInfo`."""
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
        """The `ModelInfo`, or None while the model loads."""
        sealed = ask(self.actor.description)
        return None if sealed is None else open_reply(self._key, sealed).unwrap()

    def tokenizer_files(self) -> dict[str, bytes]:
        files: dict[str, bytes] = open_reply(self._key, ask(self.actor.tokenizer)).unwrap()
        return files

    def info(self) -> ActorInfo:
        info: ActorInfo = ask(self.actor.info)
        return info

    def settle(self) -> bool:
        """Whether the registry has heard of the last completed step by now.

        Raises:
            FutureTimeoutError: the actor is silent.
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
                "no answer within the timeout: it was lost on the way and is asked for again; ask"
                " again, too, or cancel the call"
            )
        self._lost_calls.taken(request_id)
        return search.result()

    def _arrived(self, ref: Any, timeout: float | None) -> Reply | None:
        """What became of a call, as its ref tells it; None where that was lost on the way."""
        with suppress(ClusterUnavailableError):
            reply = open_reply(self._key, fetch(ref, timeout))
            return reply if reply.final else None
        return None

    def _answered(self, ref: Any, request_id: str) -> bool:
        """Of a ref that is there: whether its call has its answer, or will have none. One that has
        is forgotten, one that was lost is sent again."""
        reply = None
        with suppress(ActorLostError):  # told when somebody takes it
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
        """Of a save: if its call was lost, or one before it, nobody else would send them again."""
        with suppress(ActorLostError):
            if request_id in self._sent and self._arrived(begun, 0) is None:
                self._lost_calls.search(request_id)

    def _note(self, reply: Reply) -> None:
        if isinstance(reply.value, OptimStepResult | LoadStateResult):
            self._seen = reply.value.step
        if reply.ledger_head and self._kept:
            self._kept.saw(reply.ledger_head)
