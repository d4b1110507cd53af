"""Tests random operations, kills and cancels, against a book of what must have become of each call.

Two runs take turns. At the end, a run that loses nothing repeats what the first run went through.
Every answer must be the same to the bit, so each call was run once or not at all, in order. The
second run is private: charges cover draws of noise, draws cover steps, and only a loss costs a
charge.

The test takes half a minute, and half an hour in `make soak`; TG_TINKER_SOAK_SECONDS and _SEED
change that.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from support.clusters import registry_pid
from support.processes import SOAK, pid_of
from support.runs import config
from tg_tinker import (
    ActorLostError,
    DPConfig,
    FutureCancelledError,
    InvalidRequestError,
    ResourceConfig,
    ServiceClient,
    TrainingClient,
    WindowSpoiledError,
)
from tg_tinker.records.ledger import Ledger

pytestmark = [pytest.mark.program, pytest.mark.filterwarnings("ignore")]

SECONDS = float(os.environ.get("TG_TINKER_SOAK_SECONDS") or (1800 if SOAK else 20))
SEED = int(os.environ.get("TG_TINKER_SOAK_SEED") or 7)
ANSWER_S = 120.0
DATASET = "soak"

OPERATIONS = {
    "train": 40, "cancel": 15, "save": 10, "load": 8, "sample": 8, "kill": 8, "kill_a_save": 4,
    "park": 4, "kill_the_registry": 3,
}  # fmt: skip
"""How often each is drawn."""

Numbers = tuple[int, ...]
"""Of the batches of one step."""

Past = tuple[Numbers, ...]
"""All steps from the base model to a state."""

Call = tuple[str, int, Any]
"""What was sent: the operation, the number of its batch, its handle."""


def batch(number: int) -> dict[str, Any]:
    first = [(7 * number + place) % 250 for place in range(6)]
    return {"input_ids": [first, [number % 250, number // 250 % 250, 9]]}


@dataclass
class Book:
    """The fate of a run's calls, as far as their answers show it.

    Attributes:
        exact: whether the same state always gives the same answer.
        past: the steps that have made its weights.
        window: batches that wait for their step.
        spoiled: whether one of them was canceled, so that the next step drops them.
        untold: whether a step failed, which the next sample has to report.
        saved: the steps in each artifact that `save_state` made.
        point: the state in which a lost actor is recovered.
        answers: (past, window, operation) -> the answer.
    """

    exact: bool
    past: Past = ()
    window: Numbers = ()
    spoiled: bool = False
    untold: bool = False
    saved: dict[str, Past] = field(default_factory=dict)
    point: Past = ()
    answers: dict[tuple[Past, Numbers, str], Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def enter(self, call: Call) -> None:
        """Enters a call that was answered, by a result or an error of its own."""
        operation, number, handle = call
        try:
            result = handle.result(ANSWER_S)
        except FutureCancelledError:
            self.spoiled |= operation == "forward_backward"
            self.counts[f"{operation} cancelled"] += 1
        except WindowSpoiledError:
            self.refused(operation, right=self.spoiled)
            self.untold = True
        except InvalidRequestError:
            self.refused(operation, right=self.exact and not self.spoiled and not self.window)
        else:
            self.counts[operation] += 1
            if operation == "forward_backward":
                self.window += (number,)
                if not self.spoiled:
                    self.agree(operation, result.gradient_hash)
            else:
                self.stepped(result)

    def refused(self, operation: str, right: bool) -> None:
        assert operation == "optim_step"
        assert right
        self.window, self.spoiled, self.untold = (), False, False
        self.counts["optim_step refused"] += 1

    def stepped(self, result: Any) -> None:
        assert self.window or not self.exact  # a private run may step by noise alone
        assert not self.spoiled
        assert result.step == len(self.past) + 1
        self.agree("optim_step", result.grad_norm)
        self.be_at((*self.past, self.window))

    def agree(self, operation: str, found: Any) -> None:
        if self.exact:
            place = self.past, self.window, operation
            assert self.answers.setdefault(place, found) == found, place

    def be_at(self, past: Past) -> None:
        self.past, self.window, self.spoiled, self.untold = past, (), False, False


class Driver:
    """One run, and all operations on it. Each operation is a method of its name."""

    def __init__(self, service: ServiceClient, tc: TrainingClient, draw: random.Random) -> None:
        self.service, self.tc, self.draw = service, tc, draw
        self.book = Book(exact=not tc.config.private)
        self._artifacts: set[str] = set()
        self._sent = 0

    def train(self) -> None:
        self._enter(self._burst())

    def cancel(self) -> None:
        calls = self._burst()
        for call in self.draw.sample(calls, self.draw.randint(1, len(calls))):
            call[2].cancel()
        self._enter(calls)

    def save(self) -> None:
        artifact_id = self.tc.save_state().artifact_id
        self.book.saved[artifact_id] = self.book.point = self.book.past
        self.book.counts["saves"] += 1
        self._artifacts = self._listed()

    def load(self) -> None:
        if self.book.saved:
            artifact_id = self.draw.choice([*self.book.saved])
            past = self.book.saved[artifact_id]
            assert self.tc.load_state(artifact_id).step == len(past)
            self.book.be_at(past)
            self.book.point = past
            self.book.counts["loads"] += 1

    def sample(self) -> None:
        try:
            found = self.tc.sample("abc", max_tokens=4, temperature=0)
        except WindowSpoiledError:
            assert self.book.untold
        else:
            assert not self.book.untold
            assert found.weights_version == f"{self.tc.id}@{len(self.book.past)}"
            self.book.counts["samples"] += 1
        self.book.untold = False

    def park(self) -> None:
        if self.book.window or self.book.spoiled:
            with pytest.raises(InvalidRequestError, match="finish the step"):
                self.tc.park()
            return
        self.tc.park()
        self.book.be_at(self.book.past)
        self.book.point = self.book.past
        self.book.counts["parked"] += 1
        self._artifacts = self._listed()
        self._come_back()

    def kill(self) -> None:
        self._lose(self._burst())

    def kill_a_save(self) -> None:
        self._lose([("save_state", 0, self.tc.save_state_async())])

    def kill_the_registry(self) -> None:
        calls = self._burst()
        os.kill(registry_pid(), signal.SIGKILL)
        self._enter(calls)
        self.book.counts["registries killed"] += 1

    # --- inside ------------------------------------------------------------------------------

    def _burst(self) -> list[Call]:
        calls: list[Call] = []
        for _ in range(self.draw.randint(2, 5)):
            for _ in range(self.draw.choice((0, 1, 1, 1, 2))):
                self._sent += 1
                sent = self.tc.forward_backward(batch(self._sent))
                calls.append(("forward_backward", self._sent, sent))
            calls.append(("optim_step", 0, self.tc.optim_step()))
        return calls

    def _enter(self, calls: list[Call]) -> None:
        for call in calls:
            self.book.enter(call)
        assert self.tc.step == len(self.book.past)

    def _lose(self, calls: list[Call]) -> None:
        """Kills the actor by kill -9 at some moment of these calls; the run is recovered."""
        pid = pid_of_living(self.tc)
        time.sleep(self.draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        told: set[str] = set()
        for operation, number, handle in calls:
            error = handle.exception(ANSWER_S)
            if isinstance(error, ActorLostError):
                told.add(str(error))
            elif operation == "save_state":
                self.book.point = self.book.past
            else:
                assert not told, "a call after a lost one was run"
                self.book.enter((operation, number, handle))
        error = self.tc.forward_backward(batch(0)).exception(ANSWER_S) if not told else error
        assert isinstance(error, ActorLostError)
        assert len(told | {str(error)}) == 1
        self._resume(error)

    def _resume(self, error: ActorLostError) -> None:
        """Recovers the run. A save that was under way was entered as a whole or not at all."""
        new, book = self._listed() - self._artifacts, self.book
        if new:
            (artifact_id,) = new
            book.saved[artifact_id] = book.point = book.past
            self._artifacts |= new
        assert error.details["resume_step"] == len(book.point)
        book.counts["steps lost"] += error.details["lost_steps"]
        book.counts["actors killed"] += 1
        book.be_at(book.point)
        self._come_back()
        assert self.tc.step == len(book.point)

    def _come_back(self) -> None:
        self.tc.recover()

    def _listed(self) -> set[str]:
        return {info.artifact_id for info in self.service.list_artifacts(run=self.tc.id)}


class PrivateDriver(Driver):
    """A private run.

    Each draw of noise is noted durably before it is made, in whatever process makes it.
    """

    def __init__(self, *arguments: Any, log: Path) -> None:
        super().__init__(*arguments)
        self.log = log
        self._watch()

    def _come_back(self) -> None:
        super()._come_back()
        self._watch()

    def _watch(self) -> None:
        ray.get(self.tc._calls.link.actor.__ray_call__.remote(noting(str(self.log))))


def noting(log: str) -> Callable[[Any], None]:
    def install(actor: Any) -> None:
        import os

        session = actor._worker.session
        release = session._release

        def noted(*arguments: Any) -> Any:
            with open(log, "a") as file:  # noqa: PTH123
                file.write("draw\n")
                file.flush()
                os.fsync(file.fileno())
            return release(*arguments)

        session._release = noted

    return install


def pid_of_living(tc: TrainingClient) -> int:
    assert tc.step >= 0  # a parked run comes back for that
    return pid_of(tc)


@pytest.fixture
def drivers(
    service: ServiceClient, tiny_model: Path, tmp_path: Path
) -> tuple[Driver, PrivateDriver]:
    draw = random.Random(SEED)
    small = {"resources": ResourceConfig(num_cpus=0, num_threads=1), "batch_size": 4}
    dp = DPConfig(sampling="worst_case", noise_multiplier=2.0, target_epsilon=None)
    plain = service.create_training_client(config(tiny_model, **small))
    private = service.create_training_client(
        config(tiny_model, dataset_id=DATASET, dp_config=dp, **small)
    )
    return (
        Driver(service, plain, draw), PrivateDriver(service, private, draw, log=tmp_path / "draws"),
    )  # fmt: skip


@pytest.mark.timeout(SECONDS + 900)
def test_whatever_happens_each_call_is_run_once_or_not_at_all(
    service: ServiceClient, drivers: tuple[Driver, PrivateDriver],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (first, second), draw, begun = drivers, random.Random(SEED), time.monotonic()
    for operation in OPERATIONS:  # each at least once
        getattr(first, operation)()
    for operation in ("train", "kill", "train"):
        getattr(second, operation)()
    while time.monotonic() < begun + SECONDS:
        (operation,) = draw.choices([*OPERATIONS], [*OPERATIONS.values()])
        getattr(draw.choice(drivers), operation)()
    assert_repeats(service, first)
    assert_covered(service, second)
    service.verify_audit_log()
    told = [f"{time.monotonic() - begun:.0f} s, seed {SEED}"]
    for driver in drivers:
        figures = ", ".join(f"{n} {what}" for what, n in sorted(driver.book.counts.items()))
        told.append(f"{type(driver).__name__}: {figures}")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *told, ""]))


def assert_repeats(service: ServiceClient, driver: Driver) -> None:
    """Checks that a run that loses nothing gives the same answers to the same calls, and ends in
    the same weights."""
    past, book = driver.book.past, driver.book
    with service.create_training_client(driver.tc.config) as clean:
        for done, window in enumerate(past):
            for number in range(1, len(window) + 1):
                found = clean.forward_backward(batch(window[number - 1])).result(ANSWER_S)
                place = past[:done], window[:number], "forward_backward"
                assert book.answers[place] == found.gradient_hash
            stepped = clean.optim_step().result(ANSWER_S)
            assert book.answers[past[:done], window, "optim_step"] == stepped.grad_norm
        probes = []
        for tc in (clean, driver.tc):
            tc.eval()
            probes.append(tc.forward_backward({"input_ids": [[1, 2, 3, 4, 5, 6, 7]]}).result().loss)
        assert probes[0] == probes[1]
    book.counts["steps repeated at the end"] = len(past)


def assert_covered(service: ServiceClient, driver: PrivateDriver) -> None:
    entries = service.privacy_report(DATASET).entries
    charges = Ledger.replay(entries).accounts[driver.tc.id].count
    draws = len(driver.log.read_text().splitlines()) if driver.log.exists() else 0
    counts = driver.book.counts
    assert charges >= draws >= counts["optim_step"]
    assert charges <= counts["optim_step"] + counts["actors killed"]
    assert driver.tc.privacy is not None
    assert driver.tc.privacy.used == charges
    counts |= {"charges": charges, "draws of noise": draws}
