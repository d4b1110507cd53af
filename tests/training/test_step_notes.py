"""Tests steps that the registry cannot record for a while: each is in the audit log once."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.registry.registry import Registry
from actors.storage.home import DATABASE
from actors.training import step_notes
from actors.training.actor import TrainingActor
from actors.training.call_journal import CallJournal
from actors.training.step_notes import StepNotes
from support.privacy_helpers import registry as open_registry
from tg_tinker import (
    ActorLostError,
    InvalidRequestError,
    LoRAConfig,
    ServiceClient,
    StorageError,
)
from tg_tinker.cluster.messages import Request, Saving
from tg_tinker.config import TrainingConfig
from tg_tinker.storage.envelope import new_key, open_payload, seal_payload

US = "us"
CALLS = [("batch", "gradient")]


@dataclass
class Door:
    """The way to a real registry's `record`, as an actor has it."""

    registry: Registry
    run: str
    epoch: int
    refuses: bool = False
    loses_answers: bool = False
    asked: list[int] = field(default_factory=list)

    def __call__(self, step: int, *note: Any) -> bool:
        self.asked.append(step)
        if self.refuses:
            raise StorageError("the registry's database refused")
        newest = self.registry.runs.record(self.run, self.epoch, step, *note)
        if self.loses_answers:
            raise StorageError("whether a change was made is not known")
        return newest

    def rows(self) -> list[dict[str, Any]]:
        rows = map(json.loads, self.registry.audit_log.rows(US, 0, 1000))
        return [row for row in rows if row["event"] not in ("run.create", "run.claim")]

    def steps(self) -> list[int]:
        return [row["details"]["step"] for row in self.rows() if row["event"] == "step"]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    registry = open_registry(tmp_path / "home")
    run = registry.runs.create(US, TrainingConfig(model_ref="m").model_dump_json())
    return Door(registry, run, registry.runs.claim(run))


def made(notes: StepNotes, *steps: int) -> None:
    for step in steps:
        notes.note(step, "active", CALLS)
        step_notes.wait([notes._sent])


def test_steps_that_were_refused_are_told_before_the_next_one(door: Door) -> None:
    notes = StepNotes(door)
    made(notes, 1)
    door.refuses = True
    made(notes, 2, 3)
    assert door.steps() == [1]
    door.refuses = False
    made(notes, 4)
    assert door.steps() == [1, 2, 3, 4]
    assert door.registry.runs.get(US, door.run)[0].step == 4
    assert not notes.replaced


def test_settling_tells_them_and_says_whether_all_were_heard(door: Door) -> None:
    notes = StepNotes(door)
    door.refuses = True
    made(notes, 1, 2)
    assert notes.settle(10) is False
    door.refuses = False
    assert notes.settle(10) is True
    assert door.steps() == [1, 2]


@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_a_note_whose_answer_was_lost_is_told_again_and_leaves_one_row(
    door: Door, back_to: int
) -> None:
    """A step that is made again after a load has a row of its own."""
    notes = StepNotes(door)
    made(notes, 1)
    door.loses_answers = True
    made(notes, 2)
    notes.note(back_to, "active")
    door.loses_answers = False
    made(notes, *range(back_to + 1, 4))
    assert door.asked.count(2) > 1
    assert door.steps() == [1, 2, *range(back_to + 1, 4)]


def test_more_than_are_kept_is_a_gap_that_the_next_row_counts(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_notes, "MOST_WAITING", 3)
    notes = StepNotes(door)
    door.refuses = True
    made(notes, *range(1, 8))
    assert len(notes._waiting) == 3
    door.refuses = False
    made(notes, 8)
    found = [(row["details"]["step"], row["details"].get("left_out")) for row in door.rows()]
    assert found == [(1, None), (2, None), (8, 5)]
    made(notes, 9)
    assert "left_out" not in door.rows()[-1]["details"]


def test_what_changes_nothing_takes_no_place(door: Door) -> None:
    """A private run's steps fail while the database refuses, each with a note of its own."""
    notes = StepNotes(door)
    door.refuses = True
    made(notes, 1)
    for _ in range(10):
        notes.note(1, "active")
    assert len(notes._waiting) == 1
    notes.note(1, "completed")
    door.refuses = False
    assert notes.settle(10)
    assert [row["event"] for row in door.rows()] == ["step", "run.complete"]


def test_a_run_that_another_actor_has_is_told_of_once_and_nothing_else(door: Door) -> None:
    notes = StepNotes(door)
    door.refuses = True
    made(notes, 1, 2, 3)
    door.registry.runs.claim(door.run)
    door.refuses = False
    del door.asked[:]
    assert notes.settle(10)
    assert (notes.replaced, door.asked) == (True, [1])
    assert [(row["event"], row["outcome"]) for row in door.rows()] == [("step", "actor_lost")]


