"""Sends the calls of one training client in order, and brings their run back when it was lost.

Numbers each call, refuses one too many, hands out its `FutureHandle`, and keeps which saves
`close` has to wait for. What is called, and with what, is for `training`; how a call and its answer
travel is for `actor_link`; where a living actor comes from is for `runs`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.future import FutureHandle
from tg_tinker.client.recovery import Reach, Reached, Recover
from tg_tinker.cluster.messages import Request
from tg_tinker.errors import ActorLostError, InvalidRequestError, QueueFullError
from tg_tinker.types import PARKED, ModelInfo, SaveStateResult, TrainingClientInfo

_Sent = TypeVar("_Sent")

MAX_QUEUED = 1000
"""Calls of one client that may wait on its actor."""


class OrderedCalls:
    """From one client to the living actor of its run, whichever that is.

    Args:
        reached: the actor that the first call goes to.
        recover: whether the next call after a loss brings the run back.
        describe: what the registry knows of the run now.
        reach: finds the living actor, or brings the run back.
        finish: ends the run of an epoch.
        park_after_minutes: after so long a pause the actor may have parked itself.
    """

    def __init__(
        self,
        run_id: str,
        reached: Reached,
        recover: Recover,
        describe: Callable[[], TrainingClientInfo],
        reach: Reach,
        finish: Callable[[int, TrainingLink], None],
        park_after_minutes: float | None,
    ) -> None:
        self.reached = reached
        self.closed = False
        self.lock = threading.Lock()
        self._id = run_id
        self._recover = recover
        self._describe = describe
        self._reach = reach
        self._finish = finish
        self._patience = park_after_minutes
        self._saves: list[FutureHandle[SaveStateResult]] = []
        self._recovering = threading.RLock()
        self._used = time.monotonic()
        self._renumber()

    @property
    def link(self) -> TrainingLink:
        return self.reached.link

    @property
    def epoch(self) -> int:
        return self.reached.epoch

    @property
    def model(self) -> ModelInfo:
        return self.reached.model

    # --- calls -------------------------------------------------------------------------------

    def submit(self, operation: str, **arguments: Any) -> FutureHandle[Any]:
        """Sends one call; the lock makes the order of calls the order of their numbers."""
        self.revive()
        with self.lock:
            link = self.link
            if link.unanswered >= MAX_QUEUED and link.waiting() >= MAX_QUEUED:
                raise QueueFullError(
                    f"{MAX_QUEUED} calls are waiting on this client: take the results of earlier"
                    " ones first"
                )
            ref, request = self.send(link.send, operation, arguments)
        return FutureHandle(link, ref, request.request_id, self._id, operation)

    def submit_save(self, **arguments: Any) -> FutureHandle[SaveStateResult]:
        """Sends a `save_state`, which `close` waits for."""
        save: FutureHandle[SaveStateResult] = self.submit("save_state", **arguments)
        self._saves = [*(other for other in self._saves if not other.done()), save]
        return save

    def ask(self, question: Callable[[TrainingLink], _Sent]) -> _Sent:
        """Asks the actor something that changes nothing, beside the calls."""
        self.revive()
        link = self.link
        try:
            return question(link)
        except ActorLostError as error:
            raise link.loss(error) from None

    # --- numbers -----------------------------------------------------------------------------

    def _renumber(self) -> None:
        self._handle, self._sequence = secrets.token_hex(8), 0

    def send(
        self, send: Callable[[Request], _Sent], operation: str, arguments: dict[str, Any]
    ) -> tuple[_Sent, Request]:
        """Numbers and sends one call. Call it with the lock held."""
        request = self.next_request(operation, **arguments)
        try:
            return send(request), request
        except BaseException:
            # Whether it went out is unknown: later calls start a numbering of their own, since
            # the actor would wait for ever for a number that never arrives.
            self._renumber()
            raise

    def next_request(self, operation: str, **arguments: Any) -> Request:
        """Takes the next number. Call it with the lock held."""
        self._refuse_closed()
        number, self._sequence = self._sequence, self._sequence + 1
        return Request(
            request_id=f"{self._handle}-{number}",
            operation=operation,
            epoch=self.epoch,
            handle=self._handle,
            sequence=number,
            arguments=arguments,
            ledger=self.link.ledger_place,
        )

    # --- the actor they go to ----------------------------------------------------------------

    def revive(self) -> None:
        """Before a call: once its caller knows what was lost, the run comes back."""
        with self._recovering:
            self._notice_parking()
            lost = self.link.lost if self.link.told else None
            if lost is None or self.closed:
                return
            if self._recover == "manual" and not self.link.parked:
                raise lost
            self.recover()

    def recover(self) -> None:
        """Reaches the run's actor again; where it is gone, brings the run back."""
        self._refuse_closed()
        with self._recovering:
            lost = self.link.expect_loss()
            reached = self._reach()
            if reached.epoch != self.epoch or self.link.told:
                self._attach(reached, lost)

    def park(self) -> None:
        """Parks the run after the calls queued before; the actor is gone then."""
        with self._recovering:
            if not self.link.parked:
                self.submit("park").result()
                self.link.park()

    def close(self) -> None:
        """Ends the run after its last save."""
        if not self.closed:
            for save in self._saves:
                save.exception()  # waits; what it is, its handle tells
            self._finish(self.epoch, self.link)
            self.closed = True

    def _attach(self, reached: Reached, lost: ActorLostError) -> None:
        """From now on calls go to this actor; the last one has nothing to say any more."""
        with self.lock:
            self.link.abandon(lost)
            self.reached = reached
            self._renumber()

    def _notice_parking(self) -> None:
        """An actor that parks itself tells nobody: after half of its patience it is asked for."""
        now = time.monotonic()
        paused = self._patience is not None and now - self._used > 30 * self._patience
        self._used = now
        if paused and not self.closed and self._describe().reason == PARKED:
            self.link.park()

    def _refuse_closed(self) -> None:
        if self.closed:
            raise InvalidRequestError(
                f"client {self._id} is closed: service.get_training_client(id) opens the run again"
            )
