"""Tests the rules of a dataset's ledger, and what its chain of hashes does and does not detect."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.privacy.accountants import tabulate
from tg_tinker.errors import DPBudgetExceededError, IntegrityError
from tg_tinker.records.accounting import (
    filter_order,
    gaussian_epsilon,
    rdp_epsilon,
    subsampled_gaussian_epsilon,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.entries import GENESIS, Entry, entry_hash
from tg_tinker.records.ledger import Account, Ledger

VECTORS = Path(__file__).parents[1] / "vectors"
DELTA = 1e-5

Refusal = type[Exception] | tuple[type[Exception], ...]


def registered(epsilon: float | None = 8.0, unit: str = "example") -> Ledger:
    ledger = Ledger()
    ledger.append(registration(epsilon, unit))
    return ledger


def registration(epsilon: float | None = 8.0, unit: str = "example") -> Entry:
    order = filter_order(math.inf if epsilon is None else epsilon, DELTA)
    return {
        "type": "register", "version": 1, "dataset": "d", "epsilon": epsilon, "delta": DELTA,
        "unit": unit, "order": order, "born": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip


def opening(run: str, contract: str = "participation", **changes: Any) -> Entry:
    entry = {
        "type": "open", "run": run, "contract": contract, "sigma": 1.0, "rate": 1.0,
        "accountant": "exact", "table": [], "limit": None, "planned": 0, "facts": {"batch": 8},
    }  # fmt: skip
    if contract.endswith("poisson"):
        entry |= {"rate": 0.01, "accountant": "rdp"}
    return entry | changes


def charge(run: str, count: int, kind: str = "charge") -> Entry:
    return {"type": kind, "run": run, "epoch": 1, "charge": f"c{next(_ids)}", "count": count}


_ids = itertools.count()


def state(ledger: Ledger) -> dict[str, Any]:
    return copy.deepcopy(vars(ledger))


def chained(bodies: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Returns a chain with valid hashes and no rules, as a forger of the whole ledger can make
    it."""
    head, entries = GENESIS, []
    for seq, body in enumerate(bodies):
        entry = dict(body) | {"seq": seq, "prev": head}
        head = entry["hash"] = entry_hash(entry)
        entries.append(entry)
    return entries


def body_of(entry: Entry) -> Entry:
    return {key: value for key, value in entry.items() if key not in ("seq", "prev", "hash")}


def read(name: str) -> list[Entry]:
    return [json.loads(line) for line in (VECTORS / name).read_text().splitlines()]


# --- composition -----------------------------------------------------------------------------


def test_nothing_is_spent_before_the_first_charge() -> None:
    ledger = registered()
    ledger.append(opening("a", planned=2))
    assert ledger.epsilon == 0.0


@pytest.mark.parametrize(("uses", "epsilon"), [(1, 4.377), (2, 6.573)])
def test_uses_of_one_run(uses: int, epsilon: float) -> None:
    ledger = registered()
    ledger.append(opening("a"))
    for count in range(1, uses + 1):
        ledger.append(charge("a", count))
        ledger.append(charge("a", count))  # units used less often than the most used one
    assert ledger.epsilon == pytest.approx(epsilon, abs=1e-3)
    assert ledger.accounts["a"].steps == 2 * uses


def test_worst_case_counts_every_step() -> None:
    ledger = registered()
    ledger.append(opening("a", "worst_case", sigma=20.0))
    for count in range(1, 101):
        ledger.append(charge("a", count))
    assert ledger.epsilon == pytest.approx(1.99309, abs=1e-5)
    with pytest.raises(ValueError, match="from 100 to 100"):
        ledger.append(charge("a", 100))


def test_gaussian_runs_add_up_their_squares() -> None:
    ledger = registered()
    ledger.append(opening("a", sigma=2.0))
    ledger.append(opening("b", "worst_case", sigma=4.0))
    for count in (1, 2, 3):
        ledger.append(charge("a", count))
        ledger.append(charge("b", count))
    assert ledger.epsilon == gaussian_epsilon(math.sqrt(3 / 4 + 3 / 16), DELTA)