def test_after_a_silence_it_asks_once_and_in_between_never(door: Door) -> None:
    notes = StepNotes(door)
    made(notes, 1)
    for _ in range(100):
        notes.ask()
    assert door.asked == [1]
    notes._asked -= step_notes.ASK_AFTER_S + 1
    for _ in range(100):
        notes.ask()
    assert (door.asked, notes.replaced, door.steps()) == ([1, 1], False, [1])
    door.registry.runs.claim(door.run)
    notes.ask()
    assert not notes.replaced
    notes._asked -= step_notes.ASK_AFTER_S + 1
    notes.ask()
    assert notes.replaced


def test_a_step_that_a_freeze_has_cut_in_two_is_not_answered(door: Door) -> None:
    """The actor's own note is under way when it asks, and it waits for the answer to that note."""

    def slowly(*note: Any) -> bool:
        time.sleep(0.2)
        return door(*note)

    notes = StepNotes(slowly)
    made(notes, 1)
    notes._asked -= step_notes.ASK_AFTER_S + 1
    door.registry.runs.claim(door.run)
    notes.note(2, "active", CALLS)
    notes.ask()
    assert notes.replaced


def test_an_answer_from_before_a_freeze_is_none_to_a_question_after_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, gate = threading.Event(), threading.Event()
    clock = time.monotonic()
    monkeypatch.setattr(step_notes, "time", SimpleNamespace(monotonic=lambda: clock))

    def record(*note: Any) -> bool:
        newest = door(*note)
        told.set()
        gate.wait(30)  # the answer is in the socket of a process that is stopped
        return newest

    notes = StepNotes(record)
    notes.note(1, "active", CALLS)
    told.wait(30)
    clock += step_notes.ASK_AFTER_S + 1
    door.registry.runs.claim(door.run)
    threading.Timer(0.2, gate.set).start()
    notes.ask()
    assert notes.replaced


