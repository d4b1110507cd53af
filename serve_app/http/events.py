"""Writes server-sent events (WHATWG HTML, section 9.2), with a pulse while there is no chunk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from serve_app.http.refusals import error_event

PULSE_S = 10.0
"""Seconds without a chunk after which a stream sends a pulse: proxies close silent connections."""

_PULSE = ": still here\n\n"
_T = TypeVar("_T")


async def lines(
    first: str | None,
    rest: AsyncIterator[str | None],
    last: Callable[[], dict[str, Any] | None],
) -> AsyncIterator[str]:
    """Yields the items of `with_pulse`, which are lines, then `last()` if not None, then `[DONE]`.

    An error after the first line becomes an event and ends the stream.

    Args:
        first: the first item, which the caller has taken; None is a pulse.
    """
    yield _PULSE if first is None else first
    try:
        async for item in rest:
            yield _PULSE if item is None else item
    except Exception as error:
        yield line(error_event(error))
        return
    if (closing := last()) is not None:
        yield line(closing)
    yield "data: [DONE]\n\n"


async def with_pulse(
    items: AsyncGenerator[_T, None], every_s: float = PULSE_S
) -> AsyncGenerator[_T | None, None]:
    """Yields the items, and None whenever no item came for `every_s` seconds.

    If the caller leaves early, `items` ends.
    """
    async with aclosing(items):
        while True:
            coming = asyncio.ensure_future(_next(items))
            try:
                while not (await asyncio.wait({coming}, timeout=every_s))[0]:
                    yield None
                yield coming.result()
            except StopAsyncIteration:
                return
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait({coming})  # `items` cannot be closed while it runs.


async def _next(items: AsyncGenerator[_T, None]) -> _T:
    return await anext(items)


def line(value: dict[str, Any]) -> str:
    """Returns an event as a `data:` line."""
    return f"data: {json.dumps(value)}\n\n"
