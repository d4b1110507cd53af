"""Samples from one copy of a base model, for all runs trained on it.

Calls and replies are sealed, and failures are values. The event loop exchanges lists with the
engine's thread and never waits for a forward pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.process import collections_paused, reply_of, settle_heap
from actors.registry.audit_log import SDK
from actors.registry.registry import as_registry
from actors.sampling.grammar import Grammar, Grammars
from actors.sampling.requests import Load
from actors.sampling.text import Completions, check_length, join
from actors.storage.home import MODELS
from serve_app.replica.metrics import Watch, count_refusal, meters
from serve_app.replica.sources import Source, Sources
from serve_app.replica.threads import TenantThreads
from tg_tinker.cluster.messages import Reply, SampleRequest
from tg_tinker.cluster.named_actors import find_registry, keep_to_reserved_gpus
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.data.text import ChatPrompt, encode_prompt, load_tokenizer
from tg_tinker.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    TGTinkerError,
)
from tg_tinker.sampling import SamplingParams
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.types import SampleResult, StreamChunk

if TYPE_CHECKING:
    from serve_app.replica.engines import EngineThread

REPORT_S = 1.0
"""Seconds between two reports of the engines' load to the metrics."""

FORGET_S = 2.0
"""Seconds between two checks whether the artifacts in memory still exist."""

TEXTS = 2
"""The maximum number of texts that are encoded at the same time, for each tenant, and of answers
that are decoded."""

COMPILE_S = 5.0
"""Seconds in which a JSON schema must be compiled."""

ALL = ""
"""The value in place of a tenant for calls of the SDK, which are one domain of trust."""

_ATTEMPTS = 3
"""The number of attempts to queue a request whose weights leave memory before it is queued."""


