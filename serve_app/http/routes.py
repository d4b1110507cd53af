"""The HTTP side of the sampling application: its routes, and the way of a request.

OpenAI's `/v1/completions`, `/v1/chat/completions` and `/v1/models`, our own `/v1/sample`, and
`/healthz`. No text of a request is in any log or error.
"""

# Serve copies the routes, with the names they use, when `ingress` below is reached: types are no
# strings here (no `from __future__ import annotations`), and nothing is defined after the class.
import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve

from actors.process import forget_keyrings, harden
from actors.sampling.text import by_completion
from serve_app.http.access import Access, Caller, HttpOptions
from serve_app.http.events import lines, with_pulse
from serve_app.http.openai import (
    MOST_COMPLETIONS,
    Answer,
    ChatBody,
    CompletionBody,
    SampleBody,
    finite,
    sample_event,
    usage,
)
from serve_app.http.refusals import install, parsed
from serve_app.http.sealed import ReplicaEnd
from serve_app.replica.replica import Replica, Running
from serve_app.replica.sources import BASE, BASE_SOURCE, Source
from serve_app.replica.threads import TenantThreads
from tg_tinker.data.chat import render_messages
from tg_tinker.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    VersionGoneError,
)
from tg_tinker.sampling import SamplingParams, check_prompts
from tg_tinker.types import StreamChunk

MOST_BODY_BYTES = 2**20
BODY_S = 10.0
"""How long a body may take to arrive."""

WAIT_S, POLL_S, MOST_WAITING = 10.0, 0.2, 32
"""How long `RUN@>=STEP` waits for its step, how often it looks, how many of a tenant wait."""

LOOKUPS = 8
"""Names of weights that are looked up at once, of each tenant."""

_Body = TypeVar("_Body", CompletionBody, ChatBody, SampleBody)

api = FastAPI(title="TG-Tinker", docs_url=None, redoc_url=None, openapi_url=None)
install(api, MOST_BODY_BYTES)
api.add_middleware(ReplicaEnd)  # the last one is the outermost


