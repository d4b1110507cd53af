"""Tests the arithmetic of epsilon against closed forms, brute-force integrals and Opacus."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.privacy import accountants
from actors.privacy.accountants import epsilon_after, tabulate
from tg_tinker.errors import InvalidRequestError
from tg_tinker.records import accounting
from tg_tinker.records.accounting import (
    filter_order,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    largest_count,
    rdp_epsilon,
    smallest_sigma,
    subsampled_gaussian_epsilon,
    subsampled_gaussian_rdp,
)

MUS = st.floats(0.01, 50.0)
EPSILONS = st.floats(0.01, 200.0)
DELTAS = st.floats(1e-10, 1e-2)


def density(x: float, mean: float = 0.0) -> float:
    return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)


def integral(function: Callable[[float], float]) -> float:
    """Returns the integral over the range that matters for a unit normal around 0 and another
    nearby."""
    width = 1e-3
    return width * math.fsum(function(i * width) for i in range(-12_000, 16_000))


def hockey_stick(mu: float, epsilon: float, rate: float = 1.0) -> float:
    """Returns the delta of a (sampled) Gaussian, straight from its definition."""
    tilt = math.exp(epsilon)

    def excess(x: float) -> float:
        mixed = rate * density(x, mu) + (1 - rate) * density(x)
        return max(0.0, mixed - tilt * density(x))

    return integral(excess)


# --- without sampling ------------------------------------------------------------------------


def test_examples_of_the_module() -> None:
    assert doctest.testmod(accounting).attempted >= 2
    assert doctest.testmod(accounting).failed == 0


@pytest.mark.parametrize(
    ("sigma", "uses", "epsilon"),
    [(20, 100, 1.993), (1, 1, 4.377), (1, 2, 6.573), (1, 3, 8.385), (2, 1, 2.0), (2, 3, 3.7)],
)
def test_epsilon_of_so_many_uses(sigma: float, uses: int, epsilon: float) -> None:
    ours = gaussian_epsilon(math.sqrt(uses) / sigma, 1e-5)
    assert ours == pytest.approx(epsilon, abs=0.06 if sigma == 2 else 0.005)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_delta_is_the_hockey_stick_divergence(mu: float, epsilon: float) -> None:
    assert gaussian_delta(mu, epsilon) == pytest.approx(hockey_stick(mu, epsilon), rel=1e-5, abs=0)


@given(MUS, DELTAS)
def test_epsilon_is_enough_and_a_little_less_is_not(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, epsilon) <= delta
    assert epsilon == 0 or gaussian_delta(mu, epsilon * (1 - 1e-6) - 1e-9) > delta


@given(EPSILONS, DELTAS)
def test_mu_is_paid_for_and_a_little_more_is_not(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_epsilon(mu, delta) <= epsilon * (1 + 1e-9)
    assert gaussian_epsilon(mu * (1 + 1e-6), delta) > epsilon


@given(MUS, st.floats(1.001, 3.0), DELTAS)
def test_epsilon_rises_with_mu_and_falls_with_delta(mu: float, more: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_epsilon(mu * more, delta) >= epsilon
    assert gaussian_epsilon(mu, delta * more) <= epsilon
    assert epsilon == 0 or gaussian_epsilon(mu * more, delta) > epsilon


def test_ends_of_the_range() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(1e-9, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_epsilon(1e9, 1e-5) == math.inf  # beyond what is looked for: never less
    assert gaussian_mu(math.inf, 1e-5) == math.inf
    # Deep in the tail delta underflows; what is left of it must not become negative.
    assert 0 <= gaussian_delta(1.0, 800.0) < 1e-300
    assert gaussian_epsilon(1e4, 1e-5) == pytest.approx(5e7 + 4.2649e4, rel=1e-6)


# --- one sampled step ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3, 8, 32, 63])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.5, 0.2), (4.0, 0.5), (1.0, 1.0)])
def test_renyi_divergence_is_that_of_opacus(order: int, sigma: float, rate: float) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    theirs = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])
    ours = subsampled_gaussian_rdp(sigma, rate, order)
    assert ours == pytest.approx(float(theirs[0]), rel=1e-9)
    spent, _ = get_privacy_spent(orders=[order], rdp=50 * theirs, delta=1e-5)
    assert rdp_epsilon(50 * ours, order, 1e-5) == pytest.approx(float(spent), rel=1e-9)


def test_renyi_divergence_is_its_integral() -> None:
    def powered(x: float) -> float:
        return density(x) * (0.7 + 0.3 * density(x, 1.0) / density(x)) ** 4

    expected = math.log(integral(powered)) / 3
    assert subsampled_gaussian_rdp(1.0, 0.3, 4) == pytest.approx(expected, rel=1e-8)


def test_rare_units_are_not_free() -> None:
    # q^2 (e - 1) at order 2: a sum that loses its digits would give 0, and a free budget.
    tiny = subsampled_gaussian_rdp(1.0, 1e-9, 2)
    assert tiny == pytest.approx(1e-18 * math.expm1(1), rel=1e-9, abs=0)


@given(st.floats(0.3, 20), st.floats(1e-5, 0.9), st.integers(2, 100), st.floats(1.01, 2))
def test_divergence_rises_with_rate_and_order(
    sigma: float, rate: float, order: int, more: float
) -> None:
    at = subsampled_gaussian_rdp(sigma, rate, order)
    assert subsampled_gaussian_rdp(sigma, min(1.0, rate * more), order) > at
    assert subsampled_gaussian_rdp(sigma, rate, order + 1) >= at * (1 - 1e-12)
    assert subsampled_gaussian_rdp(sigma * more, rate, order) < at


@given(MUS, DELTAS, st.integers(2, 512))
def test_renyi_never_promises_more_than_the_exact_gaussian(
    mu: float, delta: float, order: int
) -> None:
    assert rdp_epsilon(order * mu**2 / 2, order, delta) >= gaussian_epsilon(mu, delta) * (1 - 1e-9)


@pytest.mark.parametrize(("sigma", "rate", "delta"), [(1.0, 0.1, 1e-3), (0.5, 0.01, 1e-4)])
def test_one_sampled_step_is_exact(sigma: float, rate: float, delta: float) -> None:
    epsilon = subsampled_gaussian_epsilon(sigma, rate, delta)
    assert hockey_stick(1 / sigma, epsilon, rate) == pytest.approx(delta, rel=1e-4)
    assert subsampled_gaussian_epsilon(sigma, 1.0, delta) == gaussian_epsilon(1 / sigma, delta)


def test_one_sampled_step_at_the_ends() -> None:
    assert subsampled_gaussian_epsilon(1.0, 1e-6, 1e-5) == 0.0  # rarer than delta
    unsampled = gaussian_epsilon(100.0, 1e-3)
    almost = subsampled_gaussian_epsilon(0.01, 0.01, 1e-5)
    assert almost == pytest.approx(unsampled + math.log(0.01), rel=1e-9)


# --- searches --------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_largest_count_never_passes_what_fits(fits: int, limit: int) -> None:
    asked: list[int] = []
    found = largest_count(lambda n: asked.append(n) or n <= fits, limit)  # type: ignore[func-returns-value]
    assert found == min(fits, limit)
    assert len(asked) <= 26


@given(st.floats(1e-4, 1e4))
def test_smallest_sigma_is_enough_and_tight(threshold: float) -> None:
    sigma = smallest_sigma(lambda s: s >= threshold)
    assert threshold <= sigma <= threshold * 1.0012
    assert float(f"{sigma:.4g}") == sigma


def test_no_sigma_is_enough() -> None:
    assert smallest_sigma(lambda sigma: False) == math.inf


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0])
def test_filter_order_lets_a_budget_pay_for_the_most(epsilon: float) -> None:
    def uses(order: int) -> int:
        return largest_count(lambda n: rdp_epsilon(order * n / 2e8, order, 1e-5) <= epsilon, 10**11)

    best = filter_order(epsilon, 1e-5)
    assert 2 <= best <= accounting.MAX_ORDER
    assert all(uses(best) >= uses(order) for order in range(2, 513, 3))


# --- sampled steps: numerical accountants -----------------------------------------------------


@pytest.mark.parametrize(
    ("accountant", "sigma", "rate", "steps", "delta", "epsilon"),
    [
        ("rdp", 1.0, 0.01, 1000, 1e-5, 2.101),
        ("moments", 1.0, 0.01, 1000, 1e-5, 2.101),
        ("rdp", 1.0, 0.0625, 100, 1e-5, 4.991),
        ("rdp", 0.6, 0.001, 5000, 1e-6, 3.627),
        ("rdp", 1.0, 0.01, 1, 1e-5, 0.956),
        ("prv", 1.0, 0.01, 1000, 1e-5, 1.828),
        ("prv", 1.0, 0.0625, 100, 1e-5, 4.377),
        ("prv", 0.6, 0.001, 5000, 1e-6, 2.749),
        ("prv", 1.0, 0.01, 1, 1e-5, 0.1995),
        ("prv", 20.0, 1.0, 100, 1e-5, 1.993),
        ("rdp", 20.0, 1.0, 100, 1e-5, 1.993),
    ],
)
def test_published_values(
    accountant: str, sigma: float, rate: float, steps: int, delta: float, epsilon: float
) -> None:
    ours = epsilon_after(accountant, sigma, rate, steps, delta)
    assert ours == pytest.approx(epsilon, rel=0.008)
    assert ours >= subsampled_gaussian_epsilon(sigma, rate, delta) * (1 - 1e-6)


def test_an_accountant_that_does_not_exist() -> None:
    with pytest.raises(InvalidRequestError, match="no accountant 'gdp'"):
        epsilon_after("gdp", 1.0, 0.01, 10, 1e-5)


# --- tables ----------------------------------------------------------------------------------


def test_table_ends_with_the_most_steps_that_fit() -> None:
    table = tabulate("rdp", 1.0, 0.05, 1e-5, 8.0, None)
    steps, epsilon = table[-1]
    assert epsilon <= 8.0 < epsilon_after("rdp", 1.0, 0.05, steps + 1, 1e-5)
    assert epsilon == epsilon_after("rdp", 1.0, 0.05, steps, 1e-5)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.7, 3.0), st.floats(1e-3, 0.3), st.floats(0.5, 10.0), st.integers(1, 400))
def test_table_rises_and_bounds_what_lies_between(
    sigma: float, rate: float, limit: float, most: int
) -> None:
    table = tabulate("rdp", sigma, rate, 1e-5, limit, most)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(table))
    assert all(b[0] <= a[0] + max(1, a[0] // 10) for a, b in pairwise(table))
    assert all(epsilon <= limit for _, epsilon in table)
    assert not table or table[-1][0] <= most
    for (before, _), (_, epsilon) in pairwise(table):
        assert epsilon_after("rdp", sigma, rate, before + 1, 1e-5) <= epsilon


def test_a_step_more_is_never_cheaper() -> None:
    # A search over orders that starts anew for each count found 0.518 here, and 0.501 one later.
    bounds = [epsilon_after("rdp", 1.09375, 0.001, steps, 1e-5) for steps in range(1, 400)]
    assert bounds == sorted(bounds)
    assert bounds[23] < bounds[24] < 0.505


def test_prv_table() -> None:
    table = tabulate("prv", 0.43, 0.0173, 1e-5, 8.0, None)
    last = table[-1][0]
    assert [steps for steps, _ in table] == list(range(1, last + 1))
    assert table[-1][1] <= 8.0 < epsilon_after("prv", 0.43, 0.0173, last + 1, 1e-5)
    assert len(table) > 3 * len(tabulate("rdp", 0.43, 0.0173, 1e-5, 8.0, None))


def test_dents_are_filled_from_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {1: 1.0, 2: 1.4, 3: 1.2, 4: 1.3, 5: 2.5}
    monkeypatch.setattr(accountants, "_curve", lambda *_: values.__getitem__)
    expected = ((1, 1.0), (2, 1.2), (3, 1.2), (4, 1.3))
    assert tabulate("prv", 1.0, 0.1, 1e-5, 2.0, 5) == expected


def test_ends_of_a_table() -> None:
    assert tabulate("rdp", 0.3, 0.1, 1e-5, 1.0, None) == ()
    assert tabulate("rdp", 5.0, 0.01, 1e-5, 8.0, 40)[-1][0] == 40
    assert tabulate("rdp", 5.0, 0.01, 1e-5, math.inf, None)[-1][0] == 10_000
    assert tabulate("rdp", 5.0, 0.01, 1e-5, math.inf, 7)[-1][0] == 7
    assert tabulate("rdp", 1000.0, 1e-4, 1e-5, 8.0, None)[-1][0] == 1_000_000
    assert tabulate("rdp", 20.0, 1.0, 1e-5, 1.9931, None)[-1][0] == 100  # nothing is sampled