def test_one_sampled_run_alone_has_its_table_and_rounds_up_in_it() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson", table=[[1, 0.21], [2, 0.25], [4, 0.31]]))
    for count, epsilon in ((1, 0.21), (2, 0.25), (3, 0.31), (4, 0.31)):
        ledger.append(charge("a", count))
        assert ledger.epsilon == epsilon


def test_beyond_its_table_a_sampled_run_is_filtered() -> None:
    ledger = registered(None)
    ledger.append(opening("a", "poisson", table=[[1, 0.21]]))
    ledger.append(charge("a", 1))
    ledger.append(charge("a", 2))
    order = ledger.registered["order"]
    filtered = rdp_epsilon(2 * subsampled_gaussian_rdp(1.0, 0.01, order), order, DELTA)
    assert ledger.epsilon == filtered < math.inf


def test_a_table_is_never_worse_than_the_filter() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson", table=[[1, 7.9]]))
    ledger.append(charge("a", 1))
    assert ledger.epsilon < 7.9


def test_a_second_run_puts_both_through_the_filter() -> None:
    ledger = registered()
    ledger.append(opening("a", "poisson", table=[[1, 0.21], [2, 0.25]]))
    ledger.append(charge("a", 1))
    ledger.append(opening("b", sigma=4.0))
    assert ledger.epsilon == 0.21
    ledger.append(charge("b", 1))
    order = ledger.registered["order"]
    rdp = subsampled_gaussian_rdp(1.0, 0.01, order) + order / (2 * 16)
    assert ledger.epsilon == pytest.approx(rdp_epsilon(rdp, order, DELTA), rel=1e-12)
    assert ledger.epsilon > gaussian_epsilon(1 / 4, DELTA)


def test_contracts_are_strictly_ordered_for_the_same_steps() -> None:
    table = tabulate("rdp", 8.0, 0.01, DELTA, 8.0, 50)
    spent = []
    for contract, uses in (("poisson", 50), ("participation", 5), ("worst_case", 50)):
        ledger = registered()
        rows = [list(row) for row in table] if contract == "poisson" else []
        ledger.append(opening("a", contract, sigma=8.0, table=rows))
        for step in range(1, 51):
            ledger.append(charge("a", math.ceil(step * uses / 50)))
        assert ledger.accounts["a"].steps == 50
        spent.append(ledger.epsilon)
    assert spent[0] < spent[1] < spent[2]


TABLE = [[n, 0.2095 + 0.012 * (n - 1)] for n in range(1, 31)]

ACTIONS = st.lists(
    st.sampled_from(["use", "repeat", "sample", "release", "open"]), min_size=1, max_size=40
)


def act(ledger: Ledger, action: str) -> Entry:
    a, b = ledger.accounts["a"], ledger.accounts["b"]
    bodies = {
        "use": charge("a", a.count + 1),
        "repeat": charge("a", a.count),
        "sample": charge("b", b.count + 1),
        "release": {"type": "release", "run": "b"},
        "open": opening(f"c{ledger.length}", planned=1, sigma=3.0),
    }
    return bodies[action]


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_what_every_charge_spends_adds_up_to_the_total(actions: list[str]) -> None:
    ledger = registered()
    entries = [ledger.append(opening("a", sigma=2.0, planned=1))]
    entries += [ledger.append(opening("b", "poisson", table=TABLE, planned=5))]
    spent = []
    for action in actions:
        before, held = ledger.epsilon, state(ledger)
        try:
            entries.append(ledger.append(act(ledger, action)))
        except DPBudgetExceededError:
            assert state(ledger) == held
        spent.append(ledger.epsilon - before)
        assert spent[-1] >= 0
        assert ledger.epsilon <= ledger.limit
    assert math.fsum(spent) == pytest.approx(ledger.epsilon, abs=1e-9)
    replayed = Ledger.replay(chained([registration(), *map(body_of, entries)]))
    assert state(replayed) == state(ledger)


# --- the gate --------------------------------------------------------------------------------


def refused(ledger: Ledger, body: Entry, error: Refusal, match: str | None) -> None:
    before = state(ledger)
    with pytest.raises(error, match=match):
        ledger.append(body)
    assert state(ledger) == before


