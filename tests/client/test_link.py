"""Tests answers that are lost between an actor and its client, one by one, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import pytest

from actors.training.call_journal import CallJournal
from tg_tinker.client import actor_link as links
from tg_tinker.client import lost_calls
from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.future import FutureHandle
from tg_tinker.cluster.messages import Reply, Request, Saving
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureCancelledError,
    FutureTimeoutError,
)
from tg_tinker.storage.envelope import new_key, open_payload, seal_payload

KEY = new_key()
SAVE = Request("h-0", "save_state", 1, "h", 0)


class Wire:
    """An actor that has saved already, and the answers that arrive from it, by method, in order.

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
    """Returns a function that makes a link whose refs are methods.

    A ref is fetched when somebody waits for it.
    """

    def over(wire: Wire) -> TrainingLink:
        monkeypatch.setattr(lost_calls, "_PAUSE_S", 0.0)
        monkeypatch.setattr(links, "send", lambda method, *_: method)
        monkeypatch.setattr(links, "split", lambda refs: ([], refs))
        monkeypatch.setattr(links, "fetch", lambda ref, timeout=None: wire.ask(ref))
        monkeypatch.setattr(links, "when_done", lambda ref, work: work())
        monkeypatch.setattr(lost_calls, "ask", wire.ask)
        return TrainingLink(wire, KEY, lambda error, seen: error)

    return over


@pytest.mark.parametrize(
    "begun",
    [
        {"call": [Reply(Saving("a")), Reply(Saving("a"))], "stored": [None, Reply("durable")]},
        {"call": [None], "stored": [Reply("durable")]},
    ],
    ids=["its beginning arrived", "its beginning was lost, its end was told instead"],
)
def test_the_end_of_a_save_is_asked_for_until_it_arrives(
    linked: Callable[[Wire], TrainingLink], begun: dict[str, list[Any]]
) -> None:
    """This holds however the beginning of the save was answered.

    A client that never learns of the end does not know what is durable.
    """
    link = linked(Wire(**begun, saved=[None]))
    assert link.open(link.send(SAVE), "h-0").unwrap() == "durable"


