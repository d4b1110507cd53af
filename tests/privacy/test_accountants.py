"""Tests the epsilon of Poisson samples against the true delta, from 1e-3 down to 1e-15."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.privacy import accountants, composition, renyi
from actors.privacy.accountants import epsilon_after, tabulate
from actors.privacy.composition import composed_epsilon
from actors.privacy.renyi import ADD, REMOVE, moments
from support.exact_delta import exact_delta
from support.processes import SOAK
from tg_tinker.records.accounting import (
    gaussian_delta,
    gaussian_epsilon,
    subsampled_gaussian_epsilon,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.entries import check_table

Setting = tuple[float, float, int, float]  # sigma, rate, steps, delta

QUICK: list[Setting] = [
    (1.0, 0.01, 1000, 1e-5),
    (1.0, 0.01, 1000, 1e-12),
    (1.0, 0.01, 1000, 1e-13),
    (1.0, 0.01, 100, 1e-14),
    (0.6, 0.01, 500, 1e-13),
    (0.6, 0.01, 500, 1e-14),
    (1.0, 0.05, 200, 1e-14),
    (2.0, 0.1, 1000, 1e-14),
    (2.0, 0.02, 3000, 1e-15),
    (0.1, 0.05, 100, 1e-5),
    (20.0, 0.01, 10_000, 1e-5),
    (0.8, 0.3, 20, 1e-9),
]

RUNS = [
    (1.0, 0.01, 1000), (1.0, 0.01, 300), (0.6, 0.01, 500), (1.0, 0.05, 200), (2.0, 0.1, 1000),
    (2.0, 0.02, 3000), (20.0, 0.01, 10_000), (0.3, 0.05, 100), (0.1, 0.05, 100), (4.0, 0.2, 2000),
    (0.8, 0.3, 20), (2.0, 0.9, 50),
]  # fmt: skip

SETTINGS = (
    [(*run, delta) for run, delta in product(RUNS, (1e-5, 1e-8, 1e-11, 1e-13, 1e-15))]
    if SOAK
    else QUICK
)


# --- the oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "steps", "epsilon"),
    [(10.0, 100, 4.377), (2.0, 3, 3.0), (1.0, 1, 4.377), (1.0, 4, 20.0), (0.1, 2, 300.0)],
)
def test_the_oracle_is_the_closed_form_where_nothing_is_left_out(
    sigma: float, steps: int, epsilon: float
) -> None:
    exact = exact_delta(sigma, 1 - 1e-9, steps, epsilon)
    assert exact.precision < 1e-9
    assert exact.delta == pytest.approx(
        gaussian_delta(math.sqrt(steps) / sigma, epsilon), rel=1e-6, abs=0
    )


def test_the_oracle_is_the_closed_form_of_one_step() -> None:
    epsilon = subsampled_gaussian_epsilon(10.0, 0.5, 1e-5)
    assert exact_delta(10.0, 0.5, 1, epsilon).delta == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (0.8, 0.3, 20)])
def test_the_oracle_is_between_the_bounds_of_another_library(
    sigma: float, rate: float, steps: int
) -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    def epsilon(upper: bool) -> float:
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=1e-3,
            pessimistic_estimate=upper,
        )  # fmt: skip
        return float(one.self_compose(steps).get_epsilon_for_delta(1e-5))

    assert exact_delta(sigma, rate, steps, epsilon(True)).delta <= 1e-5 * (1 + 1e-6)
    assert exact_delta(sigma, rate, steps, epsilon(True)).delta == pytest.approx(1e-5, rel=0.01)
    assert exact_delta(sigma, rate, steps, epsilon(False)).delta >= 1e-5


# --- upper bounds, and close ones -------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_the_true_delta_is_at_most_the_stated_one_and_close_to_it(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    for accountant in ("prv", "pld"):
        epsilon = epsilon_after(accountant, sigma, rate, steps, delta)
        exact = exact_delta(sigma, rate, steps, epsilon)
        assert exact.precision < 5e-4
        assert 0.98 * delta < exact.delta <= delta
    loose = epsilon_after("rdp", sigma, rate, steps, delta)
    assert exact_delta(sigma, rate, steps, loose).delta <= delta


@pytest.mark.parametrize("direction", [REMOVE, ADD])
@pytest.mark.parametrize("tilt", [0.5, 2.0, 8.0])
def test_any_tilt_gives_an_upper_bound(tilt: float, direction: int) -> None:
    for delta in (1e-5, 1e-12, 1e-14):
        best = epsilon_after("prv", 0.6, 0.01, 500, delta)
        epsilon = composed_epsilon(0.6, 0.01, direction, tilt=tilt, steps=500, delta=delta)
        if direction == REMOVE:
            assert epsilon >= best / 1.01
            assert exact_delta(0.6, 0.01, 500, min(epsilon, 100.0)).delta <= delta


@pytest.mark.parametrize(("steps", "delta"), [(1, 1e-5), (1, 1e-15), (4, 1e-9), (200, 1e-12)])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 30.0])
def test_nearly_no_sampling_is_the_closed_form(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    assert exact * (1 - 1e-6) <= epsilon_after("prv", sigma, 1 - 1e-9, steps, delta) < 1.003 * exact


@pytest.mark.parametrize("delta", [1e-4, 1e-8, 1e-15])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.3, 0.2), (20.0, 0.5), (0.05, 0.001)])
def test_one_step_is_the_closed_form(sigma: float, rate: float, delta: float) -> None:
    exact = subsampled_gaussian_epsilon(sigma, rate, delta)
    assert exact <= epsilon_after("prv", sigma, rate, 1, delta) <= 1.005 * exact


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "most"),
    [
        (0.7, 1e-4, 200_000, 1e-7, 0.617),  # 0.797 on a mesh of 1e-3
        (20.0, 0.01, 10_000, 1e-5, 0.1605),  # 0.178 by Renyi
        (0.1, 0.05, 100, 1e-5, 794.0),  # 3,037 by Renyi at whole orders
        (0.5, 1e-6, 100_000, 1e-9, 0.300),  # 3.03 by Renyi: a unit takes part once in ten runs
    ],
)
def test_the_mesh_fits_losses_of_every_size(
    sigma: float, rate: float, steps: int, delta: float, most: float
) -> None:
    assert epsilon_after("prv", sigma, rate, steps, delta) < most


def test_renyi_alone_finds_small_orders_for_little_noise() -> None:
    assert epsilon_after("rdp", 0.1, 0.05, 100, 1e-5) < 890


def test_opacus_agrees_up_to_the_error_that_it_adds() -> None:
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = [(0.8, 0.02, 200)]
    ours = epsilon_after("prv", 0.8, 0.02, 200, 1e-5)
    assert theirs.get_epsilon(1e-5) - 0.012 < ours < theirs.get_epsilon(1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-4, 6), st.floats(-9, 0), st.integers(1, 100_000), st.floats(-30, -1),
)  # fmt: skip
def test_every_setting_has_a_bound_between_one_step_and_renyi(
    log_sigma: float, log_rate: float, steps: int, log_delta: float
) -> None:
    sigma, rate, delta = 10**log_sigma, 10**log_rate, 10**log_delta
    epsilon = epsilon_after("prv", sigma, rate, steps, delta)
    assert subsampled_gaussian_epsilon(sigma, rate, delta) * (1 - 1e-6) <= epsilon < math.inf
    assert epsilon <= epsilon_after("rdp", sigma, rate, steps, delta)


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.4, 0.3), (30.0, 0.001)])
def test_tables_pass_the_rules_of_the_ledger(sigma: float, rate: float) -> None:
    table = tabulate("prv", sigma, rate, 1e-13, 8.0, 500)
    check_table(table, subsampled_gaussian_epsilon(sigma, rate, 1e-13))


# --- parts -----------------------------------------------------------------------------------


def test_the_worse_direction_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def composed(sigma: float, rate: float, direction: int, **_: Any) -> float:
        return {REMOVE: 1.0, ADD: 1.2}[direction]

    monkeypatch.setattr(accountants, "composed_epsilon", composed)
    assert epsilon_after("prv", 1.0, 0.01, 1000, 1e-5) == 1.2


def test_where_a_transform_has_no_answer_renyi_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountants, "composed_epsilon", lambda *_, **__: math.inf)
    bound = epsilon_after("rdp", 1.0, 0.01, 1000, 1e-5)
    assert epsilon_after("prv", 1.0, 0.01, 1000, 1e-5) == bound


@pytest.mark.parametrize("direction", [REMOVE, ADD])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.2, 0.3), (5.0, 0.9)])
def test_moving_outcomes_to_the_ends_of_their_cell_keeps_both_masses(
    sigma: float, rate: float, direction: int
) -> None:
    top = 1 + 14 * sigma
    reach = math.log1p(-rate + rate * math.exp((2 * top - 1) / (2 * sigma**2))) - math.log1p(-rate)
    losses = composition._losses(sigma, rate, direction, reach, 8000)
    assert losses.tilted(1e-300)[0] == pytest.approx(0.0, abs=1e-12)  # the P-mass is 1
    assert losses.tilted(-1.0)[0] == pytest.approx(0.0, abs=1e-9)  # and so is the Q-mass
    # A cell's outcomes move to both ends: the moment is above the true one, by little.
    kept = moments(sigma, rate, direction)
    at = int((kept.tilts > 1.5).argmax())
    assert kept.logs[at] <= losses.tilted(float(kept.tilts[at]))[0] < 1.05 * kept.logs[at]


@pytest.mark.parametrize("direction", [REMOVE, ADD])
def test_a_mesh_that_ends_early_leaves_no_mass_out(direction: int) -> None:
    losses = composition._losses(1.0, 0.3, direction, 0.5, 100)
    assert math.exp(losses.tilted(1e-300)[0]) + losses.above == pytest.approx(1.0, rel=1e-12)
    assert (losses.above > 0.1) is (direction == REMOVE)


def test_outcomes_above_the_mesh_count_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    real = composition._losses
    monkeypatch.setattr(composition, "_losses", lambda *a: real(*a)._replace(above=1.1e-8))
    found = composed_epsilon(1.0, 0.01, REMOVE, tilt=5.0, steps=1000, delta=1e-5)
    assert found == math.inf  # 1,000 steps x 1.1e-8


@pytest.mark.parametrize("error", ["TRANSFORM_ERROR", "POWER_ERROR"])
def test_rounding_is_added(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def epsilon() -> float:
        return composed_epsilon(1.0, 0.01, REMOVE, tilt=5.0, steps=1000, delta=1e-5)

    exact = epsilon()
    monkeypatch.setattr(composition, error, 1e-4)
    assert epsilon() > 1.01 * exact


def test_renyi_divergences_are_the_closed_form_at_whole_orders() -> None:
    for sigma, rate in [(1.0, 0.01), (0.3, 0.05), (0.05, 0.5), (20.0, 0.01), (1.0, 1e-9)]:
        orders = [2, 3, 8] if sigma < 1 else [2, 3, 8, 64]
        ours = renyi._log_moments(sigma, rate, np.array(orders, dtype=float))
        for order, moment in zip(orders, ours, strict=True):
            exact = (order - 1) * subsampled_gaussian_rdp(sigma, rate, order)
            assert exact * (1 - 1e-12) <= moment <= exact * (1 + 1e-5)
