"""Bodies between Serve's HTTP proxy and a replica, sealed: the two ends of that way.

Serve hands bodies on as pickled messages, and what is larger than Ray keeps inline (100 KB) lies in
the object store, in clear, and is spilled as it lies. So a middleware in the proxy seals what a
client sends, and one in the replica, outermost there, what it answers. The proxy makes a key for
each request. It travels with the headers, which are small enough to stay inline. This protects what
comes to rest, not Ray's own connections.

Serve runs `middlewares` in its proxies where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` named it
when Ray started: `tg_tinker.cluster.connection` calls `install` for an embedded cluster. Other
applications behind the same proxy are left alone.
"""

from __future__ import annotations

import http.client
import json
import os
import time

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.openai import error_body
from tg_tinker.errors import ClusterUnavailableError
from tg_tinker.storage.envelope import new_key, open_payload, seal_payload

APPLICATIONS = "tg-tinker-"
"""What the names of our applications begin with."""

MOST_HEAD_BYTES = 32 * 2**10
"""Of address and headers: with them the key stays inline."""

_ROUTE_S = 10.0
_KEY = "tg_tinker.key"
_SEALED = "tg_tinker.sealed"

_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_VALUE = "serve_app.http.sealed:middlewares"
_IN_CLEAR = (
    "Serve's HTTP proxy would hand texts on in clear: start Ray, on every node, with"
    f" {_VARIABLE}={_VALUE} in the environment, and let the application's name begin with"
    f" {APPLICATIONS}"
)


def install() -> None:
    """For the proxies of a cluster that is started with this process's environment."""
    os.environ.setdefault(_VARIABLE, _VALUE)


def middlewares() -> list[Middleware]:
    """What Serve calls in each of its HTTP proxies."""
    return [Middleware(ProxyEnd)]


class ProxyEnd:
    """Seals the requests of our applications, and opens their answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not await self._is_ours(scope["path"]):
            await self._app(scope, receive, send)
            return
        if _head_bytes(scope) > MOST_HEAD_BYTES:
            text = f"address and headers are larger than {MOST_HEAD_BYTES:,} bytes: send less"
            body = error_body(text, "invalid_request_error", "head_too_large")
            await JSONResponse(body, 431)(scope, receive, send)
            return
        key = new_key()

        async def sealed() -> Message:
            return _sealed(key, await receive())

        async def opened(message: Message) -> None:
            await send(_opened(key, message))  # Serve itself answers, too: in clear

        extensions = {**scope.get("extensions", {}), _KEY: key}
        await self._app({**scope, "extensions": extensions}, sealed, opened)

    async def _is_ours(self, path: str) -> bool:
        """By Serve's own list of routes, the longest prefix first."""
        answer = bytearray()

        async def nothing() -> Message:
            return {"type": "http.request", "body": b""}

        async def collect(message: Message) -> None:
            answer.extend(message.get("body", b""))

        scope = {"type": "http", "method": "GET", "path": "/-/routes", "headers": []}
        await self._app(scope, nothing, collect)
        try:
            routes: dict[str, str] = json.loads(answer)
        except ValueError:
            return False  # it has none yet; should one of ours get this, it refuses to answer
        within = [r for r in routes if f"{path}/".startswith(f"{r.rstrip('/')}/")]
        return bool(within) and routes[max(within, key=len)].startswith(APPLICATIONS)


class ReplicaEnd:
    """Opens a request before anything else sees it, and seals its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = scope.get("extensions", {}).get(_KEY)
        if key is None:
            body = error_body(_IN_CLEAR, "server_error", "proxy_in_clear")
            await JSONResponse(body, 503)(scope, receive, send)
            return

        async def opened() -> Message:
            return _opened(key, await receive())

        async def sealed(message: Message) -> None:
            await send(_sealed(key, message))

        await self._app(scope, opened, sealed)


def check_proxy(host: str, port: int) -> None:
    """Returns once the proxy knows the application, and that it seals.

    Raises:
        ClusterUnavailableError: it does not seal, or does not answer.
    """
    deadline = time.monotonic() + _ROUTE_S
    while (status := _health(host, port)) == 404 and time.monotonic() < deadline:
        time.sleep(0.1)  # a new route takes a moment to reach the proxy
    if status == 503:
        raise ClusterUnavailableError(_IN_CLEAR)
    if status != 200:
        raise ClusterUnavailableError(
            f"the sampling application at {host}:{port} answers {status} instead of its health:"
            " `serve status` on the head node says why"
        )


def _health(host: str, port: int) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=_ROUTE_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        raise ClusterUnavailableError(
            f"nothing answers at {host}:{port}: `serve status` on the head node says why"
        ) from None
    finally:
        connection.close()


def _sealed(key: bytes, message: Message) -> Message:
    if not message.get("body"):
        return message
    return {**message, "body": seal_payload(key, message["body"]), _SEALED: True}


def _opened(key: bytes, message: Message) -> Message:
    if not message.get(_SEALED):
        return message
    opened: Message = {**message, "body": open_payload(key, message["body"])}
    del opened[_SEALED]
    return opened


def _head_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
