"""Composes the privacy loss of Poisson-subsampled Gaussian steps by a tilted Fourier transform.

    composed_epsilon(1.0, 0.01, REMOVE, tilt=9.0, steps=1000, delta=1e-5)      # 1.83

The result is an upper bound at every delta, because each approximation rounds up:

1. **Mesh.** Let P and Q be the outcome's distributions under the two neighbors, and let a cell hold
   the outcomes whose loss log(P / Q) is between two neighboring points of a mesh. All outcomes of a
   cell move to its two ends, with the weights that keep both their P-mass and their Q-mass. The
   original pair follows from the moved pair by post-processing: at an end, draw an outcome of the
   cells beside it. So the moved pair leaks at least as much, and composed pairs do too. This is the
   pessimistic estimate of Doroshenko et al. 2022, arXiv:2207.04380. A weight that rounding puts out
   of its range moves mass to the upper end, which only raises the loss.
2. **Ends of the mesh.** Losses below the mesh are raised to its lowest point. An outcome above the
   mesh counts in full: delta grows by `steps` times its probability.
3. **Tilt.** Each loss l is weighted with exp(tilt l) and the sum of the weights is divided out. The
   distribution of the sum of `steps` losses is then centered near epsilon, where an untilted
   transform has only the rounding error of the far larger weights at the center (Gruebel and
   Hermesmeier 1999, ASTIN Bulletin 29(2)). The weights are taken back when delta is summed up.
4. **Aliasing.** A transform of n points treats the term that a sum adds to delta as periodic: to
   each sum's own term it adds those of the sums a whole number of windows away. No term is
   negative.
5. **Rounding.** The largest weight is kept out of the transform, and added to each coefficient. The
   error of the transform of the others in the 2-norm is at most a small multiple of log2(n) 2^-53
   times their norm (Higham 2002, Accuracy and Stability of Numerical Algorithms, Theorem 24.2); by
   the inequality of Cauchy and Schwarz it changes delta by at most its product with the norm of the
   terms of delta. The sum with the largest weight and the power add a relative error to each
   coefficient. As no coefficient exceeds 1, the power multiplies all of them by at most `steps`.
   These bounds are added to delta. A thousandth of delta pays for the rounding of the mesh's
   weights, which is about 1e-13 of each weight in each step.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import next_fast_len, rfft
from scipy.special import ndtr, ndtri

from actors.privacy.renyi import REMOVE, Array

FINE, COARSE = 0.01, 0.3
"""The factor, less 1, by which a mesh may enlarge the moment of the sum, and so delta."""

MOST_CELLS = 2**18
"""The cells of the largest mesh, and about the points of the largest transform: 0.05 seconds and
30 MB. Where more are needed, cells are wider, and the bound is looser."""

TRANSFORM_ERROR = 16 * 2.0**-53
"""The relative error of a transform for each factor of 2 in its length. Higham's constant is about
7."""

POWER_ERROR = 8 * 2.0**-53
"""The relative error of a coefficient's sum, logarithm and exponential, for each step."""

_SHARE = 1e-4
"""The share of delta that may go to outcomes above the mesh, and to aliasing."""

_MARGIN = 1e-3
"""The share of delta that pays for the rounding of weights."""


class _Losses(NamedTuple):
    """The loss of one step on a mesh: cell i has the loss `lowest` + i `width`."""

    lowest: float
    width: float
    logs: Array
    """Shape (cells + 1,): the log of the probability of each loss."""
    above: float
    """The probability of a loss above the mesh."""

    def tilted(self, tilt: float) -> tuple[float, Array]:
        """Returns the log of the sum of the tilted weights, and the weights divided by it."""
        tilted = self.logs + tilt * (self.lowest + self.width * np.arange(len(self.logs)))
        peak = tilted.max()
        weights = np.exp(tilted - peak)
        total = weights.sum()
        return float(peak + np.log(total)), weights / total


