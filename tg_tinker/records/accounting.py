"""Epsilon of Gaussian mechanisms in closed form: pure arithmetic, so that anyone can check it.

    >>> round(gaussian_epsilon(mu=1.0, delta=1e-5), 3)      # one use at sigma = 1
    4.377
    >>> round(gaussian_epsilon(mu=2**0.5, delta=1e-5), 3)   # two uses
    6.573

Throughout, sigma is the noise's standard deviation over the L2 bound C of one unit, and mu is
C times the square root of the uses over that standard deviation: k uses at sigma have
mu = sqrt(k) / sigma, and uses at several sigmas have mu^2 = the sum of 1 / sigma^2.
Numerical accountants (prv, pld) are in `actors.privacy.accountants`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

MAX_ORDER = 512
"""Largest Renyi order tried; larger ones matter for epsilons below 0.01 only."""

SIGMA_RANGE = (1e-4, 1e6)
"""Noise multipliers for which all of this is far from overflow and from rounding to nothing."""

_SQRT2 = math.sqrt(2.0)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The exact delta at which a Gaussian mechanism is (epsilon, delta)-private.

    Balle and Wang 2018, arXiv:1805.06530, Theorem 8.
    """
    if mu == 0:
        return 0.0
    near, far = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return max(0.0, _normal_cdf(near) - math.exp(epsilon + _log_normal_cdf(far)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon at this delta, rounded up in the twelfth digit; 0 for mu = 0."""
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if math.isinf(mu):
        return math.inf
    return _smallest(lambda epsilon: gaussian_delta(mu, epsilon) <= delta)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu that an (epsilon, delta) budget pays for, rounded down."""
    if math.isinf(epsilon):
        return math.inf
    return 1 / _smallest(lambda sigma: gaussian_delta(1 / sigma, epsilon) <= delta)


def subsampled_gaussian_epsilon(sigma: float, rate: float, delta: float) -> float:
    """The exact epsilon of one Gaussian step on a Poisson sample.

    Balle, Barthe and Gaboardi 2018, arXiv:1807.01647, Theorem 8. More steps cost at least this.
    """
    unsampled = gaussian_epsilon(1 / sigma, min(1.0, delta / rate))
    if unsampled > 700:  # rate * exp(unsampled), which would overflow
        return unsampled + math.log(rate)
    return math.log1p(rate * math.expm1(unsampled))


@lru_cache(maxsize=4096)
def subsampled_gaussian_rdp(sigma: float, rate: float, order: int) -> float:
    """Renyi divergence of one Gaussian step on a Poisson sample, at an integer order >= 2.

    Mironov, Talwar and Zhang 2019, arXiv:1908.10530, section 3.3. A unit takes part with
    probability `rate`; without it the step sees a null example in its place.
    """
    if rate >= 1:
        return order / (2 * sigma**2)
    # The sum of the plain binomial is 1 and taken out: what is left loses no digits.
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
    """Epsilon of a mechanism whose Renyi divergence at `order` is `rdp`.

    Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12.
    """
    if rdp == 0:
        return 0.0
    slack = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, rdp + slack)


def filter_order(epsilon: float, delta: float) -> int:
    """The order at which a Renyi filter lets a budget pay for the most Gaussian noise."""
    reference = min(epsilon, 1e3)

    def paid(order: int) -> float:  # mu^2 that fits
        return 2 * (reference - rdp_epsilon(1e-300, order, delta)) / order

    return max(range(2, MAX_ORDER + 1), key=paid)


def largest_count(fits: Callable[[int], bool], limit: int = 10_000_000) -> int:
    """The largest n for which a monotone test holds, 0 if it fails at 1, at most `limit`."""
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
    """The smallest noise multiplier for which a monotone test holds, rounded up to 4 digits.

    Infinite if the test holds for none.
    """
    raw = _smallest(fits, relative=1e-4)
    return raw if math.isinf(raw) else _rounded_up(raw)


def _smallest(holds: Callable[[float], bool], relative: float = 1e-12) -> float:
    """The smallest positive number for which a monotone test holds, from above."""
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


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / _SQRT2) / 2


def _log_normal_cdf(x: float) -> float:
    """Also where the value itself underflows: Mills' ratio bounds it from below there."""
    if x > -35:
        return math.log(_normal_cdf(x))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / (x * x))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
