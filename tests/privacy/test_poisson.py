"""Tests Poisson samples: the draw, the check of what is sent, and asserted samples that are not
Poisson."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from actors.engine.model import Base
from actors.privacy.budget import Budget
from actors.privacy.poisson import PoissonSampler
from actors.privacy.units import unit_ids
from actors.registry.plausibility import looks_drawn
from support.privacy_helpers import ROWS, PrivateSession, private_session, registry, rows
from tg_tinker import ActorLostError, DPBudgetExceededError, InvalidRequestError
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge

KEY = b"k" * 32


def paid(units: list[bytes]) -> Charge:
    return Charge("c", "d", "h", 1, 1.0, True, 0.1, 0.1, 1e-5, 1)


def drawn_session(model: Path, **dp: object) -> PrivateSession:
    """Returns a session with eight rows, each in a step with probability 1/4, for three steps."""
    values = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"} | dp
    return private_session(model, batch_size=2, max_steps=3, dp={"noise_multiplier": None} | values)


# --- the draw ------------------------------------------------------------------------------------


def test_each_unit_is_drawn_with_the_rate_and_on_its_own() -> None:
    units = [bytes([i // 256, i % 256]) for i in range(2000)]
    sampler = PoissonSampler(units, 0.3)
    taken = np.zeros((100, 2000))
    for step in range(100):
        taken[step, sampler.draw(paid)] = 1
        sampler.use()
    sizes = taken.sum(1)
    assert abs(taken.mean() - 0.3) < 6 * (0.3 * 0.7 / taken.size) ** 0.5
    assert sizes.var() == pytest.approx(2000 * 0.3 * 0.7, rel=0.9)  # not of one size
    assert abs(np.corrcoef(taken[0], taken[1])[0, 1]) < 6 / 2000**0.5


def test_a_draw_stays_until_a_step_has_used_it() -> None:
    sampler = PoissonSampler([bytes([i]) for i in range(200)], 0.5)
    first = sampler.draw(paid)
    assert sampler.draw(paid) == first
    sampler.use()
    assert sampler.draw(paid) != first  # equal with a chance of 2^-200


def test_units_are_known_by_a_keyed_hash_of_their_tokens_alone() -> None:
    padded = rows([[0, *ROWS[0]]], attention_mask=[[0] + [1] * len(ROWS[0])])
    same = [unit_ids(KEY, given, "example") for given in (rows(ROWS[:1]), padded)]
    assert same[0] == same[1]
    assert unit_ids(b"x" * 32, rows(ROWS[:1]), "example") != same[0]
    ids = unit_ids(KEY, rows(ROWS[:3], example_ids=["a", "b", "a"]), "id")
    assert ids[0] == ids[2] != ids[1]


# --- a session -----------------------------------------------------------------------------------


def test_a_step_of_exactly_the_draw_is_taken_until_the_budget_ends(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    units = s.poisson.register(rows())
    for _ in range(3):
        s.forward_backward([rows()[row] for unit in s.poisson.draw(s.step) for row in units[unit]])
        metrics = s.optim_step().dp_metrics
    assert metrics.total_epsilon <= 8
    with pytest.raises(DPBudgetExceededError, match="no step is left"):
        s.poisson.draw(s.step)


@pytest.mark.parametrize("change", ["one more", "one less", "another"])
def test_a_step_of_other_rows_than_the_draw_is_refused_and_not_charged(
    tiny_model: Path, change: str
) -> None:
    s = drawn_session(tiny_model)
    s.poisson.register(rows())
    drawn = s.poisson.draw(s.step)
    while not drawn or len(drawn) == len(ROWS):  # a draw that can be changed both ways
        s = drawn_session(tiny_model)
        s.poisson.register(rows())
        drawn = s.poisson.draw(s.step)
    others = [unit for unit in range(len(ROWS)) if unit not in drawn]
    sent = {
        "one more": [*drawn, others[0]], "one less": drawn[1:], "another": [*drawn[1:], others[0]],
    }[change]  # fmt: skip
    s.forward_backward([rows()[unit] for unit in sent])
    with pytest.raises(InvalidRequestError, match="not the drawn sample"):
        s.optim_step()
    assert s.poisson.draw(s.step) == drawn  # nobody can pick among draws
    ledger = Ledger.replay(s.budget.registry.ledgers.entries("default", "default"))
    assert [account.steps for account in ledger.accounts.values()] == [1]  # the draw, no more
    assert s.step == 0


def test_a_draw_is_paid_before_it_is_told_and_stays_paid(tiny_model: Path, tmp_path: Path) -> None:
    """A client that discards samples until it gets wanted rows pays for each of them."""
    known = registry()
    dp = {
        "sampling": "poisson",
        "dataset_size": 8,
        "accountant_type": "rdp",
        "noise_multiplier": None,
    }
    s = private_session(tiny_model, known=known, batch_size=2, max_steps=3, dp=dp)
    run, charged = s.budget.run_id, []
    for epoch in range(2, 5):  # a new actor of the run each time
        s.poisson.register(rows())
        s.poisson.draw(s.step)
        account = Ledger.replay(known.ledgers.entries("default", "default")).accounts[run]
        charged.append(account.count)
        budget = Budget.planned(known, "default", run, known.runs.claim(run), s.config, "float32")
        assert budget.epoch == epoch
        s = PrivateSession(Base.load(str(tiny_model), cache=tmp_path), s.config, budget)
    assert charged == [1, 2, 3]
    s.poisson.register(rows())
    with pytest.raises(DPBudgetExceededError):
        s.poisson.draw(s.step)
    assert s.step == 0


def test_a_draw_that_cannot_be_paid_is_not_told(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    s.poisson.register(rows())
    known = s.budget.registry
    known.runs.claim(s.budget.run_id)  # a newer actor owns the run
    for _ in range(2):
        with pytest.raises(ActorLostError):
            s.poisson.draw(s.step)
    assert not s.poisson.paid
    assert s.poisson._sampler._drawn is None


def test_a_step_before_any_draw_is_refused(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    with pytest.raises(InvalidRequestError, match="poisson_batches"):
        s.poisson.draw(s.step)
    s.forward_backward(rows())
    with pytest.raises(InvalidRequestError, match="poisson_batches"):
        s.optim_step()


def test_the_registered_rows_must_be_as_many_units_as_agreed(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    for wrong in (ROWS[:7], [*ROWS[:7], ROWS[0]]):
        with pytest.raises(InvalidRequestError, match="7 distinct units"):
            s.poisson.register(rows(wrong))
    assert s.poisson.register(rows([*ROWS, ROWS[3]])) == [[i] for i in range(8)]


def test_no_other_contract_draws(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'participation'"):
        private_session(tiny_model).poisson.register(rows())


def test_an_open_draw_survives_registering_and_loading(tiny_model: Path) -> None:
    s = drawn_session(tiny_model, noise_multiplier=1.0)
    s.poisson.register(rows())
    drawn, saved = s.poisson.draw(s.step), s.state()
    for _ in range(20):
        s.poisson.register(rows())
        s.load(saved)
        assert s.poisson.draw(s.step) == drawn
    with pytest.raises(InvalidRequestError, match="waits for its step"):
        s.poisson.register(rows([[1, 2, 3], *ROWS[1:]]))
    assert s.poisson.draw(s.step) == drawn


def test_draws_end_with_the_planned_steps_though_the_budget_pays_for_more(
    tiny_model: Path,
) -> None:
    s = drawn_session(tiny_model, noise_multiplier=4.0)
    s.poisson.register(rows())
    for _ in range(3):
        s.forward_backward([rows()[unit] for unit in s.poisson.draw(s.step)])
        s.optim_step()
    with pytest.raises(DPBudgetExceededError, match="that were planned"):
        s.poisson.draw(s.step)


def train_until_refused(s: PrivateSession) -> None:
    while True:
        s.forward_backward([rows()[unit] for unit in s.poisson.draw(s.step)])
        s.optim_step()


def test_draws_end_when_another_run_has_spent_the_budget(tiny_model: Path) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    s = private_session(tiny_model, known=known, batch_size=2, dp=dp)
    s.poisson.register(rows())
    s.poisson.draw(s.step)
    other = private_session(tiny_model, known=known, dp={"max_participations": 1})
    other.forward_backward(rows())
    other.optim_step()
    with pytest.raises(DPBudgetExceededError, match="by others"):
        train_until_refused(s)
    assert s.budget.registry.ledgers.privacy_info("default", "default", s.budget.run_id).left > 0


# --- asserted samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_true_samples_pass(rate: float, seed: int) -> None:
    generator = random.Random(seed)
    drawn = [{u for u in range(500) if generator.random() < rate} for _ in range(60)]
    for steps in range(1, 61):
        sizes = [len(step) for step in drawn[:steps]]
        assert looks_drawn(sizes, len(set().union(*drawn[:steps])), 500, rate)


def test_batches_of_one_size_and_shuffled_epochs_fail_in_the_end() -> None:
    assert not looks_drawn([50] * 60, 500, 500, 0.1)
    generator = random.Random(0)
    sizes = [sum(generator.random() < 0.1 for _ in range(5000)) for _ in range(20)]
    assert looks_drawn(sizes, 5000 - int(5000 * 0.9**20), 5000, 0.1)
    assert not looks_drawn(sizes, 5000, 5000, 0.1)  # every row reached: no row was drawn twice


def test_one_batch_of_an_impossible_size_fails_at_once() -> None:
    assert not looks_drawn([0, 400], 400, 1000, 0.05)


def test_an_implausible_run_is_counted_by_participation_from_its_first_step(
    tiny_model: Path,
) -> None:
    known = registry()
    dp = {"sampling": "client_poisson", "dataset_size": 800, "accountant_type": "rdp"}
    s = private_session(tiny_model, known=known, batch_size=8, dp=dp)
    s.forward_backward(rows())
    honest = s.optim_step().dp_metrics.total_epsilon
    assert honest < 1
    s.forward_backward(rows([[i, j, 7] for i in range(20) for j in range(20, 25)]))
    jumped = s.optim_step().dp_metrics.total_epsilon  # 100 rows where 8 were to be expected
    assert jumped == pytest.approx(4.377, abs=1e-3)  # one use of each row at sigma 1
    ledger = Ledger.replay(known.ledgers.entries("default", "default"))
    account = ledger.accounts[s.budget.run_id]
    assert (account.contract, account.count, account.limit) == ("participation", 1, 2)
