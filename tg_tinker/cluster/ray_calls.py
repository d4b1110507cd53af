"""Calls Ray's actors, and waits for their answers; the SDK calls actors only through this module.

The module translates Ray's exceptions: its functions return values or raise a `TGTinkerError`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tg_tinker.backend import PACKAGES
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    InvalidRequestError,
)

# These variables must be set before Ray is first imported, so other packages import this module
# first. No telemetry leaves the machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A handle that is used after its service is closed must fail, and must not start a cluster.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# By default Ray's own metrics show each actor name, and so each run, to anyone at their port.
os.environ.setdefault("RAY_metric_cardinality_level", "low")
# By default gRPC sends Ray's token to the proxy that http_proxy names, also for this machine.
os.environ.setdefault("no_grpc_proxy", "0.0.0.0/0,::/0")
# Serve loads gRPC, whose fork handlers disturb the start of the next embedded cluster.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_inherited = False
_RESTART_S = 30.0
"""The maximum wait of a call for an actor that restarts, in seconds."""
_RESTARTING = "actor_restarting"
_LEFT = "left_cluster"
_FORKED = "forked_process"
_NOT_IMPORTED = "failed to import on the worker"
"""In Ray's text about an actor whose class its worker could not import."""
_log = logging.getLogger("tg_tinker")


def inherited() -> bool:
    """Returns whether this process was forked from one that was connected to a Ray cluster.

    Nothing of the connection works here: its threads stayed in the other process, and each call
    would wait for them forever. Also, its locks may be held for good.
    """
    return _inherited


def check_process() -> None:
    """Checks that this process can use Ray; call it before a lock of an object that existed before.

    Raises:
        InvalidRequestError: this process was forked from one that was connected.
    """
    if _inherited:
        raise InvalidRequestError(
            "this process was forked from a program that was connected to a Ray cluster, and no"
            " client, service or handle works in it: start it by spawn, as"
            " multiprocessing.get_context('spawn') does (DataLoader(multiprocessing_context="
            "'spawn')), and create a ServiceClient in it; or fork before the first ServiceClient",
            code=_FORKED,
        )


def _note_fork() -> None:
    """Notes in a forked process that it inherited a connection, and keeps Ray from ending that.

    Ray would do so at the end of this process, in three ways, and wait for threads that are not
    there: the parent that waits for its child would hang as well.
    """
    global _inherited
    ray: Any = sys.modules.get("ray")
    is_initialized = getattr(ray, "is_initialized", None)
    if is_initialized is None or not is_initialized():
        return
    _inherited = True
    atexit.unregister(ray.shutdown)
    worker, state = ray._private.worker.global_worker, ray._private.state.state
    for held in (worker.core_worker, worker.gcs_client, state._global_state_accessor):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))  # No destructor runs.
    del worker.core_worker  # Nor do those of refs and handles reach it.
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # Only the GNU library has `on_exit`.
        # Comes before what Ray has registered there, when Python itself has ended.
        library.on_exit(ctypes.cast(library._exit, ctypes.c_void_p), None)


os.register_at_fork(after_in_child=_note_fork)


