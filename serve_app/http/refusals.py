"""Turns errors into HTTP statuses in OpenAI's format, and refuses bodies that are too large.

An error response repeats no prompt, message or stop sequence. It may name the model, invalid fields
and numbers of the request.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.bodies import WRONG_TYPE, value_of
from serve_app.http.fields import advice
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

_OLDER = "the registry of this server is an older copy of its database: inform its operator"
"""What an HTTP client sees of a `RollbackError`.

The error itself names objects in the store and a tenant, which are for the operator alone.
"""

MOST_PIECES = 2**13
"""The maximum number of pieces in which a body may arrive: each costs time of the event loop."""

_MOST = 8
"""The maximum number of problems of a body that an error names."""


def install(api: FastAPI, most_body_bytes: int) -> None:
    """Installs the error handlers and the limit on bodies in an application."""
    api.add_middleware(Guard, most=most_body_bytes)
    api.exception_handler(TGTinkerError)(_refused)
    api.exception_handler(HTTPException)(_no_such_route)


def error_event(error: Exception) -> dict[str, Any]:
    """Returns an error as an event in the format of OpenAI's clients.

    An error that is not a `TGTinkerError` appears with its type and location only.
    """
    try:
        failure(error).unwrap()
    except TGTinkerError as shown:
        return error_body(_told(shown), "server_error", shown.code)
    raise error  # Never reached: the reply of `failure` is always an error.


class Guard:
    """A middleware that refuses large bodies and hides the text of unexpected errors.

    It refuses a body that is too large before the whole body is in memory. It answers an unexpected
    error without the error's text, which could contain text of the request.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, pieces, begun = 0, 0, False

        def problem() -> str:
            if read > self._most:
                return f"the body exceeds {self._most:,} bytes: send less at a time"
            if pieces > MOST_PIECES:
                return f"the body came in more than {MOST_PIECES:,} pieces: send larger ones"
            return ""

        async def limited() -> Message:
            nonlocal read, pieces
            message = await receive()
            read, pieces = read + len(message.get("body", b"")), pieces + 1
            if problem():
                raise ValueError("too large")  # `sending` drops any response to this error.
            return message

        async def sending(message: Message) -> None:
            nonlocal begun
            if not problem():
                begun = True
                await send(message)

        try:
            await self._app(scope, limited, sending)
        except Exception as error:
            if not begun and not problem():
                await JSONResponse(error_event(error), 500)(scope, receive, send)
        if text := problem():
            count_refusal("body_too_large")
            body = error_body(text, "invalid_request_error", "body_too_large")
            await JSONResponse(body, 413)(scope, receive, send)


def _refused(request: Request, error: TGTinkerError) -> JSONResponse:
    count_refusal(error.code)
    status, kind = next((s, k) for cls, s, k in _STATUS if isinstance(error, cls))
    status = 415 if error.code == WRONG_TYPE else status
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    param = error.details.get("parameter")
    return JSONResponse(error_body(_told(error), kind, error.code, param), status, headers)


def _told(error: TGTinkerError) -> str:
    """Returns what an HTTP client sees of an error."""
    return _OLDER if isinstance(error, RollbackError) else error.message


def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    kind = "invalid_request_error"
    return JSONResponse(error_body(str(error.detail), kind, "http"), error.status_code)


def _path(loc: tuple[int | str, ...]) -> str:
    """Returns the path of a field, without the names of the types that it may have."""
    first, *rest = loc or ("the body",)
    inner = [part for part in rest if isinstance(part, int) or part.isidentifier()]
    return ".".join(map(str, (first, *inner)))


_T = TypeVar("_T", bound=BaseModel)


def parsed(kind: type[_T], content: bytes) -> _T:
    """Returns a body, parsed as one of the formats in `openai`. It takes long for a long body.

    Raises:
        InvalidRequestError: the body is invalid. The message names the invalid fields, but does not
            repeat their content.
    """
    try:
        return kind.model_validate(value_of(content))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    problems = []
    for item in found[:_MOST]:
        where = _path(item["loc"])
        told = item["msg"]
        if item["type"] == "extra_forbidden":
            told = ": ".join(filter(None, ("not supported here", advice(item["loc"]))))
        problems.append(f"{where[:80]}: {told}")
    first = problems[0].partition(":")[0]
    text = "; ".join(dict.fromkeys(problems))
    raise InvalidRequestError(text, details={"parameter": first})
