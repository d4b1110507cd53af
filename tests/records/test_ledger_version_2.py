"""Tests version 2 of the ledger: the greatest sum of a unit, the stream of draws, evaluations."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import DPBudgetExceededError, IntegrityError, InvalidRequestError
from tg_tinker.records.accounting import gaussian_epsilon
from tg_tinker.records.entries import GENESIS, UPGRADE, Entry, entry_hash, registration
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.sums import added, times, weight

VECTORS = Path(__file__).parents[1] / "vectors" / "ledger_2"
DELTA, UNITS = 1e-5, "ab" * 32
MALFORMED = (ValueError, TypeError, KeyError)
_ids = itertools.count()


def registered(epsilon: float | None = 8.0, version: int = 2) -> Ledger:
    ledger = Ledger()
    born = "2026-01-01T00:00:00+00:00"
    ledger.append(registration("d", epsilon, DELTA, "example", born) | {"version": version})
    return ledger


def opening(run: str, contract: str = "participation", **changes: Any) -> Entry:
    entry = {
        "type": "open", "run": run, "contract": contract, "sigma": 1.0, "rate": 1.0,
        "accountant": "exact", "table": [], "limit": None, "planned": 0,
        "facts": {"batch": 8, "bound": 1.0},
    }  # fmt: skip
    if contract.endswith("poisson"):
        entry |= {"rate": 0.01, "accountant": "rdp", "table": [[100, 2.0]]}
    return entry | changes


def charge(run: str, count: int, spent: float, **more: Any) -> Entry:
    return {
        "type": "charge", "run": run, "epoch": 1, "charge": f"c{next(_ids)}", "count": count,
        "spent": spent,
    } | more  # fmt: skip


def draw(run: str, position: int, units: str = UNITS) -> Entry:
    return {"type": "draw", "run": run, "position": position, "units": units}


def evaluation(run: str, sigma: float, spent: float) -> Entry:
    return {
        "type": "evaluation", "run": run, "epoch": 1, "charge": f"e{next(_ids)}", "sigma": sigma,
        "spent": spent,
    }  # fmt: skip


def state(ledger: Ledger) -> dict[str, Any]:
    return copy.deepcopy(vars(ledger))


def refused(
    ledger: Ledger, body: Entry, error: type[Exception] | tuple[type[Exception], ...] = MALFORMED,
    match: str | None = None,
) -> None:  # fmt: skip
    before = state(ledger)
    with pytest.raises(error, match=match):
        ledger.append(body)
    assert state(ledger) == before


# --- sums ----------------------------------------------------------------------------------------


SIGMAS = st.floats(1e-4, 1e6)


@given(SIGMAS, st.integers(1, 10**6))
def test_a_cost_is_never_below_the_true_one_and_hardly_above(sigma: float, count: int) -> None:
    true = 1 / Fraction(sigma) ** 2
    assert true <= Fraction(weight(sigma)) <= true * (1 + Fraction(2) ** -29)
    assert Fraction(times(count, sigma)) == count * Fraction(weight(sigma))


@given(st.lists(SIGMAS, min_size=1, max_size=30))
def test_sums_are_never_rounded_down(sigmas: list[float]) -> None:
    total = 0.0
    for sigma in sigmas:
        total = added(total, weight(sigma))
    exact = sum(Fraction(weight(sigma)) for sigma in sigmas)
    assert exact <= Fraction(total) <= exact * (1 + Fraction(2) ** -46)


# --- the greatest sum of a unit ------------------------------------------------------------------


def test_runs_on_other_rows_do_not_add_up() -> None:
    ledger = registered()
    ledger.append(opening("a"))
    ledger.append(opening("b"))
    ledger.append(charge("a", 1, 1.0))
    ledger.append(charge("b", 1, 1.0))  # other rows
    assert ledger.epsilon == gaussian_epsilon(1.0, DELTA)
    ledger.append(charge("b", 2, 2.0))  # one of these rows again
    assert ledger.epsilon == gaussian_epsilon(math.sqrt(2), DELTA)


@pytest.mark.parametrize("spent", [0.5, 0.0, 2.0000000001, math.inf, -1.0, None, True, "1"])
def test_the_greatest_sum_neither_falls_nor_rises_by_more_than_the_step(spent: Any) -> None:
    ledger = registered()
    ledger.append(opening("a"))
    ledger.append(charge("a", 1, 1.0))
    refused(ledger, charge("a", 1, 1.0) | {"spent": spent})
    refused(ledger, charge("a", 2, 1.0))  # two uses at sigma 1 have a sum of 2
    ledger.append(charge("a", 2, 2.0))


@pytest.mark.parametrize("contract", ["worst_case", "poisson", "client_poisson"])
def test_a_step_that_counts_no_uses_leaves_the_greatest_sum(contract: str) -> None:
    ledger = registered()
    ledger.append(opening("a", contract, sigma=4.0))
    more = {}
    if contract == "poisson":
        ledger.append(draw("a", 0))
        more = {"position": 0}
    refused(ledger, charge("a", 1, 1 / 16, **more))
    ledger.append(charge("a", 1, 0.0, **more))
    assert ledger.everyone == (1 / 16 if contract == "worst_case" else 0.0)


def test_what_is_charged_to_everyone_adds_to_every_unit() -> None:
    ledger = registered()
    ledger.append(opening("a", "worst_case", sigma=2.0))
    ledger.append(opening("b"))
    ledger.append(charge("a", 1, 0.0))
    ledger.append(charge("b", 1, 1.0))
    assert ledger.epsilon == gaussian_epsilon(math.sqrt(1.25), DELTA)
    refused(ledger, opening("c", planned=3), DPBudgetExceededError)
    ledger.append(opening("c", planned=2))  # what a fresh unit can pay, beside 1 / 4
    refused(ledger, charge("b", 3, 3.0))
    ledger.append(charge("b", 2, 2.0))
    refused(ledger, charge("b", 3, 3.0), DPBudgetExceededError, "cannot pay")


def test_a_fallen_back_run_takes_its_uses_along() -> None:
    ledger = registered()
    ledger.append(opening("a", "client_poisson", sigma=2.0))
    for count in range(1, 11):
        ledger.append(charge("a", count, 0.0))
    body = {"type": "fall_back", "run": "a", "count": 3, "limit": None}
    for wrong in ({}, {"spent": 0.76}, {"spent": -0.1}, {"spent": None}):
        refused(ledger, body | wrong)
    ledger.append(body | {"spent": 0.75})
    assert ledger.epsilon == gaussian_epsilon(math.sqrt(0.75), DELTA)


# --- the stream of draws -------------------------------------------------------------------------


def test_a_position_is_told_before_it_is_charged_and_used_once() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson"))
    for body in (charge("a", 1, 0.0), charge("a", 1, 0.0, position=0), draw("a", 1),
                 draw("a", 0, "short"), draw("b", 0)):  # fmt: skip
        refused(ledger, body)
    ledger.append(draw("a", 0))
    assert ledger.told is not None
    assert ledger.epsilon == 0
    for body in (draw("a", 0), draw("a", 1), charge("a", 1, 0.0), charge("a", 1, 0.0, position=1)):
        refused(ledger, body)
    ledger.append(charge("a", 1, 0.0, position=0))
    assert (ledger.position, ledger.told) == (1, None)
    refused(ledger, charge("a", 2, 0.0, position=0))


@pytest.mark.parametrize("change", [{"sigma": 2.0}, {"rate": 0.02}, {"facts": {"bound": 2.0}}])
def test_only_a_run_of_the_same_settings_uses_a_draw(change: Entry) -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson"))
    ledger.append(opening("b", "poisson", **change))
    ledger.append(opening("c", "poisson"))
    ledger.append(draw("a", 0))
    refused(ledger, charge("b", 1, 0.0, position=0))
    ledger.append(charge("c", 1, 0.0, position=0))


def test_a_draw_that_the_budget_cannot_pay_for_is_not_told() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson", limit=1))
    ledger.append(draw("a", 0))
    ledger.append(charge("a", 1, 0.0, position=0))
    refused(ledger, draw("a", 1), DPBudgetExceededError, "has used all 1 steps")


def test_after_a_drop_steps_are_uses() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson", limit=9, planned=9))
    ledger.append(draw("a", 0))
    ledger.append(charge("a", 1, 0.0, position=0))
    sampled = ledger.epsilon
    drop = {"type": "drop", "run": None, "position": 1}
    refused(ledger, drop)  # nothing is told
    ledger.append(draw("a", 1))
    refused(ledger, drop | {"position": 0})
    refused(ledger, drop | {"run": "b"})
    ledger.append(drop)
    assert (ledger.position, ledger.told, ledger.dropped) == (2, None, 1)
    assert ledger.epsilon == sampled  # it told nothing that was used
    ledger.append(draw("a", 2))
    refused(ledger, charge("a", 2, 0.0, position=2))
    ledger.append(charge("a", 1, 1.0, position=2))
    assert ledger.epsilon > gaussian_epsilon(1.0, DELTA)
    assert (ledger.accounts["a"].count, ledger.accounts["a"].steps) == (1, 2)


def test_a_step_without_noise_uses_its_draw_too() -> None:
    ledger = registered(None)
    ledger.append(opening("a", "poisson"))
    ledger.append(draw("a", 0))
    refused(ledger, charge("a", 1, 0.0) | {"type": "unnoised"})
    ledger.append(charge("a", 1, 0.0, position=0) | {"type": "unnoised"})
    assert (ledger.position, ledger.epsilon) == (1, math.inf)


# --- the unit that nobody stated -----------------------------------------------------------------


def unstated(run: str, contract: str = "participation", **changes: Any) -> Entry:
    facts = {"batch": 8, "bound": 1.0, "unit": "example", "unit_stated": False}
    return opening(run, contract, facts=facts, **changes)


def chosen(run: str, unit: str = "id") -> Entry:
    return {"type": "unit", "run": run, "unit": unit}


def test_a_unit_that_nobody_stated_is_chosen_once_and_ends_the_runs_before_it() -> None:
    ledger = registered()
    ledger.append(unstated("a", planned=2))
    ledger.append(unstated("b", "poisson"))
    assert (ledger.unit_stated, ledger.unit_open) == (False, True)
    for body in (chosen("a"), chosen(""), chosen("c", "example"), chosen("c", "user"),
                 chosen("c") | {"more": 1}, opening("c", facts={"unit": "id"})):  # fmt: skip
        refused(ledger, body)
    ledger.append(chosen("c"))
    assert (ledger.registered["unit"], ledger.unit_stated, ledger.unit_open) == ("id", True, False)
    assert ledger.accounts["a"].reserved == 0
    for body in (chosen("d", "example"), unstated("c")):
        refused(ledger, body)
    ledger.append(opening("c", facts={"unit": "id", "unit_stated": True}))
    old = "opened before the unit of dataset 'd' was chosen, which is 'id' now.*create a new client"
    for body in (charge("a", 1, 1.0), draw("b", 0), evaluation("a", 2.0, 0.25)):
        refused(ledger, body, InvalidRequestError, old)
    ledger.append(charge("c", 1, 1.0))
    ledger.append(evaluation("tc-1", 2.0, 1.25))
    refused(ledger, chosen("d", "example"))
    ledger.append({"type": "book", "runs": ["a", "c"]})
    refused(ledger, charge("a", 1, 1.25), InvalidRequestError, old)
    refused(ledger, charge("c", 2, 2.25), DPBudgetExceededError, "restored after the database")


@pytest.mark.parametrize(
    "before",
    [
        [],  # whoever registered the dataset stated the unit
        [opening("a")],  # a run of an earlier release
        [unstated("a"), opening("b", facts={"unit": "example", "unit_stated": True})],
        [unstated("a"), charge("a", 1, 1.0)],
        [unstated("a"), evaluation("tc-1", 2.0, 0.25)],
        [unstated("a"), charge("a", 1, 1.0) | {"type": "unnoised"}],
        [unstated("a", "poisson"), draw("a", 0)],
        [unstated("a", "poisson"), draw("a", 0), {"type": "drop", "run": "a", "position": 0}],
        [unstated("a"), {"type": "book", "runs": ["a"]}],
    ],
)
def test_a_unit_that_was_stated_paid_for_or_drawn_by_is_never_changed(before: list[Entry]) -> None:
    ledger = registered(None)
    for body in before:
        ledger.append(body)
    assert not ledger.unit_open
    refused(ledger, chosen("z"))


def test_version_1_has_no_unit_to_choose() -> None:
    ledger = registered(version=1)
    ledger.append(unstated("a"))
    refused(ledger, chosen("z"))
    ledger.append(UPGRADE)
    ledger.append(chosen("z"))


# --- evaluations, and what was lost --------------------------------------------------------------


def test_an_evaluation_is_a_gaussian_release_by_a_run_of_any_name() -> None:
    ledger = registered()
    ledger.append(evaluation("tc-1", 2.0, 0.25))
    assert ledger.epsilon == gaussian_epsilon(0.5, DELTA)
    for body in (evaluation("tc-1", 2.0, 0.51), evaluation("", 2.0, 0.5),
                 evaluation("tc-1", 0.0, 0.5), evaluation("tc-1", 1e9, 0.25),
                 evaluation("tc-1", 2.0, 0.2)):  # fmt: skip
        refused(ledger, body)
    refused(ledger, evaluation("tc-1", 0.1, 100.25), DPBudgetExceededError, "cannot pay")
    again = evaluation("tc-1", 2.0, 0.5)
    ledger.append(again)
    refused(ledger, again | {"spent": 0.75})  # its id is used


def test_lost_uses_may_be_of_any_unit() -> None:
    ledger = registered()
    ledger.append(opening("a"))
    ledger.append(charge("a", 1, 1.0))
    ledger.append(evaluation("tc-1", 2.0, 1.25))
    before = ledger.epsilon
    ledger.append({"type": "book", "runs": ["a", "tc-1"]})
    assert (ledger.unknown, ledger.dropped, ledger.epsilon) == (1.25, 0, before)
    refused(ledger, {"type": "book", "runs": ["b"]})
    ledger.append({"type": "book", "runs": ["a"]})
    assert ledger.unknown == 1.25


def test_booking_passes_over_a_draw_that_may_have_been_told() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson"))
    ledger.append(opening("b"))
    ledger.append(draw("a", 0))
    ledger.append({"type": "book", "runs": ["b"]})
    assert (ledger.position, ledger.told, ledger.dropped) == (1, None, 1)


# --- from version 1 to version 2 -----------------------------------------------------------------


def test_an_upgraded_ledger_keeps_its_past() -> None:
    ledger = registered(version=1)
    for run, contract in (("a", "participation"), ("b", "participation"), ("p", "poisson"),
                          ("w", "worst_case")):  # fmt: skip
        ledger.append(opening(run, contract, sigma=4.0))
    old = {"type": "charge", "epoch": 1}
    for number, run in enumerate(["a", "b", "p", "w"]):
        ledger.append(old | {"run": run, "charge": f"c{number}", "count": 1})
    for later in (draw("p", 1), evaluation("a", 2.0, 0.25), charge("a", 2, 0.25),
                  {"type": "drop", "run": None, "position": 1}):  # fmt: skip
        refused(ledger, later)
    before = ledger.epsilon
    ledger.append(UPGRADE)
    assert ledger.epsilon == pytest.approx(before, rel=1e-8)
    assert (ledger.everyone, ledger.spent) == (1 / 16, 2 / 16)
    assert (ledger.position, ledger.unbound, ledger.told) == (1, 1, None)
    refused(ledger, UPGRADE)
    refused(ledger, old | {"run": "a", "charge": "x", "count": 2})
    ledger.append(draw("p", 1))
    ledger.append(charge("a", 2, 3 / 16))
    refused(registered(), UPGRADE)
    refused(registered(version=1), UPGRADE | {"version": 3})


# --- newer releases ------------------------------------------------------------------------------


def chained(bodies: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Returns a chain with valid hashes and no rules."""
    head, entries = GENESIS, []
    for seq, body in enumerate(bodies):
        entry = dict(body) | {"seq": seq, "prev": head}
        head = entry["hash"] = entry_hash(entry)
        entries.append(entry)
    return entries


