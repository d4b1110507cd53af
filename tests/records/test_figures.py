"""Tests what a spent budget means at other deltas and for groups, against integrals and published
values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.records.accounting import (
    gaussian_delta,
    gaussian_epsilon,
    normal_cdf,
    rdp_epsilon,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.entries import registration
from tg_tinker.records.figures import (
    ACCOUNTANT,
    EXACT,
    FILTER,
    LEMMA,
    MIXTURE,
    OLD_RANGE,
    RENYI,
    curve,
    gaussian_mu2,
    group_rdp,
    groups,
    noise_tail,
)
from tg_tinker.records.ledger import Account, Ledger

DELTA = 1e-5
NOISE = [number * 4e-3 for number in range(-3_000, 9_000)]
VECTORS = Path(__file__).parents[1] / "vectors"


def ledger(*accounts: Account, epsilon: float | None = 50.0, delta: float = DELTA) -> Ledger:
    """Returns the ledger of a dataset on which these runs made their steps, one after the other.

    In version 1, the accounts hold all that is composed.
    """
    made = Ledger()
    made.append(registration("d", epsilon, delta, "example", "now") | {"version": 1})
    made.accounts = {f"run{number}": account for number, account in enumerate(accounts)}
    return made


def participation(sigma: float, uses: int, **facts: Any) -> Account:
    return Account("participation", sigma, 1.0, "exact", (), None, 0, uses, 2 * uses, facts)


def poisson(sigma: float, rate: float, steps: int, delta: float = DELTA, **facts: Any) -> Account:
    alone = min(
        rdp_epsilon(steps * subsampled_gaussian_rdp(sigma, rate, order), order, delta)
        for order in range(2, 65)
    )
    table = ((steps, alone),)
    return Account("poisson", sigma, rate, "rdp", table, None, 0, steps, steps, facts)


def log_ratio(z: float, sigma: float, rate: float, units: int) -> float:
    """Returns the log-likelihood ratio of a group's sample at noise z, from its definition."""
    return math.log(
        math.fsum(
            math.comb(units, k) * rate**k * (1 - rate) ** (units - k)
            * math.exp(k * z / sigma - (k / sigma) ** 2 / 2)
            for k in range(units + 1)
        )
    )  # fmt: skip


def expected(
    function: Callable[[float], float], tilt: Callable[[float], float] = lambda z: 0.0
) -> float:
    """Returns the mean of function(z) x exp(tilt(z)) for standard normal z, by a rectangle rule."""
    return math.fsum(
        function(z) * math.exp(tilt(z) - z * z / 2) * 4e-3 / math.sqrt(2 * math.pi) for z in NOISE
    )


# --- Gaussian contracts --------------------------------------------------------------------------


def test_the_figures_of_gaussian_contracts_are_exact() -> None:
    made = ledger(participation(1.0, 2), participation(2.0, 4))
    mu = math.sqrt(3.0)
    assert gaussian_mu2(made) == pytest.approx(3.0)
    for figure in curve(made):
        assert gaussian_delta(mu, figure.epsilon) == pytest.approx(figure.delta, rel=1e-6, abs=0)
        assert figure.how == EXACT
    assert [figure.delta for figure in curve(made)] == [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
    found = {figure.units: figure.epsilon for figure in groups(made)}
    assert found == {m: gaussian_epsilon(m * mu, DELTA) for m in (1, 2, 4, 8)}
    assert {figure.how for figure in groups(made)} == {EXACT}


@pytest.mark.parametrize("name", ["good", "unlimited"])
def test_what_was_released_composes_to_the_epsilon_of_the_ledger(name: str) -> None:
    entries = [json.loads(line) for line in (VECTORS / f"{name}.jsonl").read_text().splitlines()]
    for end in range(1, len(entries) + 1):
        made = Ledger.replay(entries[:end])
        mu2, sampled = made.released
        if made.unnoised:
            assert math.isinf(made.epsilon)
        elif not sampled:
            assert made.epsilon == gaussian_epsilon(math.sqrt(mu2), made.delta)
        else:
            order = made.registered["order"]
            rdp = order * mu2 / 2 + math.fsum(
                a.count * subsampled_gaussian_rdp(a.sigma, a.rate, order) for a in sampled
            )
            assert made.epsilon <= rdp_epsilon(rdp, order, made.delta) * (1 + 1e-12)


# --- Poisson sampling ----------------------------------------------------------------------------

PUBLISHED = {2: 3.98, 4: 8.90, 8: 20.9}
"""Units -> true epsilon at rate 0.01, sigma 1, 1,000 steps, delta 1e-5 (by loss distributions)."""


def test_groups_under_poisson_are_bounded_from_above_and_closely() -> None:
    made = {figure.units: figure for figure in groups(ledger(poisson(1.0, 0.01, 1000)))}
    assert made[1].how == ACCOUNTANT
    for units, true in PUBLISHED.items():
        assert true < made[units].epsilon < 1.2 * true
        assert made[units].delta == DELTA
        assert made[units].how == MIXTURE


def test_the_divergence_of_a_group_of_one_is_that_of_one_unit() -> None:
    for sigma, rate in ((1.0, 0.01), (0.6, 0.001), (4.0, 0.2), (20.0, 0.01)):
        for order, found in group_rdp(sigma, rate, 1):
            if order >= 2:
                one = subsampled_gaussian_rdp(sigma, rate, int(order))
                assert one * (1 - 1e-9) <= found <= one * (1 + 1e-9) + 2e-13


@pytest.mark.parametrize("units", [2, 3, 8])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.1), (2.0, 0.5), (5.0, 0.3)])
def test_the_divergence_of_a_group_covers_both_directions(
    sigma: float, rate: float, units: int
) -> None:
    found = dict(group_rdp(sigma, rate, units))
    logs = {z: log_ratio(z, sigma, rate, units) for z in NOISE}
    for order in (1.3, 1.75, 2, 3):
        both = [
            math.log(expected(lambda z: 1.0, lambda z, power=power: power * logs[z])) / (order - 1)
            for power in (order, 1 - order)
        ]
        assert found[order] == pytest.approx(max(both), rel=1e-5)
        assert found[order] >= max(both) * (1 - 1e-9)


