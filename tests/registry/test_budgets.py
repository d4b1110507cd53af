"""Tests ledgers in the registry: who may spend, what is stored, and many clients on one dataset."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.privacy.budget import Budget
from actors.registry.draws import Draw
from actors.registry.registry import Registry
from support.privacy_helpers import new_budget, planned_budget, private_config, registry
from tg_tinker import (
    ActorLostError,
    DPBudgetExceededError,
    DPConfig,
    InvalidRequestError,
    NotFoundError,
    TrainingConfig,
)
from tg_tinker.errors import IntegrityError, LedgerMismatchError
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge

pytestmark = pytest.mark.usefixtures("each_database")

CALLS = [("sha256:batch-4711", "sha256:gradient-4711")]


def units(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def opened(known: Registry, **values: Any) -> Budget:
    return new_budget(known, private_config(Path("none"), **values))


def charge(
    budget: Budget, numbers: list[bytes], noised: bool = True, told: tuple[int, str] | None = None
) -> Charge:
    return budget.registry.ledgers.charge(
        budget.tenant, budget.dataset, budget.run_id, budget.epoch, secrets.token_hex(16),
        numbers, noised, CALLS, (), told,
    )  # fmt: skip


def draw(budget: Budget, numbers: list[bytes]) -> Draw:
    return budget.registry.ledgers.draw(
        budget.tenant, budget.dataset, budget.run_id, budget.epoch, b"".join(sorted(numbers))
    )


def step(budget: Budget, numbers: list[bytes]) -> Charge:
    """Draws from these units, and charges what was drawn."""
    told = draw(budget, numbers)
    drawn = [sorted(numbers)[at] for at in told.drawn]
    return charge(budget, drawn, told=(told.position, told.units))


def evaluate(budget: Budget, numbers: list[bytes], sigma: float, dataset: str) -> Charge:
    return budget.registry.ledgers.evaluate(
        budget.tenant, dataset, budget.run_id, budget.epoch, secrets.token_hex(16), numbers, sigma
    )


def ledger_of(budget: Budget) -> Ledger:
    return Ledger.replay(budget.registry.ledgers.entries(budget.tenant, budget.dataset))


# --- registration --------------------------------------------------------------------------------


def test_what_was_promised_for_a_data_set_is_never_changed() -> None:
    known = registry()
    known.ledgers.register("default", "clinic", 8.0, 1e-5, "example")
    before = known.ledgers.entries("default", "clinic")
    known.ledgers.register("default", "clinic", 8.0, 1e-5, "example")  # the same again
    for other in ((9.0, 1e-5, "example"), (None, 1e-5, "example"), (8.0, 1e-6, "example"),
                  (8.0, 1e-5, "id")):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="never changed"):
            known.ledgers.register("default", "clinic", *other)
    assert known.ledgers.entries("default", "clinic") == before


def test_a_refused_plan_registers_nothing() -> None:
    known = registry()
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        opened(known, dp={"noise_multiplier": 0.1}, dataset_id="clinic")
    assert known.ledgers.datasets("default") == []


def test_a_data_set_of_another_tenant_does_not_exist() -> None:
    known = registry()
    known.ledgers.register("bank", "default", 8.0, 1e-5, "example")
    assert known.ledgers.entries("clinic", "default") == []
    assert known.ledgers.datasets("clinic") == []
    run = known.runs.create("clinic", '{"model_ref": "m"}')
    with pytest.raises(NotFoundError, match="no dataset 'default'"):
        known.ledgers.admit("clinic", "default", run, [])


def test_data_sets_have_different_unit_keys_which_are_stored_wrapped(tmp_path: Path) -> None:
    known = registry(tmp_path / "home")
    first, second = opened(known, dataset_id="a"), opened(known, dataset_id="b")
    assert first.key != second.key
    assert known.ledgers.unit_key("default", "a") == first.key
    for file in (tmp_path / "home").glob("registry.db*"):
        assert first.key not in file.read_bytes()
        assert first.key.hex().encode() not in file.read_bytes()


# --- the unit that nobody stated -----------------------------------------------------------------


def planned(known: Registry, unit: str | None, **values: Any) -> Budget:
    return planned_budget(known, private_config(Path("none"), dp={"unit": unit}, **values))


def kinds(known: Registry, dataset: str = "default") -> list[str]:
    return [entry["type"] for entry in known.ledgers.entries("default", dataset)]


def test_the_client_that_chooses_the_unit_opens_in_the_same_transaction() -> None:
    known = registry()
    first = opened(known, max_steps=2)
    key = known.ledgers.unit_keys("default")["default"]
    second = planned(known, "id").open()
    assert kinds(known) == ["register", "open", "unit", "open"]
    assert known.ledgers.unit_keys("default")["default"] == ("id", key[1])
    assert known.ledgers.entries("default", "default")[2]["run"] == second.run_id
    assert (second.unit, second.unit_stated) == ("id", True)
    before = known.ledgers.entries("default", "default")
    refusals = [
        lambda: charge(first, units(1)),
        lambda: first.admit(units(1)),
        lambda: first.note(units(1)),
        lambda: draw(first, units(1)),
    ]
    for refused in refusals:
        with pytest.raises(InvalidRequestError, match=r"before the unit .* create a new client"):
            refused()
    assert known.ledgers.entries("default", "default") == before
    assert charge(second, units(1)).count == 1


def test_a_plan_that_is_refused_chooses_no_unit() -> None:
    known = registry()
    first = opened(known)
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        planned_budget(known, private_config(
            Path("none"), dp={"unit": "id", "noise_multiplier": 0.1}
        ))  # fmt: skip
    late = planned(known, "id")
    assert late.plan is not None
    late.plan[0]["sigma"] = 0.1
    late.plan[0]["planned"] = 1
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        late.open()
    assert kinds(known) == ["register", "open"]
    charge(first, units(1))


@pytest.mark.parametrize(("unit", "meanwhile"), [("id", "example"), (None, "id"), ("id", None)])
def test_a_client_whose_plan_came_too_late_reserves_nothing(
    unit: str | None, meanwhile: str | None
) -> None:
    known = registry()
    first = opened(known)
    late = planned(known, unit)
    if meanwhile is None:
        charge(first, units(1))
    else:
        planned(known, meanwhile).open()
    before = kinds(known)
    with pytest.raises(InvalidRequestError, match=r"meanwhile.*create the client again"):
        late.open()
    assert kinds(known) == before
    assert planned(known, None).open().unit == ("id" if meanwhile == "id" else "example")


def test_of_clients_that_choose_at_once_one_writes_the_unit_and_all_open() -> None:
    known = registry()
    opened(known)
    budgets = [planned(known, "id", max_steps=1) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Budget.open, budgets))
    assert kinds(known) == ["register", "open", "unit", "open", "open", "open", "open"]
    for number, budget in enumerate(budgets):
        charge(budget, units(number))


def test_clients_that_choose_differently_at_once_leave_one_unit() -> None:
    known = registry()
    opened(known)
    budgets = [planned(known, unit) for unit in ("id", "example")]

    def try_to_open(budget: Budget) -> bool:
        try:
            budget.open()
        except InvalidRequestError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        worked = list(pool.map(try_to_open, budgets))
    assert sorted(worked) == [False, True]
    assert ledger_of(budgets[0]).registered["unit"] == budgets[worked.index(True)].unit


def test_another_first_client_is_told_how_to_choose() -> None:
    known = registry()
    late = planned(known, "id")  # nobody has registered the dataset yet
    opened(known)
    with pytest.raises(InvalidRequestError, match=r"nobody has chosen .*DPConfig\(unit='id'\)"):
        late.open()
    planned(known, "id").open()


def test_an_evaluation_by_a_unit_that_holds_no_more_is_not_charged() -> None:
    known = registry()
    run = opened(known, dataset_id="training")
    opened(known, dataset_id="held")
    planned(known, "id", dataset_id="held").open()
    asked = ("default", "held", run.run_id, run.epoch, "f" * 32, units(1), 2.0, ())
    with pytest.raises(InvalidRequestError, match="the unit of dataset 'held' is 'id'"):
        known.ledgers.evaluate(*asked, "example")
    assert kinds(known, "held") == ["register", "open", "unit", "open"]
    assert known.ledgers.evaluate(*asked, "id").dataset == "held"


# --- charges -------------------------------------------------------------------------------------


def test_two_clients_of_one_data_set_spend_one_budget() -> None:
    known = registry()
    first, second = opened(known), opened(known)
    made = [charge(first, units(1, 2)), charge(second, units(1, 2)), charge(first, units(3))]
    assert [round(c.total_epsilon, 3) for c in made] == [4.377, 6.573, 6.573]
    assert sum(c.epsilon_spent for c in made) == pytest.approx(made[-1].total_epsilon, abs=1e-9)
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        charge(second, units(1))
    assert ledger_of(first).epsilon == made[-1].total_epsilon


@pytest.mark.parametrize("contract", ["participation", "client_poisson"])
def test_an_actor_that_was_replaced_charges_nothing_and_changes_no_contract(contract: str) -> None:
    """500 rows where 50 are expected were not drawn, so the run would otherwise be counted by
    uses."""
    dp: dict[str, Any] = {"noise_multiplier": 20.0}
    if contract == "client_poisson":
        dp |= {"sampling": "client_poisson", "dataset_size": 500, "accountant_type": "rdp"}
    budget = opened(registry(), dp=dp, batch_size=50)
    charge(budget, units(*range(50)))
    before = budget.registry.ledgers.entries(budget.tenant, budget.dataset)
    budget.registry.runs.claim(budget.run_id)
    with pytest.raises(ActorLostError, match="may not charge"):
        charge(budget, units(*range(500)))
    assert budget.registry.ledgers.entries(budget.tenant, budget.dataset) == before


def test_two_contracts_on_one_data_set_are_filtered_and_add_up() -> None:
    known = registry()
    poisson = {
        "sampling": "poisson", "dataset_size": 8000, "accountant_type": "rdp",
        "noise_multiplier": 1.0,
    }  # fmt: skip
    first = opened(known, dp=poisson)
    second = opened(known, dp={"noise_multiplier": 4.0})
    all_units = units(*range(8000))
    made = [step(first, all_units), charge(second, units(1)), step(first, all_units),
            charge(second, units(1, 2))]  # fmt: skip
    totals = [c.total_epsilon for c in made]
    assert totals == sorted(totals)
    assert sum(c.epsilon_spent for c in made) == pytest.approx(totals[-1], abs=1e-9)
    assert totals[-1] <= 8


def test_the_last_charges_of_two_clients_at_once_never_overspend() -> None:
    known = registry()
    budgets = [opened(known, dp={"noise_multiplier": 1.5}) for _ in range(8)]

    def spend(budget: Budget) -> bool:
        try:
            charge(budget, units(1))
        except DPBudgetExceededError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        granted = sum(pool.map(spend, budgets))
    ledger = ledger_of(budgets[0])
    assert 0 < granted < 8
    assert ledger.epsilon <= 8
    assert sum(account.count for account in ledger.accounts.values()) == granted


def test_a_refused_charge_notes_no_use() -> None:
    budget = opened(registry(), dp={"max_participations": 1})
    charge(budget, units(1))
    before = budget.registry.ledgers.entries("default", "default")
    with pytest.raises(DPBudgetExceededError):
        charge(budget, units(1, 2))
    assert budget.registry.ledgers.entries("default", "default") == before
    assert budget.admit(units(1, 2)) == set(units(1))
    charge(budget, units(2))  # its use was not noted by the refused charge


def test_uses_of_ten_thousand_units_are_counted() -> None:
    budget = opened(registry(), dp={"noise_multiplier": 2.0, "max_participations": 2})
    many = units(*range(12_000))
    assert charge(budget, many).count == 1
    assert charge(budget, [*many[6_000:], *units(*range(12_000, 13_000))]).count == 2
    assert budget.admit(many) == set(many[6_000:])


def test_reservations_are_kept_from_others_and_given_back() -> None:
    known = registry()
    first = opened(known, dp={"noise_multiplier": 2.0, "max_participations": 6})
    with pytest.raises(DPBudgetExceededError, match="reserved"):
        opened(known, dp={"noise_multiplier": 2.0, "sampling": "worst_case"}, max_steps=6)
    known.ledgers.release("default", "default", first.run_id)
    length = ledger_of(first).length
    known.ledgers.release("default", "default", first.run_id)  # nothing is left to free
    assert ledger_of(first).length == length
    opened(known, dp={"noise_multiplier": 2.0, "sampling": "worst_case"}, max_steps=6)


def test_parking_a_run_frees_its_plan() -> None:
    known = registry()
    run = opened(known, dp={"noise_multiplier": 2.0, "max_participations": 6})
    charge(run, units(1))
    other = opened(known, dp={"noise_multiplier": 2.0})
    for _ in range(2):
        known.runs.park(run.run_id, run.epoch)  # again: only the answer was lost
        assert ledger_of(run).accounts[run.run_id].reserved == 0
    assert other.admit(units(1, 2)) == set()


def test_the_end_of_a_run_frees_its_plan_and_that_of_an_actor_it_had_before_does_not() -> None:
    known = registry()
    run = opened(known, dp={"noise_multiplier": 2.0, "max_participations": 6})
    back = known.runs.claim(run.run_id)
    known.runs.finish(
        run.run_id, run.epoch, "completed"
    )  # a client that does not know that it is back
    assert ledger_of(run).accounts[run.run_id].reserved == 6
    known.runs.finish(run.run_id, back, "completed")
    assert ledger_of(run).accounts[run.run_id].reserved == 0
    length = ledger_of(run).length
    known.runs.finish(run.run_id, back, "completed")  # only the answer was lost
    assert ledger_of(run).length == length


def test_a_run_that_comes_back_keeps_its_contract_and_its_uses() -> None:
    known = registry()
    config = private_config(Path("none"), dp={"max_participations": 1})
    run = new_budget(known, config)
    charge(run, units(1))
    epoch = known.runs.claim(run.run_id)
    again = Budget.planned(known, "default", run.run_id, epoch, config, "float32").open()
    assert again.key == run.key
    assert again.admit(units(1, 2)) == set(units(1))
    assert list(ledger_of(run).accounts) == [run.run_id]


# --- releases on another dataset -----------------------------------------------------------------


def test_an_evaluation_is_charged_to_the_units_of_the_other_data_set_alone() -> None:
    known = registry()
    run = opened(known, dataset_id="training")
    known.ledgers.register("default", "held out", 4.5, 1e-5, "example")
    first = evaluate(run, units(1, 2), 1.0, "held out")
    assert (first.dataset, first.sigma, round(first.total_epsilon, 3)) == ("held out", 1.0, 4.377)
    assert round(evaluate(run, units(3), 1.0, "held out").total_epsilon, 3) == 4.377
    assert known.ledgers.at_limit("default", "held out", run.run_id, units(1, 2, 3, 4), 1.0) == set(
        units(1, 2, 3)
    )
    assert known.ledgers.at_limit("default", "held out", run.run_id, units(1, 4), 8.0) == set()
    before = known.ledgers.entries("default", "held out")
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        evaluate(run, units(1, 4), 1.0, "held out")
    assert known.ledgers.entries("default", "held out") == before
    assert known.ledgers.at_limit("default", "held out", run.run_id, units(4), 1.0) == set()
    assert ledger_of(run).epsilon == 0


def test_an_evaluation_has_the_guarantees_of_a_charge() -> None:
    known = registry()
    run = opened(known, dataset_id="training")
    known.ledgers.register("default", "held out", 8.0, 1e-5, "example")
    asked = ("default", "held out", run.run_id, run.epoch, "f" * 32, units(1), 2.0)
    receipt = known.ledgers.evaluate(*asked)
    assert known.ledgers.evaluate(*asked) == receipt  # a repeat
    assert len(known.ledgers.entries("default", "held out")) == 2
    with pytest.raises(LedgerMismatchError, match="is known"):
        known.ledgers.evaluate(*asked[:4], "e" * 32, units(1), 2.0, ["9-" + "0" * 64])
    for tenant in ("clinic", "bank"):
        with pytest.raises(NotFoundError):
            known.ledgers.evaluate(tenant, *asked[1:4], "d" * 32, units(1), 2.0)
    known.runs.claim(run.run_id)
    with pytest.raises(ActorLostError, match="replaced"):
        known.ledgers.evaluate(*asked[:4], "e" * 32, units(1), 2.0)
    assert len(known.ledgers.entries("default", "held out")) == 2


# --- what is stored ------------------------------------------------------------------------------


def test_hashes_of_data_are_stored_keyed_only(tmp_path: Path) -> None:
    budget = opened(registry(tmp_path / "home"))
    charge(budget, units(1))
    other = opened(budget.registry)
    charge(other, units(2))
    for file in (tmp_path / "home").glob("registry.db*"):
        for call in CALLS:
            assert not any(part.encode() in file.read_bytes() for part in call)
    with budget.registry.database.engine.begin() as database:
        evidence = database.exec_driver_sql("select evidence from charges").scalars().all()
    for call in CALLS:
        assert not any(part in text for part in call for text in evidence)
    assert len(set(evidence)) == 2  # of equal batches: the key is the run's


def test_ledger_entries_hold_nothing_of_the_units() -> None:
    budget = opened(registry())
    charge(budget, units(77))
    text = str(budget.registry.ledgers.entries("default", "default"))
    assert units(77)[0].hex() not in text
    assert "4711" not in text


def test_an_entry_changed_in_the_database_is_noticed_by_the_next_registry(tmp_path: Path) -> None:
    budget = opened(registry(tmp_path / "home"))
    charge(budget, units(1))
    with budget.registry.database.engine.begin() as database:
        database.exec_driver_sql(
            "update ledger_entries set entry = replace(entry, '\"count\": 1', '\"count\": 0')"
            " where seq = 2"
        )
    with pytest.raises(IntegrityError, match="entry 2"):
        registry(tmp_path / "home").ledgers.charge(
            "default", "default", budget.run_id, budget.epoch, "f" * 32, units(2), True, CALLS
        )


# --- steps without noise -------------------------------------------------------------------------


def test_a_step_without_noise_is_infinite_for_ever_and_refused_elsewhere() -> None:
    known = registry()
    free = opened(known, dp={"target_epsilon": None}, dataset_id="free")
    assert charge(free, units(1), noised=False).total_epsilon == float("inf")
    assert charge(free, units(2)).total_epsilon == float("inf")
    limited = opened(known)
    with pytest.raises(DPBudgetExceededError, match="unlimited"):
        charge(limited, units(1), noised=False)
    assert ledger_of(limited).epsilon == 0


@pytest.mark.parametrize("config", [{}, {"dp_config": DPConfig(enabled=False)}])
def test_data_that_was_trained_on_without_privacy_gets_no_budget(config: dict[str, Any]) -> None:
    known = registry()
    open_run = TrainingConfig(model_ref="m", dataset_id="shared", **config)
    known.runs.create("default", open_run.model_dump_json())
    with pytest.raises(InvalidRequestError, match="without privacy"):
        known.ledgers.register("default", "shared", 8.0, 1e-5, "example")
    assert known.ledgers.entries("default", "shared") == []
    known.ledgers.register("another", "shared", 8.0, 1e-5, "example")  # of another tenant
    known.ledgers.register("default", "other", 8.0, 1e-5, "example")
