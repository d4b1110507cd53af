"""Runs slot engines, each in its own thread, and tracks the weights that each engine holds.

One engine has the base model and all LoRA adapters. Weights that cannot share the base model (full
fine-tuning, trained biases) get their own copy of the model. A few of these copies stay in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch

from actors.engine.lora import make_trainable
from actors.engine.model import Base
from actors.sampling.adapters import Adapter
from actors.sampling.engine import SlotEngine
from actors.sampling.requests import Load, TokenRequest
from actors.sampling.snapshots import Snapshot
from serve_app.replica.sources import Source
from serve_app.replica.threads import TenantThreads
from tg_tinker.errors import (
    ArtifactMismatchError,
    InternalError,
    NotFoundError,
    QueueFullError,
)

MOST_WHOLE_MODELS = 2
"""The maximum number of model copies with their own weights.

The idle copy that was used least recently is dropped first.
"""

ROOM_S = 60.0
"""Seconds that weights wait until a model copy can be dropped."""

_T = TypeVar("_T")


class EngineThread:
    """A `SlotEngine` with the only thread that may use it."""

    def __init__(self, engine: SlotEngine) -> None:
        self._engine = engine
        self._inbox: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._closed = self._ended = self._working = False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def holds(self, adapter: str) -> bool:
        """Returns whether an adapter is resident now."""
        return adapter in self._engine.adapters

    @property
    def idle(self) -> bool:
        """Whether no request runs, waits or is about to be added."""
        with self._changed:
            return not (self._inbox or self._working) and self._engine.idle

    def do(self, work: Callable[[SlotEngine], _T]) -> Future[_T]:
        """Queues `work(engine)` to run between two steps; returns its future without waiting.

        Raises:
            NotFoundError: the engine was closed, because its weights made room for others.
            InternalError: the thread of the engine has ended.
        """
        outcome: Future[_T] = Future()

        def run() -> None:
            if not outcome.set_running_or_notify_cancel():
                return  # The caller has left.
            try:
                outcome.set_result(work(self._engine))
            except BaseException as error:
                outcome.set_exception(error)

        with self._changed:
            if self._closed:
                raise NotFoundError("these weights have left memory: repeat the request")
            if self._ended:
                raise InternalError("this engine has ended: repeat the request")
            self._inbox.append(run)
            self._changed.notify()
        return outcome

    def cancel(self, request: TokenRequest, index: int | None = None) -> None:
        """Cancels a request before the next step. No effect if request or engine has ended."""
        with contextlib.suppress(InternalError, NotFoundError):
            self.do(lambda engine: engine.cancel(request, index))

    def close(self) -> None:
        """Ends the thread after the current step. Requests that still run end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        # A defect leaves no traceback in a log. `alive` reports it, and Serve starts a new replica.
        with contextlib.suppress(Exception):
            while self._turn():
                pass
        with self._changed:
            inbox, self._inbox = self._inbox, []
            self._ended = True
            self._working = False
        for work in inbox:
            work()
        # So that no caller waits forever.
        self._engine.end_all("this engine has ended: repeat the request")

    def _turn(self) -> bool:
        """Runs the queued work, then a step; returns False once the engine is closed."""
        with self._changed:
            while self._engine.idle and not (self._inbox or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            inbox, self._inbox = self._inbox, []
            self._working = True
        for work in inbox:
            work()
        self._engine.step()
        with self._changed:
            self._working = False
        return True


class Engines:
    """The engines of one base model."""

    def __init__(self, load: Callable[[], Base]) -> None:
        self._read = load
        self.base = load()
        self._shared = EngineThread(SlotEngine(self.base))
        self._whole: OrderedDict[str, EngineThread] = OrderedDict()
        # Held while a model copy is loaded: one load at a time.
        self._adding = threading.Lock()
        # Held for a moment while `_whole` is read or changed.
        self._changing = threading.Lock()

    @property
    def alive(self) -> bool:
        return all(engine.alive for engine in self._all())

    def load(self) -> Load:
        """Returns the load of all engines together, as of their last steps."""
        loads = [thread.do(lambda engine: engine.load).result() for thread in self._all()]
        return sum(loads[1:], loads[0])

    def has(self, name: str | None, shared: bool) -> bool:
        """Returns whether the weights of this name are in memory.

        None is the base model, which is always in memory. The answer may change at any time: an
        adapter may leave memory until a request pins it.
        """
        return name is None or (self._shared.holds(name) if shared else name in self._whole)

    def add(self, snapshot: Snapshot) -> Future[None]:
        """Adds weights, so that work that is sent to their engine from now on finds them.

        Returns:
            A future. For an adapter, it is done once the adapter is copied between two steps of the
            engine. The caller need not wait for it, but it holds the error if the adapter is
            refused.

        Raises:
            ArtifactMismatchError: the weights were trained on another base model.
            QueueFullError: all model copies are in use.
        """
        if not self.base.known_as(snapshot.base):
            raise ArtifactMismatchError(
                "these weights were trained on another base model than this sampler's, because the"
                " files of the model have changed since one of the two was loaded: restart the"
                " cluster"
            )
        self.base.refuse_other_files(snapshot.files)
        if snapshot.shared:
            config = snapshot.adapter_config or {}
            adapter = Adapter(snapshot.name, config, snapshot.weights)
            return self._shared.do(lambda engine: engine.adapters.add(adapter))
        with self._adding:
            # Checked again: a load continues when its client leaves, and another client may have
            # requested the same weights.
            if snapshot.name not in self._whole:
                self._make_room()
                engine = EngineThread(SlotEngine(self._with_weights(snapshot)))
                with self._changing:
                    self._whole[snapshot.name] = engine
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def of(self, name: str | None, shared: bool) -> EngineThread:
        """Returns the engine that holds these weights.

        Raises:
            NotFoundError: the weights have left memory.
        """
        if name is None or shared:
            return self._shared
        with self._changing:
            if name not in self._whole:
                raise NotFoundError("these weights have left memory: repeat the request")
            self._whole.move_to_end(name)
            return self._whole[name]

    def names(self) -> list[str]:
        """Returns the names of all weights in memory, except the base model."""
        resident = self._shared.do(lambda engine: engine.adapters.names).result()
        with self._changing:
            return [*resident, *self._whole]

    def forget(self, name: str) -> None:
        """Drops weights that nobody may use any longer, unless a request is using them."""
        self._shared.do(lambda engine: engine.adapters.forget(name)).result()
        with self._changing:
            if name in self._whole and self._whole[name].idle:
                self._whole.pop(name).close()

    def _all(self) -> list[EngineThread]:
        with self._changing:
            return [self._shared, *self._whole.values()]

    def _make_room(self) -> None:
        """Waits until the number of model copies is below the maximum, dropping an idle copy.

        Raises:
            QueueFullError: all copies are in use for `ROOM_S` seconds.
        """
        deadline = time.monotonic() + ROOM_S
        while not self._dropped_one_where_full():
            if time.monotonic() > deadline:
                raise QueueFullError(
                    f"all {MOST_WHOLE_MODELS} copies of the model with their own weights have been"
                    f" in use for {ROOM_S:g} s: try again later"
                )
            time.sleep(0.02)

    def _dropped_one_where_full(self) -> bool:
        with self._changing:
            if len(self._whole) < MOST_WHOLE_MODELS:
                return True
            unused = next((name for name, engine in self._whole.items() if engine.idle), None)
            if unused is None:
                return False
            self._whole.pop(unused).close()
            return True

    def _with_weights(self, snapshot: Snapshot) -> Base:
        base = self._read()
        parameters = make_trainable(base, snapshot.lora_config).saved
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                parameters[name].copy_(tensor)
        base.model.requires_grad_(False).eval()
        return base


def loader(model_ref: str, dtype: str, cache: Path) -> Callable[[], Base]:
    return lambda: Base.load(model_ref, cache=cache, dtype=dtype)


AT_ONCE = 4
"""The maximum number of concurrent fetches for each tenant: each one needs the memory of a copy."""


class Fetches:
    """The fetches of weights in one replica. Only the event loop may use this object."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._threads = TenantThreads(AT_ONCE, "fetch")
        self._coming: dict[str | None, asyncio.Future[Future[None]]] = {}

    async def ahead(self, source: Source, tenant: str) -> Future[None] | None:
        """Fetches weights into their engine, unless they are in memory.

        Work that is sent to the engine after this call finds the weights. Concurrent callers share
        one fetch.

        Returns:
            The future of `Engines.add`; None if the weights were in memory already.
        """
        if self._engines.has(source.name, source.shared):
            return None
        coming = self._coming.get(source.name)
        if coming is None:
            coming = self._threads.run(tenant, lambda: self._engines.add(source.fetch()))
            coming.add_done_callback(lambda _: self._coming.pop(source.name))
            self._coming[source.name] = coming
        # If one caller leaves, the fetch continues for the others.
        return await asyncio.shield(coming)
