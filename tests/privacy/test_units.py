"""Tests which unit a private run protects: the one that is stated, and what rows with ids mean
where nobody stated one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.model import Base
from actors.privacy import units
from actors.privacy.budget import Budget
from actors.registry.registry import Registry
from support.privacy_helpers import (
    ROWS,
    PrivateSession,
    distance,
    perturb,
    private_config,
    registry,
    rows,
    sums,
)
from tg_tinker import (
    DPConfig,
    InvalidRequestError,
    OptimizerConfig,
    TrainingConfig,
    WindowSpoiledError,
)
from tg_tinker.data.batch import Example
from tg_tinker.errors import ClusterUnavailableError
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import UNITS, PrivacyReport

IDS = ["alice"] * 8


def session(model: Path, known: Registry, **dp: Any) -> PrivateSession:
    return of_config(model, known, private_config(model, dp=dp))


def of_config(model: Path, known: Registry, config: TrainingConfig) -> PrivateSession:
    run_id = known.runs.create("default", config.model_dump_json())
    return claimed(model, known, config, run_id)


def claimed(model: Path, known: Registry, config: TrainingConfig, run_id: str) -> PrivateSession:
    epoch = known.runs.claim(run_id)
    budget = Budget.planned(known, "default", run_id, epoch, config, "float32")
    return PrivateSession(Base.load(str(model), cache=model), config, budget)


def kinds(known: Registry) -> list[str]:
    return [entry["type"] for entry in known.ledgers.entries("default", "default")]


def test_ids_without_a_stated_unit_are_refused_before_any_charge(tiny_model: Path) -> None:
    known = registry()
    s = session(tiny_model, known)
    with pytest.raises(InvalidRequestError, match="example_ids") as refusal:
        s.forward_backward(rows(example_ids=IDS))
    for way_out in ('DPConfig(unit="id")', 'DPConfig(unit="example")', "create the client again"):
        assert way_out in str(refusal.value)
    assert "dataset_id" not in str(refusal.value)
    assert "alice" not in str(refusal.value)
    with pytest.raises(WindowSpoiledError):
        s.optim_step()
    assert kinds(known) == ["register", "open"]


def test_rows_without_ids_are_examples_where_nobody_states_a_unit(tiny_model: Path) -> None:
    known = registry()
    s = session(tiny_model, known)
    s.forward_backward(rows())
    assert len(s._pending.units) == 8
    ledger = Ledger.replay(known.ledgers.entries("default", "default"))
    assert ledger.registered["unit"] == "example"
    (account,) = ledger.accounts.values()
    assert (account.facts["unit"], account.facts["unit_stated"]) == ("example", False)
    with pytest.raises(InvalidRequestError, match="example_ids"):
        s.forward_backward(rows(example_ids=IDS))


def test_an_explicit_example_takes_rows_with_ids(tiny_model: Path) -> None:
    s = session(tiny_model, registry(), unit="example")
    s.forward_backward(rows(example_ids=IDS))
    assert len(s._pending.units) == 8


@pytest.mark.parametrize(("unit", "count"), [("id", 1), ("example", 8)])
def test_a_registered_data_set_states_the_unit(tiny_model: Path, unit: str, count: int) -> None:
    known = registry()
    known.ledgers.register("default", "default", 8.0, 1e-5, unit)
    s = session(tiny_model, known)
    s.forward_backward(rows(example_ids=IDS))
    assert len(s._pending.units) == count
    with pytest.raises(InvalidRequestError, match="use the dataset's unit"):
        session(tiny_model, known, unit="example" if unit == "id" else "id")


def test_a_registered_id_needs_ids(tiny_model: Path) -> None:
    known = registry()
    known.ledgers.register("default", "default", 8.0, 1e-5, "id")
    with pytest.raises(InvalidRequestError, match="pass example_ids"):
        session(tiny_model, known).forward_backward(rows())


def test_later_runs_on_a_data_set_inherit_what_was_left_open(tiny_model: Path) -> None:
    known = registry()
    session(tiny_model, known, max_participations=1)
    later = session(tiny_model, known, max_participations=1, noise_multiplier=4.0)
    with pytest.raises(InvalidRequestError, match="example_ids"):
        later.forward_backward(rows(example_ids=IDS))
    # A run that states the unit decides for itself.
    stated = {"max_participations": 1, "noise_multiplier": 4.0, "unit": "example"}
    session(tiny_model, known, **stated).forward_backward(rows(example_ids=IDS))


@pytest.mark.parametrize(("unit", "count"), [("id", 1), ("example", 8)])
def test_both_ways_out_of_a_refusal_keep_the_data_set(
    tiny_model: Path, unit: str, count: int
) -> None:
    known = registry()
    with pytest.raises(InvalidRequestError, match="example_ids"):
        session(tiny_model, known, max_participations=1).forward_backward(rows(example_ids=IDS))
    s = session(tiny_model, known, max_participations=1, unit=unit)
    s.forward_backward(rows(example_ids=IDS))
    assert len(s._pending.units) == count
    s.optim_step()
    ledger = Ledger.replay(entries := known.ledgers.entries("default", "default"))
    assert ledger.registered["unit"] == unit
    assert PrivacyReport(entries).certificate()["unit"] == UNITS[unit]
    assert ledger.accounts[s.budget.run_id].facts["unit"] == unit
    assert kinds(known) == ["register", "open", *["unit"] * (unit == "id"), "open", "charge"]
    # A later run takes the unit that was chosen.
    later = session(tiny_model, known, max_participations=1)
    later.forward_backward(rows(example_ids=IDS))
    assert len(later._pending.units) == count


def test_a_run_that_was_opened_before_the_unit_was_chosen_takes_no_step(tiny_model: Path) -> None:
    known, config = registry(), private_config(tiny_model)
    old, idle = of_config(tiny_model, known, config), of_config(tiny_model, known, config)
    old.forward_backward(rows())
    session(tiny_model, known, unit="id")
    message = "opened before the unit of dataset 'default' was chosen.*create a new client"
    with pytest.raises(InvalidRequestError, match=message):
        old.optim_step()
    again = claimed(tiny_model, known, config, idle.budget.run_id)
    for ids in (None, IDS):
        with pytest.raises(InvalidRequestError, match=message):
            idle.forward_backward(rows(example_ids=ids))
    with pytest.raises(InvalidRequestError, match=message):
        again.forward_backward(rows(example_ids=IDS))
    assert kinds(known) == ["register", "open", "open", "unit", "open"]


def test_after_a_charge_only_another_data_set_gets_the_unit(tiny_model: Path) -> None:
    known = registry()
    s = session(tiny_model, known)
    s.forward_backward(rows())
    s.optim_step()
    with pytest.raises(InvalidRequestError, match="with another dataset_id, since 'default'"):
        s.forward_backward(rows(example_ids=IDS))
    with pytest.raises(InvalidRequestError, match="use the dataset's unit"):
        session(tiny_model, known, unit="id")


def test_a_run_that_goes_on_elsewhere_still_refuses_ids(tiny_model: Path) -> None:
    known, config = registry(), private_config(tiny_model)
    first = of_config(tiny_model, known, config)
    again = claimed(tiny_model, known, config, first.budget.run_id)
    with pytest.raises(InvalidRequestError, match="example_ids"):
        again.forward_backward(rows(example_ids=IDS))


def test_a_run_of_an_earlier_release_stated_its_unit(tiny_model: Path) -> None:
    """Earlier configs hold the unit, and earlier ledgers have no fact about who chose it."""
    known = registry()
    old = private_config(tiny_model).model_dump(mode="json")
    old["dp_config"]["unit"] = "example"
    s = of_config(tiny_model, known, TrainingConfig.model_validate(old))
    s.forward_backward(rows(example_ids=IDS))
    assert len(s._pending.units) == 8


def test_poisson_samples_are_not_drawn_from_ids_without_a_stated_unit(tiny_model: Path) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    s = of_config(tiny_model, known, private_config(tiny_model, batch_size=2, dp=dp))
    with pytest.raises(InvalidRequestError, match="example_ids"):
        s.poisson.register(rows(example_ids=IDS))
    with pytest.raises(InvalidRequestError, match="no dataset is registered"):
        s.poisson.draw(0)
    assert kinds(known) == ["register", "open"]


def test_units_of_samples_are_forgotten_with_the_unit(tiny_model: Path) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    s = of_config(tiny_model, known, private_config(tiny_model, batch_size=2, dp=dp))
    s.poisson.register(rows())
    assert known.ledgers.counted_units("default", "default") == 8
    config = private_config(tiny_model, batch_size=2, dp=dp | {"unit": "id"})
    of_config(tiny_model, known, config)
    assert known.ledgers.counted_units("default", "default") == 0
    with pytest.raises(InvalidRequestError, match="before the unit of dataset"):
        s.poisson.register(rows())
    assert known.ledgers.counted_units("default", "default") == 0


def test_measuring_the_loss_of_rows_with_ids_is_free(tiny_model: Path) -> None:
    s = session(tiny_model, registry())
    assert s.forward_backward(rows(ROWS[:2], example_ids=["a", "b"]), train=False).loss > 0


# --- one content under several ids ---------------------------------------------------------------


def test_contents_under_another_id_are_counted_for_the_owner_alone(tiny_model: Path) -> None:
    known = registry()
    s = session(tiny_model, known, unit="example")
    first = s.forward_backward(rows(ROWS[:3], example_ids=["a", "b", "c"]))
    assert first.warnings == ()
    s.optim_step()
    again = s.forward_backward(rows(ROWS[:4], example_ids=["a", "x", "y", "d"]))
    assert "2 of 4 rows have the tokens of earlier rows with another id" in again.warnings[0]
    s.optim_step()
    told = json.dumps(PrivacyReport(known.ledgers.entries("default", "default")).certificate())
    assert "another id" not in told
    assert not {"x", "y"} & set(told.split('"'))


def test_shared_contents_are_hidden_with_the_private_metrics(tiny_model: Path) -> None:
    s = session(tiny_model, registry(), unit="example", show_private_metrics=False)
    for name in "ab":
        assert s.forward_backward(rows(ROWS[:1], example_ids=[name])).warnings == ()


def test_shared_contents_need_ids_of_people_and_the_unit_example(tiny_model: Path) -> None:
    for dp, ids in (({}, None), ({"unit": "id"}, ["a", "b"])):
        s = session(tiny_model, registry(), **dp)
        result = s.forward_backward(rows([ROWS[0], ROWS[0]], example_ids=ids))
        assert not any("another id" in warning for warning in result.warnings)


def test_the_memory_of_contents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MOST_REMEMBERED", 1)
    shared = units.SharedContents()
    both = rows(ROWS[:2], example_ids=["a", "a"])
    assert shared.count(both, [b"one", b"two"]) == 0
    assert shared.count(rows(ROWS[:2], example_ids=["b", "b"]), [b"one", b"two"]) == 1


def released(model: Path, calls: Sequence[Sequence[Example]]) -> list[dict[str, torch.Tensor]]:
    """Returns the clipped sum of each step of a run in which each unit may be used once."""
    config = private_config(
        model, dp={"unit": "example", "max_participations": 1, "max_grad_norm": 1e-3},
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-30),
    )  # fmt: skip
    s = of_config(model, registry(), config)
    perturb(s)
    found = []
    for call in calls:
        s.forward_backward(call)
        found.append(sums(s))
        s.optim_step()
    return found


def moved(model: Path, calls: Sequence[list[Example]]) -> float:
    """Returns how far the sums move, in units of C, if the very first row is nulled."""
    before, after = released(model, calls), released(model, [calls[0][1:], *calls[1:]])
    return sum(distance(a, b) ** 2 for a, b in zip(before, after, strict=True)) ** 0.5 / 1e-3


def test_one_of_two_people_with_equal_rows_has_mu_times_the_root_of_two(tiny_model: Path) -> None:
    """The row of one person takes the place of the other's, in a step of its own."""
    calls = [rows([ROWS[0], ROWS[1]]), rows([ROWS[0], ROWS[2]])]
    assert moved(tiny_model, calls) == pytest.approx(2**0.5, rel=1e-3)


