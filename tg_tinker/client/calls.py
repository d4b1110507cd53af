"""Sends the calls of one training client in order, and recovers their run when its actor is lost.

This module numbers each call, refuses a call when the queue is full, returns its `FutureHandle`,
and tracks the saves that `close` waits for. `training` builds and checks the calls, `actor_link`
transports calls and answers, and `recovery` finds or starts the actor.
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
from tg_tinker.cluster.ray_calls import check_process, inherited
from tg_tinker.errors import ActorLostError, InvalidRequestError, QueueFullError
from tg_tinker.texts import check_texts
from tg_tinker.types import PARKED, ModelInfo, SaveStateResult, TrainingClientInfo

_Sent = TypeVar("_Sent")

MAX_QUEUED = 1000
"""The maximum number of calls of one client that wait on its actor."""


class OrderedCalls:
    """The ordered calls of one client to the current actor of its run.

    Args:
        run_id: the id of the run.
        reached: the actor that receives the first call.
        recover: whether the next call after a loss recovers the run.
        describe: returns the registry's current description of the run.
        reach: finds the living actor, or recovers the run.
        finish: ends the run if it is still in the given epoch.
        park_after_minutes: the minutes without a call after which the actor parks itself; None
            means never.
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
        """Sends one call and returns its handle; the lock keeps calls in order of their numbers.

        Raises:
            QueueFullError: `MAX_QUEUED` calls of this client wait on the actor.
            InvalidRequestError: the client is closed, or an argument is no valid text.
        """
        for name, argument in arguments.items():
            check_texts(argument, name)
        self.revive()
        with self.lock:
            link = self.link
            if link.unanswered >= MAX_QUEUED and link.waiting() >= MAX_QUEUED:
                raise QueueFullError(
                    f"{MAX_QUEUED} calls are waiting on this client: take the results of earlier"
                    " calls first"
                )
            ref, request = self.send(link.send, operation, arguments)
        return FutureHandle(link, ref, request.request_id, self._id, operation)

    def submit_save(self, **arguments: Any) -> FutureHandle[SaveStateResult]:
        """Sends a `save_state` call and returns its handle; `close` waits for the save."""
        save: FutureHandle[SaveStateResult] = self.submit("save_state", **arguments)
        self._saves = [*(other for other in self._saves if not other.done()), save]
        return save

    def ask(self, question: Callable[[TrainingLink], _Sent]) -> _Sent:
        """Asks the actor a question that changes nothing, outside the order of calls."""
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
        """Numbers and sends one call; the caller must hold the lock."""
        request = self.next_request(operation, **arguments)
        try:
            return send(request), request
        except BaseException:
            # It is unknown whether the call went out. Later calls start a new numbering: the actor
            # would otherwise wait forever for a number that never arrives.
            self._renumber()
            raise

    def next_request(self, operation: str, **arguments: Any) -> Request:
        """Returns a request with the next number; the caller must hold the lock.

        Raises:
            InvalidRequestError: the client is closed.
        """
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

    # --- the current actor -------------------------------------------------------------------

    def revive(self) -> None:
        """Prepares a call: recovers a lost run, once its loss was reported to the caller.

        Raises:
            ActorLostError: the actor is lost, and only `recover()` may recover the run.
            InvalidRequestError: this process was forked, see `check_process`.
        """
        check_process()
        with self._recovering:
            self._notice_parking()
            lost = self.link.lost if self.link.told else None
            if lost is None or self.closed:
                return
            if self._recover == "manual" and not self.link.parked:
                raise lost
            self.recover()

    def recover(self) -> None:
        """Reconnects to the run's actor, or recovers the run if its actor is gone."""
        check_process()
        self._refuse_closed()
        with self._recovering:
            lost = self.link.expect_loss()
            reached = self._reach()
            if reached.epoch != self.epoch or self.link.told:
                self._attach(reached, lost)

    def park(self) -> None:
        """Parks the run after all queued calls, and ends its actor."""
        check_process()
        with self._recovering:
            if not self.link.parked:
                self.submit("park").result()
                self.link.park()

    def close(self) -> None:
        """Ends the run after its last save; repeating it changes nothing.

        In a forked process this does nothing: the run belongs to the other process.
        """
        if not self.closed and not inherited():
            for save in self._saves:
                # Waits for the end. The handle of the save reports an error.
                save.exception()
            self._finish(self.epoch, self.link)
            self.closed = True

    def _attach(self, reached: Reached, lost: ActorLostError) -> None:
        """Sends later calls to this actor; open calls to the previous actor end with `lost`."""
        with self.lock:
            self.link.abandon(lost)
            self.reached = reached
            self._renumber()

    def _notice_parking(self) -> None:
        """Detects that the actor has parked itself, which the actor does not report.

        The registry is asked only after a pause of half of `park_after_minutes`.
        """
        now = time.monotonic()
        paused = self._patience is not None and now - self._used > 30 * self._patience
        self._used = now
        if paused and not self.closed and self._describe().reason == PARKED:
            self.link.park()

    def _refuse_closed(self) -> None:
        if self.closed:
            raise InvalidRequestError(
                f"client {self._id} is closed: service.get_training_client(id) reopens the run"
            )
