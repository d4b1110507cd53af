"""One copy of a base model that samples for all runs trained on it.

Calls come sealed and are answered sealed; failures are values. The event loop exchanges lists with
the engine's thread and never waits for a forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine.model import use_threads
from actors.process import reply_of, settle_heap
from actors.registry.audit_log import SDK
from actors.registry.registry import as_registry
from actors.sampling.requests import Load
from actors.sampling.text import Completions, join
from actors.storage.home import MODELS
from serve_app.replica.engines import Engines, EngineThread, Fetches, loader
from serve_app.replica.metrics import Watch, count_refusal, meters
from serve_app.replica.sources import Source, Sources
from serve_app.replica.threads import TenantThreads
from tg_tinker.cluster.messages import Reply, SampleRequest
from tg_tinker.cluster.named_actors import find_registry, keep_to_reserved_gpus
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.data.text import encode_prompt, load_tokenizer
from tg_tinker.errors import DeadlineExceededError, InternalError, NotFoundError, TGTinkerError
from tg_tinker.sampling import SamplingParams
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.types import SampleResult, StreamChunk

REPORT_S = 1.0
"""Between two looks at how full the engines are, for the metrics."""

FORGET_S = 2.0
"""Between two looks whether artifacts that are held still exist."""

TEXTS = 2
"""Texts that are turned into tokens or back at once, of each tenant."""

ALL = ""
"""In place of a tenant, over the SDK: one domain of trust."""

_ATTEMPTS = 3
"""Of fetching weights that leave again before their request is queued."""


@dataclass(repr=False)
class Running:
    """A call that is queued: its engine delivers, `Replica.follow` reads."""

    call: Completions
    engine: EngineThread
    arrived: asyncio.Event
    watch: Watch

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, once each."""
        return sum(len(request.prompt) for request in self.call.requests if not request.first)

    @property
    def prompts(self) -> int:
        return sum(not request.first for request in self.call.requests)


