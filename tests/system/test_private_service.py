"""Tests private runs through a real embedded cluster: the whole way from a batch to a
certificate."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.privacy_helpers import ROWS
from tg_tinker import (
    ActorLostError,
    DPBudgetExceededError,
    DPConfig,
    InvalidRequestError,
    LineageError,
    LoRAConfig,
    NotFoundError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.records.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a step has")]


def config(model: Path, dataset: str, **dp: Any) -> TrainingConfig:
    values = {"noise_multiplier": 1.0, "target_epsilon": 8.0} | dp
    steps = values.pop("max_steps", None)
    return TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=2), batch_size=2, max_steps=steps,
        dataset_id=dataset, dp_config=DPConfig(**values),
    )  # fmt: skip


def step(tc: TrainingClient, *rows: int) -> Any:
    tc.forward_backward({"input_ids": [ROWS[row] for row in rows]})
    return tc.optim_step().result()


def test_the_seeds_example_with_a_dp_config_trains_an_epoch_of_distinct_rows(
    service: ServiceClient, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with service.create_training_client(config(tiny_model, "epoch")) as tc:
        sizes = []
        for start in range(0, 8, 2):
            result = step(tc, start, start + 1)
            assert result.dp_metrics.noise_applied
            sizes.append(result.dp_metrics.total_epsilon)
        assert sizes == [pytest.approx(4.377, abs=1e-3)] * 4
        assert (tc.privacy.used, tc.privacy.limit, tc.privacy.left) == (1, 2, 1)
        said = tc.privacy.message
    assert said in caplog.text
    assert "each example may be used 2 times at sigma 1" in said
    report = service.privacy_report("epoch")
    assert report.total_epsilon == sizes[-1]
    (run,) = report.certificate()["runs"].values()
    assert (run["charges"], run["dtype"]) == (4, "float32")


def test_a_used_up_budget_is_typed_and_the_weights_can_still_be_saved(
    service: ServiceClient, tiny_model: Path
) -> None:
    with service.create_training_client(config(tiny_model, "spent", max_participations=1)) as tc:
        step(tc, 0, 1)
        with pytest.raises(DPBudgetExceededError, match="used 1 times"):
            tc.forward_backward({"input_ids": ROWS[:2]}).result()
        with pytest.raises(DPBudgetExceededError):
            tc.optim_step().result()
        assert tc.step == 1
        assert tc.save_state().artifact_id
        assert tc.sample("ab", max_tokens=2).samples
    twice = config(tiny_model, "spent", max_participations=2)
    with service.create_training_client(twice) as tc:
        step(tc, 0, 1)
        with pytest.raises(DPBudgetExceededError):  # three uses cost 8.39
            tc.forward_backward({"input_ids": ROWS[:2]}).result()
        with pytest.raises(DPBudgetExceededError):
            tc.optim_step().result()
        step(tc, 2, 3)  # rows that have their whole budget


def test_drawn_batches_train_until_the_planned_steps_are_made(
    service: ServiceClient, tiny_model: Path
) -> None:
    dp = {
        "noise_multiplier": None, "sampling": "poisson", "dataset_size": 8, "max_steps": 4,
        "accountant_type": "rdp",
    }  # fmt: skip
    with service.create_training_client(config(tiny_model, "drawn", **dp)) as tc:
        results = []
        for batch in tc.poisson_batches({"input_ids": ROWS}):
            tc.forward_backward(batch)
            results.append(tc.optim_step())
        metrics = [handle.result().dp_metrics for handle in results]
        assert len(metrics) == 4
        assert sum(m.epsilon_spent for m in metrics) == pytest.approx(
            metrics[-1].total_epsilon, abs=1e-9
        )
        assert tc.status == "completed"
    assert service.privacy_report("drawn").total_epsilon <= 8


def test_reservations_of_a_closed_or_killed_client_are_given_back(
    service: ServiceClient, tiny_model: Path
) -> None:
    plan = config(tiny_model, "kept", sampling="worst_case", max_steps=2)
    first = service.create_training_client(plan)
    with pytest.raises(DPBudgetExceededError, match="reserved"):
        service.create_training_client(plan)
    first.close()
    second = service.create_training_client(plan)
    kill_actor(second)
    deadline = time.monotonic() + 30
    while True:  # Ray takes a moment to notice the death
        try:
            service.create_training_client(plan).close()
            break
        except DPBudgetExceededError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert service.privacy_report("kept").total_epsilon == 0


def reserved(service: ServiceClient, dataset: str, tc: TrainingClient) -> int:
    return Ledger.replay(service.privacy_report(dataset).entries).accounts[tc.id].reserved


def test_a_plan_outlives_other_embedded_clusters_and_ends_with_parking(
    service: ServiceClient, tiny_model: Path, home: Path
) -> None:
    plan = config(tiny_model, "needed", max_participations=2)
    beside = (
        "from tg_tinker import ServiceClient\n"
        "with ServiceClient('local') as service:\n"
        "    service._runs.release_reservations_of_the_dead('needed')\n"
    )
    with service.create_training_client(plan) as tc:
        command = [sys.executable, "-W", "ignore", "-c", beside]
        subprocess.run(command, check=True, timeout=120)
        assert reserved(service, "needed", tc) == 2
        tc.park()
    assert service.describe_training_client(tc.id).reason == "parked"
    assert reserved(service, "needed", tc) == 0


def kill_actor(tc: TrainingClient) -> None:
    import ray

    pid = ray.get(tc._calls.link.actor.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def test_a_run_that_comes_back_charges_on_and_is_refunded_nothing(
    service: ServiceClient, tiny_model: Path
) -> None:
    tc = service.create_training_client(config(tiny_model, "back", max_participations=2))
    step(tc, 0, 1)
    tc.save_state()
    step(tc, 0, 1)
    kill_actor(tc)
    with pytest.raises(ActorLostError):
        tc.forward_backward({"input_ids": ROWS[2:4]}).result(timeout=60)
    with service.get_training_client(tc.id) as again:
        assert (again.step, again.privacy.used) == (1, 2)
        with pytest.raises(DPBudgetExceededError):
            again.forward_backward({"input_ids": ROWS[:2]}).result()
        again.optim_step().exception()
        assert step(again, 2, 3).dp_metrics.epsilon_spent == 0  # its first use, below the most


def test_weights_trained_without_privacy_are_refused_unless_allowed(
    service: ServiceClient, tiny_model: Path
) -> None:
    plain = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2, alpha=4))
    with service.create_training_client(plain) as tc:
        step(tc, 0, 1)
        tainted = tc.save_state().artifact_id
    with service.create_training_client(config(tiny_model, "lineage")) as tc:
        with pytest.raises(LineageError, match="allow_nonprivate_init"):
            tc.load_state(tainted)
        assert tc.step == 0
    allowed = config(tiny_model, "lineage", allow_nonprivate_init=True)
    with service.create_training_client(allowed) as tc:
        with pytest.warns(UserWarning, match="no privacy guarantee"):
            assert tc.load_state(tainted).step == 1
        descendant = (step(tc, 0, 1), tc.save_state().artifact_id)[1]
    with (
        service.create_training_client(config(tiny_model, "lineage")) as tc,
        pytest.raises(LineageError),
    ):
        tc.load_state(descendant)
    assert service.privacy_report("lineage").certificate()["guarantee"] is False


def test_weights_of_another_data_set_are_linked_before_they_are_used(
    service: ServiceClient, tiny_model: Path
) -> None:
    with service.create_training_client(config(tiny_model, "first")) as tc:
        step(tc, 0, 1)
        saved = tc.save_state().artifact_id
    with service.create_training_client(config(tiny_model, "second")) as tc:
        tc.load_state(saved)
    assert service.privacy_report("second").certificate()["linked_datasets"] == ["first"]


def test_a_plain_run_may_not_name_a_data_set_with_a_ledger(
    service: ServiceClient, tiny_model: Path
) -> None:
    service.register_dataset("guarded", epsilon=3.0)
    plain = TrainingConfig(model_ref=str(tiny_model), dataset_id="guarded")
    with pytest.raises(InvalidRequestError, match="has a privacy ledger"):
        service.create_training_client(plain)


def test_registration_is_checked_and_never_changed(service: ServiceClient) -> None:
    service.register_dataset("fixed", epsilon=3.0, delta=1e-6)
    service.register_dataset("fixed", epsilon=3.0, delta=1e-6)
    with pytest.raises(InvalidRequestError, match="never changed"):
        service.register_dataset("fixed", epsilon=8.0, delta=1e-6)
    for wrong in ({"epsilon": -1.0}, {"epsilon": 1.0, "delta": 2.0}, {"epsilon": 1.0, "unit": "x"}):
        with pytest.raises(InvalidRequestError):
            service.register_dataset("wrong", **wrong)
    with pytest.raises(InvalidRequestError):
        service.register_dataset("../up", epsilon=1.0)
    with pytest.raises(NotFoundError, match=r"datasets with a ledger: .*fixed"):
        service.privacy_report("wrong")


def test_an_exported_ledger_verifies_without_the_service(service: ServiceClient) -> None:
    entries = service.privacy_report("epoch").entries
    assert Ledger.replay(entries).head == entries[-1]["hash"]


def test_steps_without_noise_are_refused_and_change_nothing(
    service: ServiceClient, tiny_model: Path
) -> None:
    with service.create_training_client(config(tiny_model, "noisy")) as tc:
        tc.forward_backward({"input_ids": ROWS[:2]})
        with pytest.raises(DPBudgetExceededError, match="unlimited"):
            tc.optim_step(apply_dp_noise=False).result()
        assert tc.step == 0
        assert tc.privacy.total_epsilon == 0
