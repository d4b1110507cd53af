"""Sends requests of the command line to the sampling server; programs use the `openai` package.

No other module opens a URL. HTTP libraries read the environment by default: with HTTP_PROXY set,
they send a prompt and an API key for 127.0.0.1 to another machine. Here a request to this machine
takes no proxy, a server elsewhere that is reached in clear is warned of, no redirect is followed,
and no file such as ``.netrc`` adds credentials.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2

from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError
from tg_tinker.hosts import stays_here
from tg_tinker.texts import check_texts

TIMEOUT_S = 600


class Server:
    """A sampling server, as the command line reaches it.

    Args:
        url: the URL of the server, such as ``http://127.0.0.1:8000/v1``.
        key: an API key, or None if the server needs none.

    Raises:
        InvalidRequestError: the URL or the key is malformed, or the URL contains a password. The
            message repeats neither.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url = _checked(url)
        self._headers = _authorization(key)

    @property
    def warning(self) -> str:
        """What others can read on the way to the server; empty if they can read nothing."""
        if self._url.scheme == "https" or stays_here(self._url.host):
            return ""
        return (
            f"text and API key travel to {self._url.host} in clear: everyone on the way, such as a"
            " proxy, can read them. Use an https:// address (docs/sampling.md), or a tunnel such as"
            " `ssh -L 8000:127.0.0.1:8000`"
        )

    def stream(self, route: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a streamed answer.

        Args:
            route: the path below the URL, such as ``chat/completions``.

        Raises:
            InvalidRequestError: a text of the body is no valid text, the server or a proxy refused
                the request, or the environment names a proxy that cannot be used. The message has
                the server's reason.
            ClusterUnavailableError: no server answers at the URL, or the answer stopped early.
        """
        target = f"{str(self._url).rstrip('/')}/{route}"
        sent = dict(body) | {"stream": True}
        check_texts(sent, "the request")
        try:
            with (
                self._client() as client,
                client.stream("POST", target, json=sent, headers=self._headers) as answer,
            ):
                if answer.status_code != httpx2.codes.OK:
                    raise self._refusal(answer)
                yield from _events(answer)
        except httpx2.HTTPError as error:
            raise ClusterUnavailableError(
                f"no server answers at {self._url} ({type(error).__name__}): start one with"
                " `tg-tinker serve`, or check the proxy that the environment names"
            ) from None

    def _client(self) -> httpx2.Client:
        # A transport of its own reads the certificates that the environment names, but no proxy.
        direct = httpx2.HTTPTransport() if stays_here(self._url.host) else None
        try:
            return httpx2.Client(
                transport=direct, trust_env=direct is None, follow_redirects=False,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except (ValueError, ImportError, httpx2.InvalidURL):  # their texts may hold a password
            raise InvalidRequestError(
                "the proxy that the environment names cannot be used: set HTTP_PROXY, HTTPS_PROXY"
                " and ALL_PROXY to an address such as http://proxy:3128, or name"
                f" {self._url.host} in NO_PROXY"
            ) from None

    def _refusal(self, answer: httpx2.Response) -> InvalidRequestError:
        status = answer.status_code
        if answer.has_redirect_location:
            reason = (
                f"{self._url} redirects to another address, which gets neither text nor key: pass"
                " the address of `tg-tinker serve` itself"
            )
        else:
            reason = _reason(answer.read(), status)
        if status == httpx2.codes.NOT_FOUND and not self._url.path.rstrip("/").endswith("/v1"):
            reason += ": check that the URL ends in /v1"
        return InvalidRequestError(reason, details={"status": status})


def _checked(text: str) -> httpx2.URL:
    """Returns a URL of a server.

    Raises:
        InvalidRequestError: the URL is malformed, or has parts that may be secret.
    """
    try:
        url = httpx2.URL(text)
        url.raw_host.decode().encode("idna")  # as a socket does when it asks for the address
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    reached = url.scheme in ("http", "https") and bool(url.host) and "%" not in url.host
    reached = reached and (url.port is None or 0 < url.port < 2**16)
    if reached and not (url.userinfo or url.query or url.fragment):
        return url
    raise InvalidRequestError(
        "url: the server's address must have the form http://127.0.0.1:8000/v1 or https://HOST/v1,"
        " without a user, a password or a question mark; give the API key by TG_TINKER_API_KEY"
    )


def _authorization(key: str | None) -> dict[str, str]:
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):  # here, because the library would quote the key
        raise InvalidRequestError(
            "the API key holds a line break or a character that no key has: copy the key again;"
            " it begins with tgt-"
        )
    return {"Authorization": f"Bearer {key}"}


def _events(answer: httpx2.Response) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(httpx2.TransportError):
        for event in httpx2.EventSource(answer):
            if event.data == "[DONE]":
                return
            try:
                found: dict[str, Any] = json.loads(event.data)
            except ValueError:
                break  # the event was cut short
            if "error" in found:
                raise InvalidRequestError(found["error"]["message"])
            yield found
    # A connection that was closed early looks like one that has ended.
    raise ClusterUnavailableError(
        "the answer broke off before its end: the server stopped, a proxy closed the connection, or"
        " the server is not `tg-tinker serve`. Send the request again"
    )


def _reason(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return (
            f"status {status} without a reason: check that the address is that of `tg-tinker"
            " serve`, and the proxy that the environment names"
        )
