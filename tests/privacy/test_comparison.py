"""Tests the comparison of contracts: its runs fit the budget, and its sentences are true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tg_tinker
from actors.privacy.accountants import epsilon_after
from tg_tinker.demo.plots import plot_plan
from tg_tinker.errors import InvalidRequestError
from tg_tinker.records.accounting import gaussian_epsilon
from tg_tinker.records.planning import PrivacyPlan


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return tg_tinker.plan_privacy(rows=3692, epsilon=8.0, epochs=3, max_grad_norm=0.5)


def test_every_contract_has_each_batch_size(plan: PrivacyPlan) -> None:
    contracts = ("participation", "poisson", "client_poisson", "worst_case")
    assert [(run.contract, run.batch_size) for run in plan.runs] == [
        (contract, batch) for contract in contracts for batch in (64, 128, 256, 512)
    ]
    assert plan.reasons.keys() == {*contracts}


def test_each_run_spends_the_budget_and_no_more(plan: PrivacyPlan) -> None:
    for run in plan.runs:
        assert run.steps == math.ceil(3 * 3692 / run.batch_size)
        if "poisson" in run.contract:
            rate = run.batch_size / 3692
            spent = epsilon_after("prv", run.noise_multiplier, rate, run.steps, 1e-5)
        else:
            uses = 3 if run.contract == "participation" else run.steps
            spent = gaussian_epsilon(math.sqrt(uses) / run.noise_multiplier, 1e-5)
        assert 7.9 < run.epsilon == spent <= 8.0


def test_larger_batches_have_less_noise(plan: PrivacyPlan) -> None:
    for contract in plan.reasons:
        noise = [run.noise for run in plan.runs if run.contract == contract]
        assert noise == sorted(noise, reverse=True)
        for run in plan.runs:
            assert run.noise == run.noise_multiplier * 0.5 / run.batch_size


def test_the_best_is_poisson_only_where_it_saves_noise(plan: PrivacyPlan) -> None:
    assert plan.best == "poisson"
    # One draw of nearly all rows hides nobody.
    assert tg_tinker.plan_privacy(rows=100, epsilon=8.0, batch_size=99).best == "participation"


def test_twice_the_rows_halve_the_noise_or_lower_epsilon(plan: PrivacyPlan) -> None:
    (first,) = (run for run in plan.runs if (run.contract, run.batch_size) == ("poisson", 64))
    lower = epsilon_after("prv", 2 * first.noise_multiplier, 64 / 3692, first.steps, 1e-5)
    assert f"({first.noise / 2:.3g})" in plan.twice_the_rows
    assert plan.twice_the_rows.endswith(f"at epsilon {lower:.3g}.")


def test_evaluations_are_gaussian_releases_of_a_sum_that_one_row_moves_by_two() -> None:
    plan = tg_tinker.plan_privacy(rows=2000, epsilon=8.0, held_out_rows=200)
    for one in plan.evaluations:
        mu = 2 / (one.std * 200)
        assert one.epsilon == gaussian_epsilon(mu, plan.delta)
        assert gaussian_epsilon(math.sqrt(one.count) * mu, plan.delta) <= 8.0
        assert gaussian_epsilon(math.sqrt(one.count + 1) * mu, plan.delta) > 8.0


def test_delta_stays_below_one_row() -> None:
    assert tg_tinker.plan_privacy(rows=1_000_000, epsilon=8.0, batch_size=500_000).delta < 1.01e-7


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rows": 0}, "rows is 0: give"),
        ({"epochs": 0}, "epochs is 0: give"),
        ({"epsilon": 0.0}, "epsilon is 0: give"),
        ({"epsilon": math.inf}, "finite"),
        ({"delta": 1.0}, "delta is 1: give"),
        ({"delta": 0.5}, "must be below 1 / dataset_size"),
        ({"batch_size": 101}, "exceeds the 100 rows: lower"),
        ({"held_out_rows": 0}, "held_out_rows is 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
    ],
)
def test_numbers_that_make_no_plan(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        tg_tinker.plan_privacy(**({"rows": 100, "epsilon": 8.0} | given))


def test_one_row_has_a_plan() -> None:
    assert {run.batch_size for run in tg_tinker.plan_privacy(rows=1, epsilon=8.0).runs} == {1}


def test_the_text_and_the_json_have_every_run(plan: PrivacyPlan, tmp_path: Path) -> None:
    text, found = str(plan), json.loads(json.dumps(plan.to_json()))
    for run, entry in zip(plan.runs, found["runs"], strict=True):
        assert f"{run.noise:.3g}" in text
        assert entry["noise"] == run.noise
    assert plot_plan(plan, tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
