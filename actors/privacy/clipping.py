"""From per-unit gradients to a private gradient: one type per stage, so that none is skipped.

    UnitGradients.clip(C) -> ClippedSum, which adds up -> privatise -> PrivateGradient

The optimizer of a private run takes nothing but a `PrivateGradient`, which `privatise` alone makes.
What comes before it must not leave the actor's memory; none of these types has a printable form.
Whose gradient is whose is settled in `unit_gradients`, that a draw is charged in `session`.

Legend: U units, each one example or all rows of one id; C the L2 bound of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from actors.engine.gradients import PrivateGradient, Tensors
from actors.privacy.noise import standard_normal

Noise = Callable[[int], torch.Tensor]

_BLOCK = 2**20
"""Values that get their noise at a time: bounds the float64 copies."""

_NORMED = 1024
"""Values whose squares are added in float32."""


@dataclass(repr=False)
class UnitGradients:
    """Gradients of whole units, not yet clipped.

    Attributes:
        by_unit: float32 [U, ...] by parameter name: the very values that are normed and summed.
    """

    by_unit: Tensors

    def norms(self) -> torch.Tensor:
        """float64 [U]: each unit's L2 norm over all tensors together.

        In float32 over a thousand values at a time, in float64 from there on: a float32 norm of
        28 million values was found 1.6 % too small, and so a unit's part 1.6 % above its bound.
        """
        squares = [
            torch.linalg.vector_norm(block, dim=-1).double().square().sum(1)
            for tensor in self.by_unit.values()
            for block in _norm_blocks(tensor.flatten(1))
        ]
        return torch.stack(squares).sum(0).sqrt()

    def clip(self, bound: float) -> ClippedSum:
        """The sum over units of g * C / max(|g|, C); consumes the gradients.

        Replacing any unit by a null example moves the sum by at most `bound` in L2 (Abadi et
        al. 2016, arXiv:1607.00133), up to rounding in float32. A unit with a NaN, an infinity
        or an overflowing norm adds exactly zero; so does a unit whose gradient is zero.
        """
        norms = self.norms()
        finite = torch.isfinite(norms)
        # Not `+ eps` below the bar: the factor must never exceed C / |g|.
        factors = _rounded_down(torch.where(finite, bound / norms.clamp(min=bound), 0.0))
        sums = {}
        for name in list(self.by_unit):
            tensor = self.by_unit.pop(name)
            if not finite.all():
                tensor[~finite] = 0  # 0 * NaN would still be NaN
            # Not one product of factors and gradients: a GPU may be set to make those in TF32,
            # whose ten bits would let a unit be 0.1 % above its bound.
            tensor *= factors.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
            sums[name] = tensor.sum(0)
        clipped = torch.where(finite, norms.clamp(max=bound), 0.0)
        before = torch.where(finite, norms, 0.0)
        return ClippedSum(sums, bound, before.tolist(), clipped.tolist(), int((~finite).sum()))


@dataclass(repr=False)
class ClippedSum:
    """Sum of clipped gradients since the last step. Un-noised: it never leaves the actor.

    Attributes:
        sums: float32 by parameter name.
        bound: C, the most that one unit may have moved the sum.
        norms_before, norms_after: of every unit in the sum, before and after clipping.
        non_finite: units that added zero because their gradient was not finite.
    """

    sums: Tensors
    bound: float
    norms_before: list[float] = field(default_factory=list)
    norms_after: list[float] = field(default_factory=list)
    non_finite: int = 0

    @classmethod
    def zero(cls, parameters: Mapping[str, torch.Tensor], bound: float) -> ClippedSum:
        """A sum over no unit; it has all tensors, since a step without data is noised too."""
        zeros = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        return cls(zeros, bound)

    @property
    def num_clipped(self) -> int:
        return sum(norm > self.bound for norm in self.norms_before)

    def add(self, other: ClippedSum) -> None:
        """Adds in place; the units of the two must be disjoint, or a unit counts twice."""
        if other.bound != self.bound or other.sums.keys() != self.sums.keys():
            raise ValueError("sums of other bounds or parameters do not add up")
        for name, tensor in self.sums.items():
            tensor += other.sums[name]
        self.norms_before += other.norms_before
        self.norms_after += other.norms_after
        self.non_finite += other.non_finite

    def wipe(self) -> None:
        """Overwrites the sum: dropped windows leave nothing in memory."""
        for tensor in self.sums.values():
            tensor.zero_()
        self.sums = {}


def _norm_blocks(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """[U, blocks, 1024] of rows [U, n], and [U, 1, rest] of what is left of each."""
    whole = rows.shape[1] // _NORMED * _NORMED
    if whole:
        yield rows[:, :whole].view(len(rows), whole // _NORMED, _NORMED)
    if whole < rows.shape[1]:
        yield rows[:, None, whole:]


def _rounded_down(factors: torch.Tensor) -> torch.Tensor:
    """float32, never above the float64 they come from: for the largest gradients they are
    denormal, where rounding to nearest would exceed the bound by far more than 1e-7."""
    nearest = factors.float()
    return torch.where(
        nearest > factors, torch.nextafter(nearest, -torch.ones_like(nearest)), nearest
    )


def privatise(
    total: ClippedSum, *, sigma: float, divisor: float, noise: Noise = standard_normal
) -> PrivateGradient:
    """One draw of noise for the whole sum; consumes and overwrites it.

    Added in float64 and rounded once. `divisor` must be public: the expected batch, never the
    number of units that came. `sigma` 0 is the step without noise that `Ledger` calls unnoised.
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
    return PrivateGradient(tensors, std)


def _blocks(sums: Tensors) -> Iterator[list[torch.Tensor]]:
    """Flat views of all values, in order, at most `_BLOCK` values to a list: one draw for many
    small tensors takes a quarter of the time of a draw for each."""
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