def ask(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Calls an actor's method and returns its answer; raises as `fetch`."""
    return fetch(send(method, *arguments), timeout)


def send(method: Any, *arguments: Any) -> Any:
    """Calls an actor's method and returns a ref to its answer."""
    with translated():
        return method.remote(*arguments)


def fetch(ref: Any, timeout: float | None = None) -> Any:
    """Waits for the value of a ref and returns it.

    Raises:
        FutureTimeoutError: there is no value within `timeout` seconds.
        ActorLostError: the actor is gone; `details["reason"]` says why.
        ClusterUnavailableError: the answer was lost on the way; the actor may still be alive.
    """
    with translated():
        return lazy_ray().get(ref, timeout=timeout)


def kill(actor: Any) -> None:
    """Ends an actor and frees its resources; ignores errors."""
    with contextlib.suppress(Exception), translated():
        lazy_ray().kill(actor)


def split(refs: list[Any], wait_s: float | None = 0) -> tuple[list[Any], list[Any]]:
    """Splits refs into answered refs and pending refs; an error is an answer.

    Args:
        wait_s: the maximum wait for all refs in seconds; None waits without a limit.
    """
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
    check_process()
    _dispatcher().put(work)


def ask_again(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Calls like `ask`, and repeats the call while Ray restarts the actor.

    Use this function only for methods that may run twice. It waits `_RESTART_S` for the actor.
    """
    deadline = time.monotonic() + _RESTART_S
    while True:
        try:
            return ask(method, *arguments, timeout=timeout)
        except ClusterUnavailableError as error:
            if not restarting(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def restarting(error: ClusterUnavailableError) -> bool:
    """Returns whether the actor may answer again; it is unknown whether the call was done."""
    return error.code == _RESTARTING


def left(error: ClusterUnavailableError) -> bool:
    """Returns whether this process has lost its cluster for good, so that a retry cannot help."""
    return error.code == _LEFT


# --- Ray's exceptions ---------------------------------------------------------------------------


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Translates Ray's exceptions to `TGTinkerError`, without their texts, which may quote data.

    Raises:
        FutureTimeoutError: the answer did not arrive within the timeout.
        ActorLostError: the actor is gone.
        ClusterUnavailableError: the cluster or the actor does not answer, or was left.
        InvalidRequestError: see `check_process`.
    """
    check_process()
    if not lazy_ray().is_initialized():
        raise ClusterUnavailableError(
            "this process has left its Ray cluster: open a new ServiceClient, and reconnect to the"
            " run with get_training_client",
            code=_LEFT,
        )
    errors = lazy_ray().exceptions
    try:
        yield
    except errors.GetTimeoutError:
        raise FutureTimeoutError(
            "no answer within the timeout: the call continues; ask again for its result, or cancel"
            " it"
        ) from None
    except errors.ActorUnavailableError:
        if _embedded_died():
            raise ClusterUnavailableError(
                "the Ray cluster that this program had started has died: start the program again;"
                " get_training_client recovers the run from its last artifact",
                code=_LEFT,
            ) from None
        raise ClusterUnavailableError(
            "a call to an actor or its answer was lost on the way, or Ray restarts the actor: ask"
            " again",
            code=_RESTARTING,
        ) from None
    except errors.RayActorError as error:
        if _NOT_IMPORTED in str(error):
            raise ClusterUnavailableError(
                "a worker of the Ray cluster cannot import TG-Tinker: rename files and folders"
                f" named {', '.join(PACKAGES)} in the working directory and on the PYTHONPATH of"
                " the workers, and install the same version of TG-Tinker on every node"
            ) from None
        reason = _how_it_ended(error)
        raise ActorLostError(
            f"the actor of this client is gone ({reason}): service.get_training_client(id) recovers"
            " the run from its last artifact",
            details={"reason": reason},
        ) from None
    except (errors.RayError, ConnectionError) as error:
        raise ClusterUnavailableError(
            f"the Ray cluster does not answer ({type(error).__name__}): check `ray status`, then"
            " open a new ServiceClient"
        ) from None


def _embedded_died() -> bool:
    """Returns whether a cluster that this program started has died; nothing restarts its parts."""
    node = lazy_ray()._private.worker._global_node
    ours = node.all_processes if node is not None else {}
    return any(
        started.process.poll() is not None
        for kind in ("raylet", "gcs_server") for started in ours.get(kind, ())
    )  # fmt: skip


def _how_it_ended(error: Any) -> str:
    """Returns the reason as one of our own phrases: Ray's text may quote arguments."""
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
    """Returns the queue of the thread that runs callbacks, and starts the thread if needed.

    It is not a thread of Ray, so callbacks may call the client.
    """
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