class Replica:
    """See the module; `http` adds its routes, `application` makes it a Serve deployment."""

    def __init__(
        self, namespace: str, model_ref: str, dtype: str, home: str, store: str,
        threads: int | None,
    ) -> None:  # fmt: skip
        keep_to_reserved_gpus()
        self._remote = RemoteRegistry(find_registry(namespace))
        self.registry, self._key = as_registry(self._remote), self._remote.key
        use_threads(threads)
        self.engines = Engines(loader(model_ref, dtype, Path(home) / MODELS))
        self.tokenizer = load_tokenizer(self.engines.base.tokenizer_files())
        settle_heap()
        self.sources = Sources(self.registry, self._key, namespace, store, model_ref)
        self.texts = TenantThreads(TEXTS, "text")  # they wait for nothing else
        self._fetches = Fetches(self.engines)
        self._newest: dict[str, int] = {}  # step of each run that was sampled from
        self._reporting = asyncio.ensure_future(self._report())
        self._forgetting = asyncio.ensure_future(self._forget())

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
            running = await self.begin(source, request.prompts, request.params, source.version, ALL)
            async for chunk in self.follow(running):
                yield seal_payload(self._key, Reply(chunk))
        except Exception as error:
            yield seal_payload(self._key, failure(error))

    async def load(self) -> Load:
        """How full the engines are."""
        return await asyncio.to_thread(self.engines.load)

    def forget_gone(self) -> None:
        """Drops the weights of artifacts that were deleted, shredded or have expired."""
        for name in self.sources.gone(self.engines.names()):
            self.engines.forget(name)

    def check_health(self) -> None:
        if not self.engines.alive:
            raise RuntimeError("a sampling engine has died")

    # --- what HTTP uses, too -------------------------------------------------------------------

    async def result(
        self, source: Source, prompts: Sequence[str], params: SamplingParams
    ) -> SampleResult:
        """All completions."""
        started = time.perf_counter()
        running = await self.begin(source, prompts, params, source.version, ALL)
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
        self, source: Source, prompts: Sequence[str | list[int]], params: SamplingParams,
        owner: str, tenant: str,
    ) -> Running:  # fmt: skip
        """Queues a call where its weights are, which are fetched first where they are not.

        Args:
            owner: whose turns it shares in the engine.
            tenant: whose threads read the prompts and fetch the weights.

        Raises:
            InvalidRequestError: it can never run.
            NotFoundError: its weights are gone.
        """
        arrived, loop, watch = asyncio.Event(), asyncio.get_running_loop(), Watch()
        call = Completions(
            self.tokenizer,
            await self.encoded(tenant, prompts),
            params,
            source.version,
            adapter=source.name if source.shared else None,
            owner=owner,
            notify=lambda: loop.call_soon_threadsafe(arrived.set),
        )
        for _ in range(_ATTEMPTS):
            adding = await self._fetches.ahead(source, tenant)
            try:
                engine = self.engines.of(source.name, source.shared)
                await asyncio.wrap_future(engine.do(lambda e: e.submit_all(call.requests)))
            except NotFoundError:
                if adding is not None:
                    adding.result()  # done before: why they are not there
                continue  # the weights left again before they were pinned
            except asyncio.CancelledError:  # the work may be done already
                for request in call.requests:
                    engine.cancel(request)
                raise
            running = Running(call, engine, arrived, watch)
            watch.queued(running.prompt_tokens, self._lag(source.version))
            return running
        raise NotFoundError(
            f"the weights of {source.version} leave memory faster than they are used: sample from"
            " fewer runs at a time"
        )

    async def encoded(self, tenant: str, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids; the event loop goes on meanwhile."""
        return await self.texts.run(
            tenant,
            lambda: [
                encode_prompt(self.tokenizer, p) if isinstance(p, str) else p for p in prompts
            ],
        )

    async def follow(
        self, running: Running, deadline_s: float | None = None, tenant: str | None = None,
        who: str = SDK,
    ) -> AsyncIterator[StreamChunk]:  # fmt: skip
        """Chunks as they grow; leaving it early frees the slots within a step.

        Args:
            tenant, who: ask, for the audit log; None is the run's tenant.

        Raises:
            DeadlineExceededError: it is not done after this time.
        """
        call, engine = running.call, running.engine
        ends = None if deadline_s is None else time.monotonic() + deadline_s
        outcome, tokens = "cancelled", 0  # unless it is said below how it ended
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
                    running.watch.delivered(call, chunk)
                    tokens += len(chunk.token_ids)
                    yield chunk
                for stopped in call.stopped():
                    engine.cancel(*stopped)
            outcome = "ok"
        except Exception as error:
            outcome = error.code if isinstance(error, TGTinkerError) else InternalError.code
            raise
        finally:
            for one in call.requests:
                engine.cancel(one)
            self._remote.notify(
                "audit_log.record_sample",
                tenant,
                who,
                call.version,
                running.prompts,
                tokens,
                outcome,
            )

    # --- inside ------------------------------------------------------------------------------

    def _lag(self, version: str) -> int | None:
        """Steps behind the newest weights of its run that were asked for here."""
        run, _, step = version.partition("@")
        if not step:
            return None
        self._newest[run] = max(int(step), self._newest.get(run, 0))
        return self._newest[run] - int(step)

    async def _report(self) -> None:
        while self.engines.alive:
            with contextlib.suppress(TGTinkerError):  # an engine left while it was asked
                meters().load(await self.load())
            await asyncio.sleep(REPORT_S)

    async def _forget(self) -> None:
        """Asks again and again: so every replica learns of it, whoever could not reach it then."""
        while self.engines.alive:
            with contextlib.suppress(TGTinkerError):  # no registry, or an engine left
                await asyncio.to_thread(self.forget_gone)
            await asyncio.sleep(FORGET_S)


def failure(error: Exception) -> Reply:
    """An error as a value; one that is not ours by its type and place only."""

    def again() -> Any:
        raise error

    reply = reply_of(again)
    if reply.code:
        count_refusal(reply.code)
    return reply