def composed_epsilon(
    sigma: float, rate: float, direction: int, *, tilt: float, steps: int, delta: float,
    looseness: float = FINE,
) -> float:  # fmt: skip
    """Returns an upper bound on epsilon in one direction, or infinity if the window has none.

    Any positive tilt gives an upper bound. The tilt of the best Renyi order gives nearly the
    smallest one.
    """
    losses = _meshed(sigma, rate, direction, tilt, steps, delta, looseness)
    log_total, weights = losses.tilted(tilt)
    width = losses.width
    points = next_fast_len(math.ceil(_window(tilt, delta) / width) + 1, real=True)
    sums = _powered(weights, steps, points)
    sticks = sums.powers.conj() * _hockey_sticks(tilt, width, points, sums.frequencies)
    # The sum of `steps` losses of the largest weight has the index 0.
    start = steps * (losses.lowest + width * sums.largest)
    log_scale = steps * log_total - tilt * start
    rounding = (steps + 1) * (
        POWER_ERROR * float(np.abs(sticks).sum())
        + TRANSFORM_ERROR * math.log2(points) * sums.norm * _norm(tilt, width, points)
    )

    def delta_at(index: int) -> float:
        """Returns an upper bound on delta at epsilon = start + index width."""
        turns = sums.frequencies * index % points / points
        terms = (sticks * np.exp(-2j * np.pi * turns)).real
        # Rounding keeps what is scaled above 1e-20, so a scale that is cut is still too large.
        scale = math.exp(min(700.0, log_scale - tilt * width * index))
        return scale * (float(terms.sum()) + rounding) + steps * losses.above

    fails = math.floor(-start / width)  # the last index with an epsilon of 0 or less
    chernoff = (steps * log_total + math.log(2 / delta)) / tilt
    holds = max(fails + 1, math.ceil((chernoff - start) / width))
    target = (1 - _MARGIN) * delta
    if delta_at(fails) <= target:
        return 0.0
    if not delta_at(holds) <= target:
        return math.inf
    while holds - fails > 1:
        middle = (fails + holds) // 2
        fails, holds = (fails, middle) if delta_at(middle) <= target else (middle, holds)
    # Delta is convex in exp(epsilon), so a chord is above it.
    high, low = delta_at(fails), delta_at(holds)
    share = math.log1p((high - target) / (high - low) * math.expm1(width)) / width
    return max(0.0, start + width * (fails + min(1.0, share)))


def _window(tilt: float, delta: float) -> float:
    """Returns a width of the window at which aliasing hardly raises delta.

    What sums below epsilon add is at most exp(-tilt window), far below delta. What sums above the
    window add has a weight of up to exp(tilt window), so the window must not end too early.
    """
    return 1.5 * (math.log(1 / _SHARE) - math.log(delta)) / tilt


class _Sums(NamedTuple):
    """The Fourier coefficients of the distribution of the tilted sum, less `steps` times `largest`.

    Attributes:
        largest: the index of the largest weight of one step.
        norm: the 2-norm of the other weights.
        frequencies: shape (k,), ascending: those whose coefficients are not negligible.
        powers: shape (k,): their coefficients; those of negative frequencies are the conjugates.
    """

    largest: int
    norm: float
    frequencies: npt.NDArray[np.int64]
    powers: npt.NDArray[np.complex128]


def _powered(weights: Array, steps: int, points: int) -> _Sums:
    largest = int(weights.argmax())
    others = weights.copy()
    others[largest] = 0.0
    folded = np.bincount((np.arange(len(weights)) - largest) % points, others, points)
    coefficients = weights[largest] + rfft(folded)
    # The others are below 1e-26 after the power, far below the rounding.
    kept = np.flatnonzero(np.abs(coefficients) > math.exp(-60 / steps))
    return _Sums(largest, float(np.linalg.norm(folded)), kept, coefficients[kept] ** steps)


def _hockey_sticks(
    tilt: float, width: float, points: int, frequencies: npt.NDArray[np.int64]
) -> npt.NDArray[np.complex128]:
    """Returns the Fourier coefficients of the terms of delta, weighted for a sum of real parts.

    The term of a sum that is i cells above epsilon is exp(-tilt i width) (1 - exp(-i width)), for
    every i >= 0. These are two geometric series in the cells. Shape (k,), as `frequencies`.
    """
    exponent = -tilt * width - 2j * np.pi * frequencies / points
    once = -np.expm1(exponent)
    terms = np.exp(exponent) * -math.expm1(-width) / once / -np.expm1(exponent - width)
    both_signs = np.where((frequencies == 0) | (2 * frequencies == points), 1, 2)
    sticks: npt.NDArray[np.complex128] = terms * both_signs / points
    return sticks


