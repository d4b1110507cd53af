"""Runs Adam without the variance of the privacy noise in its second moment.

A private gradient is g + noise of a known variance Phi, so the second moment of Adam estimates
g^2 + Phi. Where Phi is the larger part, as it mostly is, Adam divides every value by the same
number and no longer adapts. DP-AdamBC (Tang et al. 2023, arXiv:2312.14334) subtracts Phi.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

NOISE = "noise_sq"
"""The key of the averaged variance in the state of a parameter."""


class NoiseCorrectedAdam(torch.optim.Optimizer):
    """Adam or AdamW that divides by the root of max(v - Phi, floor).

    v is the second moment, corrected for its start from zero as in Adam.

    Phi is an average, with the beta2 of v, over the variance of the noise of each step: sigma may
    change between steps when another run's state is loaded. So the mean of v - Phi over the noise
    is what v would be without noise.

    v - Phi is random, and for some values negative. The floor is the standard deviation that noise
    alone gives v: Phi sqrt(2 S), where S is the sum of the squared weights of the average. It is
    1.4 Phi in the first step and, at a beta2 of 0.999, falls to 0.032 Phi.

    Moments are float32 for any dtype of the parameters: in bfloat16 the difference would be lost.

    Attributes:
        noise_variance: the variance of the noise on each value of the gradient of the next step;
            with 0 from the first step on, this is Adam.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, decoupled: bool
    ) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(parameters, defaults)
        self._decoupled = decoupled
        self.noise_variance = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        decay = group["weight_decay"]
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        if decay and not self._decoupled:
            gradient = gradient + decay * parameter
        if not state:
            state["step"] = torch.tensor(0.0)
            state[NOISE] = torch.tensor(0.0, dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        state[NOISE].mul_(beta2).add_((1 - beta2) * self.noise_variance)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        floor, without_noise = second_moment(state, beta2)
        if decay and self._decoupled:
            parameter.mul_(1 - group["lr"] * decay)
        divisor = without_noise.clamp_(min=floor).sqrt_().add_(group["eps"])
        size = group["lr"] / (1 - beta1 ** float(state["step"]))
        parameter.addcdiv_(state["exp_avg"], divisor, value=-size)


def second_moment(state: dict[str, torch.Tensor], beta2: float) -> tuple[float, torch.Tensor]:
    """Returns the floor, and v - Phi of each value in a new tensor."""
    kept = beta2 ** float(state["step"])
    phi = float(state[NOISE]) / (1 - kept)
    squared_weights = (1 - beta2) / (1 + beta2) * (1 + kept) / (1 - kept)
    return phi * math.sqrt(2 * squared_weights), state["exp_avg_sq"] / (1 - kept) - phi
