"""Tests Adam without the variance of the privacy noise in its second moment."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.engine.corrected_adam import NOISE, NoiseCorrectedAdam, second_moment
from actors.engine.gradients import MeanGradient
from actors.engine.optim import Optimizer
from actors.privacy.clipping import ClippedSum, privatize
from actors.privacy.session import PrivateSession
from support.helpers import assert_equal, weights
from support.privacy_helpers import private_session, rows
from tg_tinker import ArtifactMismatchError, OptimizerConfig

C, DIVISOR, SIZE = 0.25, 8.0, 200_000
CORRECTED = OptimizerConfig(noise_correction=True)
NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "momentum": 0.0, "max_grad_norm": None}


def moments(sigmas: list[float], scale: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns v - Phi after steps with this noise, v without noise, and the last floor."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = Optimizer(CORRECTED, {"w": parameter})
    clean, kept = torch.zeros(SIZE), 1.0
    for sigma in sigmas:
        gradient = scale * torch.randn(SIZE)
        gradient[: SIZE // 2] = 0  # where there is nothing but noise
        total = ClippedSum.zero({"w": gradient}, C)
        total.values += gradient * DIVISOR
        noise = lambda count: torch.randn(count, dtype=torch.float64)  # noqa: E731
        private = privatize(total, sigma=sigma, divisor=DIVISOR, noise=noise)
        optimizer.step(private, weight_decay=0.0, **NUMBERS)  # type: ignore[arg-type]
        clean, kept = 0.99 * clean + 0.01 * gradient**2, 0.99 * kept
    floor, found = second_moment(optimizer._torch.state[parameter], 0.99)
    return found, clean / (1 - kept), floor


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0] * 12, [0.5, 4.0, 4.0, 1.0, 2.0]], ids=["one", "equal", "differing"]
)
def test_the_mean_over_the_noise_is_the_second_moment_without_noise(sigmas: list[float]) -> None:
    """At the scale of a tenth of the noise, the variance of another step or of the sum shows."""
    phi = (max(sigmas) * C / DIVISOR) ** 2
    found, clean, _ = moments(sigmas, 0.1 * math.sqrt(phi))
    for half in (slice(None, SIZE // 2), slice(SIZE // 2, None)):
        off = (found[half] - clean[half]).mean()
        assert abs(off) < 5 * (found - clean)[half].std() / math.sqrt(SIZE // 2)
        assert abs(off) < 0.02 * phi


def test_the_floor_is_what_noise_alone_makes_by_chance() -> None:
    for steps in (1, 5, 40):
        found, _, floor = moments([2.0] * steps, 0.0)
        assert floor == pytest.approx(float(found.std()), rel=0.05)
    state = {"step": torch.tensor(1e6), NOISE: torch.tensor(1.0), "exp_avg_sq": torch.ones(1)}
    assert second_moment(state, 0.999)[0] == pytest.approx(0.0316, rel=1e-2)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_noise_it_is_torchs_own(name: str, decay: float) -> None:
    found = []
    for corrected in (False, True):
        torch.manual_seed(1)
        parameter = torch.nn.Parameter(torch.randn(50))
        config = OptimizerConfig(name=name, noise_correction=corrected)
        optimizer = Optimizer(config, {"w": parameter})
        for _ in range(4):
            gradient = MeanGradient({"w": torch.randn(50)})
            optimizer.step(gradient, weight_decay=decay, **NUMBERS)  # type: ignore[arg-type]
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_moments_of_a_bfloat16_weight_are_float32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    optimizer = Optimizer(CORRECTED, {"w": parameter})
    optimizer.step(MeanGradient({"w": torch.ones(10)}), weight_decay=0.0, **NUMBERS)  # type: ignore[arg-type]
    state = optimizer.state()
    assert state["w::exp_avg_sq"].dtype == torch.float32
    assert parameter.dtype == torch.bfloat16
    assert (parameter < 0).all()


class Predictable(PrivateSession):
    """A session whose noise follows from the step, so that two runs can be compared."""

    def _noise(self, count: int) -> torch.Tensor:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.step)
        return torch.randn(count, dtype=torch.float64, generator=generator)


def test_a_resumed_run_reaches_the_same_bits(tiny_model: Path) -> None:
    def stepped(s: PrivateSession, steps: int) -> None:
        for _ in range(steps):
            s.forward_backward(rows())
            s.optim_step()

    dp = {"noise_multiplier": 1.0, "target_epsilon": 50.0}
    values = {"optimizer": CORRECTED, "dp": dp}
    whole, half = (private_session(tiny_model, Predictable, **values) for _ in range(2))
    stepped(whole, 3)
    stepped(half, 1)
    resumed = private_session(tiny_model, Predictable, **values)
    resumed.load(half.state())
    stepped(resumed, 2)
    assert_equal(weights(resumed), weights(whole))
    assert isinstance(resumed._optimizer._torch, NoiseCorrectedAdam)
    assert resumed._optimizer._torch.noise_variance == pytest.approx((1.0 * 1.0 / 8) ** 2)


def test_moments_of_plain_adam_are_refused(tiny_model: Path) -> None:
    plain = private_session(tiny_model)
    corrected = private_session(tiny_model, optimizer=CORRECTED)
    with pytest.raises(ArtifactMismatchError, match="adamw with noise_correction here"):
        corrected.load(plain.state())
    corrected.load(plain.state(include_optimizer=False))
