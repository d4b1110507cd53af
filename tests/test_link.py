"""Answers that are lost between an actor and its client, one by one, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from actors.calls import Calls
from tg_tinker import link as links
from tg_tinker import lost_calls
from tg_tinker.envelope import new_key, open_payload, seal_payload
from tg_tinker.errors import (
    ClusterUnavailableError,
    FutureCancelledError,
    FutureTimeoutError,
)
from tg_tinker.future import FutureHandle
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
        monkeypatch.setattr(links, "when_done", lambda ref, work: work())
        monkeypatch.setattr(lost_calls, "ask", wire.ask)
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
    assert link.open(link.send(SAVE), "h-0").unwrap() == "durable"


class Lossy:
    """An actor's calls in their threads; those that are sent as `lost` never arrive.

    Attributes:
        runs: cleared, it is busy: what arrives waits.
    """

    call, saved, stored, cancel = "call", "saved", "stored", "cancel"

    def __init__(self, lost: set[int]) -> None:
        self._lost, self._sent = lost, 0
        self._calls, self.runs = Calls(1), threading.Event()
        self.runs.set()
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

    def split(self, refs: list[Future[Any]], wait_s: float | None = 0) -> tuple[list[Any], ...]:
        done, pending = wait(refs, wait_s)
        return [*done], [*pending]

    def _lose(self, _: bytes) -> bytes:
        raise ClusterUnavailableError("lost")

    def _run(self, sealed: bytes) -> bytes:
        assert self.runs.wait(15)
        request = open_payload(KEY, sealed)

        def work(_: Request, check_cancelled: Callable[[], None]) -> Any:
            check_cancelled()
            return Saving("a") if request.operation == "save_state" else "stepped"

        return seal_payload(KEY, self._calls.run(request, work))

    def _saved(self, request_id: str) -> bytes:
        begun = self._calls.wait(request_id, 15)
        return seal_payload(KEY, begun if begun.error else Reply("durable"))

    def _stored(self, request_id: str) -> bytes | None:
        reply = self._calls.stored(request_id)
        return None if reply is None else seal_payload(KEY, reply)

    def _cancel(self, request_id: str) -> bool:
        return self._calls.cancel(request_id)


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lossy], TrainingLink]:
    """Callbacks run at once, on the thread on which they are due."""

    def linked(actor: Lossy) -> TrainingLink:
        monkeypatch.setattr(lost_calls, "_PAUSE_S", 0.0)
        monkeypatch.setattr(lost_calls, "ask", actor.ask)
        for name in ("ask", "send", "fetch", "split"):
            monkeypatch.setattr(links, name, getattr(actor, name))
        monkeypatch.setattr(links, "dispatch", lambda work: work())
        monkeypatch.setattr(
            links, "when_done", lambda ref, work: ref.add_done_callback(lambda _: work())
        )
        return TrainingLink(actor, KEY, lambda error, seen: error)

    return linked


@pytest.fixture
def lossy(over: Callable[[Lossy], TrainingLink]) -> Callable[[set[int]], TrainingLink]:
    return lambda lost: over(Lossy(lost))


def step(number: int) -> Request:
    return Request(f"h-{number}", "optim_step", 1, "h", number)


def handle(link: TrainingLink, request: Request) -> FutureHandle[Any]:
    return FutureHandle(link, link.send(request), request.request_id, "tc", request.operation)


def test_a_call_is_sent_on_while_those_before_it_arrive_one_by_one(
    lossy: Callable[[set[int]], TrainingLink],
) -> None:
    """Twelve are lost; then of each try the call arrives, one before it, and not the next."""
    link = lossy({*range(12), *range(14, 14 + 3 * 10, 3)})
    refs = [link.send(step(number)) for number in range(12)]
    assert lost_calls.TRIES < 12
    assert link.open(refs[-1], "h-11").unwrap() == "stepped"


@pytest.mark.parametrize(
    "lost", [{0}, {1}, {0, 1}, {1, 2}, {0, 2, 3}], ids=lambda lost: "-".join(map(str, lost))
)
def test_a_save_arrives_though_it_and_a_step_that_nobody_waits_for_are_lost(
    lossy: Callable[[set[int]], TrainingLink], lost: set[int]
) -> None:
    link = lossy(lost)
    link.send(step(0))
    saving = handle(link, Request("h-1", "save_state", 1, "h", 1))
    assert saving.result(10) == "durable"


def test_a_save_that_nobody_looks_at_is_not_remembered_for_ever(
    lossy: Callable[[set[int]], TrainingLink],
) -> None:
    link = lossy(set())
    for number in range(5):
        handle(link, Request(f"h-{number}", "save_state", 1, "h", number))
    deadline = time.monotonic() + 10
    while link.waiting() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert link.unanswered == 0


# --- a lost call whose actor is busy ------------------------------------------------------------


@pytest.fixture
def busy() -> Iterator[Lossy]:
    """The first call to it is lost; what is sent again waits until it runs."""
    actor = Lossy({0})
    actor.runs.clear()
    yield actor
    actor.runs.set()


def test_whoever_waits_for_a_lost_call_waits_no_longer_than_they_say(
    over: Callable[[Lossy], TrainingLink], busy: Lossy
) -> None:
    """Also while another thread waits for it, or for another lost call, without a limit."""
    link = over(busy)
    first, second = handle(link, step(0)), handle(link, step(1))
    without_limit = threading.Thread(target=first.result)
    without_limit.start()
    for one in (first, second, first):
        began = time.monotonic()
        with pytest.raises(FutureTimeoutError):
            one.result(0.2)
        assert time.monotonic() - began < 5  # it would be 15
    busy.runs.set()
    assert first.result(10) == second.result(10) == "stepped"
    without_limit.join()


def test_a_lost_call_is_pending_until_it_was_run_and_nobody_blocks_to_learn_it(
    over: Callable[[Lossy], TrainingLink], busy: Lossy
) -> None:
    link, told = over(busy), threading.Event()
    one = handle(link, step(0))
    one.add_done_callback(lambda _: told.set())
    wait([one.object_ref], 10)
    assert (one.done(), one.status(), told.is_set(), link.waiting()) == (False, "pending", False, 1)
    busy.runs.set()
    assert told.wait(10)
    assert (one.done(), one.status()) == (True, "done")


def test_a_lost_call_can_be_cancelled_before_it_arrives(
    over: Callable[[Lossy], TrainingLink], busy: Lossy
) -> None:
    link = over(busy)
    one = handle(link, step(0))
    wait([one.object_ref], 10)
    assert one.cancel()
    busy.runs.set()
    assert type(one.exception(10)) is FutureCancelledError
    assert (one.status(), one.cancel()) == ("cancelled", False)


def test_an_actor_that_nothing_reaches_is_told_each_time_and_asked_anew(
    lossy: Callable[[set[int]], TrainingLink],
) -> None:
    link = lossy({*range(1 + lost_calls.TRIES)})
    one = handle(link, step(0))
    assert type(one.exception(10)) is ClusterUnavailableError
    assert one.result(10) == "stepped"
    assert not link._lost_calls._answers


def test_an_answer_that_is_asked_for_after_the_call_was_forgotten_is_in_the_journal_or_lost(
    over: Callable[[Lossy], TrainingLink],
) -> None:
    actor = Lossy({0})
    link = over(actor)
    one = handle(link, step(0))
    assert one.result(10) == "stepped"
    again = FutureHandle[str](link, one.object_ref, "h-0", "tc", "optim_step")
    assert again.result(10) == "stepped"
    actor._calls._replies.clear()
    again = FutureHandle[str](link, one.object_ref, "h-0", "tc", "optim_step")
    with pytest.raises(ClusterUnavailableError, match="lost on the way"):
        again.result(10)
