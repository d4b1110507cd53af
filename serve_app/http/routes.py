"""Serves the HTTP routes of the sampling application.

The routes are OpenAI's `/v1/completions`, `/v1/chat/completions` and `/v1/models`, our own
`/v1/sample`, and `/healthz`. No text of a request appears in a log or an error.
"""

# At `ingress` below, Serve copies the routes with the names they use. So types are not strings here
# (no `from __future__ import annotations`), and nothing is defined after the class.
import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve

from actors.process import forget_keyrings, harden
from actors.sampling.text import by_completion, check_length, is_light
from serve_app.http.access import Access, Caller, HttpOptions
from serve_app.http.bodies import check_type
from serve_app.http.events import line, lines, with_pulse
from serve_app.http.openai import (
    Answer,
    Body,
    ChatBody,
    CompletionBody,
    SampleBody,
    best,
    check_count,
    check_scores,
    sample_event,
    sampled,
    usage,
)
from serve_app.http.refusals import install, parsed
from serve_app.http.sealed import ReplicaEnd
from serve_app.replica.replica import Replica, Running
from serve_app.replica.sources import BASE, BASE_SOURCE, Source, no_model
from serve_app.replica.threads import TenantThreads
from tg_tinker.data.chat import render_messages
from tg_tinker.data.text import ChatPrompt
from tg_tinker.errors import DeadlineExceededError, QueueFullError, VersionGoneError
from tg_tinker.sampling import SamplingParams, check_prompts
from tg_tinker.types import StreamChunk

MOST_BODY_BYTES = 2**20
BODY_S = 10.0
"""Seconds that a body may take to arrive."""

WAIT_S, POLL_S, MOST_WAITING = 10.0, 0.2, 32
"""For `RUN@>=STEP`: how long to wait for the step and to pause between checks, in seconds, and the
maximum number of waiting requests of a tenant."""

LOOK_S = 1.0
"""Seconds after which a request that draws nothing looks whether its caller still has access."""

LOOKUPS = 8
"""The maximum number of concurrent lookups of weights for each tenant."""

_Body = TypeVar("_Body", bound=Body)
_Read = TypeVar("_Read")

