"""Tests the plan of a private run: missing values follow from the budget, and the gate agrees."""

from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.privacy import accountants
from actors.privacy.noise import LEAST_SIGMA
from actors.privacy.plan import Plan, plan_run
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError
from tg_tinker.records.accounting import filter_order, gaussian_epsilon
from tg_tinker.records.entries import registration
from tg_tinker.records.ledger import Ledger

SAMPLED = {"sampling": "poisson", "dataset_size": 800, "accountant_type": "rdp"}


def registered(epsilon: float | None = 8.0, delta: float = 1e-5, unit: str = "example") -> Ledger:
    ledger = Ledger()
    ledger.append({
        "type": "register", "version": 1, "dataset": "d", "epsilon": epsilon, "delta": delta,
        "unit": unit, "order": filter_order(epsilon or math.inf, delta), "born": "",
    })  # fmt: skip
    return ledger


def planned(
    ledger: Ledger | None = None, max_steps: int | None = None, batch: int = 8, calls: int = 1,
    **dp: Any,
) -> Plan:  # fmt: skip
    config = TrainingConfig(
        model_ref="m", batch_size=batch, gradient_accumulation_steps=calls, max_steps=max_steps
    )
    return plan_run(DPConfig(**dp), config, ledger or registered())


def charge(ledger: Ledger, run: str, count: int) -> None:
    body = {"type": "charge", "run": run, "epoch": 1, "charge": f"{run}{count}", "count": count}
    ledger.append(body)


def spent(uses: int, sigma: float, epsilon: float | None = 8.0) -> Ledger:
    ledger = registered(epsilon)
    ledger.append(planned(ledger, noise_multiplier=sigma).entry("before"))
    for count in range(1, uses + 1):
        charge(ledger, "before", count)
    return ledger


def use_up(ledger: Ledger, made: Plan) -> int:
    """Returns the count that the gate really grants."""
    ledger.append(made.entry("run"))
    for count in range(1, 100_000):
        try:
            charge(ledger, "run", count)
        except DPBudgetExceededError:
            return count - 1
    raise AssertionError("the gate never closed")


# --- participation ------------------------------------------------------------------------------


def test_uses_follow_from_noise() -> None:
    made = planned(noise_multiplier=1.0)
    assert (made.sigma, made.rate, made.limit, made.planned) == (1.0, 1.0, 2, 0)
    assert (made.contract, made.accountant, made.table) == ("participation", "exact", ())


@pytest.mark.parametrize(("uses", "given"), [(3, {}), (1, {"max_participations": 1}),
                                             (10, {"max_participations": 10})])  # fmt: skip
def test_noise_follows_from_uses(uses: int, given: dict[str, int]) -> None:
    made = planned(**given)
    assert made.limit == uses
    assert gaussian_epsilon(math.sqrt(uses) / made.sigma, 1e-5) <= 8.0
    assert gaussian_epsilon(math.sqrt(uses) / (made.sigma * 0.998), 1e-5) > 8.0
    assert float(f"{made.sigma:.4g}") == made.sigma


def test_both_are_checked_and_kept() -> None:
    assert planned(noise_multiplier=1.0, max_participations=1).limit == 1
    with pytest.raises(DPBudgetExceededError, match="5 uses of each example at sigma 1") as caught:
        planned(noise_multiplier=1.0, max_participations=5)
    enough = caught.value.details["noise_multiplier"]
    assert planned(noise_multiplier=enough, max_participations=5).limit == 5
    with pytest.raises(DPBudgetExceededError):
        planned(noise_multiplier=enough * 0.998, max_participations=5)


@pytest.mark.parametrize(
    ("given", "max_steps", "reserved"),
    [
        ({"noise_multiplier": 1.0}, None, 0),
        ({}, None, 0),
        ({"max_participations": 4}, None, 4),
        ({"noise_multiplier": 1.0}, 100, 2),
        ({"noise_multiplier": 20.0}, 100, 100),  # a unit is used once per step at most
    ],
)
def test_uses_are_reserved_where_an_end_is_stated(
    given: dict[str, Any], max_steps: int | None, reserved: int
) -> None:
    assert planned(max_steps=max_steps, **given).planned == reserved


