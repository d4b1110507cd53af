"""Tests what a private run finds out about its model when it is created."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from actors.engine import losses, model
from actors.engine.recompute import Recomputation
from actors.privacy import capture
from actors.privacy.capture import CapturedLinear
from actors.privacy.gradient_probes import farthest
from support.helpers import assert_close
from support.privacy_helpers import oracle_sum, perturb, private_session, rows, sums
from tg_tinker import InvalidRequestError, LoRAConfig, ResourceConfig

PER_UNIT = capture._per_unit
PRODUCT = CapturedLinear.forward


def swapped(*of: Any) -> torch.Tensor:
    return PER_UNIT(*of).flip(0)


def leaking(*of: Any) -> torch.Tensor:
    """A tenth of the first unit's gradient counts for the second, too."""
    found = PER_UNIT(*of)
    if len(found) > 1:
        found[1] += 0.1 * found[0]
    return found


def scaled(upstream: torch.Tensor, inputs: torch.Tensor, bounds: Any) -> torch.Tensor:
    """The tensors B are a fifth too long."""
    found = PER_UNIT(upstream, inputs, bounds)
    return 1.2 * found if inputs.shape[1] == 4 else found


@pytest.mark.parametrize("wrong", [swapped, leaking, scaled], ids=lambda one: one.__name__)
@pytest.mark.parametrize("rank", [1, 4])
def test_a_wrong_capture_is_found_and_ordinary_autograd_takes_over(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], rank: int
) -> None:
    if wrong is scaled and rank == 1:
        pytest.skip("the mutant knows tensors by their rank of 4")
    monkeypatch.setattr(capture, "_per_unit", wrong)
    s = private_session(tiny_model, lora_config=LoRAConfig(rank=rank))
    assert s.unit_backward.path == "row by row"
    assert "differs by" in s.unit_backward.slow_because
    perturb(s)
    s.forward_backward(rows())
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows()]), 2e-5)


def test_one_scaled_tensor_of_many_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = capture._move
    moved: list[int] = []

    def one_scaled(gradient: torch.Tensor, slot: torch.Tensor) -> None:
        if len(gradient) == 3:  # of the three rows whose gradients are compared
            moved.append(1)
        if len(moved) == 3:
            slot.grad *= 1.2  # type: ignore[operator]
        move(gradient, slot)

    monkeypatch.setattr(capture, "_move", one_scaled)
    s = private_session(tiny_model, lora_config=LoRAConfig(rank=1, target_modules="all-linear"))
    assert s.unit_backward.path == "row by row"


def test_a_use_that_is_not_captured_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer runs twice, as where layers share weights, and the capture loses one use."""

    def forgotten(self: CapturedLinear, x: torch.Tensor) -> torch.Tensor:
        plain = torch.nn.functional.linear(x, self.weight)
        return (PRODUCT(self, x) + (plain.detach() if self._capture.slots else plain)) / 2

    monkeypatch.setattr(CapturedLinear, "forward", forgotten)
    assert private_session(tiny_model).unit_backward.path == "row by row"


SHAPES = {"a": torch.Size([2, 50]), "b": torch.Size([100]), "c": torch.Size([100])}


@pytest.mark.parametrize(
    ("sizes", "errors", "ratio"),
    [
        ((1.0, 1.0, 1e-3), (0.0, 0.0, 3e-4), 3.7e-4),  # cancels: a third of the tensor is rounding
        ((1.0, 1.0, 1e-9), (0.0, 0.0, 1e-9), 1.2e-9),
        ((1.0, 1.0, 0.5), (0.0, 0.0, 0.5), 0.6),
        ((1.0, 1.0, 1.0), (1e-5, 0.2, 0.0), 0.2),
        ((1e-4, 1e-4, 1.0), (0.0, 0.2, 0.0), 0.35),
    ],
)
def test_a_difference_counts_relative_to_the_whole_gradient(
    sizes: tuple[float, ...], errors: tuple[float, ...], ratio: float
) -> None:
    generator = torch.Generator().manual_seed(0)

    def units(norms: tuple[float, ...]) -> torch.Tensor:
        drawn = torch.nn.functional.normalize(torch.randn(2, 3, 100, generator=generator), dim=2)
        return (drawn * torch.tensor([norms, (0.0, 0.0, 0.0)])[:, :, None]).flatten(1)

    wanted = units(sizes)
    name, found = farthest(wanted + units(errors), wanted, SHAPES)
    assert found == pytest.approx(ratio, rel=0.05)
    assert name == "abc"[max(range(3), key=errors.__getitem__)]


def test_a_difference_that_is_not_a_number_is_the_farthest() -> None:
    wanted = torch.ones(1, 300)
    found = wanted.clone()
    found[0, 150] = torch.nan
    name, ratio = farthest(found, wanted, SHAPES)
    assert (name, ratio <= 1.0) == ("b", False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rank_one_keeps_the_fast_path(tiny_model: Path, dtype: str) -> None:
    for seed in range(2):
        lora = LoRAConfig(rank=1, alpha=2.0, target_modules="all-linear")
        s = private_session(tiny_model, lora_config=lora, seed=seed, dtype=dtype)
        assert (s.unit_backward.path, s.unit_backward.slow_because) == ("fast", "")


def test_what_has_no_fast_path_says_why(tiny_model: Path) -> None:
    s = private_session(tiny_model, lora_config=None)
    assert (s.unit_backward.path, s.base.flat) == ("row by row", True)
    assert s.unit_backward.slow_because == "it trains more than matrices of an adapter"


def test_a_model_that_draws_in_eval_mode_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = losses.head_losses

    def noisy(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        return real(hidden * (1 + 0.1 * torch.rand_like(hidden)), *others)

    monkeypatch.setattr(model, "head_losses", noisy)
    with pytest.raises(InvalidRequestError, match="draws random numbers in eval mode"):
        private_session(tiny_model)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("fault", ["another gradient", "nothing saved"])
def test_recomputation_that_is_wrong_is_refused_or_not_used(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, asked: bool, fault: str
) -> None:
    real = Recomputation._twice

    def wrong(self: Recomputation, forward: Callable[..., Any]) -> Callable[..., Any]:
        if fault == "nothing saved":
            return forward

        def other(hidden: torch.Tensor, *inputs: Any, **options: Any) -> Any:
            in_backward = torch._C._current_graph_task_id() >= 0
            return forward(hidden + (0.5 if in_backward else 0.0), *inputs, **options)

        return real(self, other)

    monkeypatch.setattr(Recomputation, "_twice", wrong)
    resources = ResourceConfig(activation_checkpointing=asked)
    if asked:
        with pytest.raises(InvalidRequestError, match="activation_checkpointing=False"):
            private_session(tiny_model, resources=resources)
    else:
        assert not private_session(tiny_model, resources=resources).recomputation.possible


def test_recomputation_that_a_model_lacks_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(InvalidRequestError, match="cannot compute activations again"):
        private_session(tiny_model, resources=ResourceConfig(activation_checkpointing=True))
    assert not private_session(tiny_model).recomputation.possible