FIRST = registration("d", 8.0, DELTA, "example", "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    "bodies",
    [
        [FIRST | {"version": 3}], [FIRST, {"type": "segment", "run": "a"}],
        [FIRST | {"version": 1}, {"type": "upgrade", "version": 3}],
        [FIRST | {"version": 3, "strategy": "banded"}],
    ],
)  # fmt: skip
def test_an_entry_of_a_newer_release_is_called_so(bodies: list[Entry]) -> None:
    at, entries = len(bodies) - 1, chained(bodies)
    with pytest.raises(IntegrityError, match=f"entry {at} .*written by a newer release.*newest"):
        Ledger.replay(entries)
    entries[at]["hash"] = "0" * 64
    with pytest.raises(IntegrityError, match=f"entry {at} "):
        Ledger.replay(entries)


# --- frozen vectors ------------------------------------------------------------------------------


def body_of(entry: Entry) -> Entry:
    return {key: value for key, value in entry.items() if key not in ("seq", "prev", "hash")}


def read(name: str) -> list[Entry]:
    return [json.loads(line) for line in (VECTORS / name).read_text().splitlines()]


EXPECTED: Mapping[str, Any] = json.loads((VECTORS / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED["good"]))
def test_frozen_ledgers_keep_their_heads_and_epsilons(name: str) -> None:
    ledger, expected = Ledger.replay(read(name)), EXPECTED["good"][name]
    assert ledger.head == expected["head"]
    assert ledger.epsilon == pytest.approx(expected["epsilon"], rel=1e-9)
    assert (ledger.position, ledger.dropped) == (expected["position"], expected["dropped"])


@pytest.mark.parametrize("name", sorted(EXPECTED["broken"]))
def test_frozen_broken_ledgers_are_refused(name: str) -> None:
    entries = read(name)
    assert chained(body_of(entry) for entry in entries) == entries  # the rules alone refuse it
    at = len(entries) - 1
    with pytest.raises(IntegrityError, match=f"entry {at} of the ledger breaks a rule"):
        Ledger.replay(entries)
    Ledger.replay(entries[:at])


def test_every_vector_is_tested_and_every_type_of_entry_has_one() -> None:
    names = set(EXPECTED["good"]) | set(EXPECTED["broken"])
    assert {path.name for path in VECTORS.glob("*.jsonl")} == names
    good = {entry["type"] for name in EXPECTED["good"] for entry in read(name)}
    broken = {read(name)[-1]["type"] for name in EXPECTED["broken"]}
    assert good == set(Ledger()._rules()) - {"unnoised", "link", "release"}
    assert broken >= {
        "upgrade",
        "unit",
        "draw",
        "charge",
        "drop",
        "evaluation",
        "fall_back",
        "book",
    }