# No redirects: they would lead to the host that the request names, which may be anyone's.
api = FastAPI(
    title="TG-Tinker", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
)
install(api, MOST_BODY_BYTES)
api.add_middleware(ReplicaEnd)  # The middleware that is added last is the outermost.


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
        self._waiting: Counter[str] = Counter()  # By tenant.

    # --- routes ------------------------------------------------------------------------------

    @api.get("/healthz")
    async def healthz(self) -> Response:
        alive = self.engines.alive
        return JSONResponse({"status": "ok" if alive else "engine died"}, 200 if alive else 503)

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": await self._models(request)}

    # A path: a name with a slash in it is a name that does not exist, not another route.
    @api.get("/v1/models/{model:path}")
    async def model(self, request: Request, model: str) -> dict[str, Any]:
        for listed in await self._models(request):
            if listed["id"] == model:
                return listed
        raise no_model(model)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        caller, (body, ids, params, echoes) = await self._asked(
            request, CompletionBody, self._completion
        )
        running = await self._begun(caller, body.model, ids, params)
        return await self._answer(caller, running, body, echoes, ids)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        caller, (body, prompt, params) = await self._asked(request, ChatBody, self._chat)
        running = await self._begun(caller, body.model, [prompt], params)
        return await self._answer(caller, running, body, [""])

    @api.post("/v1/sample")
    async def sample_native(self, request: Request) -> Response:
        caller, (body, ids, params) = await self._asked(request, SampleBody, self._sample)
        running = await self._begun(caller, body.model, ids, params)
        if body.stream:
            return await self._events(caller, running, sample_event)
        parts = best(await self._all(caller, running), params.num_completions, body.kept)
        told = {"weights_version": running.call.version, "prompt_tokens": running.prompt_tokens}
        return await self.answers.run(
            caller.tenant, lambda: JSONResponse({"samples": sampled(parts, body.kept), **told})
        )

    # --- the way of a request ------------------------------------------------------------------

    async def _models(self, request: Request) -> list[dict[str, Any]]:
        """Returns the models that the sender of a request may name."""
        caller = await self._access.caller(request)
        with self._access.arriving(caller):
            names = await self._lookups.run(
                caller.tenant, lambda: self.sources.names(caller.tenant, caller.models)
            )
        return [{"id": name, "object": "model", "created": 0, "owned_by": caller.tenant}
                for name in names]  # fmt: skip

    async def _asked(
        self, request: Request, kind: type[_Body], read: Callable[[_Body], _Read]
    ) -> tuple[Caller, _Read]:
        """Authenticates the caller, then reads and parses the body; returns both.

        Every route with a body begins here. A body is read only for a caller with access, a key
        cannot send more bodies at once than it may have concurrent requests, and the threads of the
        tenant parse them.

        Args:
            read: turns the body into what the route needs, in the same thread right after parsing.
                So a body that it refuses does not wait in memory behind other bodies.

        Raises:
            AccessDeniedError: the request has no key, or an invalid key.
            QueueFullError: too many requests of this key are running.
            InvalidRequestError: the body is not JSON, does not have this format, or is refused.
            DeadlineExceededError: the body did not arrive in time.
        """
        caller = await self._access.caller(request)
        check_type(request)
        with self._access.arriving(caller):
            try:
                async with asyncio.timeout(BODY_S):
                    content = await request.body()
            except TimeoutError:
                raise DeadlineExceededError(
                    f"the body was not complete after {BODY_S:g} s: send it faster"
                ) from None
            return caller, await self.texts.run(caller.tenant, lambda: read(parsed(kind, content)))

    def _completion(
        self, body: CompletionBody
    ) -> tuple[CompletionBody, list[list[int]], SamplingParams, list[str]]:
        """Returns a body, the tokens of its prompts, its parameters and its echoes."""
        prompts, params = body.prompts(), body.params()
        ids = self._ids(prompts, params)
        return body, ids, params, [self._as_text(p) if body.echo else "" for p in prompts]

    def _chat(self, body: ChatBody) -> tuple[ChatBody, ChatPrompt, SamplingParams]:
        messages, context = body.plain_messages(), self.engines.base.context_length
        check_length(self.tokenizer, "".join(one["content"] for one in messages), context)
        prompt = render_messages(self.tokenizer, messages)
        return body, prompt, body.params(context - len(prompt.token_ids))

    def _sample(self, body: SampleBody) -> tuple[SampleBody, list[list[int]], SamplingParams]:
        params = body.params()
        return body, self._ids(check_prompts(body.prompts), params), params

    def _ids(self, prompts: Sequence[str | list[int]], params: SamplingParams) -> list[list[int]]:
        """Returns the tokens of the prompts, of which there are few enough for one answer."""
        check_count(len(prompts), params)
        ids = self.encode(prompts)
        check_scores(ids, params)
        return ids

    async def _answer(
        self, caller: Caller, running: Running, body: CompletionBody | ChatBody, echoes: list[str],
        prompts: Sequence[list[int]] = (),
    ) -> Response:  # fmt: skip
        answer = await self.answers.run(
            caller.tenant,
            lambda: Answer(body, self.tokenizer, echoes, running.call.version, prompts),
        )
        if not body.stream:
            parts = await self._all(caller, running)
            drawn = sum(len(chunk.token_ids) for part in parts for chunk in part)
            counts = usage(running.prompt_tokens, drawn)
            kept = best(parts, running.call.count // running.prompts, body.kept)
            return await self.answers.run(
                caller.tenant, lambda: JSONResponse(answer.whole(kept, counts))
            )
        wanted = body.stream_options is not None and body.stream_options.include_usage
        last = answer.usage_event if wanted else None
        return await self._events(caller, running, answer.event, last)

    async def _begun(
        self, caller: Caller, model: str, prompts: Sequence[str | list[int]],
        params: SamplingParams,
    ) -> Running:  # fmt: skip
        """Checks and queues a request. All refusals happen here, before the response begins."""
        self._access.enter(caller, params.max_tokens * params.num_completions * len(prompts))
        try:
            source = await self._source(caller, model)
            return await self.begin(source, prompts, params, caller.key_id, caller.tenant)
        except BaseException:
            self._access.leave(caller)
            raise

    async def _source(self, caller: Caller, model: str) -> Source:
        """Returns the weights that a request names; for `RUN@>=STEP`, waits for the step."""
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
                        f"{MOST_WAITING} requests are waiting for later steps already: try again"
                        " later"
                    )
                self._waiting[caller.tenant] += not waits
                waits = True
                await asyncio.sleep(POLL_S)
        finally:
            self._waiting[caller.tenant] -= waits

    async def _followed(
        self, caller: Caller, running: Running
    ) -> AsyncGenerator[StreamChunk, None]:
        """Yields the chunks of a request, as long as its caller has access."""
        chunks = self.follow(running, self._options.deadline_s, caller.tenant, caller.who)
        try:
            async with aclosing(with_pulse(chunks, LOOK_S)) as looked_at:
                async for chunk in looked_at:
                    await self._access.still(caller)
                    if chunk is not None:
                        yield chunk
        finally:
            self._access.leave(caller)

    async def _all(self, caller: Caller, running: Running) -> list[list[StreamChunk]]:
        """Returns the chunks of each completion."""
        chunks = [chunk async for chunk in self._followed(caller, running)]
        return by_completion(chunks, running.call.count)

    async def _events(
        self, caller: Caller, running: Running, event: Any, last: Any = None
    ) -> StreamingResponse:
        """Returns the response as server-sent events."""
        drawn = 0

        async def written() -> AsyncGenerator[str, None]:
            nonlocal drawn
            async with aclosing(self._followed(caller, running)) as chunks:
                async for chunk in chunks:
                    drawn += len(chunk.token_ids)
                    write = partial(lambda chunk: line(event(chunk)), chunk)
                    short = is_light(chunk)
                    yield write() if short else await self.answers.run(caller.tenant, write)

        def closing() -> Any:
            return None if last is None else last(usage(running.prompt_tokens, drawn))

        events = with_pulse(written())
        # The first event is taken here. If the client leaves before the response begins, a
        # generator that never started would never release the request.
        first = await anext(events)
        return StreamingResponse(lines(first, events, closing), media_type="text/event-stream")

    def _as_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return text
