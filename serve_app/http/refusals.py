"""How HTTP refuses: errors as statuses in OpenAI's form, and bodies that are too large.

What a request held is in no answer.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.openai import error_body
from serve_app.replica.metrics import count_refusal
from serve_app.replica.replica import failure
from tg_tinker.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    RollbackError,
    ServiceError,
    TGTinkerError,
    VersionGoneError,
)

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

_OLDER = "the registry of this server is an older copy of its database: tell who operates it"
"""To the operator the error says more: objects in the store, a tenant, and what to do."""

_MOST = 8
"""Problems of a body that are named."""


def install(api: FastAPI, most_body_bytes: int) -> None:
    """Gives an application these answers."""
    api.add_middleware(Guard, most=most_body_bytes)
    api.exception_handler(TGTinkerError)(_refused)
    api.exception_handler(HTTPException)(_no_such_route)


def error_event(error: Exception) -> dict[str, Any]:
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
                await JSONResponse(error_event(error), 500)(scope, receive, send)
        if read > self._most:
            count_refusal("body_too_large")
            text = f"the body is larger than {self._most:,} bytes: send less at a time"
            body = error_body(text, "invalid_request_error", "body_too_large")
            await JSONResponse(body, 413)(scope, receive, send)


def _refused(request: Request, error: TGTinkerError) -> JSONResponse:
    count_refusal(error.code)
    status, kind = next((s, k) for cls, s, k in _STATUS if isinstance(error, cls))
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    param = error.details.get("parameter")
    text = _OLDER if isinstance(error, RollbackError) else error.message
    return JSONResponse(error_body(text, kind, error.code, param), status, headers)


def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    kind = "invalid_request_error"
    return JSONResponse(error_body(str(error.detail), kind, "http"), error.status_code)


_T = TypeVar("_T", bound=BaseModel)


def parsed(kind: type[_T], content: bytes) -> _T:
    """A body as one of `openai`'s.

    Raises:
        InvalidRequestError: names the fields that are wrong; what they held is not repeated.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_context=False, include_input=False)[
            :_MOST
        ]:
            where = ".".join(str(part) for part in item["loc"])
            unknown = item["type"] == "extra_forbidden"
            problems.append(f"{where[:80]}: {'not supported here' if unknown else item['msg']}")
        first = problems[0].partition(":")[0]
        text = "; ".join(dict.fromkeys(problems))
        raise InvalidRequestError(text, details={"parameter": first}) from None
