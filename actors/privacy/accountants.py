"""Epsilon of Poisson-subsampled Gaussian steps: the only door to the numerical accountants.

    epsilon_after("prv", sigma=1.0, rate=0.01, steps=1000, delta=1e-5)      # 1.84
    tabulate("prv", 1.0, 0.01, 1e-5, limit_epsilon=8.0, max_steps=None)     # ((1, 0.21), ...)

Every value is an upper bound: the smaller of Renyi's (Mironov, Talwar and Zhang 2019,
arXiv:1908.10530) and, for `prv`, that of Gopi, Lee and Wutschitz 2021, arXiv:2106.02848, or,
for `pld`, that of Doroshenko et al. 2022, arXiv:2207.04380. Contracts without sampling need
none of this: see `tg_tinker.records.accounting`. Sigma is in units of the L2 bound of one example;
one example takes part in a step with probability `rate`, or is a null example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.records.accounting import (
    gaussian_epsilon,
    largest_count,
    rdp_epsilon,
    subsampled_gaussian_epsilon,
    subsampled_gaussian_rdp,
)

Curve = Callable[[int], float]
"""Steps -> epsilon; infinite where the accountant has no answer."""

MAX_STEPS = 1_000_000
"""Longest table."""

UNLIMITED_STEPS = 10_000
"""Length of a table that no budget ends."""

MAX_POINTS = 2**19
"""Largest grid of the prv accountant: a tenth of a second and 50 MB. Beyond, a wider mesh."""

EPSILON_ERROR = 0.01
"""What the prv accountant adds for its mesh, as in Opacus; at most `MAX_ERROR` on wide ones."""

MAX_ERROR = 0.2

PLD_MESH = 1e-3
"""Grid of the pld accountant: 0.05 % above the finest one."""

PLD_POINTS = 2**21
"""Its largest grid. Beyond, only Renyi's bound is left."""

MAX_REACH = 500.0
"""Largest privacy loss on a grid: its exponential must not overflow."""

_ORDERS = (
    *range(2, 17), 18, 20, 22, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 384, 512,
)  # fmt: skip


def epsilon_after(accountant: str, sigma: float, rate: float, steps: int, delta: float) -> float:
    """An upper bound of the epsilon that this many steps cost at this delta.

    Raises:
        InvalidRequestError: no such accountant, or `pld` without its optional package.
    """
    return _curve(accountant, sigma, rate, delta)(steps)


def tabulate(
    accountant: str, sigma: float, rate: float, delta: float, limit_epsilon: float,
    max_steps: int | None,
) -> tuple[tuple[int, float], ...]:  # fmt: skip
    """Rows (steps, epsilon), both rising; the last is the most steps within `limit_epsilon`.

    Every step up to 16, then 10 % more per row: who looks up a step between two rows takes the
    next one, which bounds it. Ends at `max_steps` where that comes first; empty if not even one
    step fits.

    Raises:
        InvalidRequestError: as `epsilon_after`.
    """
    curve = _curve(accountant, sigma, rate, delta)
    end = min(max_steps or (UNLIMITED_STEPS if math.isinf(limit_epsilon) else MAX_STEPS), MAX_STEPS)
    counts: list[int] = []
    for count in _grid(end):
        if curve(count) > limit_epsilon:
            counts += _last(curve, counts[-1] if counts else 0, count, limit_epsilon)
            break
        counts.append(count)
    return _rising([(count, curve(count)) for count in counts])


def _last(curve: Curve, fits: int, fails: int, limit: float) -> list[int]:
    """The most steps within a limit, if that is more than a number known to fit."""
    more = largest_count(lambda n: curve(fits + n) <= limit, fails - fits - 1)
    return [fits + more] if more else []


