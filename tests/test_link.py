"""Answers that are lost between an actor and its client, one by one, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tg_tinker import link as links
from tg_tinker.envelope import new_key, seal_payload
from tg_tinker.errors import ClusterUnavailableError
from tg_tinker.link import TrainingLink
from tg_tinker.wire import Reply, Request, Saving

KEY = new_key()
SAVE = Request("h-0", "save_state", 1, "h", 0)


class Wire:
    """An actor that has saved already, and the answers that arrive of it: by method, in turn.

    `None` is an answer that is lost.
    """

    call, saved, stored = "call", "saved", "stored"

    def __init__(self, **arrive: list[Any]) -> None:
        self._arrive = arrive

    def ask(self, method: str, *_: Any, timeout: float | None = None) -> Any:
        reply = self._arrive[method].pop(0)
        if reply is None:
            raise ClusterUnavailableError("lost")
        return seal_payload(KEY, reply)


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wire], TrainingLink]:
    """Refs are methods, fetched when somebody waits for them."""

    def over(wire: Wire) -> TrainingLink:
        monkeypatch.setattr(links, "send", lambda method, *_: method)
        monkeypatch.setattr(links, "fetch", lambda ref, timeout=None: wire.ask(ref))
        monkeypatch.setattr(links, "ask", wire.ask)
        monkeypatch.setattr(links, "when_done", lambda ref, work: work())
        return TrainingLink(wire, KEY, lambda error, seen: error)

    return over


@pytest.mark.parametrize(
    "begun",
    [
        {"call": [Reply(Saving("a"))], "stored": [None]},
        {"call": [None], "stored": [Reply("durable"), None]},
    ],
    ids=["its beginning arrived", "its beginning was lost, its end was told instead"],
)
def test_the_end_of_a_save_is_asked_for_until_it_arrives(
    linked: Callable[[Wire], TrainingLink], begun: dict[str, list[Any]]
) -> None:
    """However its beginning was answered: who is told of no end does not know what is durable."""
    again = {"call": [*begun["call"], Reply(Saving("a"))], "saved": [None, Reply("durable")]}
    link = linked(Wire(**(begun | again)))
    link.send(SAVE)
    assert link.open(link.saved("h-0"), "h-0").unwrap() == "durable"
