"""Answers that are lost between an actor and its client, one by one, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from actors.calls import Calls
from tg_tinker import link as links
from tg_tinker.envelope import new_key, open_payload, seal_payload
from tg_tinker.errors import ClusterUnavailableError, FutureTimeoutError
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
        monkeypatch.setattr(links, "aside", lambda work: work())
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


class Lossy:
    """An actor's calls in their threads; those that are sent as `lost` never arrive."""

    call, saved, stored = "call", "saved", "stored"

    def __init__(self, lost: set[int]) -> None:
        self._lost, self._sent = lost, 0
        self._calls, self._begun = Calls(1), threading.Event()
        self._training, self._beside = ThreadPoolExecutor(1), ThreadPoolExecutor(4)

    def send(self, method: str, argument: Any) -> Future[Any]:
        if method == "call":
            self._sent += 1
            pool = self._beside if self._sent - 1 in self._lost else self._training
            return pool.submit(self._lose if pool is self._beside else self._run, argument)
        return self._beside.submit(getattr(self, f"_{method}"), argument)

    def fetch(self, ref: Future[Any], timeout: float | None = None) -> Any:
        try:
            return ref.result(timeout)
        except TimeoutError:
            raise FutureTimeoutError("not yet") from None

    def ask(self, method: str, argument: Any, timeout: float | None = None) -> Any:
        return self.fetch(self.send(method, argument), timeout)

    def _lose(self, _: bytes) -> bytes:
        raise ClusterUnavailableError("lost")

    def _run(self, sealed: bytes) -> bytes:
        request = open_payload(KEY, sealed)
        saves = request.operation == "save_state"
        reply = self._calls.run(request, lambda *_: Saving("a") if saves else "stepped")
        if reply.error is None and saves:
            self._begun.set()
        return seal_payload(KEY, reply)

    def _saved(self, _: str) -> bytes:
        assert self._begun.wait(15)
        return seal_payload(KEY, Reply("durable"))

    def _stored(self, request_id: str) -> bytes | None:
        reply = self._calls.stored(request_id)
        return None if reply is None else seal_payload(KEY, reply)


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], TrainingLink]:
    def over(lost: set[int]) -> TrainingLink:
        actor = Lossy(lost)
        monkeypatch.setattr(links, "_PAUSE_S", 0.0)
        for name in ("send", "fetch", "ask"):
            monkeypatch.setattr(links, name, getattr(actor, name))
        monkeypatch.setattr(
            links, "when_done", lambda ref, work: ref.add_done_callback(lambda _: work())
        )
        return TrainingLink(actor, KEY, lambda error, seen: error)

    return over


def test_a_call_is_sent_on_while_those_before_it_arrive_one_by_one(
    lossy: Callable[[set[int]], TrainingLink],
) -> None:
    """Twelve are lost; then of each try the call arrives, one before it, and not the next."""
    link = lossy({*range(12), *range(14, 14 + 3 * 10, 3)})
    refs = [link.send(Request(f"h-{n}", "optim_step", 1, "h", n)) for n in range(12)]
    assert links.TRIES < 12
    assert link.open(refs[-1], "h-11").unwrap() == "stepped"


@pytest.mark.parametrize(
    "lost", [{0}, {1}, {0, 1}, {1, 2}, {0, 2, 3}], ids=lambda lost: "-".join(map(str, lost))
)
def test_a_save_arrives_though_it_and_a_step_that_nobody_waits_for_are_lost(
    lossy: Callable[[set[int]], TrainingLink], lost: set[int]
) -> None:
    link, told = lossy(lost), []
    link.send(Request("h-0", "optim_step", 1, "h", 0))
    link.send(Request("h-1", "save_state", 1, "h", 1))
    ref = link.saved("h-1")
    taking = threading.Thread(target=lambda: told.append(link.open(ref, "h-1")), daemon=True)
    taking.start()
    taking.join(10)
    assert [reply.unwrap() for reply in told] == ["durable"]
