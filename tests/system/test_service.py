"""Tests the API through a real embedded cluster: order, failure, repeats, life and death of
actors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.registry import actor
from tg_tinker import (
    ActorLostError,
    ArtifactMismatchError,
    BatchData,
    ClusterUnavailableError,
    DPBudgetExceededError,
    DPConfig,
    FutureCancelledError,
    FutureTimeoutError,
    IntegrityError,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    OptimizerConfig,
    PlacementError,
    QueueFullError,
    ResourceConfig,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
    WindowSpoiledError,
    errors,
)
from tg_tinker.client import calls
from tg_tinker.cluster.messages import Request

pytestmark = pytest.mark.slow

BATCH = {"input_ids": [[5, 6, 7, 8], [9, 10, 11]]}
LONG = {"input_ids": [[7] * 128] * 80}


def config(model: Path, **values: Any) -> TrainingConfig:
    defaults = {"model_ref": str(model), "lora_config": LoRAConfig(rank=4)}
    return TrainingConfig(**(defaults | values))


@pytest.fixture(scope="module")
def tc(service: ServiceClient, tiny_model: Path) -> Iterator[TrainingClient]:
    """Yields one client for the tests that leave it healthy."""
    with service.create_training_client(config(tiny_model)) as client:
        yield client


def clean_window(tc: TrainingClient) -> None:
    """Drops what an earlier test left pending."""
    tc.train()
    tc.optim_step().exception()  # perhaps of a spoiled window, which a sample would be told of
    tc.optim_step().exception()  # of an empty one, which is told to nobody


# --- order ------------------------------------------------------------------------------------


def test_calls_queued_ahead_give_what_waited_calls_give(
    service: ServiceClient, tiny_model: Path
) -> None:
    with (
        service.create_training_client(config(tiny_model)) as ahead,
        service.create_training_client(config(tiny_model)) as waited,
    ):
        handles = []
        for _ in range(5):
            handles += [ahead.forward_backward(BATCH), ahead.optim_step()]
        queued = [handle.result() for handle in handles]
        for i in range(5):
            loss = waited.forward_backward(BATCH).result()
            step = waited.optim_step().result()
            assert (queued[2 * i].loss, queued[2 * i].gradient_hash) == (
                loss.loss,
                loss.gradient_hash,
            )
            assert (queued[2 * i + 1].step, queued[2 * i + 1].grad_norm) == (i + 1, step.grad_norm)
        assert ahead.step == waited.step == 5
        ids = [handle.future_id for handle in handles]
        assert len(set(ids)) == 10
        assert {h.operation for h in handles} == {"forward_backward", "optim_step"}
        assert {h.training_client_id for h in handles} == {ahead.id}


def test_sample_sees_every_step_queued_before_it(tc: TrainingClient) -> None:
    clean_window(tc)
    before = tc.step
    tc.forward_backward(BATCH)
    tc.optim_step()
    result = tc.sample("ab", max_tokens=3, temperature=0)
    assert result.weights_version == f"{tc.id}@{before + 1}"


def test_step_is_read_without_waiting_behind_the_queue(tc: TrainingClient) -> None:
    clean_window(tc)
    before = tc.step
    slow = tc.forward_backward({"input_ids": LONG["input_ids"] * 20})
    seen = tc.step
    assert not slow.done()
    assert seen == before
    assert tc.info().queued >= 1
    slow.cancel()
    assert slow.exception(60) is not None
    clean_window(tc)


def test_train_and_eval_mode_travel_with_each_call(tc: TrainingClient) -> None:
    clean_window(tc)
    tc.eval()
    evaluated = tc.forward_backward(BATCH)
    tc.train()
    trained = tc.forward_backward(BATCH)
    assert evaluated.result().gradient_hash == ""
    assert trained.result().gradient_hash.startswith("sha256:")
    assert evaluated.result().loss == trained.result().loss
    clean_window(tc)


def test_a_batch_may_be_a_dict_a_batchdata_or_padded(tc: TrainingClient) -> None:
    clean_window(tc)
    tc.eval()
    padded = BatchData([[5, 6, 7, 8], [9, 10, 11, 0]], attention_mask=[[1] * 4, [1, 1, 1, 0]])
    a, b = tc.forward_backward(BATCH).result(), tc.forward_backward(padded).result()
    assert (a.loss, a.batch_hash, a.num_tokens) == (b.loss, b.batch_hash, 7)
    assert tc.forward_backward(BATCH, batch_hash="epoch 1, batch 2").result().batch_hash == (
        "epoch 1, batch 2"
    )
    tc.train()


# --- futures ----------------------------------------------------------------------------------


def test_result_times_out_and_can_be_asked_again(tc: TrainingClient) -> None:
    clean_window(tc)
    handle = tc.forward_backward(LONG)
    with pytest.raises(FutureTimeoutError):
        handle.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        handle.exception(timeout=0.01)
    assert handle.status() == "pending"
    assert handle.result(timeout=60).num_tokens == 128 * 80
    assert handle.status() == "done"
    assert handle.done()
    clean_window(tc)


def test_a_cancelled_call_ends_typed_and_spoils_its_window(tc: TrainingClient) -> None:
    clean_window(tc)
    before = tc.step
    running, waiting = tc.forward_backward(LONG), tc.forward_backward(BATCH)
    step = tc.optim_step()
    assert waiting.cancel()
    with pytest.raises(FutureCancelledError):
        waiting.result()
    assert waiting.status() == "cancelled"
    assert running.result().num_tokens
    with pytest.raises(WindowSpoiledError):
        step.result()
    assert not waiting.cancel()
    tc.forward_backward(BATCH)
    assert tc.optim_step().result().step == before + 1


def test_a_running_batch_is_cancelled_between_micro_batches(tc: TrainingClient) -> None:
    clean_window(tc)
    handle = tc.forward_backward({"input_ids": [[7] * 128] * 2000})
    time.sleep(0.3)
    assert handle.cancel()
    with pytest.raises(FutureCancelledError):  # whole, it would have run to its end
        handle.result(timeout=60)
    clean_window(tc)


def test_a_cancelled_step_keeps_its_window(tc: TrainingClient) -> None:
    clean_window(tc)
    before = tc.step
    tc.forward_backward(LONG)
    step = tc.optim_step()
    assert step.cancel()
    with pytest.raises(FutureCancelledError):
        step.result()
    assert tc.optim_step().result().step == before + 1


def test_callbacks_run_on_a_thread_that_may_call_the_client(tc: TrainingClient) -> None:
    clean_window(tc)
    seen: list[Any] = []
    arrived = threading.Event()

    def callback(handle: Any) -> None:
        seen.extend([handle.status(), handle.result().num_tokens, tc.step])
        arrived.set()

    def failing(handle: Any) -> None:
        raise ValueError("in a callback")

    handle = tc.forward_backward(BATCH)
    handle.add_done_callback(failing)
    handle.add_done_callback(callback)
    assert arrived.wait(30)
    assert seen[:2] == ["done", 7]
    late = threading.Event()
    handle.add_done_callback(lambda _: late.set())
    assert late.wait(30)
    clean_window(tc)


def test_handles_can_be_awaited_together(tc: TrainingClient) -> None:
    clean_window(tc)

    async def both() -> tuple[Any, Any]:
        return await asyncio.gather(tc.forward_backward(BATCH), tc.optim_step())

    loss, step = asyncio.run(both())
    assert loss.num_tokens == 7
    assert step.step == tc.step

    async def failing() -> None:
        await tc.optim_step()

    with pytest.raises(InvalidRequestError):
        asyncio.run(failing())


def test_too_many_waiting_calls_push_back(
    tc: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_window(tc)
    monkeypatch.setattr(calls, "MAX_QUEUED", 3)
    handles = [tc.forward_backward(LONG)]
    with pytest.raises(QueueFullError, match="3 calls"):
        handles += [tc.forward_backward(BATCH) for _ in range(4)]
    for handle in handles:
        handle.result()
    clean_window(tc)


def test_a_repeated_call_is_answered_from_memory_and_not_run_again(tc: TrainingClient) -> None:
    clean_window(tc)
    tc.forward_backward(BATCH).result()
    with tc._calls.lock:
        request = tc._calls.next_request("optim_step", apply_dp_noise=True)
    first = tc._calls.link.open(tc._calls.link.send(request), "").unwrap()
    again = tc._calls.link.open(tc._calls.link.send(request), "").unwrap()
    assert first == again
    assert tc.step == first.step


def test_a_call_of_another_epoch_is_refused(tc: TrainingClient) -> None:
    request = Request("x-0", "optim_step", epoch=99, handle="x", sequence=0)
    with pytest.raises(ActorLostError, match="epoch 99"):
        tc._calls.link._lost_calls._call(request).unwrap()


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "labels of row 0"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "hole"),
        ({"input_ids": [[1, 259]]}, "vocabulary is 0..258"),
        ({"input_ids": [[1.5, 2.0]]}, "integers"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "labeled"),
        ({"input_ids": [[1] * 129]}, "context is 128"),
        ({"inputs": [[1]]}, "unknown batch keys"),
    ],
)
def test_a_bad_batch_raises_at_once_and_was_never_sent(
    tc: TrainingClient, batch: dict, message: str
) -> None:
    clean_window(tc)
    good = tc.forward_backward(BATCH)
    with pytest.raises(InvalidRequestError, match=message):
        tc.forward_backward(batch)
    assert good.result().num_tokens == 7
    assert tc.optim_step().exception() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_p": 0}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 1000}, "context of 128"),
    ],
)
def test_bad_sampling_parameters_are_typed(
    tc: TrainingClient, arguments: dict, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        tc.sample("ab", **arguments)
    with pytest.raises(InvalidRequestError, match=message):
        list(tc.sample_stream("ab", **arguments))


def test_unknown_stream_parameters_and_lists_are_refused(tc: TrainingClient) -> None:
    with pytest.raises(InvalidRequestError, match="mirostat"):
        tc.sample_stream("ab", mirostat=2)
    with pytest.raises(InvalidRequestError, match="one prompt"):
        tc.sample_stream(["a", "b"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_ref": "/nowhere/model"}, NotFoundError, "/nowhere/model"),
        ({"lora_config": LoRAConfig(rank=33)}, InvalidRequestError, "rank 33"),
        ({"lora_config": LoRAConfig(target_modules=("x_proj",))}, InvalidRequestError, "q_proj"),
        ({"dp_config": DPConfig(noise_multiplier=0.1)}, DPBudgetExceededError, "cannot pay"),
        ({"resources": ResourceConfig(num_gpus=8)}, PlacementError, "8 GPUs"),
    ],
)
def test_a_client_that_cannot_be_is_refused_with_the_reason(
    service: ServiceClient, tiny_model: Path, values: dict, error: type, message: str
) -> None:
    def active() -> int:
        return sum(run.status == "active" for run in service.list_training_clients())

    before = active()
    with pytest.raises(error, match=message):
        service.create_training_client(config(tiny_model, **values))
    assert active() == before


def test_disabled_privacy_trains_like_none(service: ServiceClient, tiny_model: Path) -> None:
    with service.create_training_client(
        config(tiny_model, dp_config=DPConfig(enabled=False))
    ) as tc:
        tc.forward_backward(BATCH)
        assert tc.optim_step(apply_dp_noise=False).result().dp_metrics is None


def test_no_place_names_own_holders_and_none_of_another_tenant(
    service: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus = service._cluster.resources()["CPU"]
    everything = ResourceConfig(num_cpus=cpus)
    with (
        service.create_training_client(config(tiny_model, resources=everything)) as holder,
        ServiceClient(address="local", tenant="clinic") as other,
    ):
        with monkeypatch.context() as short:
            short.setattr(service._cluster, "placement_timeout_s", 3.0)
            with pytest.raises(PlacementError, match=holder.id):
                service.create_training_client(config(tiny_model, resources=everything))
        monkeypatch.setattr(other._cluster, "placement_timeout_s", 1.0)
        with pytest.raises(PlacementError, match="Yours: no client; free are") as refused:
            other.create_training_client(config(tiny_model, resources=everything))
        assert holder.id not in str(refused.value)
    with service.create_training_client(config(tiny_model, resources=everything)):
        pass


# --- streaming --------------------------------------------------------------------------------


def test_a_stream_equals_the_sample(tc: TrainingClient) -> None:
    clean_window(tc)
    whole = tc.sample("abc", max_tokens=20, temperature=0).samples[0]
    chunks = list(tc.sample_stream("abc", max_tokens=20, temperature=0))
    assert "".join(chunk.text for chunk in chunks) == whole.completion
    assert [t for chunk in chunks for t in chunk.token_ids] == whole.token_ids
    assert chunks[-1].finish_reason == whole.finish_reason
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_leaving_a_stream_early_frees_the_actor(tc: TrainingClient) -> None:
    clean_window(tc)
    for _ in tc.sample_stream("abc", max_tokens=120, temperature=1.0, top_p=0.99):
        break
    assert tc.forward_backward(BATCH).result(timeout=30).num_tokens == 7
    clean_window(tc)


def test_a_stream_has_its_place_in_the_order_when_it_is_made(tc: TrainingClient) -> None:
    clean_window(tc)
    before = tc.step
    stream = tc.sample_stream("abc", max_tokens=5, temperature=0)
    tc.forward_backward(BATCH)
    assert tc.optim_step().result(timeout=60).step == before + 1
    assert {chunk.weights_version for chunk in stream} == {f"{tc.id}@{before}"}
    tc.sample_stream("abc", max_tokens=5)  # made and never read
    assert tc.sample("abc", max_tokens=2).total_tokens


def test_a_call_that_could_not_be_sent_does_not_block_later_ones(tc: TrainingClient) -> None:
    clean_window(tc)

    def interrupted(request: Request) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tc._calls.lock:
        tc._calls.send(interrupted, "save_state", {})
    tc.forward_backward(BATCH)
    assert tc.optim_step().exception(timeout=60) is None


def test_hundreds_of_cancelled_calls_all_stay_cancelled(tc: TrainingClient) -> None:
    clean_window(tc)
    running = tc.forward_backward({"input_ids": [[7] * 128] * 4000})
    handles = [tc.forward_backward(BATCH) for _ in range(400)]
    assert all(handle.cancel() for handle in reversed([running, *handles]))
    assert {handle.exception().code for handle in handles} == {"cancelled"}
    clean_window(tc)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"top_k": 2.5}, "top_k"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop_sequences": "END"}, "list of strings"),
    ],
)
def test_sampling_parameters_of_the_wrong_type_are_named(
    tc: TrainingClient, arguments: dict, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        tc.sample("ab", **arguments)
    with pytest.raises(InvalidRequestError, match=message):
        tc.sample_stream("ab", **arguments)


# --- artifacts --------------------------------------------------------------------------------


def test_save_and_load_round_trip_with_metadata(tc: TrainingClient, service: ServiceClient) -> None:
    clean_window(tc)
    tc.forward_backward(BATCH)
    step = tc.optim_step().result().step
    notes = {"epoch": 5, "val_loss": 0.42, "dataset": "v2", "nested": [1, {"a": None}]}
    saved = tc.save_state(metadata=notes)
    tc.eval()
    loss = tc.forward_backward(BATCH).result().loss
    tc.train()
    tc.forward_backward(BATCH)
    tc.optim_step()
    loaded = tc.load_state(saved.artifact_id)
    tc.eval()
    assert tc.forward_backward(BATCH).result().loss == loss
    tc.train()
    assert (loaded.step, tc.step, loaded.metadata) == (step, step, notes)
    assert loaded.timestamp == saved.timestamp
    assert saved.encryption.algorithm.startswith("AES256_GCM")
    info = service.get_artifact(saved.artifact_id)
    assert (info.step, info.size_bytes, info.training_client_id) == (step, saved.size_bytes, tc.id)
    assert saved.artifact_id in {a.artifact_id for a in service.list_artifacts()}


def test_saving_leaves_the_live_window_alone(tc: TrainingClient) -> None:
    clean_window(tc)
    before = tc.step
    tc.forward_backward(BATCH)
    handle = tc.save_state_async()
    assert tc.optim_step().result().step == before + 1
    assert handle.result().size_bytes > 0


def test_no_call_takes_half_a_character_and_no_run_is_spoiled_by_it(
    service: ServiceClient, tiny_model: Path
) -> None:
    """A step whose batch had such a name could never be recorded, and its run never be closed."""
    half = "patient 4711\ud83d"
    batch = {"input_ids": [[1, 2, 3]]}
    with service.create_training_client(config(tiny_model)) as tc:
        calls: list[Any] = [
            lambda: tc.forward_backward(batch, half), lambda: tc.save_state(metadata={"a": [half]}),
            lambda: tc.save_state(metadata={half: 1}), lambda: tc.load_state(half),
            lambda: tc.sample("a", stop_sequences=[half]), lambda: tc.sample(["a", half]),
            lambda: service.create_api_key(half), lambda: service.get_artifact(half),
            lambda: service.get_training_client(half), lambda: service.privacy_report(half),
            lambda: service.export_adapter("art-1", half),
            lambda: service.import_adapter(half, str(tiny_model)),
            lambda: ServiceClient(namespace=half), lambda: ServiceClient(database=f"sqlite:///{half}"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(InvalidRequestError) as caught:
                call()
            assert "4711" not in str(caught.value)
        tc.forward_backward(batch, "\U0001f600")
        assert tc.optim_step().result().step == 1
    assert service.describe_training_client(tc.id).status == "completed"


def test_metadata_that_json_cannot_hold_is_refused(tc: TrainingClient) -> None:
    with pytest.raises(InvalidRequestError, match="JSON"):
        tc.save_state(metadata={"x": object()})


def test_deleting_through_another_store_deletes_nothing(
    tc: TrainingClient, service: ServiceClient, tmp_path: Path
) -> None:
    saved = tc.save_state().artifact_id
    with (
        ServiceClient(address="local", store=tmp_path) as elsewhere,
        pytest.raises(NotFoundError, match="no file in this store"),
    ):
        elsewhere.delete_artifact(saved)
    assert service.get_artifact(saved).artifact_id == saved


def test_unknown_deleted_and_foreign_artifacts_are_not_found(
    tc: TrainingClient, service: ServiceClient
) -> None:
    with pytest.raises(NotFoundError, match="list_artifacts"):
        tc.load_state("art-unknown")
    saved = tc.save_state().artifact_id
    service.delete_artifact(saved)
    with pytest.raises(NotFoundError):
        tc.load_state(saved)
    with pytest.raises(NotFoundError):
        service.delete_artifact(saved)
    other = tc.save_state().artifact_id
    with (
        ServiceClient(address="local", tenant="other") as stranger,
        pytest.raises(NotFoundError),
    ):
        stranger.get_artifact(other)


def test_an_artifact_of_another_rank_changes_nothing(
    tc: TrainingClient, service: ServiceClient, tiny_model: Path
) -> None:
    saved = tc.save_state().artifact_id
    with service.create_training_client(
        config(tiny_model, lora_config=LoRAConfig(rank=2))
    ) as other:
        with pytest.raises(ArtifactMismatchError, match="rank"):
            other.load_state(saved)
        assert other.step == 0


def test_a_tampered_artifact_is_refused(tc: TrainingClient, home: Path) -> None:
    saved = tc.save_state().artifact_id
    (file,) = (home / "store").rglob(f"{saved}/adapter_model.safetensors.enc")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(IntegrityError):
        tc.load_state(saved)


def test_exported_adapter_generates_the_same_tokens_in_plain_peft(
    tc: TrainingClient, service: ServiceClient, tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    path = service.export_adapter(tc.save_state().artifact_id, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = tc.tokenizer("hello")["input_ids"]
    ours = tc.sample("hello", max_tokens=24, temperature=0).samples[0].token_ids
    of_given_base = PeftModel.from_pretrained(plain, path)
    of_named_base = AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for model in (of_given_base, of_named_base):
        expected = model.eval().generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=256
        )
        assert ours == expected[0, len(prompt) :].tolist()
    with pytest.raises(InvalidRequestError, match="exists"):
        service.export_adapter(tc.save_state().artifact_id, path)


# --- every error class ------------------------------------------------------------------------


def all_errors(cls: type = errors.TGTinkerError) -> list[type]:
    return [cls, *(c for sub in cls.__subclasses__() for c in all_errors(sub))]


def test_every_error_class_round_trips_through_a_real_actor(service: ServiceClient) -> None:
    import ray

    from tg_tinker.cluster.messages import Reply

    @ray.remote(num_cpus=0)
    class Raiser:
        def fail(self, name: str) -> Reply:
            from actors.process import reply_of
            from tg_tinker import errors

            def work() -> None:
                raise getattr(errors, name)(f"this is {name}", details={"bound": 3})

            return reply_of(work)

    actor = Raiser.remote()
    for cls in all_errors():
        reply = ray.get(actor.fail.remote(cls.__name__))
        with pytest.raises(cls) as caught:
            reply.unwrap()
        assert type(caught.value) is cls
        assert str(caught.value) == f"this is {cls.__name__}"
        assert (caught.value.code, caught.value.details) == (cls.code, {"bound": 3})
        assert caught.value.__cause__ is None
    ray.kill(actor)


# --- life -------------------------------------------------------------------------------------


def test_a_run_is_completed_at_max_steps(service: ServiceClient, tiny_model: Path) -> None:
    linear = OptimizerConfig(schedule="linear")
    with service.create_training_client(config(tiny_model, max_steps=1, optimizer=linear)) as tc:
        assert tc.status == "active"
        tc.forward_backward(BATCH)
        tc.optim_step().result()
        assert tc.status == "completed"
        tc.forward_backward(BATCH).result()
        with pytest.raises(InvalidRequestError, match="max_steps"):
            tc.optim_step().result()
        assert tc.sample("a", max_tokens=2).total_tokens == 2
        assert tc.save_state().size_bytes


def test_a_closed_client_refuses_calls_and_opens_again_from_its_artifact(
    service: ServiceClient, tiny_model: Path
) -> None:
    tc = service.create_training_client(config(tiny_model))
    for _ in range(2):
        tc.forward_backward(BATCH)
        tc.optim_step()
    tc.save_state()
    tc.forward_backward(BATCH)
    tc.optim_step().result()
    tc.close()
    tc.close()
    assert tc.status == "completed"
    with pytest.raises(InvalidRequestError, match="closed"):
        tc.forward_backward(BATCH)
    with pytest.warns(UserWarning, match="lost after the last artifact: 1"):
        again = service.get_training_client(tc.id)
    with again:
        assert (again.id, again.step, again.status) == (tc.id, 2, "active")
        again.forward_backward(BATCH)
        assert again.optim_step().result().step == 3


def test_a_second_client_of_a_living_run_shares_its_actor(
    tc: TrainingClient, service: ServiceClient
) -> None:
    clean_window(tc)
    before = tc.step
    other = service.get_training_client(tc.id)
    tc.forward_backward(BATCH).result()
    assert other.optim_step().result().step == before + 1
    assert tc.step == before + 1


def test_a_killed_actor_fails_typed_and_the_run_comes_back(
    service: ServiceClient, tiny_model: Path
) -> None:
    import ray

    tc = service.create_training_client(config(tiny_model), recover="manual")
    tc.forward_backward(BATCH)
    tc.optim_step()
    tc.save_state()
    pid = ray.get(tc._calls.link.actor.__ray_call__.remote(lambda self: os.getpid()))
    pending = tc.forward_backward(LONG)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorLostError, match="get_training_client"):
        pending.result(timeout=60)
    assert pending.status() == "failed"
    with pytest.raises(ActorLostError):
        tc.sample("a")
    assert tc.status == "failed"
    with service.get_training_client(tc.id) as again:
        assert again.step == 1
        again.forward_backward(BATCH)
        assert again.optim_step().result().step == 2
        tc.close()  # the stale client: the run belongs to `again`
        again.save_state()
        assert again.status == "active"


def test_a_lost_run_without_artifact_says_so(service: ServiceClient, tiny_model: Path) -> None:
    tc = service.create_training_client(config(tiny_model))
    tc.close()
    with pytest.raises(ActorLostError, match="no artifact"):
        service.get_training_client(tc.id)
    with pytest.raises(NotFoundError):
        service.get_training_client("tc-unknown")


def test_a_notebook_sees_a_table_without_markup_from_names(tc: TrainingClient) -> None:
    assert tc.id in tc._repr_html_()
    assert "contents hidden" in repr(BatchData(**BATCH))


def test_a_dead_address_is_a_typed_error(service: ServiceClient) -> None:
    code = (
        "from tg_tinker import ServiceClient, ClusterUnavailableError\n"
        "try: ServiceClient('127.0.0.1:1')\n"
        "except ClusterUnavailableError as e: print('typed', e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("typed"), done.stderr
    assert "ray start" in done.stdout
    assert issubclass(ClusterUnavailableError, errors.ServiceError)


@pytest.mark.usefixtures("service")
def test_a_registry_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade under a cluster of `tg-tinker up`: its actors keep the old code."""
    running = actor.RELEASE
    monkeypatch.setattr(actor, "RELEASE", "9.9.9, database revision 0099, ledger version 9")
    with pytest.raises(ClusterUnavailableError, match=r"this program 9\.9\.9.*down") as refused:
        ServiceClient(address="local")
    assert running in refused.value.message


def test_a_registry_without_a_release_is_an_earlier_one() -> None:
    with pytest.raises(ClusterUnavailableError, match="runs TG-Tinker an earlier release"):
        actor._refuse_another_release(object())


def test_a_second_service_on_another_database_or_cluster_is_refused(
    service: ServiceClient, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="another database"):
        ServiceClient(address="local", database=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(InvalidRequestError, match="connected to the Ray cluster"):
        ServiceClient(address="127.0.0.1:1")


@pytest.mark.parametrize("tenant", ["", "a/b", "..", "x" * 65])
def test_a_tenant_that_could_leave_its_folder_is_refused(tenant: str) -> None:
    with pytest.raises(InvalidRequestError, match="tenant"):
        ServiceClient(address="local", tenant=tenant)
