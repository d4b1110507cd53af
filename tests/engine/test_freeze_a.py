"""Tests adapters of which only B is trained: A stays as the seed drew it, and travels with B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.memory import adapter_values, trained_values
from actors.engine.model import Base
from actors.engine.session import Session
from actors.engine.weights import stored_shapes
from actors.sampling.adapters import Adapter, AdapterBank
from support.helpers import assert_close, assert_equal, examples, session, weights
from support.privacy_helpers import Noiseless, oracle_sum, perturb, private_session, rows, sums
from tg_tinker import ArtifactMismatchError, LoRAConfig, OptimizerConfig

FROZEN = LoRAConfig(rank=4, freeze_a=True)
FAST = OptimizerConfig(learning_rate=1e-2)


def a_and_b(s: Session) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    saved = weights(s)
    return tuple(
        {name: tensor for name, tensor in saved.items() if f".lora_{side}." in name}
        for side in "AB"
    )  # type: ignore[return-value]


def stepped(s: Session, steps: int = 2) -> None:
    for _ in range(steps):
        s.forward_backward(examples())
        s.optim_step()


def test_training_moves_every_b_and_no_a(tiny_model: Path) -> None:
    s = session(tiny_model, lora_config=FROZEN, optimizer=FAST, seed=5)
    (a, b), (drawn, _) = a_and_b(s), a_and_b(session(tiny_model, seed=5))
    assert_equal(a, drawn)  # those of an ordinary adapter with this seed
    stepped(s)
    after_a, after_b = a_and_b(s)
    assert_equal(after_a, a)
    assert all(not torch.equal(after_b[name], b[name]) for name in b)
    assert s.num_trainable == sum(tensor.numel() for tensor in b.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_private_run_takes_the_fast_path_and_moves_no_a(tiny_model: Path, dropout: float) -> None:
    lora = FROZEN.model_copy(update={"dropout": dropout})
    s = private_session(tiny_model, Noiseless, lora_config=lora, optimizer=FAST)
    assert s.unit_backward.path == "fast"
    a, b = a_and_b(s)
    s.forward_backward(rows())
    s.optim_step()
    after_a, after_b = a_and_b(s)
    assert_equal(after_a, a)
    assert all(not torch.equal(after_b[name], b[name]) for name in b)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_private_sum_equals_the_loop_oracle(tiny_model: Path, bias: str) -> None:
    s = private_session(tiny_model, lora_config=LoRAConfig(rank=4, freeze_a=True, bias=bias))
    perturb(s)
    s.forward_backward(rows())
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows()]), 2e-5)


def test_a_resumed_run_reaches_the_same_bits(tiny_model: Path) -> None:
    whole, half = (session(tiny_model, lora_config=FROZEN, optimizer=FAST) for _ in range(2))
    stepped(whole, 3)
    stepped(half, 1)
    resumed = session(tiny_model, lora_config=FROZEN, optimizer=FAST, seed=9)  # draws another A
    (warning,) = resumed.load(half.state())
    assert "seed" in warning
    stepped(resumed, 2)
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("frozen", [True, False])
def test_an_artifact_of_the_other_kind_is_refused(tiny_model: Path, frozen: bool) -> None:
    one, other = (
        session(tiny_model, lora_config=LoRAConfig(rank=4, freeze_a=freeze))
        for freeze in (frozen, not frozen)
    )
    with pytest.raises(ArtifactMismatchError, match="freeze_a is "):
        one.load(other.state())


def test_an_ordinary_adapter_is_described_as_before(tiny_model: Path) -> None:
    """Otherwise artifacts of earlier versions would not fit."""
    assert "freeze_a" not in session(tiny_model).state().geometry["lora"]


def test_it_is_exported_and_sampled_as_an_ordinary_adapter(tiny_model: Path) -> None:
    s, plain = session(tiny_model, lora_config=FROZEN, optimizer=FAST), session(tiny_model)
    stepped(s)
    state, like = s.state(), plain.state()
    assert state.adapter_config == like.adapter_config
    assert {n: t.shape for n, t in state.weights.items()} == {
        n: t.shape for n, t in like.weights.items()
    }
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad():
        wanted = s.base.model(input_ids=tokens).logits
    base = Base.load(str(tiny_model), cache=tiny_model.parent / "cache")
    bank = AdapterBank(base.model)
    bank.add(Adapter("run@2", state.adapter_config or {}, state.weights))
    bank.pin("run@2")
    with torch.inference_mode(), bank.routed([], [(12, bank.index("run@2"))]):
        found = base.model(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "down_proj"), "all-linear"])
def test_memory_counts_what_trains_and_what_is_stored(tiny_model: Path, targets: Any) -> None:
    lora = LoRAConfig(rank=3, freeze_a=True, target_modules=targets)
    s, shapes = session(tiny_model, lora_config=lora), stored_shapes(tiny_model)
    assert trained_values(shapes, lora) == s.num_trainable
    assert adapter_values(shapes, lora) == sum(t.numel() for t in weights(s).values())
