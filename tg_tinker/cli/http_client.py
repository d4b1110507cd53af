"""A small client of the sampling server, for the command line; programs use `openai`'s."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError

TIMEOUT_S = 600


def stream(
    url: str, key: str | None, route: str, body: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer.

    Args:
        url: such as ``http://127.0.0.1:8000/v1``.
        key: an API key, where the server wants one.
        route: below the URL, such as ``chat/completions``.

    Raises:
        InvalidRequestError: a URL or key that cannot be one, or the server refused, with its
            reason.
        ClusterUnavailableError: no server answers there, or the answer broke off.
    """
    try:
        with _sent(url, key, route, body) as answer:
            yield from _events(answer)
    except urllib.error.HTTPError as error:
        reason = _reason(error.read())
        if error.code == 404 and not url.rstrip("/").endswith("/v1"):
            reason += ": does the URL end in /v1?"
        raise InvalidRequestError(reason, details={"status": error.code}) from None
    except (OSError, http.client.HTTPException) as error:
        raise ClusterUnavailableError(
            f"no server answers at {url} ({type(error).__name__}): start one with `tg-tinker serve`"
        ) from None


def _sent(url: str, key: str | None, route: str, body: Mapping[str, Any]) -> Any:
    """The answer, once its headers are there."""
    if not url.startswith(("http://", "https://")):
        raise InvalidRequestError(f"url {url!r}: it begins with http:// or https://")
    headers = {"Content-Type": "application/json"} | _authorization(key)
    sent = json.dumps(dict(body) | {"stream": True}).encode()
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/{route}", sent, headers)  # noqa: S310
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except (ValueError, http.client.InvalidURL):
        raise InvalidRequestError(
            f"url {url!r} is none: one looks like http://127.0.0.1:8000/v1"
        ) from None


def _authorization(key: str | None) -> dict[str, str]:
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):  # said here: http.client would quote the key
        raise InvalidRequestError(
            "the API key holds a line break or a character that no key has: copy it again, it"
            " begins with tgt-"
        )
    return {"Authorization": f"Bearer {key}"}


def _events(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip() == b"data: [DONE]":
            return
        if not line.startswith(b"data: "):
            continue
        try:
            event: dict[str, Any] = json.loads(line[6:])
        except ValueError:
            break  # cut within a line
        if "error" in event:
            raise InvalidRequestError(event["error"]["message"])
        yield event
    # A connection that is closed early reads like one that ends.
    raise ClusterUnavailableError(
        "the answer broke off before its end: the server stopped, a proxy closed the connection, or"
        " it is no `tg-tinker serve`. Ask again"
    )


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server refused without a reason: is it `tg-tinker serve`?"