@given(st.floats(0.3, 30), st.floats(1e-4, 0.99), st.sampled_from([2, 4]))
@settings(max_examples=8, deadline=None)
def test_a_larger_group_is_protected_less_and_sampling_helps(
    sigma: float, rate: float, units: int
) -> None:
    sampled, smaller = dict(group_rdp(sigma, rate, units)), dict(group_rdp(sigma, rate, units // 2))
    for order, rdp in sampled.items():
        assert rdp >= smaller[order] * (1 - 1e-9) - 1e-12
        if order >= 2:
            assert rdp <= order * (units / sigma) ** 2 / 2 * (1 + 1e-9) + 2e-13


def test_one_step_of_a_group_is_bounded_by_its_loss_at_every_order() -> None:
    sigma, rate, units = 1.0, 0.1, 4
    logs = {z: log_ratio(z, sigma, rate, units) for z in NOISE}
    epsilon = min(rdp_epsilon(rdp, order, 1e-5) for order, rdp in group_rdp(sigma, rate, units))
    removed = expected(lambda z: max(0.0, math.exp(logs[z]) - math.exp(epsilon)))
    added = expected(lambda z: max(0.0, 1 - math.exp(epsilon + logs[z])))
    assert max(removed, added) <= 1e-5


def test_the_curve_of_a_poisson_run_bounds_and_never_crosses_its_table() -> None:
    made = ledger(poisson(1.0, 0.01, 1000))
    figures = curve(made)
    assert [figure.how for figure in figures] == [RENYI, RENYI, ACCOUNTANT, RENYI, RENYI]
    epsilons = [figure.epsilon for figure in figures]
    assert epsilons == sorted(epsilons)
    # True values of this run, by loss distributions.
    assert 2.06 < epsilons[3] < 2.6
    assert 2.4 < epsilons[4] < 3.0


def test_the_curve_of_tiny_noise_uses_orders_below_two() -> None:
    (*_, last) = curve(ledger(poisson(0.3, 0.05, 100), epsilon=None))
    assert last.epsilon < 120


# --- several runs, and no guarantee --------------------------------------------------------------


def test_a_filtered_ledger_has_only_the_group_lemma() -> None:
    made = ledger(poisson(4.0, 0.01, 10), participation(3.0, 1))
    assert {figure.how for figure in curve(made)} == {FILTER}
    one, two, *_ = groups(made)
    assert one.how == FILTER
    assert (two.epsilon, two.how) == (2 * made.epsilon, LEMMA)
    ratio = (math.exp(2 * made.epsilon) - 1) / (math.exp(made.epsilon) - 1)
    assert two.delta == pytest.approx(DELTA * ratio)


def test_a_group_without_a_useful_delta_has_no_bound() -> None:
    made = ledger(poisson(1.0, 0.1, 100), participation(1.0, 4), epsilon=None)
    assert math.isinf(groups(made)[-1].epsilon)


def test_a_step_without_noise_leaves_no_finite_figure() -> None:
    for account in (participation(1.0, 1), poisson(1.0, 0.1, 1)):
        made = ledger(account, epsilon=None)
        made.unnoised = True
        assert all(math.isinf(figure.epsilon) for figure in (*curve(made), *groups(made)))


def test_an_unused_ledger_costs_nothing() -> None:
    made = ledger(participation(1.0, 0))
    assert all(figure.epsilon == 0 for figure in (*curve(made), *groups(made)))


def test_the_deltas_of_the_curve_stay_below_one() -> None:
    made = ledger(participation(1.0, 1), delta=0.05)
    assert [figure.delta for figure in curve(made)] == [0.05, 5e-3, 5e-4, 5e-5, 5e-6]


# --- the range of the noise ----------------------------------------------------------------------


def separated(sigma: float, values: int) -> float:
    """Returns the probability of noise that the neighbor cannot have, for an equal shift of all
    values."""
    shift = 1 / sigma / math.sqrt(values)
    return values * (normal_cdf(shift - OLD_RANGE) - normal_cdf(-OLD_RANGE))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.3, 1.0, 4.0])
def test_the_end_of_the_old_noise_adds_to_delta_whatever_the_shift(sigma: float) -> None:
    tail = noise_tail(ledger(participation(sigma, 3)))
    for values in (1, 2, 3, 5, 100, 1_500, 19_968, 134_500_000):
        assert tail >= min(1.0, 3 * separated(sigma, values))
    most = max(separated(sigma, values) for values in (*range(1, 300), 2**40))
    assert tail <= 16 * most


def test_noise_without_an_end_adds_nothing() -> None:
    assert noise_tail(ledger(participation(0.2, 3, noise_range=38.0))) == 0
    assert noise_tail(ledger(poisson(0.2, 0.01, 3, noise_range=38.0))) == 0
    assert noise_tail(ledger()) == 0
