"""Computes the epsilon of Poisson-subsampled Gaussian steps.

    epsilon_after("prv", sigma=1.0, rate=0.01, steps=1000, delta=1e-5)      # 1.83
    tabulate("prv", 1.0, 0.01, 1e-5, limit_epsilon=8.0, max_steps=None)     # ((1, 0.20), ...)

Every value is an upper bound, at every delta. Sigma is in units of the L2 bound of one example. In
each step an example takes part with probability `rate`; otherwise a null example takes its place.

- `rdp` (also `moments`) is the Renyi bound of Mironov, Talwar and Zhang 2019, arXiv:1908.10530,
  converted by Canonne, Kamath and Steinke 2020, arXiv:2004.00010. See `renyi`.
- `prv` and `pld` are two names of one accountant. It composes the distribution of the privacy loss
  numerically, in both directions of the neighbors, and takes the larger epsilon, but never more
  than the Renyi bound. An untilted transform (as in Gopi, Lee and Wutschitz 2021, arXiv:2106.02848)
  has a rounding error near 1e-13, which a small delta does not exceed. This one is tilted, so that
  its error is relative to delta, and the error is added. `composition` gives the proof.

Contracts without sampling need no numerical accountant: see `tg_tinker.records.accounting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from actors.privacy.composition import COARSE, FINE, composed_epsilon
from actors.privacy.renyi import ADD, REMOVE, moments
from tg_tinker.errors import InvalidRequestError
from tg_tinker.records.accounting import gaussian_epsilon, largest_count

Curve = Callable[[int], float]
"""Maps steps to epsilon."""

MAX_STEPS = 1_000_000
"""The largest number of steps in a table."""

UNLIMITED_STEPS = 10_000
"""The number of steps in a table that neither a budget nor `max_steps` limits."""


def epsilon_after(accountant: str, sigma: float, rate: float, steps: int, delta: float) -> float:
    """Returns an upper bound on the epsilon that this many steps cost at this delta.

    Raises:
        InvalidRequestError: the accountant is unknown.
    """
    return _curve(accountant, sigma, rate, delta)(steps)


def tabulate(
    accountant: str, sigma: float, rate: float, delta: float, limit_epsilon: float,
    max_steps: int | None,
) -> tuple[tuple[int, float], ...]:  # fmt: skip
    """Returns rows (steps, epsilon) in which steps rise and epsilon never falls.

    The table has a row for each step up to 16, then rows about 10 % apart. For a step between two
    rows, read the next row: its epsilon is an upper bound. The last row has the largest number of
    steps within `limit_epsilon`, or `max_steps` if that is smaller. The table is empty if not even
    one step fits.

    Raises:
        InvalidRequestError: see `epsilon_after`.
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
    """Returns the largest number of steps within `limit`, or nothing if that number is `fits`."""
    more = largest_count(lambda n: curve(fits + n) <= limit, fails - fits - 1)
    return [fits + more] if more else []


def _grid(end: int) -> list[int]:
    counts = [1]
    while counts[-1] < end:
        counts.append(min(end, counts[-1] + max(1, counts[-1] // 10 if counts[-1] > 15 else 1)))
    return counts


def _rising(rows: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Returns the rows with epsilons that never fall.

    A bound on more steps is also a bound on fewer steps. So where a numerical error makes a later
    epsilon smaller, the rows before it take the smaller epsilon.
    """
    lowest, rising = math.inf, []
    for count, epsilon in reversed(rows):
        lowest = min(lowest, epsilon)
        rising.append((count, lowest))
    return tuple(reversed(rising))


# --- one curve per accountant ----------------------------------------------------------------


def _curve(accountant: str, sigma: float, rate: float, delta: float) -> Curve:
    """Returns the accountant's epsilon as a function of steps, which remembers its values."""
    if rate >= 1:
        return lambda steps: gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    bounds = {"prv": _composed, "pld": _composed, "rdp": _renyi, "moments": _renyi}
    if accountant not in bounds:
        raise InvalidRequestError(f"no accountant {accountant!r}; known: {', '.join(bounds)}")
    bound = bounds[accountant]
    known: dict[int, float] = {}

    def curve(steps: int) -> float:
        if steps not in known:
            known[steps] = bound(sigma, rate, steps, delta)
        return known[steps]

    return curve


def _renyi(sigma: float, rate: float, steps: int, delta: float) -> float:
    return moments(sigma, rate, REMOVE).epsilon(steps, delta)


def _composed(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Returns the larger epsilon of the two directions, and at most the Renyi bound of both.

    Neither direction is known to be the worse one for every number of steps. To show that the
    second is not, its Renyi bound or a coarse mesh is often enough.
    """
    epsilon = _one_direction(sigma, rate, REMOVE, steps, delta)
    if moments(sigma, rate, ADD).epsilon(steps, delta) > epsilon:
        for looseness in (COARSE, FINE):
            other = _one_direction(sigma, rate, ADD, steps, delta, looseness)
            if other <= epsilon:
                break
        epsilon = max(epsilon, other)
    return min(epsilon, _renyi(sigma, rate, steps, delta))


def _one_direction(
    sigma: float, rate: float, direction: int, steps: int, delta: float, looseness: float = FINE
) -> float:
    # At the best order of the Renyi bound, large losses of single steps may begin to outweigh all
    # others. A smaller tilt keeps away from them.
    loss = moments(sigma, rate, direction)
    tilt = 0.75 * loss.best_tilt(steps, delta)
    composed = composed_epsilon(
        sigma, rate, direction, tilt=tilt, steps=steps, delta=delta, looseness=looseness
    )
    return min(loss.epsilon(steps, delta), composed)
