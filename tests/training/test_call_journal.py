"""Tests calls of an actor: run once, in order, repeated from memory, and without foreign text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from actors.process import reply_of
from actors.training.call_journal import KEPT_HANDLES, KEPT_REPLIES, CallJournal
from tg_tinker.client.future import FutureHandle
from tg_tinker.cluster.messages import NOT_YET, Reply, Request
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureCancelledError,
    InternalError,
    InvalidRequestError,
    ServiceError,
)

EPOCH = 3
SECRET = "the patient in bed 7"


def request(sequence: int, handle: str = "h", epoch: int = EPOCH) -> Request:
    return Request(f"{handle}-{sequence}", "optim_step", epoch, handle, sequence)


class Work:
    """The work of an actor on a request: notes it, checks for a cancellation, and answers."""

    def __init__(self, before_check: Callable[[], object] = lambda: None) -> None:
        self.ran: list[str] = []
        self._before_check = before_check

    def __call__(self, request: Request, check_cancelled: Callable[[], None]) -> str:
        self._before_check()
        check_cancelled()
        self.ran.append(request.request_id)
        return f"result {len(self.ran)}"


def raised(reply: Reply) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        reply.unwrap()
    return caught.value


# --- once ------------------------------------------------------------------------------------


def test_a_repeat_is_answered_from_memory_and_runs_once() -> None:
    calls, work = CallJournal(EPOCH), Work()
    first = calls.run(request(0), work)
    assert calls.run(request(0), work) == first == Reply("result 1")
    assert calls.run(request(1), work) == Reply("result 2")
    assert calls.run(request(0), work) == first
    assert work.ran == ["h-0", "h-1"]


def test_a_repeat_of_a_failed_call_fails_alike_and_does_not_run_again() -> None:
    attempts = []

    def fails(request: Request, check: Callable[[], None]) -> None:
        attempts.append(request.request_id)
        raise InvalidRequestError("rank 0", details={"rank": 0})

    calls = CallJournal(EPOCH)
    replies = [calls.run(request(0), fails) for _ in range(3)]
    assert attempts == ["h-0"]
    for reply in replies:
        error = raised(reply)
        assert type(error) is InvalidRequestError
        assert error.details == {"rank": 0}


def test_a_failed_call_does_not_stop_the_next_one() -> None:
    calls, work = CallJournal(EPOCH), Work()

    def fails(request: Request, check: Callable[[], None]) -> None:
        raise InvalidRequestError("no")

    calls.run(request(0), fails)
    assert calls.run(request(1), work).unwrap() == "result 1"


def test_a_reply_can_be_read_without_running_anything() -> None:
    calls, work = CallJournal(EPOCH), Work()
    assert calls.stored("h-0") is None
    reply = calls.run(request(0), work)
    assert calls.stored("h-0") == reply
    assert calls.stored("h-1") is None
    assert work.ran == ["h-0"]


def test_none_is_a_result_and_remembered_like_one() -> None:
    calls, ran = CallJournal(EPOCH), []
    for _ in range(2):
        assert calls.run(request(0), lambda r, check: ran.append(r)) == Reply(None)
    assert len(ran) == 1


# --- in order --------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [1, 2, -1])
def test_a_gap_in_the_order_is_refused_and_runs_nothing(sequence: int) -> None:
    calls, work = CallJournal(EPOCH), Work()
    error = raised(calls.run(request(sequence), work))
    assert type(error) is ServiceError
    assert f"call {sequence} of this client arrived where 0 was due" in str(error)
    assert work.ran == []
    assert calls.run(request(0), work).unwrap() == "result 1"


def test_a_new_call_under_an_old_number_is_refused() -> None:
    calls, work = CallJournal(EPOCH), Work()
    calls.run(request(0), work)
    forged = Request("another id", "optim_step", EPOCH, "h", 0)
    assert type(raised(calls.run(forged, work))) is ServiceError
    assert work.ran == ["h-0"]


def test_every_handle_has_an_order_of_its_own() -> None:
    calls, work = CallJournal(EPOCH), Work()
    for sequence in range(3):
        for handle in ("a", "b"):
            calls.run(request(sequence, handle), work).unwrap()
    assert work.ran == ["a-0", "b-0", "a-1", "b-1", "a-2", "b-2"]
    assert type(raised(calls.run(request(1, "c"), work))) is ServiceError


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1, 0])
def test_a_call_of_another_epoch_is_refused_with_both_numbers(epoch: int) -> None:
    calls, work = CallJournal(EPOCH), Work()
    error = raised(calls.run(request(0, epoch=epoch), work))
    assert type(error) is ActorLostError
    assert f"epoch {epoch}, the actor to {EPOCH}" in str(error)
    assert work.ran == []
    fresh = Request("fresh", "optim_step", EPOCH, "h", 0)
    assert calls.run(fresh, work).unwrap() == "result 1", "the refused call took a number"


# --- cancelled -------------------------------------------------------------------------------


def test_a_call_cancelled_before_it_arrives_changes_nothing() -> None:
    calls, work = CallJournal(EPOCH), Work()
    assert calls.cancel("h-0") is True
    assert type(raised(calls.run(request(0), work))) is FutureCancelledError
    assert work.ran == []
    assert calls.run(request(1), work).unwrap() == "result 1", "the order went on"


def test_a_call_cancelled_while_it_runs_stops_at_its_next_check() -> None:
    calls = CallJournal(EPOCH)
    work = Work(before_check=lambda: calls.cancel("h-0"))
    assert type(raised(calls.run(request(0), work))) is FutureCancelledError
    assert work.ran == []


def test_a_cancelled_call_answers_alike_when_repeated() -> None:
    calls, work = CallJournal(EPOCH), Work()
    calls.cancel("h-0")
    replies = [calls.run(request(0), work) for _ in range(2)]
    assert replies[0] == replies[1]
    assert work.ran == []


def test_a_call_that_has_answered_cannot_be_cancelled_any_more() -> None:
    calls, work = CallJournal(EPOCH), Work()
    reply = calls.run(request(0), work)
    assert calls.cancel("h-0") is False
    assert calls.run(request(0), work) == reply
    calls.check_cancelled("h-0")


def test_cancelling_one_call_leaves_the_others_alone() -> None:
    calls, work = CallJournal(EPOCH), Work()
    calls.cancel("h-1")
    assert calls.run(request(0), work).error is None
    assert calls.run(request(1), work).error is not None
    assert calls.run(request(2), work).error is None
    assert work.ran == ["h-0", "h-2"]


# --- bounded ---------------------------------------------------------------------------------


def test_memory_keeps_the_newest_replies_and_no_more() -> None:
    calls, work = CallJournal(EPOCH), Work()
    many = KEPT_REPLIES + 10
    for sequence in range(many):
        calls.run(request(sequence), work)
    kept = [i for i in range(many) if calls.stored(f"h-{i}") is not None]
    assert kept == [*range(10, many)]


def test_a_busy_client_pushes_out_no_reply_of_another() -> None:
    calls, work = CallJournal(EPOCH), Work()
    first = calls.run(request(0, "quiet"), work)
    for sequence in range(KEPT_REPLIES + 10):
        calls.run(request(sequence, "busy"), work)
    assert calls.stored("quiet-0") == calls.run(request(0, "quiet"), work) == first


def test_the_clients_that_called_last_are_remembered_and_no_old_call_runs_again() -> None:
    calls, work = CallJournal(EPOCH), Work()
    for number in range(KEPT_HANDLES):
        calls.run(request(0, f"h{number}"), work)
    calls.run(request(1, "h0"), work)
    calls.run(request(0, "new"), work)
    assert calls.stored("h1-0") is None
    assert None not in (calls.stored("h0-0"), calls.stored("h2-0"), calls.stored("new-0"))
    assert type(raised(calls.run(request(0, "h1"), work))) is ServiceError
    assert work.ran.count("h1-0") == 1
    assert len(calls._replies) == KEPT_HANDLES + 1


def test_a_repeat_that_is_forgotten_is_refused_rather_than_run_again() -> None:
    """The call changed the weights once, and its number is used up."""
    calls, work = CallJournal(EPOCH), Work()
    for sequence in range(KEPT_REPLIES + 1):
        calls.run(request(sequence), work)
    assert type(raised(calls.run(request(0), work))) is ServiceError
    assert len(work.ran) == KEPT_REPLIES + 1


def test_reading_and_repeating_do_not_push_replies_out() -> None:
    calls, work = CallJournal(EPOCH), Work()
    for sequence in range(KEPT_REPLIES):
        calls.run(request(sequence), work)
    for _ in range(10):
        calls.run(request(5), work)
        calls.stored("h-6")
    assert all(calls.stored(f"h-{i}") for i in range(KEPT_REPLIES))


def test_a_flood_of_cancellations_is_bounded() -> None:
    calls = CallJournal(EPOCH)
    for i in range(KEPT_REPLIES + 1):
        calls.cancel(f"x-{i}")
    calls.check_cancelled("x-0")
    for i in range(1, KEPT_REPLIES + 1):
        with pytest.raises(FutureCancelledError):
            calls.check_cancelled(f"x-{i}")


# --- what a handle keeps -----------------------------------------------------------------------


class Flaky:
    """A link whose next answers are these errors, and then the reply from the journal."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = [*errors]

    def open(self, ref: Any, request_id: str, timeout: float | None = None) -> Reply:
        if self._errors:
            raise self._errors.pop(0)
        return Reply("step 8")

    def done(self, ref: Any, request_id: str) -> bool:
        return True