# --- worst case ---------------------------------------------------------------------------------


def test_worst_case_steps_follow_from_noise() -> None:
    made = planned(sampling="worst_case", noise_multiplier=20.0)
    assert gaussian_epsilon(math.sqrt(made.limit or 0) / 20, 1e-5) <= 8.0
    assert gaussian_epsilon(math.sqrt((made.limit or 0) + 1) / 20, 1e-5) > 8.0
    assert made.planned == 0


def test_worst_case_noise_follows_from_steps() -> None:
    made = planned(sampling="worst_case", max_steps=100)
    assert made.limit is not None
    assert 100 <= made.limit < 102
    assert made.planned == 100


def test_worst_case_steps_that_do_not_fit() -> None:
    with pytest.raises(DPBudgetExceededError, match="2000 steps at sigma 20") as caught:
        planned(sampling="worst_case", noise_multiplier=20.0, max_steps=2000)
    enough = caught.value.details["noise_multiplier"]
    fits = planned(sampling="worst_case", noise_multiplier=enough, max_steps=2000)
    assert (fits.limit or 0) >= 2000


# --- Poisson samples ----------------------------------------------------------------------------


def test_sampled_steps_follow_from_noise() -> None:
    made = planned(noise_multiplier=1.0, **SAMPLED)
    assert made.rate == 0.01
    assert made.limit == made.table[-1][0] > 10_000
    assert made.table[-1][1] <= 8.0
    assert made.planned == 0
    assert planned(noise_multiplier=1.0, max_steps=50, **SAMPLED).planned == 50


def test_sampled_noise_follows_from_steps() -> None:
    made = planned(max_steps=1000, target_epsilon=3.0, **SAMPLED)
    assert made.sigma == pytest.approx(0.8657, abs=0.002)
    assert made.limit == made.planned == 1000
    assert made.table[-1] == (1000, pytest.approx(3.0, abs=0.01))


def test_prv_needs_less_noise_than_rdp_for_the_same_steps() -> None:
    made = planned(max_steps=20, **SAMPLED | {"accountant_type": "prv"})
    loose = planned(max_steps=20, **SAMPLED)
    assert made.limit == loose.limit == 20
    assert made.sigma < 0.95 * loose.sigma
    assert 7.9 < made.table[-1][1] <= 8.0
    assert (made.accountant, loose.accountant) == ("prv", "rdp")


def test_moments_is_rdp_and_calls_count_for_the_rate() -> None:
    given = SAMPLED | {"accountant_type": "moments", "sampling": "client_poisson"}
    made = planned(noise_multiplier=2.0, batch=4, calls=2, sample_rate=0.01, max_steps=5, **given)
    assert (made.accountant, made.rate, made.contract) == ("rdp", 0.01, "client_poisson")
    assert made.table == planned(noise_multiplier=2.0, max_steps=5, **SAMPLED).table


def test_sampled_steps_that_do_not_fit() -> None:
    with pytest.raises(DPBudgetExceededError, match=r"500 steps at sigma 0\.5") as caught:
        planned(noise_multiplier=0.5, max_steps=500, **SAMPLED)
    enough = caught.value.details["noise_multiplier"]
    fits = planned(noise_multiplier=enough, max_steps=500, **SAMPLED)
    assert (fits.limit or 0) >= 500
    with pytest.raises(DPBudgetExceededError, match=r"1 step at sigma 0\.1"):
        planned(noise_multiplier=0.1, **SAMPLED)


