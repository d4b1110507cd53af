"""Provides the handle of a call that was sent, which gives access to its later result.

handle = tc.forward_backward(batch)     # returns at once
handle.add_done_callback(lambda h: print(h.status()))
result = handle.result(timeout=60)      # or: result = await handle
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.ray_calls import dispatch
from tg_tinker.errors import (
    ActorLostError,
    FutureCancelledError,
    TGTinkerError,
    from_wire,
)

if TYPE_CHECKING:
    import ray

    from tg_tinker.client.actor_link import TrainingLink

Result = TypeVar("Result")


class FutureHandle(Generic[Result]):
    """The handle of one call to a training actor; it wraps a Ray `ObjectRef`.

    Attributes:
        future_id: the request id, chosen by the SDK.
        training_client_id: the id of the training client that sent the call.
        operation: the name of the method that was called.
        object_ref: Ray's reference to the sealed answer.
    """

    def __init__(
        self,
        link: TrainingLink,
        object_ref: ray.ObjectRef[bytes],
        future_id: str,
        training_client_id: str,
        operation: str,
    ) -> None:
        self.object_ref = object_ref
        self.future_id = future_id
        self.training_client_id = training_client_id
        self.operation = operation
        self._link = link
        self._reply: Reply | None = None
        self._taken = False

    def __repr__(self) -> str:
        return f"<FutureHandle {self.operation} {self.future_id}>"

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the result and returns it.

        The first call that returns the result also issues its `warnings` as Python warnings.

        Args:
            timeout: the maximum wait in seconds; None waits without a limit.

        Raises:
            FutureTimeoutError: there is no answer yet. The call continues, and you can ask again.
            ClusterUnavailableError: the answer was lost on the way. Ask for the result again, and
                do not repeat the call.
            FutureCancelledError: the call was canceled before it changed anything.
            TGTinkerError: the error of the call.
        """
        value: Result = self._wait(timeout).unwrap()
        if not self._taken:
            self._taken = True
            for warning in getattr(value, "warnings", ()):
                warnings.warn(warning, stacklevel=2)
        return value

    def exception(self, timeout: float | None = None) -> TGTinkerError | None:
        """Waits like `result`; returns the error of the call, or None if the call succeeded."""
        error = self._wait(timeout).error
        return None if error is None else from_wire(error)

    def done(self) -> bool:
        """Returns whether the call has answered: with a result, an error, or a cancellation."""
        return self._reply is not None or self._link.done(self.object_ref, self.future_id)

    def status(self) -> str:
        """Returns `pending`, `done`, `failed` or `cancelled`.

        The status is `pending` while an answer that was lost on the way is asked for again.
        """
        if not self.done():
            return "pending"
        error = self.exception()
        if self._reply is None:
            return "pending"
        if error is None:
            return "done"
        return "cancelled" if isinstance(error, FutureCancelledError) else "failed"

    def cancel(self) -> bool:
        """Asks the call to stop; returns False if the call has already answered.

        A waiting call, or a batch between two micro-batches, then ends with `FutureCancelledError`.
        An optimizer step that has begun is finished. A canceled `forward_backward` in train mode
        spoils its accumulation window: the next `optim_step` raises `WindowSpoiledError` and drops
        all gradients since the last step.
        """
        return not self.done() and self._link.cancel(self.future_id)

    def add_done_callback(self, function: Callable[[FutureHandle[Result]], object]) -> None:
        """Calls `function(handle)` on a thread of the SDK once the call is done.

        The function may call the client. If the function raises an exception, the SDK logs the type
        of the exception and does not raise it.
        """
        if self._reply is not None:
            dispatch(lambda: function(self))
        else:
            self._link.when_done(self.object_ref, self.future_id, lambda: function(self))

    def __await__(self) -> Generator[Any, None, Result]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not arrived.done():
                arrived.set_result(None)

        def arrive(_: FutureHandle[Result]) -> None:
            with suppress(RuntimeError):  # The loop has ended: nobody waits any longer.
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(arrive)
        yield from arrived
        return self.result()

    def _wait(self, timeout: float | None) -> Reply:
        if self._reply is None:
            try:
                limit = None if timeout is None else max(0.0, timeout)
                self._reply = self._link.open(self.object_ref, self.future_id, limit)
            except TimeoutError:
                raise
            except TGTinkerError as error:
                reply = Reply(error=error.to_wire())
                # After any other error the actor may still have the answer.
                if isinstance(error, ActorLostError):
                    self._reply = reply
                return reply
        return self._reply
