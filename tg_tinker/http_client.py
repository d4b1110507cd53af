"""A small client of the sampling server, for the command line; programs use `openai`'s."""

from __future__ import annotations

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
        InvalidRequestError: the server refused, with its reason.
        ClusterUnavailableError: no server answers there.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    sent = json.dumps(dict(body) | {"stream": True}).encode()
    if not url.startswith(("http://", "https://")):
        raise InvalidRequestError(f"url {url!r}: it begins with http:// or https://")
    request = urllib.request.Request(f"{url.rstrip('/')}/{route}", sent, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            yield from _events(answer)
    except urllib.error.HTTPError as error:
        raise InvalidRequestError(_reason(error.read()), details={"status": error.code}) from None
    except OSError as error:
        raise ClusterUnavailableError(
            f"no server answers at {url} ({type(error).__name__}): start one with `tg-tinker serve`"
        ) from None


def _events(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            raise InvalidRequestError(event["error"]["message"])
        yield event


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server refused without a reason: is it `tg-tinker serve`?"