def test_equal_tokens_with_other_labels_move_at_most_twice_the_bound(tiny_model: Path) -> None:
    other = [-100, -100, *ROWS[0][2:]]
    calls = [rows([ROWS[0], ROWS[0], ROWS[1]], labels=[ROWS[0], other, ROWS[1]])]
    assert 0 < moved(tiny_model, calls) <= 2


def test_no_unit_is_stated_by_default() -> None:
    assert DPConfig().unit is None


# --- delta and the number of units ---------------------------------------------------------------


def step(s: PrivateSession, *ids: Sequence[int]) -> tuple[str, ...]:
    s.forward_backward(rows(ids))
    return tuple(warning for warning in s.optim_step().warnings if "delta" in warning)


def test_the_charge_that_makes_delta_too_large_for_the_units_warns_once(tiny_model: Path) -> None:
    known = registry()
    config = private_config(
        tiny_model, batch_size=2, dp={"noise_multiplier": 4.0, "target_delta": 0.25}
    )
    s = of_config(tiny_model, known, config)
    assert step(s, *ROWS[:2]) == ()
    assert step(s, *ROWS[:2]) == ()  # the same two units
    assert known.ledgers.counted_units("default", "default") == 2
    (warning,) = step(s, *ROWS[1:4])
    assert "delta 0.25 x 4 is 1" in warning
    assert step(s, *ROWS[4:6]) == ()
    # Another run on the dataset is told of the units of all runs.
    later = of_config(tiny_model, known, config)
    assert "x 6 is 1.5" in step(later, ROWS[0])[0]
    entries = known.ledgers.entries("default", "default")
    (caution,) = PrivacyReport(entries, counted=6).certificate()["cautions"]
    assert "delta x units is 1.5" in caution
    assert known.ledgers.counted_units("other", "default") == 0