def test_a_charge_beyond_the_budget_changes_nothing() -> None:
    ledger = registered()
    ledger.append(opening("a"))
    ledger.append(charge("a", 1))
    ledger.append(charge("a", 2))
    refused(ledger, charge("a", 3), DPBudgetExceededError, "6.573 is spent")
    ledger.append(charge("a", 2))


def test_a_charge_beyond_the_runs_own_limit_changes_nothing() -> None:
    ledger = registered()
    ledger.append(opening("a", limit=1))
    ledger.append(charge("a", 1))
    refused(ledger, charge("a", 2), DPBudgetExceededError, "has used all 1 uses of a unit")


@pytest.mark.parametrize("contract", ["participation", "poisson", "client_poisson", "worst_case"])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, -1, 3.0, True, None, "4", math.nan])
def test_counts_neither_fall_nor_jump(contract: str, count: Any) -> None:
    ledger = registered(None)
    ledger.append(opening("a", contract))
    for n in (1, 2, 3):
        ledger.append(charge("a", n))
    if count == 4:
        ledger.append(charge("a", count))
    else:
        refused(ledger, charge("a", 0) | {"count": count}, (ValueError, TypeError), None)
    if contract == "participation":
        ledger.append(charge("a", ledger.accounts["a"].count))


def test_unnoised_and_fallen_back_counts_are_held_to_the_same_rule() -> None:
    ledger = registered(None)
    ledger.append(opening("a"))
    refused(ledger, charge("a", 2, "unnoised"), ValueError, "from 0 to 2")


def test_reservations_are_kept_for_the_living_and_given_back() -> None:
    ledger = registered()
    ledger.append(opening("a", planned=1))
    ledger.append(opening("b"))
    refused(ledger, opening("c", planned=2), DPBudgetExceededError, "reservations of living")
    ledger.append(charge("b", 1))
    refused(ledger, charge("b", 2), DPBudgetExceededError, "cannot pay")
    assert ledger.epsilon == pytest.approx(4.377, abs=1e-3)  # reserved is not spent
    ledger.append({"type": "release", "run": "a"})
    ledger.append(charge("b", 2))
    refused(ledger, charge("a", 1), DPBudgetExceededError, "cannot pay")


def test_a_used_reservation_is_not_counted_twice() -> None:
    ledger = registered()
    ledger.append(opening("a", planned=1))
    ledger.append(charge("a", 1))
    ledger.append(opening("b", planned=1))
    ledger.append(charge("b", 1))


def test_epsilon_with_is_the_gate() -> None:
    ledger = registered()
    ledger.append(opening("a", planned=1))
    stand_in = Account("participation", 1.0, 1.0, "exact", (), None, 0)
    before = state(ledger)
    assert ledger.epsilon_with("", 1, stand_in) == gaussian_epsilon(math.sqrt(2), DELTA)
    assert ledger.epsilon_with("a", 0) == 0.0
    assert state(ledger) == before


def test_a_sampled_run_cannot_be_pushed_out_of_its_reservation() -> None:
    ledger = registered(1.0)
    ledger.append(opening("a", "poisson", table=TABLE[:20], planned=20))
    ledger.append(opening("b", sigma=50.0))
    # Two runs go through the filter, where 20 steps alone cost more than epsilon 1.
    refused(ledger, charge("b", 1), DPBudgetExceededError, "cannot pay")
    for count in range(1, 21):
        ledger.append(charge("a", count))


# --- asserted samples, steps without noise, links -----------------------------------------------


def fallen(epsilon: float | None = 8.0, count: int = 4, steps: int = 10) -> Ledger:
    ledger = registered(epsilon)
    ledger.append(opening("a", "client_poisson", table=TABLE, limit=30, planned=30))
    for n in range(1, steps + 1):
        ledger.append(charge("a", n))
    ledger.append({"type": "fall_back", "run": "a", "count": count, "limit": None})
    return ledger


