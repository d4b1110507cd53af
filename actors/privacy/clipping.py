"""Turns per-unit gradients into a private gradient. Each stage has a type, so none can be skipped.

    UnitGradients.clip(C) -> ClippedSum, which adds up -> privatize -> PrivateGradient

The optimizer of a private run accepts only a `PrivateGradient`, which `privatize` alone makes.
The values of the earlier stages must not leave the memory of the actor. Their types have no
printable form. `unit_gradients` assigns gradients to units; `session` charges each draw of noise.

Legend: U units, each one example or all rows of one id; C the L2 bound of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from actors.engine.gradients import PrivateGradient, Tensors
from actors.privacy.noise import standard_normal

Noise = Callable[[int], torch.Tensor]
Rule = Literal["flat", "normalise"]

_BLOCK = 2**20
"""The number of values that get noise at a time: this bounds the float64 copies."""

GAMMA = 0.01
"""The length that normalized clipping adds to each norm: public, and the same for every run."""

_SLACK = 1 - 2**-14
"""What normalized factors keep of their value. A norm adds up to 1,024 squares in float32, in any
order, and so is at most 2^-15 too small; rounding a product adds 2^-24. Without it, units with a
norm of more than a few hundred could exceed C."""

_NORMED = 1024
"""The number of values whose squares are added in float32."""


@dataclass(repr=False)
class UnitGradients:
    """The gradients of whole units, before clipping.

    Attributes:
        by_unit: float32 [U, ...] by parameter name. The norms and the sum use these values.
        rule: how `clip` bounds them, as `DPConfig.clipping` names it.
    """

    by_unit: Tensors
    rule: Rule = "flat"

    def norms(self) -> torch.Tensor:
        """Returns float64 [U]: the L2 norm of each unit over all tensors together.

        The squares of 1,024 values at a time are added in float32, and these sums in float64. In
        float32 alone, the norm of 28 million values was measured 1.6 % too small, which would let a
        unit exceed its bound by 1.6 %.
        """
        squares = [
            torch.linalg.vector_norm(block, dim=-1).double().square().sum(1)
            for tensor in self.by_unit.values()
            for block in _norm_blocks(tensor.flatten(1))
        ]
        return torch.stack(squares).sum(0).sqrt()

    def clip(self, bound: float) -> ClippedSum:
        """Returns the sum over units of g * C / max(|g|, C), and consumes the gradients.

        Replacing any unit by a null example moves the sum by at most `bound` in L2 (Abadi et
        al. 2016, arXiv:1607.00133), up to rounding in float32. A unit with a NaN, an infinity
        or an overflowing norm adds exactly zero. So does a unit whose gradient is zero.

        The rule ``normalise`` returns the sum of g * C / (|g| + gamma) (Bu et al. 2022,
        arXiv:2206.07136): a unit's part is shorter than C, rounding included. This bounds what
        nulling, adding or removing a unit does. Replacing a unit by another could move the sum by
        2 C, under either rule.
        """
        norms = self.norms()
        finite = torch.isfinite(norms)
        # The factor must never exceed C / |g|. No denominator is 0, so none needs an epsilon.
        if self.rule == "normalise":
            exact = _SLACK * bound / (norms + GAMMA)
        else:
            exact = bound / norms.clamp(min=bound)
        factors = _rounded_down(torch.where(finite, exact, 0.0))
        sums = {}
        for name in list(self.by_unit):
            tensor = self.by_unit.pop(name)
            if not finite.all():
                # A factor of 0 is not enough: 0 * NaN is NaN.
                tensor[~finite] = 0
            # A matrix product of factors and gradients would be faster. But a GPU may compute it in
            # TF32, whose ten bits would let a unit exceed its bound by 0.1 %.
            tensor *= factors.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
            sums[name] = tensor.sum(0)
        # The norm of an infinite gradient times its factor of 0 would be NaN.
        clipped = torch.where(finite, norms * factors.double(), 0.0)
        before = torch.where(finite, norms, 0.0)
        return ClippedSum(sums, bound, before.tolist(), clipped.tolist(), int((~finite).sum()))


@dataclass(repr=False)
class ClippedSum:
    """The sum of the clipped gradients since the last step. It has no noise: it stays in the actor.

    Attributes:
        sums: float32 by parameter name.
        bound: C, the largest distance by which one unit may have moved the sum.
        norms_before, norms_after: the norm of every unit in the sum, before and after clipping.
        non_finite: the number of units that added zero because their gradient was not finite.
    """

    sums: Tensors
    bound: float
    norms_before: list[float] = field(default_factory=list)
    norms_after: list[float] = field(default_factory=list)
    non_finite: int = 0

    @classmethod
    def zero(cls, parameters: Mapping[str, torch.Tensor], bound: float) -> ClippedSum:
        """Returns a sum over no unit. It has all tensors: a step without data gets noise too."""
        zeros = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        return cls(zeros, bound)

    @property
    def num_clipped(self) -> int:
        return sum(norm > self.bound for norm in self.norms_before)

    def add(self, other: ClippedSum) -> None:
        """Adds in place. The two sums must have no unit in common, or the unit counts twice."""
        if other.bound != self.bound or other.sums.keys() != self.sums.keys():
            raise ValueError("sums with different bounds or parameters do not add up")
        for name, tensor in self.sums.items():
            tensor += other.sums[name]
        self.norms_before += other.norms_before
        self.norms_after += other.norms_after
        self.non_finite += other.non_finite

    def wipe(self) -> None:
        """Overwrites the sum with zeros, so that a dropped window leaves nothing in memory."""
        for tensor in self.sums.values():
            tensor.zero_()
        self.sums = {}


def _norm_blocks(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields rows [U, n] as [U, blocks, 1024], and the remaining values as [U, 1, rest]."""
    whole = rows.shape[1] // _NORMED * _NORMED
    if whole:
        yield rows[:, :whole].view(len(rows), whole // _NORMED, _NORMED)
    if whole < rows.shape[1]:
        yield rows[:, None, whole:]


def _rounded_down(factors: torch.Tensor) -> torch.Tensor:
    """Returns the factors in float32, never above their float64 values.

    For the largest gradients the factors are denormal. Rounded to nearest, they would exceed the
    bound by far more than 1e-7.
    """
    nearest = factors.float()
    return torch.where(
        nearest > factors, torch.nextafter(nearest, -torch.ones_like(nearest)), nearest
    )


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
    for block in _blocks(total.sums):
        sizes = [piece.numel() for piece in block]
        drawn = noise(sum(sizes)) if std else torch.zeros(sum(sizes), dtype=torch.float64)
        for piece, part in zip(block, torch.split(drawn, sizes), strict=True):
            piece.copy_((piece.double() + std * part.to(piece.device)) / divisor)
    tensors, total.sums = total.sums, {}
    return PrivateGradient(tensors, std / divisor)


def _blocks(sums: Tensors) -> Iterator[list[torch.Tensor]]:
    """Yields lists of flat views of all values, in order, with at most `_BLOCK` values per list.

    One draw for many small tensors takes a quarter of the time of one draw for each tensor.
    """
    block: list[torch.Tensor] = []
    room = _BLOCK
    for tensor in sums.values():
        for piece in torch.split(tensor.view(-1), _BLOCK):
            if piece.numel() > room:
                yield block
                block, room = [], _BLOCK
            block.append(piece)
            room -= piece.numel()
    yield block