@serve.ingress(api)
class HttpReplica(Replica):
    """A replica that also answers HTTP."""

    def __init__(self, options: HttpOptions, *arguments: Any) -> None:
        harden()
        forget_keyrings()
        super().__init__(*arguments)
        self._options = options
        self._access = Access(self.registry, options, self.sources.store)
        self._lookups = TenantThreads(LOOKUPS, "lookup")
        self._waiting: Counter[str] = Counter()  # by tenant

    # --- routes ------------------------------------------------------------------------------

    @api.get("/healthz")
    async def healthz(self) -> Response:
        alive = self.engines.alive
        return JSONResponse({"status": "ok" if alive else "engine died"}, 200 if alive else 503)

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        caller = await self._access.caller(request)
        with self._access.arriving(caller):
            names = await self._lookups.run(
                caller.tenant, lambda: self.sources.names(caller.tenant, caller.models)
            )
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": caller.tenant}
                  for name in names]  # fmt: skip
        return {"object": "list", "data": listed}

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        async with self._asked(request, CompletionBody) as (caller, body):
            prompts, params = body.prompts(), body.params()
        running = await self._begun(caller, body.model, prompts, params)
        echoes = [self._as_text(p) if body.echo else "" for p in prompts]
        return await self._answer(caller, running, body, echoes)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        async with self._asked(request, ChatBody) as (caller, body):
            messages = [message.plain() for message in body.messages]
            prompt = await self.texts.run(
                caller.tenant, lambda: render_messages(self.tokenizer, messages)
            )
            (ids,) = await self.encoded(caller.tenant, [prompt])
            params = body.params(self.engines.base.context_length - len(ids))
        running = await self._begun(caller, body.model, [ids], params)
        return await self._answer(caller, running, body, [""])

    @api.post("/v1/sample")
    async def sample_native(self, request: Request) -> Response:
        async with self._asked(request, SampleBody) as (caller, body):
            prompts, params = check_prompts(body.prompts), body.params()
        running = await self._begun(caller, body.model, prompts, params)
        if body.stream:
            return await self._events(caller, running, sample_event)
        parts = await self._all(caller, running)
        samples = [
            {"prompt_index": i // params.num_completions,
             "completion": "".join(chunk.text for chunk in part),
             "token_ids": [t for chunk in part for t in chunk.token_ids],
             "logprobs": [finite(p) for chunk in part for p in chunk.logprobs],
             "top_logprobs": [t for chunk in part for t in chunk.top_logprobs],
             "prompt_logprobs": sample_event(part[0])["prompt_logprobs"],
             "finish_reason": part[-1].finish_reason}
            for i, part in enumerate(parts)
        ]  # fmt: skip
        return JSONResponse(
            {"samples": samples, "weights_version": running.call.version,
             "prompt_tokens": running.prompt_tokens}
        )  # fmt: skip

    # --- the way of a request ------------------------------------------------------------------

    @asynccontextmanager
    async def _asked(
        self, request: Request, kind: type[_Body]
    ) -> AsyncGenerator[tuple[Caller, _Body], None]:
        """Who asks, and then for what: nobody without a key has a body read, and nobody more of
        them at once than may be answered.

        Raises:
            AccessDeniedError: no key, or one that opens nothing.
            QueueFullError: too many requests of this key.
            InvalidRequestError: the body is none of this kind.
            DeadlineExceededError: it did not arrive in time.
        """
        caller = await self._access.caller(request)
        with self._access.arriving(caller):
            try:
                async with asyncio.timeout(BODY_S):
                    content = await request.body()
            except TimeoutError:
                raise DeadlineExceededError(
                    f"the body was not complete after {BODY_S:g} s: send it at once"
                ) from None
            yield caller, parsed(kind, content)

    async def _answer(
        self, caller: Caller, running: Running, body: CompletionBody | ChatBody, echoes: list[str]
    ) -> Response:
        answer = Answer(body, self.tokenizer, echoes, running.call.version)
        if not body.stream:
            parts = await self._all(caller, running)
            drawn = sum(len(chunk.token_ids) for part in parts for chunk in part)
            counts = usage(running.prompt_tokens, drawn)
            return await self.texts.run(
                caller.tenant, lambda: JSONResponse(answer.whole(parts, counts))
            )
        wanted = body.stream_options is not None and body.stream_options.include_usage
        last = answer.usage_event if wanted else None
        return await self._events(caller, running, answer.event, last)

    async def _begun(
        self, caller: Caller, model: str, prompts: Sequence[str | list[int]],
        params: SamplingParams,
    ) -> Running:  # fmt: skip
        """Everything that can be refused, before the first byte of the answer."""
        count = len(prompts) * params.num_completions
        if count > MOST_COMPLETIONS:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with {params.num_completions} completions each are more"
                f" than the {MOST_COMPLETIONS} of one request: send less at a time"
            )
        self._access.enter(caller, params.max_tokens * count)
        try:
            source = await self._source(caller, model)
            return await self.begin(source, prompts, params, caller.key_id, caller.tenant)
        except BaseException:
            self._access.leave(caller)
            raise

    async def _source(self, caller: Caller, model: str) -> Source:
        """The weights a request names; waits for a step that is to come."""
        if model == BASE:
            return BASE_SOURCE
        find = partial(self.sources.find, caller.tenant, caller.models, model, caller.who)
        deadline, waits = time.monotonic() + WAIT_S, False
        try:
            while True:
                try:
                    return await self._lookups.run(caller.tenant, find)
                except VersionGoneError as gone:
                    if not gone.details.get("later") or time.monotonic() > deadline:
                        raise
                if not waits and self._waiting[caller.tenant] >= MOST_WAITING:
                    raise QueueFullError(
                        f"{MOST_WAITING} requests wait for steps to come already: ask again later"
                    )
                self._waiting[caller.tenant] += not waits
                waits = True
                await asyncio.sleep(POLL_S)
        finally:
            self._waiting[caller.tenant] -= waits

    async def _followed(
        self, caller: Caller, running: Running
    ) -> AsyncGenerator[StreamChunk, None]:
        try:
            deadline = self._options.deadline_s
            async for chunk in self.follow(running, deadline, caller.tenant, caller.who):
                yield chunk
        finally:
            self._access.leave(caller)

    async def _all(self, caller: Caller, running: Running) -> list[list[StreamChunk]]:
        """The chunks of each completion."""
        chunks = [chunk async for chunk in self._followed(caller, running)]
        return by_completion(chunks, running.call.count)

    async def _events(
        self, caller: Caller, running: Running, event: Any, last: Any = None
    ) -> StreamingResponse:
        """Server-sent events."""
        drawn = 0

        def counted(chunk: StreamChunk) -> Any:
            nonlocal drawn
            drawn += len(chunk.token_ids)
            return event(chunk)

        def closing() -> Any:
            return None if last is None else last(usage(running.prompt_tokens, drawn))

        chunks = with_pulse(self._followed(caller, running))
        # Taken here: a generator that was never begun would never give back what it holds, should
        # the client have left before the answer begins.
        first = await anext(chunks)
        return StreamingResponse(
            lines(first, chunks, counted, closing), media_type="text/event-stream"
        )

    def _as_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return text
