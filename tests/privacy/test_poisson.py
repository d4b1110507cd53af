"""Tests Poisson samples: the draw, the check of what is sent, and asserted samples that are not
Poisson."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine.model import Base
from actors.privacy.budget import Budget
from actors.privacy.units import unit_ids
from actors.registry.draws import digest_of, drawn_of
from actors.registry.plausibility import looks_drawn
from actors.registry.registry import Registry
from support.privacy_helpers import (
    ROWS,
    Noiseless,
    PrivateSession,
    private_session,
    registry,
    rows,
    sums,
)
from tg_tinker import (
    ActorLostError,
    BatchData,
    DPBudgetExceededError,
    InvalidRequestError,
    LedgerMismatchError,
)
from tg_tinker.data.batch import normalize
from tg_tinker.records.ledger import Ledger

KEY = b"k" * 32


def hashes(count: int) -> list[bytes]:
    """Returns distinct blocks, as the hashes of units are."""
    return [number.to_bytes(16, "big") for number in range(count)]


def ledger_of(known: Registry) -> Ledger:
    return Ledger.replay(known.ledgers.entries("default", "default"))


def drawn_session(model: Path, **dp: object) -> PrivateSession:
    """Returns a session with eight rows, each in a step with probability 1/4, for three steps."""
    values = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"} | dp
    return private_session(model, batch_size=2, max_steps=3, dp={"noise_multiplier": None} | values)


# --- the draw ------------------------------------------------------------------------------------


def test_each_unit_is_drawn_with_the_rate_and_on_its_own() -> None:
    listed = b"".join(hashes(2000))
    taken = np.zeros((100, 2000))
    for position in range(100):
        taken[position, drawn_of(KEY, position, listed, 0.3)] = 1
    sizes = taken.sum(1)
    assert abs(taken.mean() - 0.3) < 6 * (0.3 * 0.7 / taken.size) ** 0.5
    assert sizes.var() == pytest.approx(2000 * 0.3 * 0.7, rel=0.9)  # not of one size
    assert abs(np.corrcoef(taken[0], taken[1])[0, 1]) < 6 / 2000**0.5


def test_a_draw_depends_on_key_position_and_unit_and_on_no_order_or_number_of_rows() -> None:
    units = hashes(300)
    first = {units[at] for at in drawn_of(KEY, 7, b"".join(units), 0.5)}
    some = units[::-3] + units[:30]  # in another order, and some of them twice
    again = {some[at] for at in drawn_of(KEY, 7, b"".join(some), 0.5)}
    assert again == first & set(some)
    for key, position in ((KEY, 8), (b"j" * 32, 7)):
        assert {units[at] for at in drawn_of(key, position, b"".join(units), 0.5)} != first


def test_a_rate_is_exact_and_a_higher_rate_draws_more_of_the_same_units() -> None:
    listed = b"".join(hashes(500))
    assert drawn_of(KEY, 0, listed, 1.0) == list(range(500))
    assert drawn_of(KEY, 0, listed, 2.0**-53) in ([], [0])
    low, high = (set(drawn_of(KEY, 0, listed, rate)) for rate in (0.1, 0.2))
    assert low < high
    assert drawn_of(KEY, 0, b"", 0.5) == []


def test_a_digest_binds_the_list_and_does_not_show_that_two_lists_are_equal() -> None:
    listed = b"".join(hashes(5))
    assert digest_of(KEY, 0, listed) == digest_of(KEY, 0, listed)
    others = [
        digest_of(KEY, 0, listed[:-16]),
        digest_of(KEY, 1, listed),
        digest_of(b"x", 0, listed),
    ]
    assert digest_of(KEY, 0, listed) not in others


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
    assert [account.steps for account in ledger_of(s.budget.registry).accounts.values()] == [0]
    assert s.step == 0


def restarted(s: PrivateSession, kind: type[PrivateSession] = PrivateSession) -> PrivateSession:
    """Returns the session of a new actor of the same run."""
    known, run = s.budget.registry, s.budget.run_id
    epoch = known.runs.claim(run)
    budget = Budget.planned(known, "default", run, epoch, s.config, "float32")
    return kind(Base.load(s.config.model_ref, cache=Path(s.config.model_ref)), s.config, budget)


def take(s: PrivateSession, drawn: list[int]) -> float:
    s.forward_backward([rows()[unit] for unit in drawn])
    return s.optim_step().dp_metrics.total_epsilon


def test_whoever_restarts_until_a_unit_is_drawn_is_told_the_same_draw(tiny_model: Path) -> None:
    """New actors, new clients and other orders of the rows: there is nothing to pick from."""
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    settings: dict[str, Any] = {"known": known, "batch_size": 2, "dp": dp}
    s = private_session(tiny_model, **settings)
    for position in range(3):
        s.poisson.register(rows())
        first = s.poisson.draw(s.step)
        length = ledger_of(known).length
        for attempt in range(4):
            s = restarted(s) if attempt % 2 else private_session(tiny_model, **settings)
            order = random.Random(attempt).sample(range(8), 8)
            s.poisson.register(rows([ROWS[row] for row in order]))
            told = s.poisson.draw(s.step)
            assert sorted(order[unit] for unit in told) == first
        opened = 2  # of two new clients
        assert ledger_of(known).length == length + opened
        assert ledger_of(known).position == position
        s.poisson.register(rows())
        take(s, s.poisson.draw(s.step))
    ledger = ledger_of(known)
    assert (ledger.position, ledger.dropped) == (3, 0)
    assert sum(account.steps for account in ledger.accounts.values()) == 3


def test_a_draw_is_charged_with_its_step_and_not_before(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    s.poisson.register(rows())
    s.poisson.draw(s.step)
    assert ledger_of(s.budget.registry).epsilon == 0
    assert take(s, s.poisson.draw(s.step)) > 0


def test_a_draw_that_cannot_be_paid_is_not_told(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    s.poisson.register(rows())
    known = s.budget.registry
    known.runs.claim(s.budget.run_id)  # a newer actor owns the run
    for _ in range(2):
        with pytest.raises(ActorLostError):
            s.poisson.draw(s.step)
    assert ledger_of(known).told is None


def test_a_draw_of_an_older_database_is_not_told(tiny_model: Path) -> None:
    s = drawn_session(tiny_model)
    s.poisson.register(rows())
    s.budget.known = "77-" + "a" * 64
    with pytest.raises(LedgerMismatchError, match="77 is known"):
        s.poisson.draw(s.step)
    assert ledger_of(s.budget.registry).told is None


def test_of_two_runs_with_one_draw_the_first_uses_it_and_the_other_draws_again(
    tiny_model: Path,
) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    one, two = (private_session(tiny_model, known=known, batch_size=2, dp=dp) for _ in range(2))
    for s in (one, two):
        s.poisson.register(rows())
    drawn = one.poisson.draw(0)
    assert two.poisson.draw(0) == drawn
    take(one, drawn)
    before = ledger_of(known).length
    with pytest.raises(InvalidRequestError, match=r"another run used it.*next draw is 1"):
        take(two, drawn)
    assert (ledger_of(known).length, two.step) == (before, 0)
    take(two, two.poisson.draw(0))
    assert ledger_of(known).position == 2


@pytest.mark.parametrize("change", ["sigma", "rate", "bound", "units"])
def test_a_draw_is_bound_and_another_run_must_finish_or_drop_it(
    tiny_model: Path, change: str
) -> None:
    known = registry()
    dp: dict[str, Any] = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    s = private_session(tiny_model, known=known, batch_size=2, dp=dp)
    s.poisson.register(rows())
    drawn = s.poisson.draw(0)
    changes = {"sigma": {"noise_multiplier": 2.0}, "bound": {"max_grad_norm": 0.5}}.get(change, {})
    batch = 3 if change == "rate" else 2
    other = private_session(tiny_model, known=known, batch_size=batch, dp=dp | changes)
    other.poisson.register(rows([[9, 9, 9], *ROWS[1:]]) if change == "units" else rows())
    with pytest.raises(InvalidRequestError, match="privacy drop default") as refused:
        other.poisson.draw(0)
    assert refused.value.details == {"position": 0, "run": s.budget.run_id}
    take(s, drawn)  # finished
    other.poisson.draw(0)
    with pytest.raises(InvalidRequestError, match="waits for its step"):
        s.poisson.draw(s.step)
    known.ledgers.drop("default", "default", 1)
    known.ledgers.drop("default", "default", 1)  # again: only the answer was lost
    assert (ledger_of(known).position, ledger_of(known).dropped) == (2, 1)
    take(s, s.poisson.draw(s.step))


def test_after_a_drop_poisson_steps_count_by_uses(tiny_model: Path) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    s = private_session(tiny_model, known=known, batch_size=6, dp=dp)
    s.poisson.register(rows())
    take(s, s.poisson.draw(0))
    sampled = ledger_of(known)
    s.poisson.draw(s.step)
    known.ledgers.drop("default", "default", 1)
    uses: dict[int, int] = {}

    def train() -> None:
        for _ in range(200):
            drawn = s.poisson.draw(s.step)
            take(s, drawn)
            uses.update({unit: uses.get(unit, 0) + 1 for unit in drawn})

    with pytest.raises(DPBudgetExceededError, match="no further use"):
        train()
    ledger, (account,) = ledger_of(known), ledger_of(known).accounts.values()
    assert account.count == 1  # of its steps as samples
    # One use at sigma 1 beside the sampled step: a second one has epsilon 6.6 alone.
    assert ledger.spent == 1.0
    assert min(uses.values()) >= 1
    assert sampled.epsilon < ledger.epsilon <= 8


def test_a_run_that_opens_after_a_drop_is_planned_by_uses(tiny_model: Path) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    first = private_session(tiny_model, known=known, batch_size=2, dp=dp)
    first.poisson.register(rows())
    first.poisson.draw(0)
    known.ledgers.drop("default", "default", 0)
    s = private_session(tiny_model, known=known, batch_size=2, dp=dp | {"noise_multiplier": None})
    account = ledger_of(known).accounts[s.budget.run_id]
    # Calibrated for three uses of each unit, as under participation.
    assert (account.accountant, account.table, account.limit) == ("exact", (), None)
    assert account.sigma > 1
    assert "counted by uses because a draw" in account.facts["message"]
    s.poisson.register(rows())
    for _ in range(3):
        take(s, s.poisson.draw(s.step))
    assert 0 <= ledger_of(known).epsilon <= 8
    # A target of its own that is lower than the dataset's limits its uses.
    low = dp | {"target_epsilon": 2.0, "noise_multiplier": 3.0}
    own = private_session(tiny_model, known=known, batch_size=8, dp=low)
    own.poisson.register(rows())
    with pytest.raises(DPBudgetExceededError):
        train_until_refused(own)
    assert own.step == 2  # two uses at sigma 3: epsilon 1.8; three: 2.3


def test_a_unit_at_its_limit_adds_zero_after_a_drop(tiny_model: Path) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    s = private_session(tiny_model, Noiseless, known, batch_size=8, dp=dp)  # each unit, each time
    s.poisson.register(rows())
    s.poisson.draw(0)
    known.ledgers.drop("default", "default", 0)
    other = private_session(tiny_model, known=known)
    for _ in range(2):
        other.forward_backward(rows()[:3])
        other.optim_step()
    assert s.poisson.draw(0) == list(range(8))
    result = s.forward_backward(rows())
    assert "3 use limit reached" in result.warnings[0]
    alone = private_session(tiny_model, Noiseless)
    alone.forward_backward(rows()[3:])
    for name, tensor in sums(alone).items():
        assert tensor.equal(sums(s)[name])
    s.optim_step()


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
    s.poisson.register(rows([[1, 2, 3], *ROWS[1:]]))
    with pytest.raises(InvalidRequestError, match="waits for its step"):
        s.poisson.draw(s.step)
    s.poisson.register(rows())
    assert s.poisson.draw(s.step) == drawn


def test_a_drawn_row_may_be_sent_as_a_stand_in_which_adds_zero(tiny_model: Path) -> None:
    def session(kind: type[PrivateSession]) -> PrivateSession:
        dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
        return private_session(tiny_model, kind, batch_size=8, dp=dp)  # each unit is drawn

    s = session(Noiseless)
    s.poisson.register(rows())
    s.poisson.draw(0)
    batch = BatchData([*map(list, ROWS)])
    result = s.forward_backward(normalize(batch.emptied([0, 5])))
    assert "2 nothing labeled" in result.warnings[0]
    alone = private_session(tiny_model, Noiseless)
    alone.forward_backward([row for at, row in enumerate(rows()) if at not in (0, 5)])
    for name, tensor in sums(alone).items():
        assert tensor.equal(sums(s)[name])
    assert s.optim_step().step == 1
    with pytest.raises(InvalidRequestError, match="no row 8"):
        batch.emptied([3, 8])


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
