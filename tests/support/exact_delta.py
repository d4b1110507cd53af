"""Computes the true delta of Poisson-subsampled Gaussian steps, as the oracle of the accountants.

It shares no line and no method with `actors.privacy`: there is no mesh of losses and no composed
distribution. With L the sum of the losses of all steps and M(z) = E[exp(z l)] the moment of one
loss, for any c > 0,

    delta(epsilon) = E[max(0, 1 - exp(epsilon - L))]
                   = 1 / (2 pi i) * integral over z = c + iy of
                     M(z)^steps exp(-z epsilon) / (z (z + 1)) dz,

because 1 / (z (z + 1)) is the Laplace transform of the kink. On the line through the saddle point
the integrand is a hump without cancellation, so the relative precision does not depend on how small
delta is. Both integrals, over y and over the outcome x inside M, are sums over evenly spaced
points.

Precision: each value comes with the relative difference to the same sums on points twice as far
apart, plus what lies beyond the last y. It is below 1e-4 where the expected number of steps that a
unit takes part in is 1 or more. The integrand of fewer steps decays as 1 / y^2 only; their
precision says so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Exact(NamedTuple):
    delta: float
    precision: float  # relative


def exact_delta(sigma: float, rate: float, steps: int, epsilon: float) -> Exact:
    """Returns the larger delta of the two directions."""
    removed = _of_direction(sigma, rate, steps, epsilon, True)
    logs, losses = _outcomes(sigma, rate, False, 20.0, 2)
    chernoff = min(
        steps * _tilted(logs, losses, line)[0] - line * epsilon for line in (1.0, 3.0, 7.0, 20.0)
    )
    if chernoff < math.log(1e-6 * removed.delta):
        return removed
    added = _of_direction(sigma, rate, steps, epsilon, False)
    return max(removed, added, key=lambda one: one.delta)


def _of_direction(sigma: float, rate: float, steps: int, epsilon: float, removed: bool) -> Exact:
    line = _saddle(sigma, rate, steps, epsilon, removed)
    fine = _integral(sigma, rate, steps, epsilon, removed, line, 1)
    coarse = _integral(sigma, rate, steps, epsilon, removed, line, 2)
    if fine.delta < 1e-250:
        return Exact(fine.delta, math.inf)
    return Exact(fine.delta, abs(coarse.delta / fine.delta - 1) + fine.precision)


def _integral(
    sigma: float, rate: float, steps: int, epsilon: float, removed: bool, line: float, apart: int
) -> Exact:
    logs, losses = _outcomes(sigma, rate, removed, line, apart)
    log_moment, mean, variance = _tilted(logs, losses, line)
    weights = np.exp(logs + line * losses - log_moment)
    size = steps * log_moment - line * epsilon  # the log of the integrand's scale
    # Points this close repeat only what is exp(-40) times smaller.
    gap = apart * math.pi * line / (120 - 2 * min(0.0, size))
    gap = min(gap, apart * 0.5 / math.sqrt(steps * variance))
    total, at, decayed = 0.0, 0, 1.0
    while at < 8192 and decayed > 1e-9:
        y = gap * np.arange(at, at + 32)
        phases = np.exp(1j * y[:, None] * (losses - mean)) @ weights
        z = line + 1j * y
        values = (
            np.exp(steps * np.log(phases) + 1j * y * (steps * mean - epsilon)) / (z * (z + 1))
        ).real
        total += float(values.sum()) - (0.5 * float(values[0]) if at == 0 else 0.0)
        at += 32
        # Beyond, the integral is at most that of |M|^steps / y^2.
        beyond = float(np.abs(phases[-8:]).max()) ** steps / (gap * at)
        decayed = beyond / max(abs(total) * gap, 1e-300)
    log_delta = size + math.log(max(total * gap / math.pi, 1e-300))
    return Exact(math.exp(log_delta), decayed)


def _saddle(sigma: float, rate: float, steps: int, epsilon: float, removed: bool) -> float:
    """Returns the c at which the integrand on the real axis is smallest."""

    def slope(line: float) -> float:
        logs, losses = _outcomes(sigma, rate, removed, line, 2)
        mean = _tilted(logs, losses, line)[1]
        return steps * mean - epsilon - 1 / line - 1 / (line + 1)

    low, high = 1e-4, 1.0
    while slope(high) < 0 and high < 1e4:
        low, high = high, 2 * high
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


def _outcomes(
    sigma: float, rate: float, removed: bool, line: float, apart: int
) -> tuple[Array, Array]:
    """Returns log P(x) dx and the loss at points x that hold all mass, also when it is tilted."""
    high = 1 + 13 * sigma + (line if removed else 0.0)
    low = -13 * sigma - (0.0 if removed else min(line, 1 + 13 * sigma))
    gap = apart * min(sigma, sigma**2) / 24
    gap = max(gap, (high - low) / 20_000)
    x = np.arange(low, high, gap)
    without = -0.5 * (x / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(gap)
    odds = (2 * x - 1) / (2 * sigma**2)
    mixed = np.where(
        odds < 0,
        np.log1p(rate * np.expm1(np.minimum(odds, 0))),
        np.logaddexp(math.log1p(-rate), math.log(rate) + odds),
    )
    return (without + mixed, mixed) if removed else (without, -mixed)


def _tilted(logs: Array, losses: Array, line: float) -> tuple[float, float, float]:
    """Returns the log moment, and mean and variance of the loss under the tilted distribution."""
    exponents = logs + line * losses
    peak = exponents.max()
    weights = np.exp(exponents - peak)
    total = weights.sum()
    mean = float((weights * losses).sum() / total)
    variance = float((weights * (losses - mean) ** 2).sum() / total)
    return float(peak + math.log(total)), mean, variance
