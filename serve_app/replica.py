"""One copy of a base model that samples for all runs trained on it.

Calls come sealed and are answered sealed; failures are values. The event loop exchanges lists with
the engine's thread and never waits for a forward.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.completion import Completions, join
from actors.home import MODELS
from actors.model import use_threads
from actors.process import reply_of
from serve_app.engines import Engines, EngineThread, loader
from serve_app.sources import Source, Sources
from tg_tinker.cluster import RemoteRegistry, find_registry
from tg_tinker.envelope import open_payload, seal_payload
from tg_tinker.errors import DeadlineExceededError, NotFoundError
from tg_tinker.sampling import SamplingParams
from tg_tinker.text import load_tokenizer
from tg_tinker.types import SampleResult, StreamChunk
from tg_tinker.wire import Reply, SampleRequest

_ATTEMPTS = 3
"""Of fetching weights that leave again before their request is queued."""


@dataclass(repr=False)
class Running:
    """A call that is queued: its engine delivers, `Replica.follow` reads."""

    call: Completions
    engine: EngineThread
    arrived: asyncio.Event

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, once each."""
        return sum(len(request.prompt) for request in self.call.requests if not request.first)


class Replica:
    """See the module; `http` adds its routes, `application` makes it a Serve deployment."""

    def __init__(
        self, namespace: str, model_ref: str, dtype: str, home: str, store: str,
        threads: int | None,
    ) -> None:  # fmt: skip
        self.registry = RemoteRegistry(find_registry(namespace))
        self._key = self.registry.key
        use_threads(threads)
        self.engines = Engines(loader(model_ref, dtype, Path(home) / MODELS))
        self.tokenizer = load_tokenizer(self.engines.base.tokenizer_files())
        self.sources = Sources(self.registry.typed, self._key, namespace, store, model_ref)
        self._fetching = asyncio.Lock()

    # --- calls through a handle, sealed --------------------------------------------------------

    async def sample(self, sealed: bytes) -> bytes:
        """A sealed `SampleRequest` in; a sealed `Reply` with a `SampleResult` out."""
        try:
            request: SampleRequest = open_payload(self._key, sealed)
            source = self.sources.of_snapshot(request.snapshot)
            reply = Reply(await self.result(source, request.prompts, request.params))
        except Exception as error:
            reply = failure(error)
        return seal_payload(self._key, reply)

    async def stream(self, sealed: bytes) -> AsyncIterator[bytes]:
        """The same, a sealed `Reply` with a `StreamChunk` at a time; an error is the last."""
        try:
            request: SampleRequest = open_payload(self._key, sealed)
            source = self.sources.of_snapshot(request.snapshot)
            running = await self.begin(source, request.prompts, request.params)
            async for chunk in self.follow(running):
                yield seal_payload(self._key, Reply(chunk))
        except Exception as error:
            yield seal_payload(self._key, failure(error))

    def check_health(self) -> None:
        if not self.engines.alive:
            raise RuntimeError("a sampling engine has died")

    # --- what HTTP uses, too -------------------------------------------------------------------

    async def result(
        self, source: Source, prompts: Sequence[str], params: SamplingParams
    ) -> SampleResult:
        """All completions."""
        started = time.perf_counter()
        running = await self.begin(source, prompts, params)
        timed = [
            (chunk, 1e3 * (time.perf_counter() - started)) async for chunk in self.follow(running)
        ]
        samples = join(prompts, params.num_completions, timed)
        return SampleResult(
            samples=samples,
            total_tokens=sum(s.num_tokens for s in samples),
            latency_ms=1e3 * (time.perf_counter() - started),
            weights_version=source.version,
        )

    async def begin(
        self, source: Source, prompts: Sequence[str | list[int]], params: SamplingParams
    ) -> Running:
        """Queues a call where its weights are, which are fetched first where they are not.

        Raises:
            InvalidRequestError: it can never run.
            NotFoundError: its weights are gone.
        """
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        call = Completions(
            self.tokenizer,
            prompts,
            params,
            source.version,
            adapter=source.name if source.shared else None,
            notify=lambda: loop.call_soon_threadsafe(arrived.set),
        )
        for _ in range(_ATTEMPTS):
            engine = await self._engine(source)
            try:
                await asyncio.wrap_future(engine.do(lambda e: e.submit_all(call.requests)))
            except NotFoundError:
                continue  # the weights left again before they were pinned
            except BaseException:  # a client that leaves now, too: the work may be done already
                for request in call.requests:
                    engine.cancel(request)
                raise
            return Running(call, engine, arrived)
        raise NotFoundError(
            f"the weights of {source.version} leave memory faster than they are used: sample from"
            " fewer runs at a time"
        )

    async def follow(
        self, running: Running, deadline_s: float | None = None
    ) -> AsyncIterator[StreamChunk]:
        """Chunks as they grow; leaving it early frees the slots within a step.

        Raises:
            DeadlineExceededError: it is not done after this time.
        """
        call, engine = running.call, running.engine
        ends = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            while call.open:
                left = None if ends is None else ends - time.monotonic()
                try:
                    await asyncio.wait_for(running.arrived.wait(), left)
                except TimeoutError:
                    raise DeadlineExceededError(
                        f"the answer was not complete after {deadline_s:g} s: ask for fewer tokens"
                    ) from None
                running.arrived.clear()
                for chunk in call.take():
                    yield chunk
                for stopped in call.stopped():
                    engine.cancel(*stopped)
        finally:
            for one in call.requests:
                engine.cancel(one)

    # --- inside ------------------------------------------------------------------------------

    async def _engine(self, source: Source) -> EngineThread:
        if await asyncio.wrap_future(self.engines.has(source.name, source.shared)):
            return self.engines.of(source.name, source.shared)
        async with self._fetching:
            if not await asyncio.wrap_future(self.engines.has(source.name, source.shared)):
                await asyncio.to_thread(lambda: self.engines.add(source.fetch()))
            return self.engines.of(source.name, source.shared)


def failure(error: Exception) -> Reply:
    """An error as a value; one that is not ours by its type and place only."""

    def again() -> Any:
        raise error

    return reply_of(again)