def test_a_silent_registry_is_waited_for_once_in_a_while_and_not_twice_for_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, waits = [0.0], []
    monkeypatch.setattr(step_notes, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def wait(futures: Any, timeout: float) -> None:
        waits.append(timeout)
        clock[0] += timeout + 0.01

    monkeypatch.setattr(step_notes, "wait", wait)
    gate = threading.Event()
    notes = StepNotes(lambda *note: gate.wait(30))
    clock[0] += step_notes.ASK_AFTER_S + 1
    notes.ask()  # before the call
    notes.ask()  # before its answer
    gate.set()
    assert sum(waits) <= 10
    assert not notes.replaced


def test_a_registry_that_says_nothing_holds_up_one_call_and_ends_no_training(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_notes, "ANSWER_S", 0.01)
    gate = threading.Event()
    notes = StepNotes(lambda *note: gate.wait(30) and door(*note))
    notes._asked -= step_notes.ASK_AFTER_S + 1
    for _ in range(100):
        notes.ask()
    assert not notes.replaced
    assert len(notes._waiting) == 1
    gate.set()
    assert notes.settle(30)


def test_a_registry_that_hangs_holds_up_no_step_and_one_try_waits_for_it(door: Door) -> None:
    gate = threading.Event()
    notes = StepNotes(lambda *note: gate.wait(30) and door(*note))
    for step in range(1, 6):
        notes.note(step, "active", CALLS)
    assert notes._sender._work_queue.qsize() <= 1
    assert notes.settle(0) is False
    gate.set()
    assert notes.settle(30)
    assert door.steps() == [1, 2, 3, 4, 5]


@pytest.fixture
def actor(door: Door) -> Any:
    """Returns an actor without Ray and a model.

    `taken_over` makes it one that was frozen and replaced.
    """
    actor_type = vars(TrainingActor)["__ray_metadata__"].modified_class
    actor = actor_type.__new__(actor_type)
    actor._key, actor._epoch, actor._used = new_key(), door.epoch, 0.0
    actor._notes, actor._calls = StepNotes(door), CallJournal(door.epoch)
    actor._worker = SimpleNamespace(
        run=lambda request, check: Saving("a") if request.operation == "save_state" else "done",
        saver=SimpleNamespace(outcome=lambda saving, wait: "durable"), taken=lambda name: "weights",
        latest=lambda: "weights", session=SimpleNamespace(step=1), take_step=list,
        parked=False, broken=False, heads=None, status="active",
    )  # fmt: skip
    return actor


def taken_over(actor: Any, door: Door) -> None:
    door.registry.runs.claim(door.run)  # by another, while it was frozen
    actor._notes._asked -= step_notes.ASK_AFTER_S + 1


def answer(actor: Any, sealed: bytes) -> Any:
    return open_payload(actor._key, sealed).unwrap()


def call(actor: Any, operation: str) -> Any:
    request = Request("h-0", operation, 1, "h", 0)
    return answer(actor, actor.call(seal_payload(actor._key, request)))


@pytest.mark.parametrize("operation", ["forward_backward", "optim_step"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_actor_that_is_frozen_in_a_call_and_replaced_answers_neither_result_nor_error(
    door: Door, actor: Any, operation: str, fails: bool
) -> None:
    def run(request: Request, check: Any) -> str:
        taken_over(actor, door)
        if fails:
            raise InvalidRequestError("no")
        return "done"

    actor._worker.run = run
    with pytest.raises(ActorLostError, match="replaced"):
        call(actor, operation)


ANSWERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a repeat": ("optim_step", lambda actor: call(actor, "optim_step")),
    "a lost answer": ("optim_step", lambda actor: answer(actor, actor.stored("h-0"))),
    "the end of a save": ("save_state", lambda actor: answer(actor, actor.saved("h-0"))),
    "its weights": ("optim_step", lambda actor: answer(actor, actor.latest())),
    "a snapshot": ("optim_step", lambda actor: answer(actor, actor.snapshot("weights"))),
}


@pytest.mark.parametrize("asked", ANSWERS)
def test_an_actor_that_was_replaced_hands_out_nothing_that_it_answered_before(
    door: Door, actor: Any, asked: str
) -> None:
    operation, ask = ANSWERS[asked]
    call(actor, operation)
    assert ask(actor) in ("done", "durable", "weights")
    taken_over(actor, door)
    with pytest.raises(ActorLostError, match="replaced"):
        ask(actor)


@pytest.mark.parametrize("asked", ["saved", "latest", "taken"])
def test_an_actor_that_is_frozen_while_it_looks_for_an_answer_does_not_give_it(
    door: Door, actor: Any, asked: str
) -> None:
    call(actor, "save_state")

    def look(*_: Any, **__: Any) -> str:
        taken_over(actor, door)
        return "found"

    if asked == "saved":
        actor._worker.saver.outcome = look
    else:
        setattr(actor._worker, asked, look)
    ask = {"saved": actor.saved, "latest": lambda _: actor.latest(), "taken": actor.snapshot}[asked]
    with pytest.raises(ActorLostError, match="replaced"):
        answer(actor, ask("h-0"))


def test_a_question_beside_a_step_takes_no_row_from_it(door: Door, actor: Any) -> None:
    """A slow copy of a checkpoint is under way after the step, and a sampler requests the
    weights."""
    actor._notes._asked -= step_notes.ASK_AFTER_S + 1
    assert answer(actor, actor.latest()) == "weights"
    assert door.asked == [0]
    actor._worker.take_step = lambda: CALLS
    actor._record()
    assert actor._notes.settle(10)
    assert door.steps() == [1]


def test_a_run_is_settled_though_it_goes_on(door: Door) -> None:
    gate = threading.Event()

    def record(*note: Any) -> bool:
        if note[0] == 1:
            time.sleep(0.3)  # until it is waited for
            notes.note(2, "active", CALLS)
        else:
            assert gate.wait(30)
        return door(*note)

    notes = StepNotes(record)
    notes.note(1, "active", CALLS)
    assert notes.settle(2)
    assert not notes.settle(0)
    gate.set()
    assert notes.settle(10)
    assert door.steps() == [1, 2]


def test_an_actor_that_has_parked_tells_of_it_whoever_has_the_run_now(
    door: Door, actor: Any
) -> None:
    """The actor saved what it gave up, so nothing that it answered is lost."""
    call(actor, "park")
    actor._worker.parked = True
    taken_over(actor, door)
    assert answer(actor, actor.stored("h-0")) == call(actor, "park") == "done"


@pytest.mark.slow
@pytest.mark.parametrize(("end", "refused"), [("close", "stays open"), ("park", "not parked")])
def test_a_run_goes_on_while_the_database_takes_no_change_and_its_log_has_every_step(
    service: ServiceClient, home: Path, tiny_model: Path, end: str, refused: str
) -> None:
    config = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2))
    tc = service.create_training_client(config)

    def step() -> None:
        tc.forward_backward({"input_ids": [[5, 6, 7, 8]]})
        tc.optim_step().result()

    step()
    tc._calls.link.settle()
    with closing(sqlite3.connect(home / DATABASE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # for longer than the registry waits for it
        step()
        step()
        with pytest.raises(StorageError, match=refused):
            getattr(tc, end)()
        assert tc.info().status == "active"
        assert service.describe_training_client(tc.id).step == 1
    getattr(tc, end)()  # no step more: it has to be told by itself
    rows = [row for row in service.audit_log(limit=1000) if row.subject == tc.id]
    assert [row.details["step"] for row in rows if row.event == "step"] == [1, 2, 3]
    assert service.describe_training_client(tc.id).step == 3