def handle(*errors: Exception) -> FutureHandle[str]:
    return FutureHandle(Flaky(*errors), None, "h-0", "tc-1", "optim_step")  # type: ignore[arg-type]


def test_an_answer_that_was_lost_on_the_way_is_asked_for_again() -> None:
    """A client that takes the loss for the answer repeats a step that was made and paid for."""
    asked = handle(*(ClusterUnavailableError("lost on the way: ask again") for _ in range(2)))
    with pytest.raises(ClusterUnavailableError, match="ask again"):
        asked.result()
    assert asked.status() == "pending"
    assert [asked.result(), asked.exception(), asked.status()] == ["step 8", None, "done"]


def test_the_loss_of_the_actor_is_the_last_word() -> None:
    asked = handle(ActorLostError("repeat from step 8"))
    for _ in range(2):
        with pytest.raises(ActorLostError, match="repeat from step 8"):
            asked.result()


# --- errors as values ------------------------------------------------------------------------


class UnprintableError(Exception):
    """An exception of a library that quotes the data, and cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError(SECRET)

    __repr__ = __str__


def quoting() -> None:
    local_text = SECRET
    raise ValueError(f"cannot parse {local_text!r}")


def quoting_from() -> None:
    try:
        quoting()
    except ValueError as error:
        raise KeyError(SECRET) from error


def unprintable() -> None:
    raise UnprintableError(SECRET)


@pytest.mark.parametrize("work", [quoting, quoting_from, unprintable])
def test_a_foreign_exception_becomes_an_internal_error_without_its_text(
    work: Callable[[], None], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    reply = reply_of(work, "h-7")
    assert reply.error is not None
    error = raised(reply)
    assert type(error) is InternalError
    for said in (str(reply.error), str(error), repr(error.details), str(error.__context__)):
        assert SECRET not in said
    assert not any(capfd.readouterr())
    assert caplog.records == []


def test_an_internal_error_names_type_place_and_request() -> None:
    error = raised(reply_of(quoting, "h-7"))
    line = quoting.__code__.co_firstlineno + 2
    assert str(error).startswith("ValueError in the service at ")
    assert f"test_call_journal.py:{line} < " in str(error)
    assert "(request h-7)" in str(error)
    assert "/" not in str(error), "a path of this machine"
    assert error.details["type"] == "ValueError"
    assert error.details["request_id"] == "h-7"


def test_our_own_errors_pass_with_everything_they_say() -> None:
    def refuse() -> None:
        raise InvalidRequestError("rank 0 is below 1", "odd", {"rank": 0})

    error = raised(reply_of(refuse))
    assert type(error) is InvalidRequestError
    assert (str(error), error.code, error.details) == ("rank 0 is below 1", "odd", {"rank": 0})
    assert error.__traceback__ is not None
    assert error.__cause__ is None


def test_a_failing_call_of_an_actor_is_a_reply_too() -> None:
    calls = CallJournal(EPOCH)

    def fails(request: Request, check: Callable[[], None]) -> Any:
        raise ValueError(SECRET)

    error = raised(calls.run(request(0), fails))
    assert type(error) is InternalError
    assert "h-0" in str(error)
    assert SECRET not in str(error)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_is_not_swallowed(stop: type[BaseException]) -> None:
    def end() -> None:
        raise stop

    with pytest.raises(stop):
        reply_of(end)


def test_requests_and_replies_never_print_what_they_carry() -> None:
    carried = Request("id", "sample", 1, "h", 0, {"prompts": [SECRET]})
    assert SECRET not in repr(carried)
    assert SECRET not in repr(Reply(SECRET))


def test_an_actor_process_leaves_no_core_dump() -> None:
    program = (
        "import resource; from actors.process import harden;"
        "harden(); print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "(0, 0)"


def test_whoever_waits_for_a_call_that_never_comes_learns_it_and_asks_again() -> None:
    """The client was killed, or the call was refused: a thread of the actor must not wait for
    ever."""
    calls, work = CallJournal(EPOCH), Work()
    assert raised(calls.wait("h-0", 0.01)).code == NOT_YET  # type: ignore[attr-defined]
    calls.run(request(1), work)  # refused: out of turn
    assert raised(calls.wait("h-1", 0.01)).code == NOT_YET  # type: ignore[attr-defined]
    calls.run(request(0), work)
    assert calls.wait("h-0", 0.01).unwrap() == "result 1"