@dataclass(repr=False)
class Running:
    """A queued call. Its engine delivers chunks, and `Replica.follow` reads them."""

    call: Completions
    engine: EngineThread
    arrived: asyncio.Event
    watch: Watch

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each prompt counted once."""
        return sum(len(request.prompt) for request in self.call.requests if not request.first)

    @property
    def prompts(self) -> int:
        return sum(not request.first for request in self.call.requests)


class Replica:
    """A replica; see the module. `http` adds routes, `application` makes it a Serve deployment."""

    def __init__(
        self, namespace: str, model_ref: str, dtype: str, home: str, store: str,
        threads: int | None,
    ) -> None:  # fmt: skip
        keep_to_reserved_gpus()
        # Here, because these load torch, and programs that deploy replicas import this file.
        with collections_paused():
            from actors.engine.model import use_threads
            from serve_app.replica.engines import Engines, Fetches, loader
        self._remote = RemoteRegistry(find_registry(namespace))
        self.registry, self._key = as_registry(self._remote), self._remote.key
        use_threads(threads)
        self.engines = Engines(loader(model_ref, dtype, Path(home) / MODELS))
        self.tokenizer = load_tokenizer(self.engines.base.tokenizer_files())
        settle_heap()
        self.sources = Sources(self.registry, self._key, namespace, store, model_ref)
        # Threads of their own, so that encoding waits for no other work.
        self.texts = TenantThreads(TEXTS, "text")
        self.answers = TenantThreads(TEXTS, "answer")
        self._schemas = TenantThreads(1, "schema")
        base = self.engines.base
        self._grammars = Grammars(self.tokenizer, base.vocab_size, base.eos_ids)
        self._fetches = Fetches(self.engines)
        # The newest step of each run that was sampled from.
        self._newest: dict[str, int] = {}
        self._reporting = asyncio.ensure_future(self._report())
        self._forgetting = asyncio.ensure_future(self._forget())

    # --- calls through a handle, sealed --------------------------------------------------------

    async def sample(self, sealed: bytes) -> bytes:
        """Takes a sealed `SampleRequest`, and returns a sealed `Reply` with a `SampleResult`."""
        try:
            request: SampleRequest = open_payload(self._key, sealed)
            source = self.sources.of_snapshot(request.snapshot)
            reply = Reply(await self.result(source, request.prompts, request.params))
        except Exception as error:
            reply = failure(error)
        return seal_payload(self._key, reply)

    async def stream(self, sealed: bytes) -> AsyncIterator[bytes]:
        """Takes a sealed `SampleRequest`, and yields sealed `Reply`s with one `StreamChunk` each.

        After an error, the last reply holds the error.
        """
        try:
            request: SampleRequest = open_payload(self._key, sealed)
            source = self.sources.of_snapshot(request.snapshot)
            running = await self.begin(source, request.prompts, request.params, source.version, ALL)
            async for chunk in self.follow(running):
                yield seal_payload(self._key, Reply(chunk))
        except Exception as error:
            yield seal_payload(self._key, failure(error))

    async def load(self) -> Load:
        """Returns the load of the engines."""
        return await asyncio.to_thread(self.engines.load)

    def forget_gone(self) -> None:
        """Drops the weights of artifacts that were deleted, shredded or have expired."""
        for name in self.sources.gone(self.engines.names()):
            self.engines.forget(name)

    def check_health(self) -> None:
        """Raises an error if an engine has died, so that Serve replaces the replica."""
        if not self.engines.alive:
            raise RuntimeError("a sampling engine has died")

    # --- what HTTP uses, too -------------------------------------------------------------------

    async def result(
        self, source: Source, prompts: Sequence[str], params: SamplingParams
    ) -> SampleResult:
        """Samples, and returns all completions."""
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
        """Queues a call in the engine with its weights. The weights are fetched first if needed.

        Args:
            owner: the engine gives slots to owners in turn; all calls of an owner share its turns.
            tenant: the tenant whose threads encode the prompts and fetch the weights.

        Raises:
            InvalidRequestError: the call can never run.
            NotFoundError: the weights are gone, or leave memory again and again.
        """
        grammar = await self._compiled(tenant, params)
        arrived, loop, watch = asyncio.Event(), asyncio.get_running_loop(), Watch()

        def make() -> Completions:
            encoded = zip(prompts, self.encode(prompts), strict=True)
            return Completions(
                self.tokenizer,
                [prompt if isinstance(prompt, ChatPrompt) else ids for prompt, ids in encoded],
                params,
                source.version,
                adapter=source.name if source.shared else None,
                owner=owner,
                notify=lambda: loop.call_soon_threadsafe(arrived.set),
                grammar=grammar,
            )

        call = await self.texts.run(tenant, make)
        for _ in range(_ATTEMPTS):
            adding = await self._fetches.ahead(source, tenant)
            try:
                engine = self.engines.of(source.name, source.shared)
                await asyncio.wrap_future(engine.do(lambda e: e.submit_all(call.requests)))
            except NotFoundError:
                if adding is not None:
                    adding.result()  # Done by now. Raises the error if the weights were refused.
                continue  # The weights left memory before the request pinned them.
            except asyncio.CancelledError:
                # The requests may be queued already.
                for request in call.requests:
                    engine.cancel(request)
                raise
            running = Running(call, engine, arrived, watch)
            watch.queued(running.prompt_tokens, self._lag(source.version))
            return running
        raise NotFoundError(
            f"the weights of {source.version} leave memory before they are used: sample from fewer"
            " runs at a time"
        )

    def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Returns the token ids of the prompts. It takes long for long texts.

        Raises:
            InvalidRequestError: a prompt is longer than the context.
        """
        for prompt in prompts:
            check_length(self.tokenizer, prompt, self.engines.base.context_length)
        return [encode_prompt(self.tokenizer, p) if isinstance(p, str) else p for p in prompts]

    async def follow(
        self, running: Running, deadline_s: float | None = None, tenant: str | None = None,
        who: str = SDK,
    ) -> AsyncGenerator[StreamChunk, None]:  # fmt: skip
        """Yields chunks as they arrive; if the caller leaves early, frees the slots within a step.

        Args:
            deadline_s: the maximum time in seconds; None is without limit.
            tenant, who: the caller, for the audit log; the tenant None is the run's tenant. Its
                threads look for stop sequences, and turn many tokens at a time into text.

        Raises:
            DeadlineExceededError: the call is not complete after `deadline_s`.
        """
        call, engine = running.call, running.engine
        ends = None if deadline_s is None else time.monotonic() + deadline_s
        # The outcome if the caller leaves; below, it is set for all other ends.
        outcome, tokens = "cancelled", 0
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
                if call.light:
                    chunks, error = _taken(call)
                else:
                    chunks, error = await self.answers.run(
                        ALL if tenant is None else tenant, partial(_taken, call)
                    )
                for chunk in chunks:
                    running.watch.delivered(call, chunk)
                    tokens += len(chunk.token_ids)
                    yield chunk
                if error is not None:
                    raise error
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

    async def _compiled(self, tenant: str, params: SamplingParams) -> Grammar | None:
        """Returns the schema of a call in the form for the engine; None if it has no schema.

        Raises:
            InvalidRequestError: the schema cannot be followed, or is not compiled in time. Its
                thread goes on then, and only calls of this tenant wait for it.
        """
        schema = params.json_schema
        if schema is None:
            return None
        # Not in the thread for schemas, where it would wait behind one without a limit.
        await self.texts.run(tenant, self._grammars.prepare)
        try:
            async with asyncio.timeout(COMPILE_S):
                return await self._schemas.run(tenant, lambda: self._grammars.compiled(schema))
        except TimeoutError:
            raise InvalidRequestError(
                f"the schema was not compiled within {COMPILE_S:g} s: simplify it",
                details={"parameter": "json_schema"},
            ) from None

    def _lag(self, version: str) -> int | None:
        """Returns how many steps the version is behind the newest one sampled here from its run.

        Returns None if the version has no step.
        """
        run, _, step = version.partition("@")
        if not step:
            return None
        self._newest[run] = max(int(step), self._newest.get(run, 0))
        return self._newest[run] - int(step)

    async def _report(self) -> None:
        while self.engines.alive:
            # An engine may end while its load is read.
            with contextlib.suppress(TGTinkerError):
                meters().load(await self.load())
            await asyncio.sleep(REPORT_S)

    async def _forget(self) -> None:
        """Drops the weights of deleted artifacts every `FORGET_S` seconds.

        So every replica drops them, even one that could not be reached at the time of a deletion.
        """
        while self.engines.alive:
            # The registry may not answer, or an engine may end.
            with contextlib.suppress(TGTinkerError):
                await asyncio.to_thread(self.forget_gone)
            await asyncio.sleep(FORGET_S)


def _taken(call: Completions) -> tuple[list[StreamChunk], TGTinkerError | None]:
    """Returns the chunks that have arrived, and the error that ended the call after them."""
    chunks: list[StreamChunk] = []
    try:
        chunks.extend(call.take())
    except TGTinkerError as error:
        return chunks, error
    return chunks, None


def failure(error: Exception) -> Reply:
    """Returns an error as a reply, and counts it.

    For an error that is not a `TGTinkerError`, the reply has only its type and location.
    """

    def again() -> Any:
        raise error

    reply = reply_of(again)
    if reply.code:
        count_refusal(reply.code)
    return reply
