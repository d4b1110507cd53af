"""The SDK's only door to Ray's actors: calls, refs and what becomes of them.

Ray's own exceptions end here: what leaves this module is a value or a `TGTinkerError`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tg_tinker.errors import ActorLostError, ClusterUnavailableError, FutureTimeoutError

# Before Ray is first imported, which is why the other packages import this module first.
# No telemetry leaves.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A handle asked after its service closed must fail, not start a cluster of Ray's own choice.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# Else Ray's own series name each actor, and with it each run, to whoever reaches their port.
os.environ.setdefault("RAY_metric_cardinality_level", "low")
# Serve brings gRPC along, whose fork handlers meddle with the start of the next embedded cluster.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_RESTART_S = 30.0
"""How long a call waits for an actor that restarts."""
_RESTARTING = "actor_restarting"
_LEFT = "left_cluster"
_log = logging.getLogger("tg_tinker")


def ask(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Calls an actor's method and waits for what it returns."""
    return fetch(send(method, *arguments), timeout)


def send(method: Any, *arguments: Any) -> Any:
    """Calls an actor's method; a ref to what it will return."""
    with translated():
        return method.remote(*arguments)


def fetch(ref: Any, timeout: float | None = None) -> Any:
    """Waits for what a ref stands for.

    Raises:
        FutureTimeoutError: nothing within `timeout` seconds.
        ActorLostError: its actor is gone; `details["reason"]` says how.
        ClusterUnavailableError: the answer was lost on the way; the actor may live.
    """
    with translated():
        return lazy_ray().get(ref, timeout=timeout)


def kill(actor: Any) -> None:
    """Ends an actor and frees what it holds."""
    with contextlib.suppress(Exception):
        lazy_ray().kill(actor)


def split(refs: list[Any], wait_s: float | None = 0) -> tuple[list[Any], list[Any]]:
    """Those refs that have answered, however, and those that have not; waits for all of them at
    most `wait_s` seconds, None for ever."""
    if not refs:
        return [], []
    with translated():
        done, pending = lazy_ray().wait(refs, num_returns=len(refs), timeout=wait_s)
        return list(done), list(pending)


def when_done(ref: Any, work: Callable[[], object]) -> None:
    """Runs `work` on the dispatcher thread once a ref has answered."""
    with translated():
        ref.future().add_done_callback(lambda _: dispatch(work))


def dispatch(work: Callable[[], object]) -> None:
    """Runs `work` on the dispatcher thread."""
    _dispatcher().put(work)


def ask_again(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """`ask` of an actor that Ray restarts, until it is back: for what may be done twice."""
    deadline = time.monotonic() + _RESTART_S
    while True:
        try:
            return ask(method, *arguments, timeout=timeout)
        except ClusterUnavailableError as error:
            if not restarting(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def restarting(error: ClusterUnavailableError) -> bool:
    """Whether Ray said that the actor may answer again; the call was done or not."""
    return error.code == _RESTARTING


def left(error: ClusterUnavailableError) -> bool:
    """Whether this process has no cluster any more, or a dead one: to try again changes nothing."""
    return error.code == _LEFT


# --- Ray's exceptions ---------------------------------------------------------------------------


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Ray's exceptions as ours, without their texts: those may quote arguments."""
    if not lazy_ray().is_initialized():
        raise ClusterUnavailableError(
            "this process has left its Ray cluster: open a new ServiceClient, and reach the run"
            " again with get_training_client",
            code=_LEFT,
        )
    errors = lazy_ray().exceptions
    try:
        yield
    except errors.GetTimeoutError:
        raise FutureTimeoutError(
            "no answer within the timeout: the call goes on, ask for its result again or cancel it"
        ) from None
    except errors.ActorUnavailableError:
        if _embedded_died():
            raise ClusterUnavailableError(
                "the Ray cluster that this program had started has died: start the program again;"
                " get_training_client brings the run back from its last artifact",
                code=_LEFT,
            ) from None
        raise ClusterUnavailableError(
            "a call to an actor, or its answer, was lost on the way, or Ray restarts it: ask again",
            code=_RESTARTING,
        ) from None
    except errors.RayActorError as error:
        reason = _how_it_ended(error)
        raise ActorLostError(
            f"the actor of this client is gone ({reason}): service.get_training_client(id) brings"
            " the run back from its last artifact",
            details={"reason": reason},
        ) from None
    except (errors.RayError, ConnectionError) as error:
        raise ClusterUnavailableError(
            f"the Ray cluster does not answer ({type(error).__name__}): check `ray status`, then"
            " open a new ServiceClient"
        ) from None


def _embedded_died() -> bool:
    """Of a cluster that this program has started; nobody starts a part of it again."""
    node = lazy_ray()._private.worker._global_node
    ours = node.all_processes if node is not None else {}
    return any(
        started.process.poll() is not None
        for kind in ("raylet", "gcs_server") for started in ours.get(kind, ())
    )  # fmt: skip


def _how_it_ended(error: Any) -> str:
    """One of our own phrases: Ray's text may quote arguments."""
    text = str(error).lower()
    if "node_out_of_memory" in text or "low on memory" in text:
        return "out of memory"
    if error.preempted or "its node has died" in text or "node was terminated" in text:
        return "its node was lost"
    return "ended by us" if "ray.kill" in text else "its process ended"


def lazy_ray() -> Any:
    import ray

    return ray


# --- the dispatcher ----------------------------------------------------------------------------

_work: queue.SimpleQueue[Callable[[], object]] | None = None
_work_lock = threading.Lock()


def _dispatcher() -> queue.SimpleQueue[Callable[[], object]]:
    """The queue of the thread that runs callbacks: not Ray's, so they may call the client."""
    global _work
    with _work_lock:
        if _work is None:
            _work = queue.SimpleQueue()
            threading.Thread(target=_dispatch, args=(_work,), daemon=True).start()
        return _work


def _dispatch(work: queue.SimpleQueue[Callable[[], object]]) -> None:
    while True:
        try:
            work.get()()
        except Exception as error:
            _log.error("a callback of a FutureHandle raised %s", type(error).__name__)
