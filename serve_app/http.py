"""The HTTP side of the sampling application: routes, access, limits, streams.

OpenAI's `/v1/completions`, `/v1/chat/completions` and `/v1/models`, our own `/v1/sample`, and
`/healthz`. No text of a request is in any log or error.
"""

# Serve copies the routes, with the names they use, when `ingress` below is reached: types are no
# strings here (no `from __future__ import annotations`), and nothing is defined after the class.
import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.completion import by_completion
from actors.process import harden
from serve_app.protocol import (
    MOST_COMPLETIONS,
    Answer,
    ChatBody,
    CompletionBody,
    SampleBody,
    error_body,
    finite,
    sample_event,
    usage,
)
from serve_app.replica import Replica, Running, failure
from tg_tinker.chat import render_messages
from tg_tinker.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    ServiceError,
    TGTinkerError,
    VersionGoneError,
)
from tg_tinker.sampling import SamplingParams, check_prompts
from tg_tinker.types import StreamChunk

_STATUS: tuple[tuple[type[TGTinkerError], int, str], ...] = (
    (NotFoundError, 404, "invalid_request_error"),
    (VersionGoneError, 409, "invalid_request_error"),
    (InvalidRequestError, 400, "invalid_request_error"),
    (AccessDeniedError, 401, "authentication_error"),
    (QueueFullError, 429, "rate_limit_error"),
    (DeadlineExceededError, 504, "server_error"),
    (ServiceError, 503, "server_error"),
    (TGTinkerError, 500, "server_error"),
)
MOST_LOOKUPS = 64
MOST_BODY_BYTES = 2**20
_KNOWN_S = 5.0
"""How long a checked key is trusted: a revoked one opens nothing after that."""


@dataclass(frozen=True)
class HttpOptions:
    """What the server allows.

    Attributes:
        tenant: of everyone, when `open`.
        open: whoever reaches the port may sample, until the tenant has a key; on a loopback
            address only.
        most_tokens: `max_tokens` of a request.
        most_at_once: requests of one key.
        deadline_s: of a request, streaming included.
    """

    tenant: str = "default"
    open: bool = False
    most_tokens: int = 4096
    most_at_once: int = 32
    deadline_s: float = 300.0


@dataclass(frozen=True)
class Caller:
    """Who asks, and which models the key is for (all when empty)."""

    tenant: str
    key_id: str
    models: tuple[str, ...] = ()


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error_event(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's clients read it; one that is not ours by its type and place only."""
    try:
        failure(error).unwrap()
    except TGTinkerError as shown:
        return error_body(shown.message, "server_error", shown.code)
    raise error  # never: `failure` is an error


class Guard:
    """Outermost: refuses a body that is too large before it is all in memory, and answers what
    nobody expected without its text, which could be a request's."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, begun = 0, False

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise ValueError("too large")  # whatever is made of it, `sending` drops
            return message

        async def sending(message: Message) -> None:
            nonlocal begun
            if read <= self._most:
                begun = True
                await send(message)

        try:
            await self._app(scope, limited, sending)
        except Exception as error:
            if not begun and read <= self._most:
                await JSONResponse(_error_event(error), 500)(scope, receive, send)
        if read > self._most:
            text = f"the body is larger than {self._most:,} bytes: send less at a time"
            body = error_body(text, "invalid_request_error", "body_too_large")
            await JSONResponse(body, 413)(scope, receive, send)


api = FastAPI(title="TG-Tinker", docs_url=None, redoc_url=None, openapi_url=None)
api.add_middleware(Guard, most=MOST_BODY_BYTES)


@api.exception_handler(TGTinkerError)
def _refused(request: Request, error: TGTinkerError) -> JSONResponse:
    status, kind = next((s, k) for cls, s, k in _STATUS if isinstance(error, cls))
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    param = error.details.get("parameter")
    return JSONResponse(error_body(error.message, kind, error.code, param), status, headers)


@api.exception_handler(RequestValidationError)
def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
    """Names the fields; what they held is not repeated."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"][1:] if isinstance(part, str | int))
        unknown = item["type"] == "extra_forbidden"
        problems.append(f"{where}: {'not supported here' if unknown else item['msg']}")
    first = problems[0].partition(":")[0]
    text = "; ".join(dict.fromkeys(problems))
    return JSONResponse(error_body(text, "invalid_request_error", "invalid_request", first), 400)