def _norm(tilt: float, width: float, points: int) -> float:
    """Returns a bound on the 2-norm of the terms of delta, folded into the window."""
    unfolded = 1 / math.sqrt(-math.expm1(-2 * tilt * width))
    return unfolded / -math.expm1(-tilt * width * points)


def _meshed(
    sigma: float, rate: float, direction: int, tilt: float, steps: int, delta: float,
    looseness: float,
) -> _Losses:  # fmt: skip
    """Returns the loss of one step on a mesh that is fine enough for this tilt and these steps.

    The moment of the loss falls towards its true value as the mesh gets finer: at first with the
    width, then with its square. The fall from one mesh to the next shows how much is left.
    """
    # Meshes for a power of 4 serve fewer steps too, and are remembered.
    outside = _SHARE / 4 ** math.ceil(math.log(steps, 4))
    if direction == REMOVE:
        top = 1 - sigma * float(ndtri(max(1e-300, outside * delta)))
    else:
        top = max(1.0, -sigma * float(ndtri(outside)))  # above are the lowest losses
    reach = _log_mixture(rate, (2 * top - 1) / (2 * sigma**2)) - math.log1p(-rate)
    window = _window(tilt, delta)
    reach = max(reach, window * 2**8 / MOST_CELLS)
    most = MOST_CELLS * min(1.0, reach / window)
    halvings, finer, before = 8, 1, math.inf
    while True:
        losses = _losses(sigma, rate, direction, reach, 2**halvings)
        log_total, _ = losses.tilted(tilt)
        excess = steps * (before - log_total) / (2**finer - 1)
        if excess <= looseness or 2 ** (halvings + 1) > most:
            return losses
        finer = max(1, min(3, math.ceil(math.log2(min(64.0, excess / looseness)) / 2)))
        finer = min(finer, math.floor(math.log2(most)) - halvings)
        halvings, before = halvings + finer, log_total


@lru_cache(maxsize=16)
def _losses(sigma: float, rate: float, direction: int, reach: float, cells: int) -> _Losses:
    """Returns the loss of one step on a mesh, from its infimum log(1 - rate) up to `reach` more.

    The ratio of the densities of N(1, sigma^2) and N(0, sigma^2) at the lower end of cell j is
    (1 - rate) / rate times exp(j width) - 1, which gives the outcome there without cancellation.
    """
    width = reach / cells
    ends = width * np.arange(1, cells + 1)
    log_ratios = math.log1p(-rate) - math.log(rate) + ends + np.log(-np.expm1(-ends))
    edges = np.concatenate([[-np.inf], sigma**2 * log_ratios + 0.5])
    top = float(edges[-1])
    without, taking_part = _masses(edges / sigma), _masses((edges - 1) / sigma)
    mixed = (1 - rate) * without + rate * taking_part
    ratios = np.concatenate([[0.0], np.exp(np.minimum(log_ratios[:-1], 700.0))])
    # What the upper end of each cell gets so that the Q-mass is kept too.
    upper = rate * (taking_part - ratios * without) / -math.expm1(-width)
    lowest = math.log1p(-rate)
    weights = np.zeros(cells + 1)
    if direction == REMOVE:
        upper = np.clip(upper, 0.0, mixed)
        weights[1:] += upper
        weights[:-1] += mixed - upper
        above = (1 - rate) * ndtr(-top / sigma) + rate * ndtr((1 - top) / sigma)
    else:
        # The loss is the negative one: the lower end becomes the upper one.
        upper = np.clip(upper * np.exp(-(lowest + width * np.arange(1, cells + 1))), 0.0, without)
        weights[1:] += upper
        weights[:-1] += without - upper
        weights[-1] += ndtr(-top / sigma)
        weights, lowest, above = weights[::-1], -(lowest + cells * width), 0.0
    with np.errstate(divide="ignore"):
        return _Losses(lowest, width, np.log(weights), float(above))


def _masses(edges: Array) -> Array:
    """Returns the standard normal mass between neighboring edges, with a small relative error."""
    left, right = edges[:-1], edges[1:]
    masses: Array = np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left))
    return masses


def _log_mixture(rate: float, log_ratio: float) -> float:
    return float(np.logaddexp(math.log1p(-rate), math.log(rate) + log_ratio))
