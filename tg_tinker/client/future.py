"""The handle of a call that was sent: its result, now or later.

handle = tc.forward_backward(batch)     # returns at once
handle.add_done_callback(lambda h: print(h.status()))
result = handle.result(timeout=60)      # or: result = await handle
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Generator
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
    """Wraps the Ray `ObjectRef` of one call to a training actor.

    Attributes:
        future_id: the request id, chosen by the SDK.
        training_client_id: the client that was called.
        operation: the method that was called.
        object_ref: Ray's ref; what it points to is sealed.
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
        """Waits for the result, at most `timeout` seconds.

        What the call wants to be known is given as warnings when it is first taken.

        Raises:
            FutureTimeoutError: not yet; the call goes on and can be asked again.
            ClusterUnavailableError: the answer was lost on the way; ask again for it, and do not
                repeat the call.
            FutureCancelledError: it was cancelled before it changed anything.
            TGTinkerError: what the call raised.
        """
        value: Result = self._wait(timeout).unwrap()
        if not self._taken:
            self._taken = True
            for warning in getattr(value, "warnings", ()):
                warnings.warn(warning, stacklevel=2)
        return value

    def exception(self, timeout: float | None = None) -> TGTinkerError | None:
        """The error of the call, None if it succeeded; waits like `result`."""
        error = self._wait(timeout).error
        return None if error is None else from_wire(error)

    def done(self) -> bool:
        """Whether the call has answered: a result, an error, or a cancellation."""
        return self._reply is not None or self._link.done(self.object_ref, self.future_id)

    def status(self) -> str:
        """`pending`, `done`, `failed` or `cancelled`.

        An answer that was lost on the way is still to come: `pending`.
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
        """Asks the call to stop; false if it has answered already.

        A call that waits, or a batch between two micro-batches, then ends with
        `FutureCancelledError`; an optimizer step that has begun is finished. A cancelled
        `forward_backward` spoils its window: the next `optim_step` drops it.
        """
        return not self.done() and self._link.cancel(self.future_id)

    def add_done_callback(self, function: Callable[[FutureHandle[Result]], object]) -> None:
        """Calls `function(handle)` once it is done, on a thread of the SDK.

        It may call the client. An exception in it is logged by type and goes no further.
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

        self.add_done_callback(lambda _: loop.call_soon_threadsafe(wake))
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
                if isinstance(error, ActorLostError):  # else the actor may still have the answer
                    self._reply = reply
                return reply
        return self._reply
