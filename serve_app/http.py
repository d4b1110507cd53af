"""The HTTP side of the sampling application: its routes, and the way of a request.

OpenAI's `/v1/completions`, `/v1/chat/completions` and `/v1/models`, our own `/v1/sample`, and
`/healthz`. No text of a request is in any log or error.
"""

# Serve copies the routes, with the names they use, when `ingress` below is reached: types are no
# strings here (no `from __future__ import annotations`), and nothing is defined after the class.
import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve

from actors.completion import by_completion
from actors.process import harden
from serve_app.access import Access, Caller, HttpOptions
from serve_app.events import lines, with_pulse
from serve_app.protocol import (
    MOST_COMPLETIONS,
    Answer,
    ChatBody,
    CompletionBody,
    SampleBody,
    finite,
    sample_event,
    usage,
)
from serve_app.refusals import install
from serve_app.replica import Replica, Running
from tg_tinker.chat import render_messages
from tg_tinker.errors import InvalidRequestError
from tg_tinker.sampling import SamplingParams, check_prompts
from tg_tinker.types import StreamChunk

MOST_LOOKUPS = 64
MOST_BODY_BYTES = 2**20

api = FastAPI(title="TG-Tinker", docs_url=None, redoc_url=None, openapi_url=None)
install(api, MOST_BODY_BYTES)


@serve.ingress(api)
class HttpReplica(Replica):
    """A replica that also answers HTTP."""

    def __init__(self, options: HttpOptions, *arguments: Any) -> None:
        harden()
        super().__init__(*arguments)
        self._options = options
        self._access = Access(self.registry.typed, options)
        self._lookups = ThreadPoolExecutor(MOST_LOOKUPS)  # some wait for a step: not to be shared

    # --- routes ------------------------------------------------------------------------------

    @api.get("/healthz")
    async def healthz(self) -> Response:
        alive = self.engines.alive
        return JSONResponse({"status": "ok" if alive else "engine died"}, 200 if alive else 503)

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        caller = await self._access.caller(request)
        names = await asyncio.to_thread(self.sources.names, caller.tenant, caller.models)
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": caller.tenant}
                  for name in names]  # fmt: skip
        return {"object": "list", "data": listed}

    @api.post("/v1/completions")
    async def completions(self, body: CompletionBody, request: Request) -> Response:
        prompts = body.prompts()
        echoes = [self._as_text(p) if body.echo else "" for p in prompts]
        return await self._answer(request, body, prompts, body.params(), echoes)

    @api.post("/v1/chat/completions")
    async def chat(self, body: ChatBody, request: Request) -> Response:
        prompt = render_messages(self.tokenizer, [message.plain() for message in body.messages])
        return await self._answer(request, body, [prompt], body.params(), [""])

    @api.post("/v1/sample")
    async def sample_native(self, body: SampleBody, request: Request) -> Response:
        prompts, params = check_prompts(body.prompts), body.params()
        caller, running = await self._begun(request, body.model, prompts, params)
        if body.stream:
            return await self._events(caller, running, sample_event)
        samples = [
            {"prompt_index": i // params.num_completions,
             "completion": "".join(chunk.text for chunk in part),
             "token_ids": [t for chunk in part for t in chunk.token_ids],
             "logprobs": [finite(p) for chunk in part for p in chunk.logprobs],
             "top_logprobs": [t for chunk in part for t in chunk.top_logprobs],
             "prompt_logprobs": sample_event(part[0])["prompt_logprobs"],
             "finish_reason": part[-1].finish_reason}
            for i, part in enumerate(await self._all(caller, running))
        ]  # fmt: skip
        return JSONResponse(
            {"samples": samples, "weights_version": running.call.version,
             "prompt_tokens": running.prompt_tokens}
        )  # fmt: skip

    # --- the way of a request ------------------------------------------------------------------

    async def _answer(
        self, request: Request, body: CompletionBody | ChatBody,
        prompts: Sequence[str | list[int]], params: SamplingParams, echoes: list[str],
    ) -> Response:  # fmt: skip
        caller, running = await self._begun(request, body.model, prompts, params)
        answer = Answer(body, self.tokenizer, echoes, running.call.version)
        if not body.stream:
            parts = await self._all(caller, running)
            drawn = sum(len(chunk.token_ids) for part in parts for chunk in part)
            return JSONResponse(answer.whole(parts, usage(running.prompt_tokens, drawn)))
        counts = body.stream_options is not None and body.stream_options.include_usage
        last = answer.usage_event if counts else None
        return await self._events(caller, running, answer.event, last)

    async def _begun(
        self, request: Request, model: str, prompts: Sequence[str | list[int]],
        params: SamplingParams,
    ) -> tuple[Caller, Running]:  # fmt: skip
        """Everything that can be refused, before the first byte of the answer."""
        caller = await self._access.caller(request)
        if len(prompts) * params.num_completions > MOST_COMPLETIONS:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with {params.num_completions} completions each are more"
                f" than the {MOST_COMPLETIONS} of one request: send less at a time"
            )
        self._access.enter(caller, params.max_tokens)
        try:
            source = await asyncio.get_running_loop().run_in_executor(
                self._lookups, self.sources.find, caller.tenant, caller.models, model
            )
            return caller, await self.begin(source, prompts, params)
        except BaseException:
            self._access.leave(caller)
            raise

    async def _followed(
        self, caller: Caller, running: Running
    ) -> AsyncGenerator[StreamChunk, None]:
        try:
            async for chunk in self.follow(running, self._options.deadline_s):
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