def test_fall_back_accounts_all_steps_again() -> None:
    ledger = fallen()
    account = ledger.accounts["a"]
    assert ledger.epsilon == gaussian_epsilon(2.0, DELTA) > 8.0  # the truth, over the limit
    assert (account.contract, account.rate, account.table) == ("participation", 1.0, ())
    assert (account.count, account.steps, account.reserved) == (4, 10, 0)
    refused(ledger, charge("a", 5), DPBudgetExceededError, "cannot pay")
    refused(ledger, charge("a", 4), DPBudgetExceededError, "cannot pay")
    body = {"type": "fall_back", "run": "a", "count": 4, "limit": None}
    refused(ledger, body, ValueError, "only an asserted")


@pytest.mark.parametrize("count", [11, -1, 1.5, True])
def test_fall_back_counts_what_can_have_been_used(count: Any) -> None:
    ledger = registered()
    ledger.append(opening("a", "client_poisson", table=TABLE))
    for n in range(1, 11):
        ledger.append(charge("a", n))
    body = {"type": "fall_back", "run": "a", "count": count, "limit": None}
    refused(ledger, body, ValueError, None)


@pytest.mark.parametrize("contract", ["participation", "poisson", "worst_case"])
def test_only_an_asserted_sample_falls_back(contract: str) -> None:
    ledger = registered()
    ledger.append(opening("a", contract))
    body = {"type": "fall_back", "run": "a", "count": 0, "limit": None}
    refused(ledger, body, ValueError, "only an asserted")


def test_a_step_without_noise_needs_an_unlimited_data_set() -> None:
    ledger = registered(1e6)
    ledger.append(opening("a"))
    refused(ledger, charge("a", 1, "unnoised"), DPBudgetExceededError, "unlimited epsilon")


def test_after_a_step_without_noise_epsilon_is_infinite_for_ever() -> None:
    ledger = registered(None)
    ledger.append(opening("a"))
    ledger.append(charge("a", 1))
    assert ledger.epsilon < math.inf
    ledger.append(charge("a", 2, "unnoised"))
    ledger.append(charge("a", 3))
    ledger.append({"type": "release", "run": "a"})
    ledger.append(opening("b", "client_poisson"))
    ledger.append({"type": "fall_back", "run": "b", "count": 0, "limit": None})
    assert ledger.epsilon == math.inf
    assert ledger.accounts["a"].steps == 3


@pytest.mark.parametrize("runs", [[], ["b"], ["a", "b"], None])
def test_what_books_no_known_run_changes_nothing(runs: Any) -> None:
    ledger = registered()
    ledger.append(opening("a"))
    before = state(ledger)
    with pytest.raises((ValueError, KeyError, TypeError)):
        ledger.append({"type": "book", "runs": runs})
    assert state(ledger) == before


def test_a_booked_run_charges_no_more_and_reserves_nothing() -> None:
    ledger = registered()
    ledger.append(opening("a", "client_poisson", planned=5))
    ledger.append(charge("a", 1))
    ledger.append({"type": "book", "runs": ["a"]})
    fall_back = {"type": "fall_back", "run": "a", "count": 1, "limit": None}
    for body in (charge("a", 2), fall_back):
        with pytest.raises(DPBudgetExceededError, match="new client"):
            ledger.append(body)
    assert (ledger.accounts["a"].count, ledger.accounts["a"].reserved) == (1, 0)


def test_links_add_up() -> None:
    ledger = registered()
    ledger.append(opening("a"))
    ledger.append({"type": "link", "run": "a", "datasets": ["x", "y"]})
    ledger.append({"type": "link", "run": "a", "datasets": ["y", "z"]})
    assert ledger.linked == {"x", "y", "z"}
    refused(ledger, {"type": "link", "run": "b", "datasets": ["x"]}, ValueError, "not a run")


