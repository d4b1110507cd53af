"""One copy of a base model that samples for all runs trained on it.

Calls come sealed and are answered sealed; failures are values. The event loop exchanges lists with
the engine's thread and never waits for a forward.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from actors.completion import Completions, join
from actors.generation import SlotEngine
from actors.home import MODELS
from actors.model import use_threads
from actors.process import reply_of
from actors.snapshots import opened
from serve_app.engines import Engines, EngineThread, loader
from tg_tinker.cluster import RemoteRegistry, fetch_snapshot, find_registry
from tg_tinker.envelope import open_payload, seal_payload
from tg_tinker.errors import NotFoundError, TGTinkerError
from tg_tinker.text import load_tokenizer
from tg_tinker.types import SampleResult, StreamChunk
from tg_tinker.wire import Reply, SampleRequest, SnapshotRef

_ATTEMPTS = 3
"""Of fetching weights that leave again before their request is queued."""


class Replica:
    """See the module; `application` makes it a Serve deployment."""

    def __init__(
        self, namespace: str, model_ref: str, dtype: str, home: str, threads: int | None
    ) -> None:
        self._namespace = namespace
        self._key = RemoteRegistry(find_registry(namespace)).key
        use_threads(threads)
        self._engines = Engines(loader(model_ref, dtype, Path(home) / MODELS))
        self._tokenizer = load_tokenizer(self._engines.base.tokenizer_files())
        self._fetching = asyncio.Lock()

    async def sample(self, sealed: bytes) -> bytes:
        """A sealed `SampleRequest` in; a sealed `Reply` with a `SampleResult` out."""
        started = time.perf_counter()
        request: SampleRequest = open_payload(self._key, sealed)
        try:
            timed = [
                (chunk, 1e3 * (time.perf_counter() - started)) async for chunk in self._run(request)
            ]
            samples = join(request.prompts, request.params.num_completions, timed)
            result = SampleResult(
                samples=samples,
                total_tokens=sum(s.num_tokens for s in samples),
                latency_ms=1e3 * (time.perf_counter() - started),
                weights_version=request.snapshot.version,
            )
            reply = Reply(result)
        except Exception as error:
            reply = _failure(error)
        return seal_payload(self._key, reply)

    async def stream(self, sealed: bytes) -> AsyncIterator[bytes]:
        """The same, a sealed `Reply` with a `StreamChunk` at a time; an error is the last."""
        request: SampleRequest = open_payload(self._key, sealed)
        try:
            async for chunk in self._run(request):
                yield seal_payload(self._key, Reply(chunk))
        except Exception as error:
            yield seal_payload(self._key, _failure(error))

    def check_health(self) -> None:
        if not self._engines.alive:
            raise RuntimeError("a sampling engine has died")

    # --- inside ------------------------------------------------------------------------------

    async def _run(self, request: SampleRequest) -> AsyncIterator[StreamChunk]:
        """Chunks as they grow; leaving it early frees the slots within a step."""
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        call = Completions(
            self._tokenizer,
            request.prompts,
            request.params,
            request.snapshot.version,
            adapter=request.snapshot.name if request.snapshot.shared else None,
            notify=lambda: loop.call_soon_threadsafe(arrived.set),
        )
        engine = await self._queued(call, request.snapshot)
        try:
            while call.open:
                await arrived.wait()
                arrived.clear()
                for chunk in call.take():
                    yield chunk
                for stopped in call.stopped():
                    engine.cancel(*stopped)
        finally:
            for one in call.requests:
                engine.cancel(one)

    async def _queued(self, call: Completions, snapshot: SnapshotRef) -> EngineThread:
        """Queues the call where its weights are, which are fetched first where they are not."""

        def submit(engine: SlotEngine) -> None:
            engine.submit_all(call.requests)

        for _ in range(_ATTEMPTS):
            async with self._fetching:
                if not await asyncio.wrap_future(self._engines.has(snapshot.name, snapshot.shared)):
                    await asyncio.to_thread(self._fetch, snapshot)
                engine = self._engines.of(snapshot.name, snapshot.shared)
            try:
                await asyncio.wrap_future(engine.do(submit))
            except NotFoundError:
                continue
            return engine
        raise NotFoundError(
            f"the weights of {snapshot.version} leave memory faster than they are used: sample"
            " from fewer runs at a time"
        )

    def _fetch(self, snapshot: SnapshotRef) -> None:
        sealed = fetch_snapshot(self._namespace, snapshot.actor, snapshot.name)
        self._engines.add(opened(open_payload(self._key, sealed).unwrap()))


def _failure(error: Exception) -> Reply:
    def again() -> Any:
        raise error

    if isinstance(error, TGTinkerError):
        return Reply(error=error.to_wire())
    return reply_of(again)
