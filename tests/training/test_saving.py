"""Tests artifacts that a run saves automatically: when, which stay, and how a lost run uses
them."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from actors.artifacts.copies import copy
from actors.artifacts.publish import Draft, write
from actors.storage.store import ArtifactStore
from actors.training.place import Place
from actors.training.saving import MOST_COPIES, Schedule
from actors.training.worker import Worker
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.helpers import assert_equal, examples, weights
from tg_tinker import (
    ActorLostError,
    ArtifactMismatchError,
    CheckpointConfig,
    InvalidRequestError,
    LoRAConfig,
    OptimizerConfig,
    StorageError,
    TrainingConfig,
)
from tg_tinker.labels import AVERAGED
from tg_tinker.types import ArtifactInfo, ArtifactQuery, OptimStepResult

BY_ITSELF = ArtifactQuery(label=("saved", "automatically"))


def worker(
    service: Service, model: Path, carry: object = write, optimizer: OptimizerConfig | None = None,
    **values: int,
) -> Worker:  # fmt: skip
    config = TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=2),
        checkpoints=CheckpointConfig(**values), optimizer=optimizer or OptimizerConfig(),
    )  # fmt: skip
    place = Place(
        TENANT, service.run, service.epoch, str(service.root), service.home, service.capability
    )
    return Worker(place, config, service.registry, lambda _: None, carry)  # type: ignore[arg-type]


def step(of: Worker) -> OptimStepResult:
    of.forward_backward(lambda: None, examples(), None, True)
    return of.optim_step(lambda: None, True)


def settled(of: Worker) -> None:
    """Returns once the saver has nothing left to do."""
    of.saver._thread.submit(lambda: None).result()


def saved(service: Service) -> list[ArtifactInfo]:
    return service.registry.catalogue.find(TENANT, BY_ITSELF)


def test_it_is_due_by_steps_or_by_time_counted_from_the_last_one() -> None:
    now = [0.0]
    by_steps = Schedule(CheckpointConfig(every_steps=3), lambda: now[0])
    by_time = Schedule(CheckpointConfig(every_minutes=2), lambda: now[0])
    never = Schedule(CheckpointConfig(), lambda: now[0])
    assert [by_steps.due(step) for step in (1, 2, 3, 4)] == [False, False, True, True]
    by_steps.begin_at(4)
    assert [by_steps.due(step) for step in (5, 6, 7)] == [False, False, True]
    by_steps.begin_at(2)  # an earlier state was loaded
    assert [by_steps.due(step) for step in (3, 4, 5)] == [False, False, True]
    now[0] = 119.9
    assert not by_time.due(9)
    now[0] = 120.0
    assert by_time.due(1)
    by_time.begin_at(1)
    assert not by_time.due(2)
    now[0] = 1e9
    assert not never.due(10**9)


def test_the_newest_stay_and_what_was_saved_or_labeled_by_hand(
    service: Service, tiny_model: Path
) -> None:
    run = worker(service, tiny_model, every_steps=1, keep=2)
    by_hand = run.saver.outcome(run.save_state(lambda: None, True, {}))
    assert by_hand is not None
    for _ in range(5):
        step(run)
        settled(run)
        if run.session.step == 2:
            service.registry.catalogue.set_labels(
                TENANT, saved(service)[-1].artifact_id, {"stage": "prod"}
            )
    assert [info.step for info in saved(service)] == [4, 5]
    assert [info.step for info in service.registry.catalogue.find(TENANT)] == [0, 2, 4, 5]
    assert all(info.include_optimizer for info in saved(service))
    assert_equal(service.fetch(saved(service)[-1].artifact_id).state.weights, weights(run.session))
    newest = saved(service)[-1].artifact_id
    assert service.registry.runs.resume_point(TENANT, service.run) == (newest, 5)
    service.registry.artifacts.delete(TENANT, newest)
    assert service.registry.runs.resume_point(TENANT, service.run)[1] == 4


def test_averaged_weights_are_saved_for_sampling_and_a_lost_run_is_restored_from_others(
    service: Service, tiny_model: Path
) -> None:
    run = worker(service, tiny_model, optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.5))
    with pytest.raises(InvalidRequestError, match="no step has entered"):
        run.save_state(lambda: None, True, {}, "ema")
    for _ in range(2):
        step(run)
    resumable = run.saver.outcome(run.save_state(lambda: None, True, {}))
    averaged = run.saver.outcome(run.save_state(lambda: None, True, {"note": 1}, "ema"))
    assert resumable is not None
    assert averaged is not None
    found = service.fetch(averaged.artifact_id)
    assert found.metadata == {"note": 1}
    assert_equal(found.state.weights, run.session.averaged_state("ema").weights)
    assert found.state.lineage == service.fetch(resumable.artifact_id).state.lineage
    info = service.registry.catalogue.get(TENANT, averaged.artifact_id)
    assert (info.step, info.include_optimizer, info.labels) == (2, False, {AVERAGED: "ema"})

    copied = copy(service.registry, str(service.root), TENANT, averaged.artifact_id)
    resume_point = service.registry.runs.resume_point
    assert resume_point(TENANT, service.run) == (resumable.artifact_id, 2)
    for artifact in (averaged.artifact_id, copied.artifact_id):
        before = weights(run.session)
        with pytest.raises(ArtifactMismatchError, match="averaged weights"):
            run.load_state(lambda: None, artifact)
        assert_equal(weights(run.session), before)
    # Not even if nothing else is left that the run could be restored from.
    service.registry.artifacts.delete(TENANT, resumable.artifact_id)
    with pytest.raises(ActorLostError):
        resume_point(TENANT, service.run)


def test_no_step_waits_for_a_store_that_does_not_answer_or_fails_with_it(
    service: Service, tiny_model: Path
) -> None:
    answer, full = threading.Event(), [True]

    def stuck(store: ArtifactStore, draft: Draft) -> None:
        answer.wait(60)
        if full[0]:
            raise StorageError("the store is full")
        write(store, draft)

    run = worker(service, tiny_model, stuck, every_steps=1)
    assert [step(run).step for _ in range(4)] == [1, 2, 3, 4]  # two copies wait, two are not made
    answer.set()
    settled(run)
    (warning,) = step(run).warnings
    assert "automatic checkpoint of step 2 failed" in warning
    assert "store is full" in warning
    full[0] = False
    settled(run)
    step(run)
    settled(run)
    assert step(run).warnings == ()
    settled(run)
    assert [info.step for info in saved(service)][-1] == 7
    assert run.saver.drafts == {}


def test_no_step_fails_for_want_of_memory_to_copy_it_and_a_later_save_has_its_turn(
    service: Service, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "cannot map /dev/zero")

    run = worker(service, tiny_model, every_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr("actors.training.saving.to_files", full)  # on the training thread
        assert [step(run).step for _ in range(MOST_COPIES + 1)] == [1, 2, 3]
    with monkeypatch.context() as patched:
        patched.setattr("actors.training.saving.Draft", full)  # on the saver's
        (warning,) = step(run).warnings
        assert warning.endswith("failed, training continues: OSError")
        settled(run)
    run.saver.outcome(run.save_state(lambda: None, True, {}))  # which waits for one of the copies
    step(run)
    settled(run)
    assert step(run).warnings == ()
    settled(run)
    assert [info.step for info in saved(service)] == [5, 6]


def test_a_replaced_actor_saves_and_deletes_nothing(service: Service, tiny_model: Path) -> None:
    run = worker(service, tiny_model, every_steps=1, keep=1)
    step(run)
    settled(run)
    (kept,) = saved(service)
    service.registry.runs.claim(service.run)
    step(run)
    settled(run)
    assert saved(service) == [kept]
    assert "replaced" in step(run).warnings[0]
