"""Tests a lost actor: what the error reports, how the run is recovered, and that a frozen actor
can do nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.privacy_helpers import ROWS
from support.processes import pid_of
from support.runs import config, fingerprints, lost, train
from tg_tinker import (
    ActorLostError,
    ClusterUnavailableError,
    DPConfig,
    InvalidRequestError,
    PlacementError,
    ServiceClient,
    StorageError,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.client.lost_calls import open_reply
from tg_tinker.cluster import cluster
from tg_tinker.records.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a step has")]


def private(model: Path, dataset: str, **dp: Any) -> TrainingConfig:
    values = {"noise_multiplier": 2.0, "sampling": "worst_case", "target_epsilon": None} | dp
    return config(model, batch_size=2, dataset_id=dataset, dp_config=DPConfig(**values))


def kill(tc: TrainingClient) -> None:
    os.kill(pid_of(tc), signal.SIGKILL)


@dataclass(frozen=True)
class Clean:
    """A run of four steps that lost nothing: the answer to each call, and the states by step."""

    found: list[Any]
    artifacts: dict[int, str]


@pytest.fixture(scope="module")
def clean(service: ServiceClient, tiny_model: Path) -> Clean:
    found, artifacts = [], {}
    with service.create_training_client(config(tiny_model)) as tc:
        for step in (1, 2, 3, 4):
            found += fingerprints(train(tc, step))
            artifacts[step] = tc.save_state().artifact_id
    return Clean(found, artifacts)


# --- what is told, and what comes back --------------------------------------------------------


def test_every_lost_call_says_from_where_to_repeat_and_the_next_one_brings_the_run_back(
    service: ServiceClient, tiny_model: Path, clean: Clean
) -> None:
    with service.create_training_client(config(tiny_model)) as tc:
        train(tc, 1, 2)
        tc.save_state()
        train(tc, 3)
        pid = pid_of(tc)
        tc.forward_backward({"input_ids": [[7] * 128] * 2000})
        queued = [tc.optim_step(), tc.save_state_async(), tc.forward_backward({"input_ids": ROWS})]
        os.kill(pid, signal.SIGKILL)
        errors = [handle.exception(timeout=60) for handle in queued]
        told = {"resume_step": 2, "lost_steps": 1, "epoch": 1, "reason": "its process ended"}
        for error in errors:
            assert type(error) is ActorLostError
            assert error.details == told
            assert "Repeat from step 3" in str(error)
        assert len({str(error) for error in errors}) == 1
        info = tc.info()
        assert (info.status, info.reason, info.epoch) == ("failed", "its process ended", 1)
        assert service.describe_training_client(tc.id).status == "failed"
        assert fingerprints(train(tc, 3, 4)) == clean.found[4:]  # the same client, by itself
        info = tc.info()
        assert (info.status, info.reason, info.epoch, info.step) == ("active", "", 2, 4)
        assert queued[0].exception() is not None


def test_a_run_without_an_artifact_begins_again_once_its_caller_was_told(
    service: ServiceClient, tiny_model: Path, clean: Clean
) -> None:
    with service.create_training_client(config(tiny_model)) as tc:
        train(tc, 1, 2)
        kill(tc)
        time.sleep(1)  # Ray knows
        blind = [tc.forward_backward({"input_ids": ROWS}), tc.optim_step()]
        assert tc.info().status == "failed"
        blind.append(tc.optim_step())  # meant to follow those that are lost
        assert [type(handle.exception(60)) for handle in blind] == [ActorLostError] * 3
        assert blind[0].exception().details["lost_steps"] == 2
        assert tc.info().epoch == 1
        assert fingerprints(train(tc, 1, 2)) == clean.found[:4]


def test_a_run_that_loaded_an_artifact_comes_back_from_that_and_never_from_the_base(
    service: ServiceClient, tiny_model: Path, clean: Clean
) -> None:
    begun = service.copy_artifact(clean.artifacts[3]).artifact_id
    with service.create_training_client(config(tiny_model)) as tc:
        tc.load_state(clean.artifacts[4])
        tc.load_state(begun)
        train(tc, 4)
        kill(tc)
        assert lost(tc).details["resume_step"] == 3
        assert fingerprints(train(tc, 4)) == clean.found[6:]
        service.delete_artifact(begun)
        kill(tc)
        for _ in range(2):
            with pytest.raises(ActorLostError, match="deleted or expired"):
                tc.forward_backward({"input_ids": ROWS[:2]}).result(timeout=60)


def test_steps_that_are_lost_are_told_although_the_new_actor_does_not_start(
    service: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(**arguments: Any) -> Any:
        raise PlacementError("no room")

    def no_registry(before: Any) -> None:
        raise ClusterUnavailableError("gone")

    tc = service.create_training_client(config(tiny_model), recover="manual")
    train(tc, 1, 2)
    tc._calls.link.settle()
    kill(tc)
    lost(tc)
    with monkeypatch.context() as patched:
        patched.setattr(service._cluster, "start_training", no_room)
        with (
            pytest.warns(UserWarning, match="lost after the last artifact: 2; .* from step 0"),
            pytest.raises(PlacementError),
        ):
            service.get_training_client(tc.id)
        patched.setattr(service._runs._recovery, "warn_of_loss", no_registry)
        with pytest.raises(PlacementError):  # still: not what could not be told beside it
            service.get_training_client(tc.id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = service.get_training_client(tc.id)
    assert [result.step for result in train(again, 1)[1::2]] == [1]
    again.close()


def test_manual_recovery_waits_and_two_that_bring_a_run_back_at_once_share_one_new_actor(
    service: ServiceClient, tiny_model: Path
) -> None:
    with service.create_training_client(config(tiny_model), recover="manual") as tc:
        train(tc, 1)
        tc.save_state()
        other = service.get_training_client(tc.id)
        kill(tc)
        first = lost(tc)
        assert first.details == lost(other).details
        for call in (
            lambda: tc.optim_step(), lambda: tc.step, lambda: tc.sample("a"), tc.save_state,
        ):  # fmt: skip
            with pytest.raises(ActorLostError) as again:
                call()
            assert (str(again.value), again.value.details) == (str(first), first.details)
        assert tc.info().epoch == 1
        threads = [threading.Thread(target=client.recover) for client in (tc, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tc._calls.epoch == other._calls.epoch == tc.info().epoch >= 2
        tc.recover()  # of a living actor: nothing happens
        tc.forward_backward({"input_ids": ROWS[:2]}).result()
        assert other.optim_step().result().step == 2
    with pytest.raises(InvalidRequestError, match="recover='never'"):
        service.create_training_client(config(tiny_model), recover="never")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="closed"):
        tc.recover()


def test_a_step_that_fails_while_weights_move_ends_the_actor_and_never_the_run(
    service: ServiceClient, tiny_model: Path, clean: Clean
) -> None:
    import ray

    def cramped(actor: Any) -> None:
        torch_optimizer = actor._worker.session._optimizer._torch

        def step() -> None:
            torch_optimizer.param_groups[0]["params"][0].data.add_(1)
            raise MemoryError

        torch_optimizer.step = step

    with service.create_training_client(config(tiny_model)) as tc:
        train(tc, 1)
        tc.save_state()
        ray.get(tc._calls.link.actor.__ray_call__.remote(cramped))
        with pytest.raises(ActorLostError) as told:
            train(tc, 2)
        assert told.value.details["resume_step"] == 1
        assert fingerprints(train(tc, 2)) == clean.found[2:4]


def test_a_save_whose_storage_actor_is_killed_fails_and_the_next_one_is_whole(
    service: ServiceClient, tiny_model: Path
) -> None:
    import ray

    def doomed(writer: int) -> Any:
        def install(actor: Any) -> None:
            import os
            import signal

            from actors.artifacts.publish import Draft

            real = Draft.parts

            def dying(draft: Any, name: str) -> Any:
                Draft.parts = real  # type: ignore[method-assign]
                os.kill(writer, signal.SIGKILL)
                return real(draft, name)

            Draft.parts = dying  # type: ignore[method-assign]

        return install

    with service.create_training_client(config(tiny_model)) as tc:
        train(tc, 1)
        storage = ray.get_actor("tg_tinker.storage", namespace=service._cluster.namespace)
        pid = ray.get(storage.__ray_call__.remote(lambda self: os.getpid()))
        ray.get(tc._calls.link.actor.__ray_call__.remote(doomed(pid)))
        with pytest.raises(StorageError, match="save again"):
            tc.save_state()
        assert service.list_artifacts(run=tc.id) == []
        deadline = time.monotonic() + 60
        while True:
            try:
                saved = tc.save_state().artifact_id
                break
            except StorageError:  # it is on its way back
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert [*service.verify_artifacts(saved)] == [(saved, "")]
        assert tc.info().epoch == 1


# --- a frozen actor ---------------------------------------------------------------------------


def test_an_actor_that_wakes_up_after_it_was_replaced_can_do_nothing_and_repeats_are_charged(
    service: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._cluster, "silent_s", 2.0)
    monkeypatch.setattr(service._cluster, "kill_training", lambda run, epoch: None)  # out of reach

    def impatient(actor: Any) -> None:
        from actors.training import step_notes

        step_notes.ASK_AFTER_S = 1.0  # below the silence that counts here

    with service.create_training_client(private(tiny_model, "frozen")) as tc:
        train(tc, 1)
        saved = tc.save_state().artifact_id
        train(tc, 2)
        frozen, old = pid_of(tc), tc._calls.link
        _fetch(old.actor.__ray_call__.remote(impatient))
        os.kill(frozen, signal.SIGSTOP)
        try:
            late = [tc.forward_backward({"input_ids": ROWS[2:4]}), tc.optim_step()]
            late.append(tc.save_state_async())
            tc.recover()
            assert (tc.info().epoch, tc.step) == (2, 1)
            train(tc, 2)
        finally:
            os.kill(frozen, signal.SIGCONT)
        for handle in late:  # whatever it computes now, nobody takes it for an answer
            error = handle.exception(timeout=60)
            assert type(error) is ActorLostError
            assert error.details["reason"] == "it did not answer"
        raw = [open_reply(old._key, _fetch(handle.object_ref)) for handle in late]
        assert [reply.error and reply.error[0] for reply in raw] == ["ActorLostError"] * 3
        assert [a.artifact_id for a in service.list_artifacts(run=tc.id)] == [saved]
        account = Ledger.replay(service.privacy_report("frozen").entries).accounts[tc.id]
        assert (account.count, tc.step) == (3, 2)  # the second step twice, the late one never
        cluster.kill(old.actor)


def test_an_actor_that_is_frozen_in_a_call_and_replaced_does_not_answer_it(
    service: ServiceClient, tiny_model: Path
) -> None:
    def frozen_while_it_adds(actor: Any) -> None:
        worker, real = actor._worker, actor._worker.forward_backward

        def forward_backward(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            actor._registry.runs.claim(actor._run_id)  # by another, meanwhile
            actor._notes._asked -= 60
            return result

        worker.forward_backward = forward_backward

    with service.create_training_client(config(tiny_model)) as tc:
        train(tc, 1)
        _fetch(tc._calls.link.actor.__ray_call__.remote(frozen_while_it_adds))
        late = tc.forward_backward({"input_ids": ROWS[:2]})
        reply = open_reply(tc._calls.link._key, _fetch(late.object_ref))
        assert reply.error is not None
        assert reply.error[0] == "ActorLostError"
        cluster.kill(tc._calls.link.actor)


def _fetch(ref: Any) -> bytes:
    import ray

    return ray.get(ref, timeout=60)


def test_an_actor_that_many_wait_for_weights_of_is_not_silent(
    service: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a program that gets a client of the run meanwhile would take it over, and kill
    the actor."""
    import ray

    monkeypatch.setattr(service._cluster, "silent_s", 10.0)
    with service.create_training_client(config(tiny_model)) as tc:
        actor = tc._calls.link.actor
        ray.get(actor.__ray_call__.remote(lambda self: self._worker._changing.acquire()))
        samples = [actor.latest.remote() for _ in range(8)]  # a slow step has just begun
        settling = actor.settle.remote()
        assert service._cluster.find_training(tc.id, 1) is not None
        ray.get(actor.__ray_call__.remote(lambda self: self._worker._changing.release()))
        ray.get([*samples, settling])