# --- entries that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"contract": "shuffled"}, {"sigma": 0}, {"sigma": -1.0}, {"sigma": math.nan},
        {"sigma": math.inf}, {"sigma": 1e-200}, {"sigma": 1e200}, {"sigma": "1"},
        {"rate": 0.5}, {"table": [[1, 0.3]]}, {"planned": -1}, {"planned": 0.5},
        {"planned": 3, "limit": 2}, {"limit": -1}, {"limit": 2.5}, {"limit": True},
        {"facts": {"x": math.nan}}, {"facts": {"x": b"bytes"}}, {"facts": {"x": {1, 2}}},
        {"run": "a"}, {"extra": 1}, {"seq": 7}, {"prev": GENESIS}, {"hash": GENESIS},
        {"type": "opened"},
    ],
)  # fmt: skip
def test_an_opening_that_makes_no_sense_changes_nothing(changes: Entry) -> None:
    ledger = registered()
    ledger.append(opening("a"))
    refused(ledger, opening("b") | changes, (ValueError, TypeError, KeyError), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.0}, {"rate": 1.5}, {"rate": -0.1},
        {"table": [[1, 0.5], [2, 0.4]]}, {"table": [[2, 0.4], [1, 0.5]]},
        {"table": [[1, 0.3], [1, 0.4]]}, {"table": [[0, 0.3], [1, 0.4]]},
        {"table": [[1.5, 0.3]]}, {"table": [[1, math.inf]]}, {"table": [[1, math.nan]]},
        {"table": [[1, 0.0], [1000, 0.0]]}, {"table": [[1, 0.19]]}, {"table": [[1]]},
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_true_is_refused(changes: Entry) -> None:
    ledger = registered()
    body = opening("b", "poisson") | changes
    refused(ledger, body, (ValueError, TypeError), None)
    # The exact epsilon of one step is the least that may stand there.
    least = subsampled_gaussian_epsilon(1.0, 0.01, DELTA)
    ledger.append(opening("b", "poisson", table=[[1, least], [2, least]]))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3}, {"version": 0}, {"version": True},
        {"delta": 0.0}, {"delta": 1.0}, {"epsilon": 0.0}, {"epsilon": -1.0},
        {"epsilon": math.inf}, {"epsilon": math.nan}, {"unit": "user"}, {"order": 1},
        {"order": 2.5}, {"order": 10**9}, {"type": "open"}, {"born": None, "x": 1},
    ],
)  # fmt: skip
def test_a_registration_that_makes_no_sense_changes_nothing(changes: Entry) -> None:
    ledger = Ledger()
    refused(ledger, registration() | changes, (ValueError, TypeError, KeyError), None)


def test_a_ledger_is_registered_once_and_first() -> None:
    refused(registered(), registration(), ValueError, "the first entry, and no other")
    refused(Ledger(), opening("a"), ValueError, "the first entry, and no other")


@pytest.mark.parametrize("kind", ["charge", "unnoised", "fall_back", "release"])
def test_a_run_must_be_open(kind: str) -> None:
    bodies = {"release": {"type": "release", "run": "x"}}
    bodies["fall_back"] = {"type": "fall_back", "run": "x", "count": 0, "limit": None}
    refused(registered(None), bodies.get(kind, charge("x", 1, kind)), KeyError, "x")


def test_what_json_cannot_hold_is_refused_before_it_is_applied() -> None:
    ledger = registered()
    ledger.append(opening("a"))
    refused(ledger, charge("a", 1) | {"charge": b"raw"}, TypeError, None)
    assert ledger.epsilon == 0.0


def test_an_entry_is_a_copy() -> None:
    ledger, facts = registered(), {"batch": 8}
    entry = ledger.append(opening("a", facts=facts))
    facts["batch"] = 9
    assert entry["facts"] == ledger.accounts["a"].facts == {"batch": 8}
    assert entry["hash"] == entry_hash(entry)


# --- the chain -----------------------------------------------------------------------------------


def other(value: Any) -> Any:
    """Returns another value of the same kind, as close as possible."""
    if isinstance(value, dict):
        return value | {"forged": 1}
    if isinstance(value, list):
        return value[:-1] if value else [[1, 5.0]]
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return math.nextafter(value, 2 * value)
    return value[:-1] + ("0" if value[-1] != "0" else "1")


GOOD = ("good.jsonl", "unlimited.jsonl")