def _grid(end: int) -> list[int]:
    counts = [1]
    while counts[-1] < end:
        counts.append(min(end, counts[-1] + max(1, counts[-1] // 10 if counts[-1] > 15 else 1)))
    return counts


def _rising(rows: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A bound of more steps bounds fewer: numerical dents are filled from the right."""
    lowest, rising = math.inf, []
    for count, epsilon in reversed(rows):
        lowest = min(lowest, epsilon)
        rising.append((count, lowest))
    return tuple(reversed(rising))


# --- one curve per accountant ----------------------------------------------------------------


def _curve(accountant: str, sigma: float, rate: float, delta: float) -> Curve:
    """The accountant's epsilon by steps, remembered."""
    if rate >= 1:
        return lambda steps: gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    makers = {"prv": _prv, "rdp": _rdp, "moments": _rdp, "pld": _pld}
    if accountant not in makers:
        raise InvalidRequestError(f"no accountant {accountant!r}; known: {', '.join(makers)}")
    bounds = [make(sigma, rate, delta) for make in {_rdp, makers[accountant]}]
    floor = subsampled_gaussian_epsilon(sigma, rate, delta) * (1 - 1e-6)
    known: dict[int, float] = {}

    def curve(steps: int) -> float:
        if steps not in known:
            values = [bound(steps) for bound in bounds]
            # One step's epsilon is exact: a value below it is an accident of numbers, no bound.
            known[steps] = min([v for v in values if v >= floor], default=math.inf)
        return known[steps]

    return curve


def _rdp(sigma: float, rate: float, delta: float) -> Curve:
    return lambda steps: _renyi(sigma, rate, steps, delta)


def _renyi(sigma: float, rate: float, steps: int, delta: float) -> float:
    """The best bound over some orders and those near the best, small ones down to an eighth."""

    def bound(order: float) -> float:
        divergence = steps * _divergence(sigma, rate, order)
        return rdp_epsilon(divergence, order, delta) if 0 < divergence < math.inf else math.inf

    best: float = min(_ORDERS, key=bound)
    for part in (32, 16, 8, 4, 2, 1, 0.5, 0.25, 0.125):
        if part <= best / 4 and (part >= 1 or best <= 16):
            near = (best - part, best, best + part)
            best = min((order for order in near if order > 1), key=bound)
    return bound(best)


@lru_cache(maxsize=4096)
def _divergence(sigma: float, rate: float, order: float) -> float:
    """Of one step. Opacus has all real orders, ours are the whole ones, to the last digit."""
    if order == int(order):
        return subsampled_gaussian_rdp(sigma, rate, int(order))
    from opacus.accountants.analysis.rdp import compute_rdp

    return float(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=order))


def _prv(sigma: float, rate: float, delta: float) -> Curve:
    """Opacus' pieces, on one grid per power of four of steps."""
    import numpy as np
    from opacus.accountants.analysis.prv import compose_heterogeneous

    grids: dict[int, tuple[Any, float]] = {}

    def curve(steps: int) -> float:
        most = 4 ** -(-(steps - 1).bit_length() // 2)
        try:
            if most not in grids:
                grids[most] = _discretized(sigma, rate, delta, most)
            one, error = grids[most]
            with np.errstate(all="ignore"):
                composed = compose_heterogeneous([one], [steps])
                epsilon = float(composed.compute_epsilon(delta, delta / 1000, error)[2])
        except (ArithmeticError, ValueError, RuntimeError, MemoryError):
            return math.inf
        return epsilon if math.isfinite(epsilon) and epsilon > 0 else math.inf

    return curve


def _discretized(sigma: float, rate: float, delta: float, steps: int) -> tuple[Any, float]:
    """One step's privacy loss on a grid good for this many, and the error to add for its mesh.

    A grid that is good for many steps is so for fewer.

    Raises:
        ValueError: the grid would be too large or too coarse.
    """
    import numpy as np
    from opacus.accountants.analysis import prv
    from scipy.fft import next_fast_len

    reach, mesh = _reach(sigma, rate, delta / 1000, steps), _mesh(delta / 1000, steps)
    error = max(EPSILON_ERROR, 2 * reach / mesh / MAX_POINTS)
    if not (reach <= MAX_REACH and error <= MAX_ERROR):
        raise ValueError("the grid would be too large or too coarse")
    width = mesh * error
    half = next_fast_len(math.ceil(reach / width) + 1, real=True)
    domain = prv.Domain(-(half - 1) * width, half * width, 2 * half)
    loss = prv.PoissonSubsampledGaussianPRV(rate, sigma)
    with np.errstate(all="ignore"):
        cut = prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max)
        return prv.discretize(cut, domain), error


def _reach(sigma: float, rate: float, delta_error: float, steps: int) -> float:
    """Where to cut the privacy loss off (arXiv:2106.02848, remark 5.6), as Opacus does."""
    all_steps = _renyi(sigma, rate, steps, delta_error / 4)
    return 3 + max(all_steps, _renyi(sigma, rate, 1, delta_error / 8 / steps), EPSILON_ERROR)


def _mesh(delta_error: float, steps: int) -> float:
    """Width of a grid's cells per unit of error in epsilon (arXiv:2106.02848, Theorem 5.5)."""
    return 1 / math.sqrt(steps * math.log(12 / delta_error) / 2)


def _pld(sigma: float, rate: float, delta: float) -> Curve:
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError:
        raise InvalidRequestError(
            "accountant 'pld' needs Google's dp-accounting: pip install 'tg-tinker[pld]'"
        ) from None

    @lru_cache(maxsize=1)
    def one() -> Any:
        return pld.from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=PLD_MESH
        )

    def curve(steps: int) -> float:
        if not _renyi(sigma, rate, steps, 1e-15) < PLD_MESH * PLD_POINTS:
            return math.inf
        return float(one().self_compose(steps).get_epsilon_for_delta(delta))

    return curve
