"""Slot engines in threads of their own, and which weights each of them holds.

One engine has the base model and every LoRA adapter. Weights that cannot share it (full
fine-tuning, trained biases) get a copy of the model each, of which a few stay.
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
"""Copies of the model with weights of their own; the one used longest ago leaves first."""

ROOM_S = 60.0
"""How long weights wait for a place."""

_T = TypeVar("_T")


class EngineThread:
    """A `SlotEngine` and the only thread that touches it."""

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
        """Whether it is resident as of now."""
        return adapter in self._engine.adapters

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is on its way in."""
        with self._changed:
            return not (self._inbox or self._working) and self._engine.idle

    def do(self, work: Callable[[SlotEngine], _T]) -> Future[_T]:
        """Runs `work(engine)` between two steps; never waits for it.

        Raises:
            NotFoundError: it was closed: its weights made room for others.
            InternalError: it has died.
        """
        outcome: Future[_T] = Future()

        def run() -> None:
            if not outcome.set_running_or_notify_cancel():
                return  # whoever asked has left
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
        """Before the next step; safe when the request or the engine has ended."""
        with contextlib.suppress(InternalError, NotFoundError):
            self.do(lambda engine: engine.cancel(request, index))

    def close(self) -> None:
        """Ends the thread after the current step; what still runs ends with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        # A defect is no traceback in a log: `alive` tells of it, and Serve makes a new replica.
        with contextlib.suppress(Exception):
            while self._turn():
                pass
        with self._changed:
            inbox, self._inbox = self._inbox, []
            self._ended = True
            self._working = False
        for work in inbox:
            work()
        self._engine.end_all("this engine has ended: repeat the request")  # nobody waits for ever

    def _turn(self) -> bool:
        """What came in, then a step; false once closed."""
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
        self._adding = threading.Lock()  # one load at a time
        self._changing = threading.Lock()  # of `_whole`, for a moment

    @property
    def alive(self) -> bool:
        return all(engine.alive for engine in self._all())

    def load(self) -> Load:
        """Of all engines together, as of their last steps."""
        loads = [thread.do(lambda engine: engine.load).result() for thread in self._all()]
        return sum(loads[1:], loads[0])

    def has(self, name: str | None, shared: bool) -> bool:
        """Whether the weights of this name are here; None is the base model, which always is.

        A look from outside: adapters may leave until a request pins them.
        """
        return name is None or (self._shared.holds(name) if shared else name in self._whole)

    def add(self, snapshot: Snapshot) -> Future[None]:
        """Takes weights in; what is sent to their engine from now on finds them.

        The future of an adapter is done once it is copied, between two steps of its engine: nobody
        has to wait for it, but whoever is refused learns from it why.

        Raises:
            ArtifactMismatchError: they were trained on another base model.
            QueueFullError: all that are here are in use.
        """
        if snapshot.base != self.base.digest:
            raise ArtifactMismatchError(
                "these weights were trained on another base model than this sampler's: the files"
                " of the model have changed since one of them was loaded. Restart the cluster"
            )
        if snapshot.shared:
            config = snapshot.adapter_config or {}
            adapter = Adapter(snapshot.name, config, snapshot.weights)
            return self._shared.do(lambda engine: engine.adapters.add(adapter))
        with self._adding:  # a load goes on when its client leaves, and another may ask again
            if snapshot.name not in self._whole:
                self._make_room()
                engine = EngineThread(SlotEngine(self._with_weights(snapshot)))
                with self._changing:
                    self._whole[snapshot.name] = engine
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def of(self, name: str | None, shared: bool) -> EngineThread:
        """The engine that holds these weights.

        Raises:
            NotFoundError: they have left.
        """
        if name is None or shared:
            return self._shared
        with self._changing:
            if name not in self._whole:
                raise NotFoundError("these weights have left memory: repeat the request")
            self._whole.move_to_end(name)
            return self._whole[name]

    def names(self) -> list[str]:
        """Of all weights that are here, but for the base model's own."""
        resident = self._shared.do(lambda engine: engine.adapters.names).result()
        with self._changing:
            return [*resident, *self._whole]

    def forget(self, name: str) -> None:
        """Drops weights that nobody may use any more; while a request uses them they stay."""
        self._shared.do(lambda engine: engine.adapters.forget(name)).result()
        with self._changing:
            if name in self._whole and self._whole[name].idle:
                self._whole.pop(name).close()

    def _all(self) -> list[EngineThread]:
        with self._changing:
            return [self._shared, *self._whole.values()]

    def _make_room(self) -> None:
        """Waits until one is idle, where all places are taken."""
        deadline = time.monotonic() + ROOM_S
        while not self._dropped_one_where_full():
            if time.monotonic() > deadline:
                raise QueueFullError(
                    f"{MOST_WHOLE_MODELS} models with weights of their own have been answering for"
                    f" {ROOM_S:g} s: try again later"
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
        parameters, _ = make_trainable(base, snapshot.lora_config)
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                parameters[name].copy_(tensor)
        base.model.requires_grad_(False).eval()
        return base


def loader(model_ref: str, dtype: str, cache: Path) -> Callable[[], Base]:
    return lambda: Base.load(model_ref, cache=cache, dtype=dtype)


AT_ONCE = 4
"""Weights that are fetched at once for each tenant: each takes the memory of a copy meanwhile."""


class Fetches:
    """Of one replica; belongs to its event loop."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._threads = TenantThreads(AT_ONCE, "fetch")
        self._coming: dict[str | None, asyncio.Future[Future[None]]] = {}

    async def ahead(self, source: Source, tenant: str) -> Future[None] | None:
        """Sees that weights are in their engine, ahead of whatever is sent to it from now on; None
        where they are there. They are fetched once, however many ask for them."""
        if self._engines.has(source.name, source.shared):
            return None
        coming = self._coming.get(source.name)
        if coming is None:
            coming = self._threads.run(tenant, lambda: self._engines.add(source.fetch()))
            coming.add_done_callback(lambda _: self._coming.pop(source.name))
            self._coming[source.name] = coming
        return await asyncio.shield(coming)  # whoever leaves does not take it from the others
