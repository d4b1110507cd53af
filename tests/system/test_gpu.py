"""Tests training, privacy and sampling on a GPU. Skips, visibly, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.engine.model import Base
from actors.sampling.engine import SlotEngine
from actors.sampling.requests import TokenRequest
from support.helpers import RAGGED, assert_close, examples, session, weights, window
from support.models import make_model
from support.privacy_helpers import norm, perturb, private_session, sums
from tg_tinker import LoRAConfig, ResourceConfig, ServiceClient, TrainingConfig
from tg_tinker.sampling import SamplingParams

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: training, privacy and sampling on CUDA"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpu"), hidden_size=64)


def test_the_base_is_bfloat16_and_adapters_are_float32(model: Path) -> None:
    of = session(model)
    assert (of.base.device.type, of.base.dtype) == ("cuda", torch.bfloat16)
    assert {p.dtype for p in of._parameters.values()} == {torch.float32}


def test_gradients_are_those_of_the_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = session(model, dtype="float32")
    on_gpu.forward_backward(examples(RAGGED))
    found = {name: tensor.cpu() for name, tensor in window(on_gpu).items()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = session(model, dtype="float32")
    on_cpu.forward_backward(examples(RAGGED))
    assert_close(found, window(on_cpu), 1e-3)


def test_training_learns(model: Path) -> None:
    of = session(model)
    losses = []
    for _ in range(8):
        losses.append(of.forward_backward(examples(RAGGED)).loss)
        of.optim_step()
    assert losses[-1] < losses[0]


def test_private_units_stay_within_their_bound_and_get_noise(model: Path) -> None:
    of = private_session(model, dp={"max_grad_norm": 0.5})
    perturb(of)
    before = weights(of)
    of.forward_backward(examples(RAGGED))
    assert 0 < norm(sums(of)) <= 0.5 * len(RAGGED)
    metrics = of.optim_step().dp_metrics
    assert metrics is not None
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(of).items())


def test_sampling_equals_generate(model: Path) -> None:
    base = Base.load(str(model), cache=model / "cache", dtype="float32")
    engine, tokens = SlotEngine(base), []
    params = SamplingParams(max_tokens=12, temperature=0)
    engine.submit(TokenRequest([5, 6, 7], params, lambda token: tokens.append(token.token_id)))
    while engine.step():
        pass
    expected = base.model.generate(
        torch.tensor([[5, 6, 7]], device=base.device), max_new_tokens=12, do_sample=False
    )
    assert [t for t in tokens if t is not None] == expected[0, 3:].tolist()


@pytest.mark.slow
def test_two_clients_share_a_gpu_through_the_service(service: ServiceClient, model: Path) -> None:
    half = TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=4), resources=ResourceConfig(num_gpus=0.4)
    )
    with (
        service.create_training_client(half) as first,
        service.create_training_client(half) as second,
    ):
        for tc in (first, second):
            tc.forward_backward({"input_ids": [[5, 6, 7, 8]]})
            assert tc.optim_step().result().step == 1
