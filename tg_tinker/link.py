"""One training actor in one epoch, as a client reaches it: sealed calls out, replies back.

A call or its answer may be lost on the way while the actor lives. Then the call is sent again
under its old number: the actor answers what it has run from memory, and refuses what is not yet
its turn, so each call is run once and in order. When the actor itself is gone, every call that has
no answer ends with one and the same error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tg_tinker.envelope import open_payload, seal_payload
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    TGTinkerError,
    from_wire,
)
from tg_tinker.ledger_files import KeptHead
from tg_tinker.named_actors import ActorInfo
from tg_tinker.ray_calls import aside, ask, fetch, kill, send, split, when_done
from tg_tinker.types import PARKED, LoadStateResult, OptimStepResult
from tg_tinker.wire import OUT_OF_TURN, Reply, Request, Saving

if TYPE_CHECKING:
    import ray

TRIES = 8
"""Times that a call is sent, without getting on, before its actor counts as unreachable."""

_STORED_S = 30.0
_SETTLE_S = 90.0
_PAUSE_S = 0.2

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
        self._void: set[Any] = set()
        self._repeating = threading.Lock()
        self._losing = threading.Lock()

    @property
    def ledger_place(self) -> str:
        """Where the ledger of a private run was last seen to end."""
        return self._kept.place if self._kept else ""

    # --- calls -------------------------------------------------------------------------------

    def send(self, request: Request) -> ray.ObjectRef[bytes]:
        ref: ray.ObjectRef[bytes] = send(self.actor.call, seal_payload(self._key, request))
        self._sent[request.request_id] = ref, request
        return ref

    def saved(self, request_id: str) -> ray.ObjectRef[bytes]:
        """Of a `save_state` that was sent: answers when it is durable."""
        ref: ray.ObjectRef[bytes] = send(self.actor.saved, request_id)
        begun, request = self._sent[request_id]
        # If the call itself was lost, or one before it, nobody else would send them again.
        when_done(begun, lambda: aside(lambda: self._answered(begun, request, None)))
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

    @property
    def unanswered(self) -> int:
        """How many calls nobody has taken an answer of; at least those that `waiting` counts."""
        return len(self._sent)

    def waiting(self) -> int:
        """How many calls have no answer yet. Forgets those that have one."""
        refs = dict([*self._sent.values()])
        done, pending = split([*refs])
        for ref in done:
            self._answered(ref, refs[ref], 0)
        return len(pending)

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
        self._void |= {*split([ref for ref, _ in [*self._sent.values()]])[1]}
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
            loaded = self.done(ref, wait_s=0.3)
            remarks = ask(self.actor.progress, heard)
            for remark in remarks:
                progress(remark)
            heard += len(remarks)
        return self._opened(fetch(ref)).unwrap()

    def description(self) -> Any:
        """The `ModelInfo`, or None while the model loads."""
        sealed = ask(self.actor.description)
        return None if sealed is None else self._opened(sealed).unwrap()

    def tokenizer_files(self) -> dict[str, bytes]:
        files: dict[str, bytes] = self._opened(ask(self.actor.tokenizer)).unwrap()
        return files

    def info(self) -> ActorInfo:
        info: ActorInfo = ask(self.actor.info)
        return info

    def settle(self) -> None:
        """Returns once the registry has heard of the last completed step.

        Raises:
            FutureTimeoutError: the actor is silent.
        """
        ask(self.actor.settle, timeout=_SETTLE_S)

    def cancel(self, request_id: str) -> bool:
        return bool(ask(self.actor.cancel, request_id))

    def done(self, ref: Any, wait_s: float = 0) -> bool:
        return bool(split([ref], wait_s)[0])

    def pending(self, refs: list[Any]) -> list[Any]:
        """Those refs whose calls have not answered yet."""
        return split(refs)[1]

    def wait(self, refs: list[Any]) -> None:
        """Until all calls have answered, however."""
        split(refs, None)

    def when_done(self, ref: Any, work: Callable[[], object]) -> None:
        """Runs `work` on the dispatcher thread once the call has answered."""
        when_done(ref, work)

    # --- inside ------------------------------------------------------------------------------

    def _reply(self, ref: Any, request_id: str, timeout: float | None) -> Reply:
        """What was answered; a call whose answer does not come is asked for and sent again."""
        limit = None if timeout is None else time.monotonic() + timeout
        try:
            reply = self._opened(fetch(ref, timeout))
            if _due(reply) is None:
                return reply
        except ClusterUnavailableError:
            if (stored := self._stored(request_id)) is not None:
                return stored
        if request_id not in self._sent:
            raise ClusterUnavailableError("the answer to this call was lost on the way")
        with self._repeating:
            return self._again(self._sent[request_id][1], limit)

    def _again(self, request: Request, limit: float | None) -> Reply:
        """Sends a call once more, and before it those of its handle that the actor misses."""
        attempt, reached = 0, -1
        while attempt < TRIES:
            attempt += 1
            try:
                reply = self._call(request, limit)
                due = _due(reply)
                if due is None:
                    return self._when_saved(request, reply, limit)
                if due > reached:  # some of those before it have arrived: it is within reach
                    attempt, reached = 0, due
                for earlier in self._between(request, due):
                    self._call(earlier, limit)
            except ClusterUnavailableError:
                time.sleep(_PAUSE_S * attempt)
        raise ClusterUnavailableError(
            f"{TRIES} times a call or its answer was lost on the way to the actor: ask again"
        )

    def _between(self, request: Request, due: int) -> list[Request]:
        known = [sent for _, sent in [*self._sent.values()] if sent.handle == request.handle]
        return [sent for sent in known if due <= sent.sequence < request.sequence]

    def _call(self, request: Request, limit: float | None) -> Reply:
        sealed = seal_payload(self._key, request)
        return self._opened(ask(self.actor.call, sealed, timeout=_left(limit)))

    def _when_saved(self, request: Request, reply: Reply, limit: float | None) -> Reply:
        """Of a save its end is asked for, not its beginning."""
        if not isinstance(reply.value, Saving):
            return reply
        return self._opened(ask(self.actor.saved, request.request_id, timeout=_left(limit)))

    def _stored(self, request_id: str) -> Reply | None:
        with suppress(ClusterUnavailableError, FutureTimeoutError):
            sealed = ask(self.actor.stored, request_id, timeout=_STORED_S)
            return None if sealed is None else self._opened(sealed)
        return None

    def _answered(self, ref: Any, request: Request, timeout: float | None) -> None:
        """Forgets a call that has its answer; one that was lost is sent again: once, or until it
        has one, by the time there is."""
        with suppress(TGTinkerError):
            self._note(self._reply(ref, request.request_id, timeout))
            if request.operation != "save_state":  # its end may have to be asked for again
                self._sent.pop(request.request_id, None)

    def _note(self, reply: Reply) -> None:
        if isinstance(reply.value, OptimStepResult | LoadStateResult):
            self._seen = reply.value.step
        if reply.ledger_head and self._kept:
            self._kept.saw(reply.ledger_head)

    def _opened(self, sealed: bytes) -> Reply:
        reply: Reply = open_payload(self._key, sealed)
        return reply


def _left(limit: float | None) -> float | None:
    return None if limit is None else max(0.0, limit - time.monotonic())


def _due(reply: Reply) -> int | None:
    """The number of the call that the actor has to get first; None where it has run this one."""
    if reply.error is None or reply.error[2].get("code") != OUT_OF_TURN:
        return None
    return int(reply.error[2]["due"])
