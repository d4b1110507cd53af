"""Computes the epsilon of Poisson-subsampled Gaussian steps.

No other module imports the numerical accountants.

    epsilon_after("prv", sigma=1.0, rate=0.01, steps=1000, delta=1e-5)      # 1.84
    tabulate("prv", 1.0, 0.01, 1e-5, limit_epsilon=8.0, max_steps=None)     # ((1, 0.21), ...)

Every value is an upper bound, except that those of `prv` and `pld` can be too small at a delta of
1e-12 or below. The value is the Renyi bound (Mironov, Talwar and Zhang 2019,
arXiv:1908.10530) or a second bound, whichever is smaller. For `prv` the second bound is that of
Gopi, Lee and Wutschitz 2021, arXiv:2106.02848; for `pld` it is that of Doroshenko et al. 2022,
arXiv:2207.04380. Contracts without sampling need no numerical accountant: see
`tg_tinker.records.accounting`. Sigma is in units of the L2 bound of one example. In each step an
example takes part with probability `rate`; otherwise a null example takes its place.
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
"""Maps steps to epsilon; the epsilon is infinite where the accountant has no answer."""

MAX_STEPS = 1_000_000
"""The largest number of steps in a table."""

UNLIMITED_STEPS = 10_000
"""The number of steps in a table that neither a budget nor `max_steps` limits."""

MAX_POINTS = 2**19
"""Points of the largest grid of the prv accountant: 0.1 seconds and 50 MB.

Where more points are needed, the mesh is wider.
"""

EPSILON_ERROR = 0.01
"""The error in epsilon that the prv accountant adds for its mesh, as Opacus does.

On wider meshes the error is larger, up to `MAX_ERROR`.
"""

MAX_ERROR = 0.2

PLD_MESH = 1e-3
"""Cell width of the pld accountant's grid: epsilon is 0.05 % above that of the finest grid."""

PLD_POINTS = 2**21
"""Points of the largest grid of the pld accountant.

Where more points are needed, only the Renyi bound remains.
"""

MAX_REACH = 500.0
"""The largest privacy loss on a grid: the exponential of the loss must not overflow."""

_ORDERS = (
    *range(2, 17), 18, 20, 22, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 384, 512,
)  # fmt: skip


def epsilon_after(accountant: str, sigma: float, rate: float, steps: int, delta: float) -> float:
    """Returns an upper bound on the epsilon that this many steps cost at this delta; see the module
    for tiny deltas.

    Raises:
        InvalidRequestError: the accountant is unknown, or it is `pld` and its optional package is
            not installed.
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
    makers = {"prv": _prv, "rdp": _rdp, "moments": _rdp, "pld": _pld}
    if accountant not in makers:
        raise InvalidRequestError(f"no accountant {accountant!r}; known: {', '.join(makers)}")
    bounds = [make(sigma, rate, delta) for make in {_rdp, makers[accountant]}]
    floor = subsampled_gaussian_epsilon(sigma, rate, delta) * (1 - 1e-6)
    known: dict[int, float] = {}

    def curve(steps: int) -> float:
        if steps not in known:
            values = [bound(steps) for bound in bounds]
            # `floor` is the exact epsilon of one step. A value below it is a numerical error.
            known[steps] = min([v for v in values if v >= floor], default=math.inf)
        return known[steps]

    return curve


def _rdp(sigma: float, rate: float, delta: float) -> Curve:
    return lambda steps: _renyi(sigma, rate, steps, delta)


def _renyi(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Returns the smallest bound over `_ORDERS` and over orders near the best of them.

    The search refines small orders in steps down to 1/8.
    """

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
    """Returns the Renyi divergence of one step.

    Opacus computes real orders. `subsampled_gaussian_rdp` computes whole orders to the last digit.
    """
    if order == int(order):
        return subsampled_gaussian_rdp(sigma, rate, int(order))
    from opacus.accountants.analysis.rdp import compute_rdp

    return float(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=order))


def _prv(sigma: float, rate: float, delta: float) -> Curve:
    """Returns the prv curve, made of the parts of Opacus, with one grid per power of four steps."""
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
    """Returns the privacy loss of one step on a grid, and the error to add for the mesh.

    The grid is fine enough for this many steps, and so for fewer steps.

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
    """Returns where to truncate the privacy loss (arXiv:2106.02848, remark 5.6), as Opacus does."""
    all_steps = _renyi(sigma, rate, steps, delta_error / 4)
    return 3 + max(all_steps, _renyi(sigma, rate, 1, delta_error / 8 / steps), EPSILON_ERROR)


def _mesh(delta_error: float, steps: int) -> float:
    """Returns the cell width per unit of error in epsilon (arXiv:2106.02848, Theorem 5.5)."""
    return 1 / math.sqrt(steps * math.log(12 / delta_error) / 2)


def _pld(sigma: float, rate: float, delta: float) -> Curve:
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError:
        raise InvalidRequestError(
            "accountant 'pld' needs Google's dp-accounting: install the extra 'pld' (in a clone:"
            " pip install -e '.[pld]')"
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