def poll(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Heads:
    """The heads of a ledger, as a home keeps them."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def saw(self, head: str) -> None:
        self.seen.append(head)


class Lossy:
    """An actor whose calls run in threads; calls that are sent with a number in `lost` never
    arrive.

    Attributes:
        runs: while it is cleared, the actor is busy: calls that arrive wait.
        durable: while it is cleared, no save ends.
        patience_s: the seconds that the actor waits for the call of a save.
        unheard: whether its answers to calls are lost.
        ends: whether the next thread that asks for what is stored is ended, as Ray ends threads
            that wait.
    """

    patience_s, ends, unheard = 15.0, False, False

    call, saved, stored, cancel = "call", "saved", "stored", "cancel"

    def __init__(self, lost: set[int]) -> None:
        self._lost, self._sent = lost, 0
        self._calls, self.runs, self.durable = CallJournal(1), threading.Event(), threading.Event()
        self.runs.set()
        self.durable.set()
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

    def mend(self) -> None:
        self._lost.clear()
        self.unheard = False
        self.runs.set()
        self.durable.set()

    def _lose(self, _: bytes) -> bytes:
        raise ClusterUnavailableError("lost")

    def _run(self, sealed: bytes) -> bytes:
        assert self.runs.wait(15)
        request = open_payload(KEY, sealed)

        def work(_: Request, check_cancelled: Callable[[], None]) -> Any:
            check_cancelled()
            return Saving("a") if request.operation == "save_state" else "stepped"

        reply = self._calls.run(request, work)
        if self.unheard:
            raise ClusterUnavailableError("lost")
        return seal_payload(KEY, replace(reply, ledger_head=f"after {request.request_id}"))

    def _saved(self, request_id: str) -> bytes:
        begun = self._calls.wait(request_id, self.patience_s)
        assert begun.error or self.durable.wait(15)
        return seal_payload(KEY, begun if begun.error else Reply("durable"))

    def _stored(self, request_id: str) -> bytes | None:
        if self.ends:
            self.ends = False
            raise SystemExit(0)
        reply = self._calls.stored(request_id)
        if reply is not None and isinstance(reply.value, Saving):
            reply = Reply("durable") if self.durable.is_set() else None
        return None if reply is None else seal_payload(KEY, reply)

    def _cancel(self, request_id: str) -> bool:
        return self._calls.cancel(request_id)


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Lossy], TrainingLink]]:
    """Yields a function that links to an actor.

    Callbacks run at once, on the thread on which they are due.
    """
    linked_to: list[tuple[Lossy, TrainingLink]] = []

    def linked(actor: Lossy) -> TrainingLink:
        monkeypatch.setattr(lost_calls, "_PAUSE_S", 0.0)
        monkeypatch.setattr(lost_calls, "ask", actor.ask)
        for name in ("ask", "send", "fetch", "split"):
            monkeypatch.setattr(links, name, getattr(actor, name))
        monkeypatch.setattr(links, "dispatch", lambda work: work())
        monkeypatch.setattr(
            links, "when_done", lambda ref, work: ref.add_done_callback(lambda _: work())
        )
        link = TrainingLink(actor, KEY, lambda error, seen: error, Heads())  # type: ignore[arg-type]
        linked_to.append((actor, link))
        return link

    yield linked
    for actor, link in linked_to:  # its thread uses what is patched
        actor.mend()
        poll(lambda link=link: not link._lost_calls._working)  # type: ignore[misc]


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
    """Twelve calls are lost.

    Then each try delivers the call and one earlier call, and loses the next.
    """
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
    poll(lambda: link.waiting() == 0)
    assert link.unanswered == 0


# --- a lost call whose actor is busy ------------------------------------------------------------


@pytest.fixture
def busy() -> Lossy:
    """Returns a busy actor to which the first call is lost.

    Calls that are sent again wait until it runs.
    """
    actor = Lossy({0})
    actor.runs.clear()
    return actor


def test_whoever_waits_for_a_lost_call_waits_no_longer_than_they_say(
    over: Callable[[Lossy], TrainingLink], busy: Lossy
) -> None:
    """This holds while another thread waits without a limit, for this call or for another lost
    call."""
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
    assert "h-0" not in link._lost_calls


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


def test_calls_that_nothing_gets_through_are_pending_and_sent_again_by_who_looks(
    over: Callable[[Lossy], TrainingLink],
) -> None:
    """All searches fail; there is no callback, and nobody takes a result."""
    actor = Lossy({*range(10_000)})
    link = over(actor)
    calls = [handle(link, step(number)) for number in range(2)]
    wait([one.object_ref for one in calls], 10)
    for one in calls:
        assert not one.done()
        poll(lambda one=one: link._lost_calls.search(one.future_id).done())  # type: ignore[misc]
        assert (one.status(), link.waiting()) == ("pending", 2)
    actor.mend()
    poll(lambda: all(one.done() for one in calls))
    assert [one.result() for one in calls] == ["stepped", "stepped"]


def test_a_call_that_nothing_gets_through_fails_those_that_wait_behind_it(
    lossy: Callable[[set[int]], TrainingLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each call made its own tries, they would take their time one after the other."""
    link = lossy({*range(1000)})
    calls = [handle(link, step(number)) for number in range(20)]
    link.waiting()
    wait([link._lost_calls.search(one.future_id) for one in calls], 10)
    assert {type(one.exception(0)) for one in calls} == {ClusterUnavailableError}


def test_a_search_that_ray_ends_is_an_error_and_others_go_on(
    over: Callable[[Lossy], TrainingLink],
) -> None:
    """Ray ends each waiting thread when the program leaves the cluster."""
    actor = Lossy({0, 1})
    actor.ends = True
    link = over(actor)
    one, other = handle(link, step(0)), handle(link, step(1))
    assert type(one.exception(10)) is ClusterUnavailableError
    assert (one.result(10), other.result(10)) == ("stepped", "stepped")


def test_what_a_lost_call_was_answered_is_noted_and_the_call_forgotten_by_who_looks(
    lossy: Callable[[set[int]], TrainingLink],
) -> None:
    link = lossy({0})
    handle(link, step(0))
    poll(lambda: link.waiting() == 0)
    assert link.unanswered == 0
    assert link._kept.seen == ["after h-0"]  # type: ignore[union-attr]


def test_a_lost_save_that_goes_on_holds_up_no_lost_step(
    over: Callable[[Lossy], TrainingLink],
) -> None:
    actor = Lossy({0, 1})
    actor.durable.clear()
    link = over(actor)
    save, after = handle(link, SAVE), handle(link, step(1))
    poll(lambda: "h-0" in link._lost_calls)
    assert after.result(10) == "stepped"
    assert not save.done()
    actor.durable.set()
    assert save.result(10) == "durable"


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_save_whose_end_has_arrived_is_what_it_says(
    over: Callable[[Lossy], TrainingLink], monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The answer to the beginning of the save was lost.

    The loss is detected before or after the end arrives. Asking again leads nowhere, because the
    actor has forgotten the save and sends no more.
    """
    actor, late = Lossy(set()), list[Callable[[], object]]()
    actor.unheard = True
    link = over(actor)
    monkeypatch.setattr(links, "when_done", lambda ref, work: late.append(work))
    save = handle(link, SAVE)
    wait([save.object_ref], 10)
    actor._calls._replies.clear()
    if lost == "before":
        late[0]()
        poll(lambda: link._lost_calls.search("h-0").done())
    assert save.done()
    if lost == "after":
        late[0]()
        time.sleep(0.1)
    assert save.result(10) == "durable"


def test_a_save_that_comes_late_is_waited_for(over: Callable[[Lossy], TrainingLink]) -> None:
    actor = Lossy(set())
    actor.patience_s = 0.05
    actor.runs.clear()
    save = handle(over(actor), SAVE)
    wait([save.object_ref], 10)
    assert not save.done()
    actor.runs.set()
    assert save.result(10) == "durable"


def test_no_answer_of_an_actor_whose_run_another_has_is_asked_for(
    over: Callable[[Lossy], TrainingLink], busy: Lossy
) -> None:
    link = over(busy)
    busy._lost.add(1)
    searched, unseen = handle(link, step(0)), handle(link, step(1))
    assert not searched.done()
    wait([unseen.object_ref], 10)
    link.abandon(ActorLostError("replaced"))
    busy.runs.set()
    poll(lambda: link._lost_calls.search("h-0").done())
    for one in (searched, unseen):
        assert one.done()
        assert type(one.exception(0)) is ActorLostError


def test_a_callback_of_a_call_that_was_taken_asks_for_nothing(
    lossy: Callable[[set[int]], TrainingLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, told = lossy({0}), threading.Event()
    one = handle(link, step(0))
    assert one.result(10) == "stepped"
    one.add_done_callback(lambda _: told.set())
    assert told.wait(10)
    assert "h-0" not in link._lost_calls
