"""Computes epsilon of Gaussian mechanisms in closed form, by arithmetic that anyone can check.

    >>> round(gaussian_epsilon(mu=1.0, delta=1e-5), 3)      # one use at sigma = 1
    4.377
    >>> round(gaussian_epsilon(mu=2**0.5, delta=1e-5), 3)   # two uses
    6.573

In this module sigma is the standard deviation of the noise divided by C, the L2 bound of one unit.
k uses at one sigma have mu = sqrt(k) / sigma. Uses at several sigmas have mu^2 = the sum of
1 / sigma^2. Poisson samples are accounted for in `actors.privacy.accountants`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

MAX_ORDER = 512
"""The largest Renyi order that is tried; larger orders matter only for epsilons below 0.01."""

SIGMA_RANGE = (1e-4, 1e6)
"""The noise multipliers for which these formulas neither overflow nor round to zero."""

EVALUATION_BOUND = 2.0
"""The largest part of one held-out unit in a private evaluation, in nats per token: by as much, the
unit moves the sum of all parts under zero-out."""

_SQRT2 = math.sqrt(2.0)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Returns the exact delta at which a Gaussian mechanism is (epsilon, delta)-private.

    Balle and Wang 2018, arXiv:1805.06530, Theorem 8.
    """
    if mu == 0:
        return 0.0
    near, far = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return max(0.0, normal_cdf(near) - math.exp(epsilon + _log_normal_cdf(far)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the smallest epsilon at this delta, rounded up in the twelfth digit.

    Returns 0 if mu is 0, or so small that (0, delta)-privacy holds.
    """
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if math.isinf(mu):
        return math.inf
    return _smallest(lambda epsilon: gaussian_delta(mu, epsilon) <= delta)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Returns the largest mu that an (epsilon, delta) budget pays for, rounded down.

    Returns infinity if epsilon is infinite.
    """
    if math.isinf(epsilon):
        return math.inf
    return 1 / _smallest(lambda sigma: gaussian_delta(1 / sigma, epsilon) <= delta)


def subsampled_gaussian_epsilon(sigma: float, rate: float, delta: float) -> float:
    """Returns the exact epsilon of one Gaussian step on a Poisson sample.

    Balle, Barthe and Gaboardi 2018, arXiv:1807.01647, Theorem 8. Several steps cost at least as
    much.
    """
    unsampled = gaussian_epsilon(1 / sigma, min(1.0, delta / rate))
    if unsampled > 700:  # rate * exp(unsampled), which would overflow
        return unsampled + math.log(rate)
    return math.log1p(rate * math.expm1(unsampled))


@lru_cache(maxsize=4096)
def subsampled_gaussian_rdp(sigma: float, rate: float, order: int) -> float:
    """Returns the Renyi divergence of one Gaussian step on a Poisson sample, at an integer order.

    The order must be 2 or more. Mironov, Talwar and Zhang 2019, arXiv:1908.10530, section 3.3. A
    unit takes part with probability `rate`. In the neighboring dataset a null example takes the
    place of the unit.
    """
    if rate >= 1:
        return order / (2 * sigma**2)
    # The plain binomial terms add up to 1. Leaving this 1 out keeps all digits of the rest.
    terms = [
        _log_binomial(order, k)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + _log_expm1((k * k - k) / (2 * sigma**2))
        for k in range(2, order + 1)
    ]
    peak = max(terms)
    excess = peak + math.log(math.fsum(math.exp(term - peak) for term in terms))
    return (max(0.0, excess) + math.log1p(math.exp(-abs(excess)))) / (order - 1)


def rdp_epsilon(rdp: float, order: float, delta: float) -> float:
    """Returns epsilon of a mechanism whose Renyi divergence at `order` is `rdp`.

    Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.
    """
    if rdp == 0:
        return 0.0
    slack = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, rdp + slack)


def filter_order(epsilon: float, delta: float) -> int:
    """Returns the order at which a Renyi filter lets a budget pay for the largest mu."""
    reference = min(epsilon, 1e3)

    def paid(order: int) -> float:  # mu^2 that fits
        return 2 * (reference - rdp_epsilon(1e-300, order, delta)) / order

    return max(range(2, MAX_ORDER + 1), key=paid)


def largest_count(fits: Callable[[int], bool], limit: int = 10_000_000) -> int:
    """Returns the largest n up to `limit` for which a monotone test holds; 0 if it fails at 1."""
    if limit < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest_sigma(fits: Callable[[float], bool]) -> float:
    """Returns the smallest noise multiplier for which a monotone test holds.

    The result is rounded up to 4 significant digits. It is infinite if the test holds for no
    noise multiplier.
    """
    raw = _smallest(fits, relative=1e-4)
    return raw if math.isinf(raw) else _rounded_up(raw)


def _smallest(holds: Callable[[float], bool], relative: float = 1e-12) -> float:
    """Returns the smallest positive number for which a monotone test holds, rounded up.

    Returns infinity if the test fails for every number up to about 1e12.
    """
    low, high = 0.0, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > 1e12:
            return math.inf
    while low == 0 and high > 1e-9 and holds(high / 2):
        high /= 2
    low = low or high / 2
    while high - low > relative * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded_up(value: float) -> float:
    scale: float = 10.0 ** (3 - math.floor(math.log10(value)))
    digits = math.ceil(value * scale)
    return digits / scale if digits / scale >= value else (digits + 1) / scale


def _log_expm1(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def normal_cdf(x: float) -> float:
    return math.erfc(-x / _SQRT2) / 2


def _log_normal_cdf(x: float) -> float:
    """Returns the log of the normal CDF at x.

    Below -35, before the CDF underflows, the result is a lower bound from Mills' ratio.
    """
    if x > -35:
        return math.log(normal_cdf(x))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / (x * x))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
