"""Tests server-sent events: the order of lines, the pulse, and that no task is left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.http.events import line, lines, with_pulse
from tg_tinker.errors import DeadlineExceededError


class Items:
    """An iterator that yields each number after so many seconds, and raises each exception."""

    def __init__(self, *steps: tuple[float, Any]) -> None:
        self.steps, self.ended = steps, False

    async def run(self) -> AsyncGenerator[int, None]:
        try:
            for delay, item in self.steps:
                await asyncio.sleep(delay)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.ended = True


async def collected(items: Items, every_s: float = 0.05, most: int = 100) -> list[int | None]:
    found = []
    pulsed = with_pulse(items.run(), every_s)
    async for item in pulsed:
        found.append(item)
        if len(found) == most:
            break
    await pulsed.aclose()
    return found


def test_silence_has_a_pulse_and_no_item_is_lost() -> None:
    items = Items((0, 1), (0.18, 2), (0, 3), (0.12, 4))
    found = asyncio.run(collected(items))
    assert [item for item in found if item is not None] == [1, 2, 3, 4]
    between = found[found.index(1) + 1 : found.index(2)]
    assert between.count(None) == len(between) >= 2
    assert found[found.index(2) + 1] == 3


@pytest.mark.parametrize("most", [1, 2, 3], ids=["after an item", "in a pulse", "in another"])
def test_leaving_early_ends_the_items_at_once(most: int) -> None:
    items = Items((0, 1), (60, 2))

    async def leave() -> None:
        assert len(await collected(items, most=most)) == most
        assert items.ended

    asyncio.run(asyncio.wait_for(leave(), 5))


def joined(items: Items, last: Any = lambda: None) -> list[str]:
    async def written() -> AsyncGenerator[str, None]:
        async for item in items.run():
            yield line({"n": item})

    async def run() -> list[str]:
        pulsed = with_pulse(written(), 0.05)
        first = await anext(pulsed)
        return [part async for part in lines(first, pulsed, last)]

    return asyncio.run(run())


def test_lines_end_with_the_last_event_and_done() -> None:
    found = joined(Items((0, 1), (0.08, 2)), lambda: {"usage": 3})
    assert found[0] == 'data: {"n": 1}\n\n'
    assert found[1] == ": still here\n\n"  # a comment: clients skip it
    assert found[2:] == ['data: {"n": 2}\n\n', 'data: {"usage": 3}\n\n', "data: [DONE]\n\n"]


def test_a_slow_first_item_begins_with_a_pulse() -> None:
    found = joined(Items((0.08, 1)))
    assert found == [": still here\n\n", 'data: {"n": 1}\n\n', "data: [DONE]\n\n"]


def test_an_error_is_an_event_and_the_end_and_tells_no_text() -> None:
    ours = joined(Items((0, 1), (0, DeadlineExceededError("too late"))))
    assert len(ours) == 2
    assert '"deadline_exceeded"' in ours[1]
    assert "too late" in ours[1]
    unknown = joined(Items((0, 1), (0, ValueError("PATIENT"))))
    assert len(unknown) == 2
    assert "PATIENT" not in unknown[1]
    assert '"error"' in unknown[1]


def test_an_error_before_the_first_item_is_no_event() -> None:
    with pytest.raises(DeadlineExceededError):
        joined(Items((0, DeadlineExceededError("too late"))))