def test_a_stated_number_of_units_is_checked_at_creation(tiny_model: Path) -> None:
    known = registry()
    dp = {"target_delta": 0.25, "dataset_size": 4}
    with pytest.raises(InvalidRequestError, match="must be below 1 / dataset_size"):
        of_config(tiny_model, known, private_config(tiny_model, batch_size=2, dp=dp))
    assert kinds(known) == []


def test_a_registry_that_does_not_answer_loses_no_step(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Budget) -> int:
        raise ClusterUnavailableError("away")

    monkeypatch.setattr(Budget, "counted_units", away)
    s = session(tiny_model, registry())
    assert step(s, *ROWS) == ()
    assert s.step == 1


# --- what hidden metrics hide --------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [True, False])
def test_hidden_metrics_hide_sizes_and_times_where_units_are_drawn(
    tiny_model: Path, sampled: bool
) -> None:
    dp: dict[str, Any] = {"show_private_metrics": False, "noise_multiplier": 4.0}
    if sampled:
        dp |= {"sampling": "client_poisson", "dataset_size": 800, "accountant_type": "rdp"}
    s = of_config(tiny_model, registry(), private_config(tiny_model, dp=dp))
    for _ in range(3):  # after three steps, a batch of another size would be told
        result = s.forward_backward(rows(ROWS[:1]))
        done = s.optim_step()
        assert (result.num_tokens == 0, math.isnan(result.latency_ms)) == (sampled, sampled)
        assert math.isnan(done.latency_ms) == sampled
    assert bool(done.warnings) != sampled