@api.exception_handler(HTTPException)
def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    kind = "invalid_request_error"
    return JSONResponse(error_body(str(error.detail), kind, "http"), error.status_code)


@serve.ingress(api)
class HttpReplica(Replica):
    """A replica that also answers HTTP."""

    def __init__(self, options: HttpOptions, *arguments: Any) -> None:
        harden()
        super().__init__(*arguments)
        self._options = options
        self._lookups = ThreadPoolExecutor(MOST_LOOKUPS)  # some wait for a step: not to be shared
        self._known: dict[str, tuple[float, Caller]] = {}
        self._at_once: Counter[str] = Counter()
        self._keys_exist, self._keys_known_until = False, 0.0

    # --- routes ------------------------------------------------------------------------------

    @api.get("/healthz")
    async def healthz(self) -> Response:
        alive = self.engines.alive
        return JSONResponse({"status": "ok" if alive else "engine died"}, 200 if alive else 503)

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        caller = await self._caller(request)
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
        caller = await self._caller(request)
        if len(prompts) * params.num_completions > MOST_COMPLETIONS:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with {params.num_completions} completions each are more"
                f" than the {MOST_COMPLETIONS} of one request: send less at a time"
            )
        if params.max_tokens > self._options.most_tokens:
            raise InvalidRequestError(
                f"max_tokens={params.max_tokens} is more than the {self._options.most_tokens}"
                " that this server draws for a request"
            )
        if self._at_once[caller.key_id] >= self._options.most_at_once:
            raise QueueFullError(
                f"{self._options.most_at_once} requests of this key are answered already: wait for"
                " one to end"
            )
        self._at_once[caller.key_id] += 1
        try:
            source = await asyncio.get_running_loop().run_in_executor(
                self._lookups, self.sources.find, caller.tenant, caller.models, model
            )
            return caller, await self.begin(source, prompts, params)
        except BaseException:
            self._at_once[caller.key_id] -= 1
            raise

    async def _followed(self, caller: Caller, running: Running) -> AsyncIterator[StreamChunk]:
        try:
            async for chunk in self.follow(running, self._options.deadline_s):
                yield chunk
        finally:
            self._at_once[caller.key_id] -= 1

    async def _all(self, caller: Caller, running: Running) -> list[list[StreamChunk]]:
        """The chunks of each completion."""
        chunks = [chunk async for chunk in self._followed(caller, running)]
        return by_completion(chunks, running.call.count)

    async def _events(
        self, caller: Caller, running: Running, event: Any, last: Any = None
    ) -> StreamingResponse:
        """Server-sent events; an error after the first chunk is an event, too."""
        chunks = self._followed(caller, running)
        # Taken here: a generator that was never begun would never give back what it holds, should
        # the client have left before the answer begins.
        first = await anext(chunks)

        async def lines() -> AsyncIterator[str]:
            drawn = len(first.token_ids)
            yield _line(event(first))
            try:
                async for chunk in chunks:
                    drawn += len(chunk.token_ids)
                    yield _line(event(chunk))
            except Exception as error:
                yield _line(_error_event(error))
                return
            if last is not None:
                yield _line(last(usage(running.prompt_tokens, drawn)))
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def _caller(self, request: Request) -> Caller:
        """Who sent it.

        Raises:
            AccessDeniedError: no key, or one that opens nothing.
        """
        if self._options.open and not await self._has_keys():
            return Caller(self._options.tenant, "open")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AccessDeniedError(
                "this server wants an API key (Authorization: Bearer ...):"
                " `tg-tinker api-keys create` makes one"
            )
        until, caller = self._known.get(token, (0.0, None))
        if caller is None or until < time.monotonic():
            self._known.pop(token, None)
            tenant, info = await asyncio.to_thread(self.registry.check_api_key, token)
            caller = Caller(tenant, info.key_id, info.models)
            self._known[token] = time.monotonic() + _KNOWN_S, caller
        return caller

    async def _has_keys(self) -> bool:
        """Whether the tenant has made a key since the server started open."""
        if self._keys_known_until < time.monotonic():
            keys = await asyncio.to_thread(self.registry.api_keys, self._options.tenant)
            self._keys_exist = bool(keys)
            self._keys_known_until = time.monotonic() + _KNOWN_S
        return self._keys_exist

    def _as_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return text
