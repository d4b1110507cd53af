"""Server-sent events (WHATWG HTML, section 9.2): chunks as lines, and a pulse while none comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from serve_app.http.refusals import error_event

PULSE_S = 10.0
"""A stream that is silent for this long says so: proxies close what seems dead."""

_PULSE = ": still here\n\n"
_T = TypeVar("_T")


async def lines(
    first: _T | None,
    rest: AsyncIterator[_T | None],
    event: Callable[[_T], dict[str, Any]],
    last: Callable[[], dict[str, Any] | None],
) -> AsyncIterator[str]:
    """`data:` lines of all items of `with_pulse`; then `last()`, where it is something, and
    `[DONE]`. An error after the first line is an event, too, and the end."""
    yield _PULSE if first is None else line(event(first))
    try:
        async for item in rest:
            yield _PULSE if item is None else line(event(item))
    except Exception as error:
        yield line(error_event(error))
        return
    if (closing := last()) is not None:
        yield line(closing)
    yield "data: [DONE]\n\n"


async def with_pulse(
    items: AsyncGenerator[_T, None], every_s: float = PULSE_S
) -> AsyncGenerator[_T | None, None]:
    """The items, and None whenever none came for so long. Leaving it early ends `items`."""
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
                    await asyncio.wait({coming})  # `items` cannot end while it runs


async def _next(items: AsyncGenerator[_T, None]) -> _T:
    return await anext(items)


def line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
