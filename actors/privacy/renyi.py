"""Computes the Renyi bound of Poisson-subsampled Gaussian steps, on one fixed grid of orders.

    moments(1.0, 0.01, REMOVE).epsilon(steps=1000, delta=1e-5)      # 2.10

The grid is the same for every number of steps, so a bound never falls when a step is added: each
order's bound rises with the steps, and so does the smallest of them. A search that depends on the
number of steps does not have this property.

The privacy loss L of one step is log(P(x) / Q(x)) with x drawn from P. In the direction `REMOVE`, P
is the mixture (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) and Q is N(0, sigma^2); in the
direction `ADD` they are exchanged. The order is 1 + tilt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

REMOVE, ADD = 1, -1

SMALLEST_TILT = 2.0**-10
LARGEST_TILT = 2.0**14
TILT_RATIO = 1.05
"""The ratio of neighboring tilts of the grid. A finer grid would give 0.1 % less epsilon."""

DEVIATIONS = 12.0
"""The standard deviations on each side that an integral covers; 4e-33 of a normal is outside."""

_ROUNDING = 8 * float(np.finfo(float).eps)


@dataclass(frozen=True)
class Moments:
    """The moments of the loss of one step.

    Attributes:
        tilts: shape (n,), ascending and positive.
        logs: shape (n,), log E[exp(tilt L)], which is tilt times the Renyi divergence at the order
            1 + tilt.
    """

    tilts: Array
    logs: Array

    def epsilon(self, steps: int, delta: float) -> float:
        """Returns an upper bound on epsilon."""
        return float(self._bounds(steps, delta).min())

    def best_tilt(self, steps: int, delta: float) -> float:
        """Returns the tilt with the smallest bound."""
        return float(self.tilts[self._bounds(steps, delta).argmin()])

    def _bounds(self, steps: int, delta: float) -> Array:
        """Returns the bound of each order, at least 0 (as `accounting.rdp_epsilon`)."""
        orders = 1 + self.tilts
        slack = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / self.tilts
        bounds: Array = np.maximum(0.0, steps * self.logs / self.tilts + slack)
        return bounds


@lru_cache(maxsize=256)
def moments(sigma: float, rate: float, direction: int) -> Moments:
    """Returns the moments of the loss in one direction.

    Those of `REMOVE` bound both directions (Mironov, Talwar and Zhang 2019, arXiv:1908.10530,
    Theorem 5).
    """
    # Below sigma = 1 large orders never give the best bound, and their integrals are long.
    largest = min(LARGEST_TILT, 2 + 512 * sigma**2)
    count = math.ceil(math.log(largest / SMALLEST_TILT) / math.log(TILT_RATIO)) + 1
    tilts = np.geomspace(SMALLEST_TILT, largest, count)
    powers = 1 + tilts if direction == REMOVE else -tilts
    # Few orders at a time, because the integrals of larger orders reach further.
    parts = np.array_split(powers, math.ceil(count / 16))
    return Moments(tilts, np.concatenate([_log_moments(sigma, rate, part) for part in parts]))


def _log_moments(sigma: float, rate: float, powers: Array) -> Array:
    """Returns log E[(P(x) / Q(x))^power] with x from Q = N(0, sigma^2) and P the mixture.

    The integral is a sum over evenly spaced points. For a function that is analytic in a strip and
    decays like a normal, its relative error falls exponentially with the strip's width over the
    spacing (Trefethen and Weideman 2014, SIAM Review 56(3), Theorem 5.1). The strip ends where
    P(x) / Q(x) is zero, at an imaginary part of pi sigma^2: the spacing below has an error below
    rounding. Below sigma = 0.05 the zeros are so far from all mass that they do not matter.

    Where the moment is close to 1, its excess over 1 is summed, without the linear term, whose
    integral is 0: rare units then keep their digits. The largest possible rounding is added.
    """
    spacing = sigma / 4 * (min(1.0, sigma) if sigma > 0.05 else 1.0)
    low, high = min(0.0, powers.min()), max(1.0, powers.max())
    x = np.arange(low - DEVIATIONS * sigma, high + DEVIATIONS * sigma + spacing, spacing)
    log_q = -0.5 * (x / sigma) ** 2 + math.log(spacing / sigma / math.sqrt(2 * math.pi))
    log_ratio = (2 * x - 1) / (2 * sigma**2)
    linear = rate * _excess(log_q, log_ratio)
    with np.errstate(over="ignore"):
        exponents = powers[:, None] * _loss(rate, log_ratio)
        excess = (_excess(log_q, exponents) - powers[:, None] * linear).sum(axis=1)
    excess = np.maximum(excess, 0.0) + _ROUNDING * np.abs(powers) * np.abs(linear).sum()
    peaks = (log_q + exponents).max(axis=1)
    direct = peaks + np.log(np.exp(log_q + exponents - peaks[:, None]).sum(axis=1))
    logs: Array = np.where(excess < 0.5, np.log1p(np.minimum(excess, 0.5)), direct)
    return logs


def _loss(rate: float, log_ratio: Array) -> Array:
    """Returns log(1 - rate + rate exp(log_ratio)) with a relative error of rounding."""
    near = np.log1p(rate * np.expm1(np.minimum(log_ratio, 1.0)))
    far = np.logaddexp(math.log1p(-rate), math.log(rate) + log_ratio)
    losses: Array = np.where(log_ratio < 1, near, far)
    return losses


def _excess(log_q: Array, exponents: Array) -> Array:
    """Returns q (exp(exponent) - 1) with a relative error of rounding."""
    near = np.exp(log_q) * np.expm1(np.minimum(exponents, 1.0))
    far = np.exp(log_q + exponents) - np.exp(log_q)
    excess: Array = np.where(exponents < 1, near, far)
    return excess