@pytest.mark.parametrize("name", GOOD)
def test_every_change_of_every_field_is_noticed(name: str) -> None:
    entries = read(name)
    for at, entry in enumerate(entries):
        for key in entry:
            forged = [dict(e) for e in entries]
            forged[at][key] = other(entry[key])
            with pytest.raises(IntegrityError, match=f"entry {at} "):
                Ledger.replay(forged)


def test_a_number_written_otherwise_is_noticed() -> None:
    entries = read("good.jsonl")
    for forged in (True, 1.0):  # equal to 1 in Python
        changed = [dict(e) for e in entries]
        at = next(i for i, e in enumerate(changed) if e.get("count") == 1)
        changed[at]["count"] = forged
        with pytest.raises(IntegrityError, match=f"entry {at} "):
            Ledger.replay(changed)


@pytest.mark.parametrize("name", GOOD)
def test_entries_left_out_added_or_moved_are_noticed(name: str) -> None:
    entries = read(name)
    for at in range(len(entries) - 1):
        swapped = [*entries[:at], entries[at + 1], entries[at], *entries[at + 2 :]]
        for forged in (entries[:at] + entries[at + 1 :], entries[: at + 1] + entries[at:], swapped):
            with pytest.raises(IntegrityError):
                Ledger.replay(forged)


def test_keys_added_or_taken_away_are_noticed() -> None:
    entries = read("good.jsonl")
    for at, entry in enumerate(entries):
        for key in entry:
            less = [dict(e) for e in entries]
            del less[at][key]
            with pytest.raises(IntegrityError):
                Ledger.replay(less)
        with pytest.raises(IntegrityError):
            Ledger.replay([*entries[:at], entry | {"note": ""}, *entries[at + 1 :]])


@pytest.mark.parametrize("junk", [None, 7, "entry", [], {}, {"type": None}, {"type": []}])
def test_what_is_no_entry_is_noticed(junk: Any) -> None:
    with pytest.raises(IntegrityError, match="entry 1 "):
        Ledger.replay([*read("good.jsonl")[:1], junk])


def test_a_cut_or_rewritten_chain_is_noticed_by_its_head_alone() -> None:
    # A chain cannot know that it goes on: whoever relies on it must hold the head.
    entries = read("good.jsonl")
    whole, cut = Ledger.replay(entries), Ledger.replay(entries[:-1])
    assert cut.head == entries[-2]["hash"] != whole.head
    assert cut.birth == whole.birth
    bodies = [body_of(entry) for entry in entries]
    rewritten = Ledger.replay(chained(bodies[:2] + bodies[3:4] + bodies[2:3]))
    assert rewritten.head != whole.head


@pytest.mark.parametrize("name", GOOD)
def test_replay_is_the_ledger_that_was_written(name: str) -> None:
    entries = read(name)
    written = Ledger()
    for entry in entries:
        assert written.append(body_of(entry)) == entry
    assert state(Ledger.replay(entries)) == state(written)


# --- frozen vectors ------------------------------------------------------------------------------


def test_frozen_ledgers_keep_their_heads_and_epsilons() -> None:
    expected = json.loads((VECTORS / "expected.json").read_text())
    for name in GOOD:
        ledger = Ledger.replay(read(name))
        assert ledger.head == expected[name]["head"]
        assert ledger.length == expected[name]["entries"]
        epsilon = expected[name]["epsilon"]
        assert ledger.epsilon == pytest.approx(math.inf if epsilon is None else epsilon, rel=1e-9)


BROKEN: Mapping[str, Mapping[str, str]] = json.loads((VECTORS / "broken.json").read_text())


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_frozen_broken_ledgers_are_refused(name: str) -> None:
    entries = read(name)
    assert BROKEN[name]["reason"]
    with pytest.raises(IntegrityError, match=BROKEN[name]["says"]):
        Ledger.replay(entries)
    if "breaks a rule" in BROKEN[name]["says"]:
        # Forged as a whole: every hash is right, and the rules alone refuse it.
        assert chained(body_of(entry) for entry in entries) == entries


def test_every_vector_is_tested() -> None:
    files = {path.name for path in VECTORS.glob("*.jsonl")}
    assert files == set(GOOD) | set(BROKEN)
