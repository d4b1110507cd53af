"""Seals bodies between Serve's HTTP proxy and a replica, with one middleware at each end.

Serve passes bodies on as pickled messages. Messages above the size that Ray keeps inline (100 KB)
go to the object store in plaintext, and Ray may spill them to disk in plaintext. So a middleware in
the proxy seals the request body, and the outermost middleware in the replica seals the response
body. The proxy makes a key for each request. The key travels with the headers, which are small
enough to stay inline. This protects data at rest, but not Ray's own connections.

Serve runs `middlewares` in its proxies if `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` named it when
Ray started. For an embedded cluster, `tg_tinker.cluster.connection` calls `install`. The middleware
does not change the requests of other applications behind the same proxy. While there is no
application, it answers 503.
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
"""The prefix of the names of our applications."""

MOST_HEAD_BYTES = 32 * 2**10
"""The maximum size of address and headers: up to this size, the key stays inline with them."""

_ROUTE_S = 10.0
_LATER = "Retry-After"
_KEY = "tg_tinker.key"
_SEALED = "tg_tinker.sealed"

_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_VALUE = "serve_app.http.sealed:middlewares"
_IN_CLEAR = (
    "Serve's HTTP proxy would pass texts on in clear: start Ray on every node with"
    f" {_VARIABLE}={_VALUE} in the environment, and give the application a name that begins with"
    f" {APPLICATIONS}"
)


def install() -> None:
    """Names `middlewares` in the environment, for a cluster that this process starts."""
    os.environ.setdefault(_VARIABLE, _VALUE)


def middlewares() -> list[Middleware]:
    """Returns the middlewares of a proxy; Serve calls this function in each of its HTTP proxies."""
    return [Middleware(ProxyEnd)]


class ProxyEnd:
    """The middleware in the proxy, which seals requests to our applications and opens responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        routes = await self._routes() if scope["type"] == "http" else None
        if routes == {}:
            text = "this server has no application now, it starts or stops: try again later"
            body = error_body(text, "server_error", "no_application")
            await JSONResponse(body, 503, {_LATER: "1"})(scope, receive, send)
            return
        if not routes or not _is_ours(routes, scope["path"]):
            await self._app(scope, receive, send)
            return
        if _head_bytes(scope) > MOST_HEAD_BYTES:
            text = f"address and headers exceed {MOST_HEAD_BYTES:,} bytes: shorten them"
            body = error_body(text, "invalid_request_error", "head_too_large")
            await JSONResponse(body, 431)(scope, receive, send)
            return
        key = new_key()

        async def sealed() -> Message:
            return _sealed(key, await receive())

        async def opened(message: Message) -> None:
            await send(_opened(key, message))  # Responses of Serve itself are not sealed.

        extensions = {**scope.get("extensions", {}), _KEY: key}
        await self._app({**scope, "extensions": extensions}, sealed, opened)

    async def _routes(self) -> dict[str, str] | None:
        """Returns Serve's own list, the application of each route; None if there is none yet."""
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
            # A replica of ours refuses a request that is not sealed.
            return None
        return routes


def _is_ours(routes: dict[str, str], path: str) -> bool:
    """Returns whether a path belongs to our applications: the longest matching prefix counts."""
    within = [r for r in routes if f"{path}/".startswith(f"{r.rstrip('/')}/")]
    return bool(within) and routes[max(within, key=len)].startswith(APPLICATIONS)


class ReplicaEnd:
    """The outermost middleware in the replica, which opens requests and seals responses."""

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
    """Returns once the proxy has the route of the application and seals its requests.

    Raises:
        ClusterUnavailableError: the proxy does not seal, or does not answer.
    """
    deadline = time.monotonic() + _ROUTE_S
    while (status := _health(host, port)) == 404 and time.monotonic() < deadline:
        time.sleep(0.1)  # A new route takes a moment to reach the proxy.
    if status == 503:
        raise ClusterUnavailableError(_IN_CLEAR)
    if status != 200:
        raise ClusterUnavailableError(
            f"the sampling application at {host}:{port} answers {status} instead of its health: run"
            " `serve status` on the head node to see why"
        )


def _health(host: str, port: int) -> int:
    """Returns the status of a health check; 404 also while our own proxy has no route."""
    connection = http.client.HTTPConnection(host, port, timeout=_ROUTE_S)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        waits = answer.status == 503 and answer.getheader(_LATER) is not None
        return 404 if waits else answer.status
    except (OSError, http.client.HTTPException):
        raise ClusterUnavailableError(
            f"nothing answers at {host}:{port}: run `serve status` on the head node to see why"
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
