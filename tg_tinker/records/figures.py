"""Computes what the spent budget of a dataset means at other deltas, and for several units at once.

    curve(ledger)         # epsilon at five deltas
    groups(ledger)        # epsilon of 1, 2, 4 and 8 units together
    gaussian_mu2(ledger)  # None unless the whole ledger is one Gaussian mechanism
    noise_tail(ledger)    # the delta that the bounded range of the noise adds

Each figure names how it was computed: it is exact, or an upper bound. All of them describe what was
spent, so they hold under the conditions under which `Ledger.epsilon` holds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tg_tinker.records.accounting import (
    MAX_ORDER,
    gaussian_epsilon,
    normal_cdf,
    rdp_epsilon,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.ledger import Account, Ledger

EXACT = "exact"
ACCOUNTANT = "upper bound: the run's own accountant"
RENYI = "upper bound: Renyi divergence"
FILTER = "upper bound: Renyi filter at the registered order"
MIXTURE = "upper bound: Renyi divergence of a group's Poisson sample"
LEMMA = "upper bound: group lemma, which raises delta too"

GROUPS = (1, 2, 4, 8)

OLD_RANGE = 8.57
"""The largest value of the noise of earlier releases."""

_ORDERS = (*range(2, 64), *range(64, MAX_ORDER + 1, 16))
_FRACTIONS = (1.05, 1.1, 1.2, 1.3, 1.5, 1.75)
_MOST_GROUP_ORDER = 64
_LEAST_SAMPLED_SIGMA = 0.3
_REACH = 16.0
_LOG_BEYOND = math.log(math.erfc(_REACH / math.sqrt(2)))
_ROUNDING = 1e-13
"""Added to each divergence of a group: more than float64 loses in it."""


@dataclass(frozen=True)
class Figure:
    """An (epsilon, delta) of so many units together; infinite where nothing is guaranteed."""

    units: int
    epsilon: float
    delta: float
    how: str


def curve(ledger: Ledger) -> list[Figure]:
    """Returns epsilon of one unit at five deltas, one of them the registered delta.

    A smaller delta always has the larger epsilon.
    """
    exponents = (2, 1, 0, -1, -2) if 100 * ledger.delta < 1 else (0, -1, -2, -3, -4)
    return [_at(ledger, power) for power in exponents]


def groups(ledger: Ledger) -> list[Figure]:
    """Returns epsilon of 1, 2, 4 and 8 units together.

    Under Gaussian contracts m units together have m times the mu of one: exact. A single run under
    Poisson sampling has the Renyi divergence of the sample of a group. All other ledgers have only
    the lemma of group privacy: epsilon grows by m, and delta by (e^(m eps) - 1) / (e^eps - 1)
    (Dwork and Roth 2014, section 2.3; Vadhan 2017, lemma 2.2).
    """
    return [_of_group(ledger, units) for units in GROUPS]


def gaussian_mu2(ledger: Ledger) -> float | None:
    """Returns mu^2 of everything released, or None if it is no single Gaussian mechanism."""
    mu2, sampled = ledger.released
    return None if sampled or ledger.unnoised else mu2


def noise_tail(ledger: Ledger) -> float:
    """Returns an upper bound of the delta that the bounded range of the noise adds.

    The noise of earlier releases never exceeded 8.57 sigma. An outcome that lies beyond this range
    for one dataset, and within it for the neighbor, tells them apart. Runs that state a
    `noise_range` have noise without such an end (`actors.privacy.noise`).
    """
    tails = [
        (account.count if account.contract == "participation" else account.steps)
        * _beyond(account.sigma)
        for account in ledger.accounts.values()
        if "noise_range" not in account.facts
    ]
    return min(1.0, math.fsum(tails))


def _beyond(sigma: float) -> float:
    """Returns an upper bound of the probability that one release has noise beyond the old range,
    seen from the neighbor.

    For a unit that shifts k values by 1 / (sigma sqrt(k)) each, it is at most k times that of one
    value. Any other shift of length 1 / sigma has at most twice the greatest of these, and powers
    of 2 miss at most another factor of 2. Nobody trains more than 2^40 values.
    """
    end = -OLD_RANGE
    counts = (2.0**power for power in range(41))
    most = max(k * (normal_cdf(end + 1 / sigma / math.sqrt(k)) - normal_cdf(end)) for k in counts)
    return min(1.0, 4 * most)


def _at(ledger: Ledger, power: int) -> Figure:
    """Returns epsilon of one unit at the registered delta times a power of ten."""
    mu2, alone = gaussian_mu2(ledger), _only_run(ledger)
    if power == 0:
        how = EXACT if mu2 is not None else FILTER if alone is None else ACCOUNTANT
        return Figure(1, ledger.epsilon, ledger.delta, how)
    delta = float(f"{ledger.delta * 10.0**power:.12g}")
    if mu2 is not None:
        return Figure(1, gaussian_epsilon(math.sqrt(mu2), delta), delta, EXACT)
    epsilon = _filtered(ledger, delta)
    if alone is not None:
        epsilon = min(epsilon, _alone(alone, delta))
    # What holds at the registered delta holds at every larger delta too.
    if power > 0:
        epsilon = min(epsilon, ledger.epsilon)
    return Figure(1, epsilon, delta, FILTER if alone is None else RENYI)


def _only_run(ledger: Ledger) -> Account | None:
    """Returns the account of the only run that released anything, if it has Poisson samples."""
    mu2, sampled = ledger.released
    return sampled[0] if len(sampled) == 1 and not mu2 and not ledger.unnoised else None


def _filtered(ledger: Ledger, delta: float) -> float:
    """Returns epsilon of the Renyi filter, at the order that was fixed at registration."""
    if ledger.unnoised:
        return math.inf
    order, (mu2, sampled) = int(ledger.registered["order"]), ledger.released
    steps = (
        account.count * subsampled_gaussian_rdp(account.sigma, account.rate, order)
        for account in sampled
    )
    return rdp_epsilon(order * mu2 / 2 + math.fsum(steps), order, delta)


def _alone(account: Account, delta: float) -> float:
    """Returns epsilon of a single run under Poisson sampling, at the best of the Renyi orders.

    Its noise and rate were fixed before its first step, so every order holds at the same time.
    """
    sigma, rate = account.sigma, account.rate
    larger = ((order, subsampled_gaussian_rdp(sigma, rate, order)) for order in _ORDERS)
    return min(
        rdp_epsilon(account.count * rdp, order, delta)
        for order, rdp in (*group_rdp(sigma, rate, 1), *larger)
    )


def _of_group(ledger: Ledger, units: int) -> Figure:
    if units == 1:
        return _at(ledger, 0)
    delta = ledger.delta
    if (mu2 := gaussian_mu2(ledger)) is not None:
        return Figure(units, gaussian_epsilon(units * math.sqrt(mu2), delta), delta, EXACT)
    if (account := _only_run(ledger)) is not None:
        epsilon = min(
            rdp_epsilon(account.count * rdp, order, delta)
            for order, rdp in group_rdp(account.sigma, account.rate, units)
        )
        return Figure(units, epsilon, delta, MIXTURE)
    return _by_lemma(units, ledger.epsilon, delta)


def _by_lemma(units: int, epsilon: float, delta: float) -> Figure:
    if epsilon == 0:
        return Figure(units, 0.0, min(1.0, units * delta), LEMMA)
    if units * epsilon > 700:  # e^(m eps) would overflow, and no useful delta is left
        return Figure(units, math.inf, delta, LEMMA)
    raised = delta * math.expm1(units * epsilon) / math.expm1(epsilon)
    if raised >= 1:
        return Figure(units, math.inf, delta, LEMMA)
    return Figure(units, units * epsilon, raised, LEMMA)


@lru_cache(maxsize=64)
def group_rdp(sigma: float, rate: float, units: int) -> tuple[tuple[float, float], ...]:
    """Returns (order, Renyi divergence) of one Gaussian step on a Poisson sample, for a group.

    K of the `units` members are drawn, K ~ Bin(units, rate), and shift the sum by at most K. Among
    all such shifts, whatever their directions, K along a single axis has the largest divergence in
    both directions: the likelihood ratio is a sum of p_S exp(X_S - Var X_S / 2) over the drawn
    sets S, its divergences are expectations of convex functions, and these grow with each
    covariance of the X_S (Kahane 1985, Sur le chaos multiplicatif). The pair of mixtures is that of
    Ganesh 2024, arXiv:2401.10294. The larger of the two directions counts.
    """
    orders = (*_FRACTIONS, *range(2, _MOST_GROUP_ORDER + 1))
    # Without sampling the group takes part in every step. Sampling only lowers this.
    unsampled = (units / sigma) ** 2 / 2
    if rate >= 1 or sigma < _LEAST_SAMPLED_SIGMA:
        return tuple((order, order * unsampled) for order in orders)
    logs = [
        math.log(math.comb(units, k)) + k * math.log(rate) + (units - k) * math.log1p(-rate)
        - (k / sigma) ** 2 / 2
        for k in range(units + 1)
    ]  # fmt: skip
    ratio = _Ratio(logs, sigma)
    whole = zip(orders[len(_FRACTIONS) :], _whole_moments(logs, sigma), strict=False)
    moments = [*((order, ratio.log_moment(order)) for order in _FRACTIONS), *whole]
    sampled = (
        (order, max(0.0, removing, ratio.log_moment(1 - order)) / (order - 1) + _ROUNDING)
        for order, removing in moments
    )
    return tuple((order, min(rdp, order * unsampled)) for order, rdp in sampled)


def _whole_moments(logs: Sequence[float], sigma: float) -> Iterator[float]:
    """Yields log E[L^order] for the orders from 2; L is the likelihood ratio under pure noise.

    L^order is a sum over `order` independent draws of K. Draws that add up to s contribute
    exp(s^2 / (2 sigma^2)).
    """
    total = list(logs)
    while True:
        longer = [-math.inf] * (len(total) + len(logs) - 1)
        for i, one in enumerate(total):
            for k, other in enumerate(logs):
                longer[i + k] = _log_add(longer[i + k], one + other)
        total = longer
        yield _log_sum([one + (s / sigma) ** 2 / 2 for s, one in enumerate(total)])


class _Ratio:
    """The likelihood ratio L of a group's sample, at the points of a grid for integrals over noise.

    The trapezoid rule is nearly exact here. For imaginary parts up to a = pi sigma / 4m, the terms
    of L keep within pi / 4 of one direction. So L is analytic without zeros, |L| is at most L at
    the real part, and at least cos(pi / 4) times it. With 60 / 2 pi points for each a, the error
    relative to the integral is below e^-60 x e^(a^2 / 2) x 2^(order / 2): less than float64 rounds.

    Args:
        logs: log p_k - k^2 / (2 sigma^2) for each k. For noise z of variance 1, L(z) is the sum of
            exp(logs[k] + k z / sigma).
    """

    def __init__(self, logs: Sequence[float], sigma: float) -> None:
        self._least, self._most = logs[0], (len(logs) - 1) / sigma
        step = 2 * math.pi * min(3.0, math.pi / (4 * self._most)) / 60
        first, last = math.floor(-_REACH / step), math.ceil((2 * self._most + _REACH) / step)
        self._grid = [number * step for number in range(first, last + 1)]
        self._logs = [_log_sum([one + k * z / sigma for k, one in enumerate(logs)])
                      for z in self._grid]  # fmt: skip
        self._scale = math.log(step) - math.log(2 * math.pi) / 2

    def log_moment(self, power: float) -> float:
        """Returns an upper bound of log E[L^power] for a power below 2, which may be negative."""
        # L is at most 1 on the left of 0, at least exp(least) everywhere, and at most
        # exp(z most - most^2 / 2) on the right of `most`.
        if power > 0:
            stop, tail = len(self._grid), power * (power - 1) * self._most**2 / 2
        else:
            stop, tail = bisect_right(self._grid, _REACH), power * self._least
        terms = [
            power * log - z * z / 2
            for z, log in zip(self._grid[:stop], self._logs[:stop], strict=True)
        ]
        return _log_add(self._scale + _log_sum(terms), max(0.0, tail) + _LOG_BEYOND)


def _log_sum(logs: Sequence[float]) -> float:
    peak = max(logs)
    return peak + math.log(math.fsum(math.exp(one - peak) for one in logs))


def _log_add(a: float, b: float) -> float:
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