# --- what contradicts itself --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"target_epsilon": 9.0}, "exceeds the 8 of the dataset"),
        ({"target_delta": 1e-4}, "target_delta 0.0001 exceeds the 1e-05 of the dataset"),
        ({"unit": "id"}, "protects unit='example'"),
        ({"dataset_size": 100_000}, "below 1 / dataset_size"),
        ({"noise_multiplier": 0.049}, "outside 0.05 to"),
        ({"noise_multiplier": 1e7}, "outside 0.05 to"),
        ({"sampling": "worst_case"}, "needs noise_multiplier, or max_steps"),
        (SAMPLED, "needs noise_multiplier, or max_steps"),
        ({"sampling": "poisson", "noise_multiplier": 1.0}, "needs dataset_size"),
        (SAMPLED | {"noise_multiplier": 1.0, "sample_rate": 0.0100001}, "leave it out"),
        (SAMPLED | {"noise_multiplier": 1.0, "dataset_size": 7}, "exceeds dataset_size=7"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        planned(**given)


def test_delta_just_below_one_of_all_examples_is_allowed() -> None:
    assert planned(dataset_size=99_999).limit == 3


def test_every_example_in_every_sample_is_allowed() -> None:
    made = planned(noise_multiplier=20.0, **SAMPLED | {"dataset_size": 8})
    assert made.rate == 1.0
    assert made.limit == planned(sampling="worst_case", noise_multiplier=20.0).limit


# --- a client that asks for less ----------------------------------------------------------------


def test_a_client_may_ask_for_less_epsilon() -> None:
    assert planned(noise_multiplier=1.0, target_epsilon=5.0).limit == 1
    tight = planned(target_epsilon=1.0)
    assert gaussian_epsilon(math.sqrt(3) / tight.sigma, 1e-5) <= 1.0
    assert planned(noise_multiplier=1.0, target_epsilon=None).limit == 2


def test_a_client_may_ask_for_less_delta() -> None:
    ledger = registered(8.0, 1e-3)
    assert planned(ledger, target_delta=1e-3, noise_multiplier=1.0).limit == 4
    assert planned(ledger, target_delta=1e-9, noise_multiplier=1.0).limit == 1
    loose = planned(ledger, target_delta=1e-3, noise_multiplier=1.0, **SAMPLED)
    tight = planned(ledger, target_delta=1e-9, noise_multiplier=1.0, **SAMPLED)
    steps = tight.limit or 0
    assert steps < (loose.limit or 0)
    # The ledger's table is at its own delta; the run ends where its own delta says.
    assert accountants.epsilon_after("rdp", 1.0, 0.01, steps, 1e-9) <= 8.0
    assert accountants.epsilon_after("rdp", 1.0, 0.01, steps + 1, 1e-9) > 8.0
    assert tight.table[-1][1] < 8.0
    calibrated = planned(ledger, 50, target_delta=1e-9, **SAMPLED)
    assert accountants.epsilon_after("rdp", calibrated.sigma, 0.01, 50, 1e-9) <= 8.0


def test_less_for_a_client_holds_for_itself_and_not_for_what_others_spent() -> None:
    made = planned(spent(2, 2.0), target_epsilon=2.1, noise_multiplier=2.0)
    assert made.limit == 1


# --- what others have spent ---------------------------------------------------------------------


def test_a_spent_data_set_pays_for_less() -> None:
    fresh, used = planned(), planned(spent(1, 1.0))
    assert used.sigma > fresh.sigma
    total = gaussian_epsilon(math.sqrt(1 + 3 / used.sigma**2), 1e-5)
    assert 7.99 < total <= 8.0


def test_a_refusal_says_what_was_spent_and_how_much_noise_is_enough() -> None:
    ledger = spent(1, 1.0)
    with pytest.raises(DPBudgetExceededError, match=r"4\.377 of 8 is spent already") as caught:
        planned(ledger, noise_multiplier=0.5)
    enough = caught.value.details["noise_multiplier"]
    assert caught.value.details["spent"] == ledger.epsilon
    assert planned(ledger, noise_multiplier=enough).limit == 1


def test_a_refusal_says_what_the_living_have_reserved() -> None:
    ledger = registered()
    ledger.append(planned(ledger, max_participations=1, noise_multiplier=0.62).entry("living"))
    with pytest.raises(DPBudgetExceededError, match=r"open clients have reserved up to 7\.\d+"):
        planned(ledger, noise_multiplier=1.0)
    ledger.append({"type": "release", "run": "living"})
    assert planned(ledger, noise_multiplier=1.0).limit == 2


def test_no_noise_is_enough_for_a_data_set_that_is_all_spent() -> None:
    ledger = registered()
    made = planned(ledger, max_steps=30, **SAMPLED | {"accountant_type": "prv"})
    use_up(ledger, made)
    # Alone it had its exact table; with another run the filter says that all is gone.
    with pytest.raises(DPBudgetExceededError, match="No noise is enough") as caught:
        planned(ledger)
    assert caught.value.details["noise_multiplier"] is None
    with pytest.raises(DPBudgetExceededError, match="No noise is enough"):
        planned(ledger, noise_multiplier=2.0)


def test_a_sampled_run_on_a_used_data_set_is_planned_with_the_filter() -> None:
    ledger = spent(1, 2.0)
    alone = planned(noise_multiplier=1.0, **SAMPLED)
    made = planned(ledger, noise_multiplier=1.0, **SAMPLED)
    assert 0 < (made.limit or 0) < (alone.limit or 0)
    assert made.table == alone.table


# --- plan and gate agree ------------------------------------------------------------------------


@settings(max_examples=16, deadline=None)
@given(
    st.sampled_from([
        {"sampling": "participation"}, {"sampling": "worst_case"},
        SAMPLED | {"dataset_size": 20}, SAMPLED | {"dataset_size": 40},
    ]),
    st.floats(1.0, 3.0), st.integers(0, 3), st.floats(2.0, 8.0),
)  # fmt: skip
def test_the_gate_grants_what_was_planned_and_no_more(
    given_: dict[str, Any], sigma: float, before: int, target: float
) -> None:
    ledger = spent(before, 3.0)
    try:
        made = planned(ledger, noise_multiplier=sigma, target_epsilon=target, **given_)
    except DPBudgetExceededError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert (refusal.details["noise_multiplier"] or math.inf) > sigma
        return
    assert use_up(ledger, made) == made.limit
    assert ledger.epsilon <= ledger.limit


@pytest.mark.parametrize("given", [{}, {"sampling": "worst_case"}, SAMPLED])
def test_calibrated_noise_passes_the_gate_to_the_last_step(given: dict[str, Any]) -> None:
    ledger = spent(2, 3.0)
    made = planned(ledger, max_steps=12, **given)
    assert made.limit is not None
    assert use_up(ledger, made) == made.limit >= min(12, made.planned)
    assert 7.5 < ledger.epsilon <= 8.0


def test_a_reservation_is_honoured_whatever_comes_between() -> None:
    ledger = registered()
    made = planned(ledger, max_steps=25, noise_multiplier=1.0, **SAMPLED)
    ledger.append(made.entry("reserved"))
    other = planned(ledger, noise_multiplier=1.0)
    assert use_up(ledger, other) == other.limit
    for count in range(1, 26):
        charge(ledger, "reserved", count)


def test_planning_changes_nothing() -> None:
    ledger = spent(1, 2.0)
    head = ledger.head
    planned(ledger)
    assert (ledger.head, set(ledger.accounts)) == (head, {"before"})


# --- without a limit ----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"sampling": "worst_case"}, SAMPLED])
def test_a_data_set_without_limit(given: dict[str, Any]) -> None:
    ledger = registered(None)
    made = planned(ledger, noise_multiplier=0.5, max_steps=4, target_epsilon=None, **given)
    assert made.limit is None
    assert "no limit" in made.message
    ledger.append(made.entry("run"))
    for count in range(1, 8):
        charge(ledger, "run", count)
    assert 0 < ledger.epsilon < math.inf
    with pytest.raises(InvalidRequestError, match="give noise_multiplier"):
        planned(ledger, max_steps=4, target_epsilon=None, **given)


def test_uses_that_are_stated_limit_a_run_on_any_data_set() -> None:
    given = {"noise_multiplier": 0.1, "target_epsilon": None, "max_participations": 2}
    assert planned(registered(None), **given).limit == 2


def test_a_target_that_is_stated_limits_a_run_on_any_data_set() -> None:
    assert planned(registered(None), noise_multiplier=1.0, target_epsilon=8.0).limit == 2
    assert planned(registered(None), target_epsilon=8.0).sigma == planned().sigma


# --- the entry, the facts and the message -------------------------------------------------------


def test_the_entry_is_json_and_opens_the_run() -> None:
    made = planned(noise_multiplier=2.0, max_steps=9, **SAMPLED)
    entry = made.entry("run-1")
    assert json.loads(json.dumps(entry)) == entry
    ledger = registered()
    ledger.append(entry)
    account = ledger.accounts["run-1"]
    assert (account.limit, account.reserved, account.table) == (made.limit, 9, made.table)
    assert account.facts["message"] == made.message
    assert "message" not in made.facts
    with pytest.raises(FrozenInstanceError):
        made.sigma = 0.1  # type: ignore[misc]


@pytest.mark.parametrize("contract", ["participation", "poisson", "client_poisson", "worst_case"])
def test_facts(contract: str) -> None:
    given = {"noise_multiplier": 5.0, "dataset_size": 80, "accountant_type": "rdp"}
    made = planned(
        registered(8.0, 1e-4, "id"), batch=4, calls=3, sampling=contract, unit="id",
        max_grad_norm=0.5, target_epsilon=2.0, show_private_metrics=False, **given,
    )  # fmt: skip
    assert made.facts == {
        "bound": 0.5, "batch": 12, "dataset_size": 80, "target_epsilon": 2.0,
        "target_delta": 1e-5, "unit": "id", "metrics_shown": False, "nonprivate_init": False,
        "noise_range": 38.0, "clipping": "flat",
    }  # fmt: skip


def test_noise_is_calibrated_within_the_range_of_the_noise() -> None:
    """Else outcomes beyond the range would tell a unit apart, whatever epsilon says."""
    assert planned(registered(1e5, 1e-5), target_epsilon=1e5).sigma >= LEAST_SIGMA


def test_messages_say_what_is_allowed_and_what_would_allow_more() -> None:
    first, second = planned(noise_multiplier=1.0).message.split(". ", 1)
    assert first == (
        "Participation: each example may be used 2 times at sigma 1, epsilon 6.57 of 8"
        " (delta 1e-05)"
    )
    assert second.startswith("Poisson sampling")
    assert second.endswith("sigma 1.04 would allow 3 uses.")
    assert planned(noise_multiplier=1.04).limit == 3
    message = planned(noise_multiplier=1.0, dataset_size=80).message
    steps = int(message.split("at least ")[1].split(" ")[0])
    drawn = planned(noise_multiplier=1.0, **SAMPLED | {"dataset_size": 80})
    assert steps == drawn.limit


@pytest.mark.parametrize("given", [{"sampling": "worst_case"}, SAMPLED | {"dataset_size": 40}])
def test_messages_of_steps_name_noise_that_doubles_them(given: dict[str, Any]) -> None:
    made = planned(noise_multiplier=3.0, **given)
    said = re.search(r"; sigma (\S+) would allow (\d+) steps\.$", made.message)
    assert said is not None
    doubled = int(said[2])
    assert doubled == 2 * (made.limit or 0)
    assert (planned(noise_multiplier=float(said[1]), **given).limit or 0) >= doubled


def test_a_delta_that_lets_whole_rows_leak_is_refused() -> None:
    ledger = Ledger()
    ledger.append(registration("d", 8.0, 0.2, "example", born=""))
    with pytest.raises(InvalidRequestError, match="below 1 / the rows of a step"):
        planned(ledger, noise_multiplier=1.0, batch=8)
