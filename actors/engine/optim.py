"""Runs optimizers and learning-rate schedules.

torch holds the moments. Every hyperparameter is passed in per step. `Optimizer` accepts a
`MeanGradient` or a `PrivateGradient`, never a sum: see `gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from actors.engine.corrected_adam import NOISE, NoiseCorrectedAdam
from actors.engine.gradients import MeanGradient, PrivateGradient, Tensors
from tg_tinker.config import OptimizerConfig
from tg_tinker.errors import NonFiniteError


def learning_rate(config: OptimizerConfig, step: int, max_steps: int | None) -> float:
    """Returns the learning rate of the next step after `step` completed steps.

    The rate rises linearly to its peak during warm-up. Then it stays constant, or falls to 0 after
    `max_steps` steps.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant" or max_steps is None:
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * max(0.0, left)


def kind(config: OptimizerConfig) -> str:
    """Returns the name that states must share to share their moments."""
    return f"{config.name} with noise_correction" if config.noise_correction else config.name


class Optimizer:
    """One torch optimizer over named parameters.

    Attributes:
        half_moved: whether a step failed while it moved the parameters, so that their state is no
            longer consistent.
    """

    def __init__(self, config: OptimizerConfig, parameters: Mapping[str, torch.nn.Parameter]):
        self.half_moved = False
        # Adafactor's eps is a pair (regularization, scale floor), so its defaults stay.
        self._settable = {"lr", "betas", "weight_decay", "momentum"}
        self._settable |= set() if config.name == "adafactor" else {"eps"}
        self._parameters = dict(parameters)
        self._torch = _create(config, list(parameters.values()))

    def step(
        self,
        gradient: MeanGradient | PrivateGradient,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float,
        max_grad_norm: float | None,
    ) -> float:
        """Moves the parameters; returns the gradient's L2 norm before global clipping.

        Raises:
            NonFiniteError: if the gradient holds NaN or infinity. No parameter has moved.
        """
        norm = torch.nn.utils.get_total_norm(gradient.tensors.values())
        if not torch.isfinite(norm):
            raise NonFiniteError(
                "the gradient is not finite: this step was dropped and the weights are unchanged;"
                " lower the learning rate"
            )
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                   "momentum": momentum}  # fmt: skip
        for group in self._torch.param_groups:
            known = self._settable & group.keys()
            group.update({name: number for name, number in numbers.items() if name in known})
        for name, parameter in self._parameters.items():
            parameter.grad = gradient.tensors[name].to(parameter.dtype)
        try:
            if max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), max_grad_norm, norm)
            if isinstance(self._torch, NoiseCorrectedAdam):
                self._torch.noise_variance = gradient.noise_std**2
            self.half_moved = True
            self._torch.step()
            self.half_moved = False
        finally:
            self._torch.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> Tensors:
        """Returns the moments as tensors named `parameter::key`, ready for safetensors."""
        return {
            f"{name}::{key}": torch.as_tensor(value)
            for name, parameter in self._parameters.items()
            for key, value in self._torch.state.get(parameter, {}).items()
            if value is not None
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the moments that `state` returned. Parameters without moments start fresh."""
        self._torch.state.clear()
        for full_name, tensor in state.items():
            name, _, key = full_name.rpartition("::")
            parameter = self._parameters[name]
            kept = key in ("step", NOISE)  # scalars that are read in each step stay on the CPU
            moment = tensor.clone() if kept else tensor.to(parameter.device, copy=True)
            self._torch.state[parameter][key] = moment


def _create(config: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if config.noise_correction:
        return NoiseCorrectedAdam(parameters, config.learning_rate, config.name == "adamw")
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
    }
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)
    optimizer: torch.optim.Optimizer = kinds[config.name](parameters, lr=config.learning_rate)
    return optimizer