def test_a_run_that_is_closed_while_its_actor_is_silent_holds_no_cpus(
    service: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._cluster, "silent_s", 2.0)
    tc = service.create_training_client(config(tiny_model))
    pid = pid_of(tc)
    os.kill(pid, signal.SIGSTOP)
    try:
        service.close_training_client(tc.id)
        assert tc.info().reason == "closed"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert_ends(pid)


# --- parked runs ------------------------------------------------------------------------------


def test_a_parked_run_goes_on_where_it_was_by_the_next_call_of_anybody(
    service: ServiceClient, tiny_model: Path, clean: Clean
) -> None:
    with service.create_training_client(config(tiny_model), recover="manual") as tc:
        found = fingerprints(train(tc, 1, 2))
        tc.forward_backward({"input_ids": ROWS[3:5]}).result()
        with pytest.raises(InvalidRequestError, match="finish the step"):
            tc.park()
        tc.load_state(tc.save_state().artifact_id)  # drops the window
        other, pid = service.get_training_client(tc.id), pid_of(tc)
        service.park_training_client(tc.id)
        service.park_training_client(tc.id)
        assert_ends(pid)
        info = other.info()
        assert (info.status, info.reason, info.step) == ("active", "parked", 2)
        assert service.describe_training_client(tc.id).reason == "parked"
        error = lost(tc)  # it was not run, nothing is lost: so even this one goes on by itself
        assert (error.details["reason"], error.details["lost_steps"]) == ("parked", 0)
        found += fingerprints(train(tc, 3))
        tc.park()
        tc.park()
        assert found + fingerprints(train(tc, 4)) == clean.found
        assert tc.info().reason == ""
        service.close_training_client(tc.id)
        service.close_training_client(tc.id)
        assert service.describe_training_client(tc.id).reason == "closed"


def test_an_idle_run_parks_itself_and_releases_its_reservation(
    service: ServiceClient, tiny_model: Path
) -> None:
    idle = private(tiny_model, "idle", target_epsilon=8.0, max_participations=None)
    values = idle.model_dump() | {"max_steps": 3, "resources": {"park_after_minutes": 0.1}}
    tc = service.create_training_client(TrainingConfig(**values))
    train(tc, 1)
    while service.describe_training_client(tc.id).reason != "parked":
        time.sleep(0.2)
    assert Ledger.replay(service.privacy_report("idle").entries).accounts[tc.id].reserved == 0
    assert [result.step for result in train(tc, 2)[1::2]] == [2]  # brought back, nothing told
    tc.close()


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
