"""Turns per-unit gradients into a private gradient. Each stage has a type, so none can be skipped.

    UnitGradients.clip_into -> ClippedSum, which adds up -> privatize -> PrivateGradient

The optimizer of a private run accepts only a `PrivateGradient`, which `privatize` alone makes.
The values of the earlier stages must not leave the memory of the actor. Their types have no
printable form. `unit_gradients` assigns gradients to units; `session` charges each draw of noise.

Each stage is one flat tensor, and no stage waits for the device: norms stay on it until a step asks
for its metrics.

Legend: U units, each one example or all rows of one id; P trainable values; C the L2 bound of a
unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from actors.engine.gradients import PrivateGradient, Shapes, Tensors, by_name
from actors.privacy.noise import standard_normal

Noise = Callable[[int], torch.Tensor]
Rule = Literal["flat", "normalise"]

_BLOCK = 2**18
"""The number of values in float64 at a time: this bounds the copies, and fits a processor's cache.

A GPU gets larger blocks, which cost it fewer launches."""
_DEVICE_BLOCK = 2**24

_NOISE_BLOCK = 2**20
"""The number of values that get noise at a time."""

GAMMA = 0.01
"""The length that normalized clipping adds to each norm: public, and the same for every run."""

_SLACK = 1 - 2**-24
"""What normalized factors keep of their value. A norm adds up to 2^29 squares in float64, in any
order, and so is at most 2^-25 too small. Without it, a unit whose norm is far above gamma could
exceed C by rounding."""


@dataclass(repr=False)
class UnitGradients:
    """The gradients of whole units, before clipping.

    Attributes:
        values: float32 [U, P]. The norms and the sum use these values.
        rule: how `clip_into` bounds them, as `DPConfig.clipping` names it.
    """

    values: torch.Tensor
    rule: Rule = "flat"

    def norms(self) -> torch.Tensor:
        """Returns float64 [U]: the L2 norm of each unit over all tensors together.

        In float32 alone, the norm of 28 million values was measured 1.6 % too small, which would
        let a unit exceed its bound by 1.6 %.
        """
        squares = self.values.new_zeros(len(self.values), dtype=torch.float64)
        for block in torch.split(self.values, _block_size(self.values), dim=1):
            squares += torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square()
        return squares.sqrt()

    def clip_into(self, total: ClippedSum) -> None:
        """Adds each unit's gradient, clipped to the bound of the sum.

        Nulling any unit moves the sum by at most `total.bound` in L2, up to rounding in float64. A
        unit with a NaN or an infinity adds exactly zero. So does a unit whose gradient is zero.
        """
        norms = self.norms()
        finite = torch.isfinite(norms)
        factors = torch.where(finite, _factors(norms, total.bound, self.rule), 0.0)
        size = _block_size(self.values)
        for block, into in zip(
            torch.split(self.values, size, dim=1), torch.split(total.values, size), strict=True
        ):
            # A matrix product of factors and gradients would be faster. But a GPU may compute it in
            # fewer bits, which would let a unit exceed its bound.
            clipped = block.double().mul_(factors[:, None])
            # A factor of 0 is not enough: 0 * NaN is NaN. No other NaN is possible.
            into += clipped.nansum(0)
        before = torch.where(finite, norms, 0.0)
        total.norms_before = torch.cat([total.norms_before, before])
        total.norms_after = torch.cat([total.norms_after, before * factors])
        total.non_finite += (~finite).sum()


def _factors(norms: torch.Tensor, bound: float, rule: Rule) -> torch.Tensor:
    """Returns the factor of each unit, at most C / |g|: float64 [U].

    ``flat`` is C / max(|g|, C) (Abadi et al. 2016, arXiv:1607.00133). ``normalise`` is
    C / (|g| + gamma) (Bu et al. 2022, arXiv:2206.07136), a little less: what a unit adds is then
    shorter than C, rounding included. Either rule bounds what nulling, adding or removing a unit
    does; replacing a unit by another could move the sum by 2 C. No denominator is 0, so none needs
    an epsilon.
    """
    if rule == "normalise":
        return _SLACK * bound / (norms + GAMMA)
    return bound / norms.clamp(min=bound)


def _block_size(values: torch.Tensor) -> int:
    """Returns the columns of [U, P] that make a block of about `_BLOCK` values."""
    block = _BLOCK if values.device.type == "cpu" else _DEVICE_BLOCK
    return max(1, block // max(1, len(values)))


@dataclass(repr=False)
class ClippedSum:
    """The sum of the clipped gradients since the last step. It has no noise: it stays in the actor.

    The sum is float64, so that it stays exact however many units it has: adding n of them rounds by
    at most n * 2^-53 of the largest norm that the sum has had on the way.

    Attributes:
        values: float64 [P].
        shapes: of the trainable tensors, in the order of their values.
        bound: C, the largest distance by which one unit may have moved the sum.
        norms_before, norms_after: float64, the norm of every unit in the sum, before and after
            clipping; 0 for a unit whose gradient is not finite.
        non_finite: int64 [], the number of units that added zero because their gradient was not
            finite.
    """

    values: torch.Tensor
    shapes: Shapes
    bound: float
    norms_before: torch.Tensor
    norms_after: torch.Tensor
    non_finite: torch.Tensor

    @classmethod
    def zero(cls, parameters: Mapping[str, torch.Tensor], bound: float) -> ClippedSum:
        """Returns a sum over no unit. It has all tensors: a step without data gets noise too."""
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        device = next(iter(parameters.values())).device
        values = sum(shape.numel() for shape in shapes.values())
        none = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(
            values=none.new_zeros(values),
            shapes=shapes,
            bound=bound,
            norms_before=none,
            norms_after=none,
            non_finite=torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def sums(self) -> Tensors:
        """The sum by parameter name, as views."""
        return by_name(self.values, self.shapes)

    @property
    def num_clipped(self) -> int:
        return int((self.norms_before > self.bound).sum())

    def add(self, other: ClippedSum) -> None:
        """Adds in place. The two sums must have no unit in common, or the unit counts twice."""
        if other.bound != self.bound or other.shapes != self.shapes:
            raise ValueError("sums with different bounds or parameters do not add up")
        self.values += other.values
        self.norms_before = torch.cat([self.norms_before, other.norms_before])
        self.norms_after = torch.cat([self.norms_after, other.norms_after])
        self.non_finite = self.non_finite + other.non_finite

    def wipe(self) -> None:
        """Overwrites the sum with zeros, so that a dropped window leaves nothing in memory."""
        self.values.zero_()
        self.values, self.shapes = self.values.new_zeros(0), {}


def privatize(
    total: ClippedSum, *, sigma: float, divisor: float, noise: Noise = standard_normal
) -> PrivateGradient:
    """Returns (sum + noise) / divisor from one draw of noise, and overwrites the sum.

    The noise is added in float64 and the result is rounded once. `divisor` must be public: the
    expected batch size, never the number of units that came. With `sigma` 0 no noise is added; the
    ledger records a step of this kind as `unnoised`.
    """
    std = sigma * total.bound
    if not (math.isfinite(std) and divisor > 0):
        raise ValueError("the noise needs a finite scale and a positive divisor")
    released = torch.empty_like(total.values, dtype=torch.float32)
    for clipped, into in zip(
        torch.split(total.values, _NOISE_BLOCK), torch.split(released, _NOISE_BLOCK), strict=True
    ):
        if std:
            clipped += std * noise(len(clipped)).to(clipped.device)
        into.copy_(clipped / divisor)
    tensors = by_name(released, total.shapes)
    total.wipe()
    return PrivateGradient(tensors, std / divisor)
