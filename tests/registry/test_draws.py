"""Tests the stream of draws and the filter of each unit, against what each unit really took part
in."""

from __future__ import annotations

import math
import random
import secrets
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actors.privacy.budget import Budget
from actors.registry.draws import Draw, drawn_of
from actors.registry.registry import Registry
from support.privacy_helpers import new_budget, private_config, registry
from support.processes import SOAK
from tg_tinker import DPBudgetExceededError, InvalidRequestError
from tg_tinker.records.accounting import gaussian_delta, gaussian_epsilon
from tg_tinker.records.ledger import Ledger

UNITS = [number.to_bytes(16, "big") for number in range(8)]
POISSON = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}


def opened(known: Registry, batch: int = 8, **dp: Any) -> Budget:
    return new_budget(known, private_config(Path("none"), batch_size=batch, dp=dp))


def ledger_of(known: Registry) -> Ledger:
    return Ledger.replay(known.ledgers.entries("default", "default"))


def units_of(draw: Draw) -> list[bytes]:
    return [UNITS[at] for at in draw.drawn]


def test_the_oracle_is_right_where_a_closed_form_exists() -> None:
    everyone = true_delta(2.0, [(1.0, 2.0)] * 4, 0.5)
    assert everyone == pytest.approx(gaussian_delta(math.sqrt(4 / 4 + 0.25), 2.0), rel=2e-3)


# --- the truth -----------------------------------------------------------------------------------


def true_delta(epsilon: float, steps: list[tuple[float, float]], mu: float) -> float:
    """Returns delta of Poisson steps (rate, sigma) and one Gaussian mechanism together, by the
    distribution of the privacy loss on a fine grid: no Renyi bound, no filter."""
    spectrum = np.ones(len(GRID) // 2 + 1, dtype=complex)
    for step in [*steps, (1.0, 1 / mu)] if mu else steps:
        spectrum = spectrum * np.fft.rfft(np.fft.ifftshift(loss_of(*step)))
    whole = np.fft.fftshift(np.fft.irfft(spectrum, len(GRID)))
    above = epsilon < GRID
    return float((whole[above] * -np.expm1(epsilon - GRID[above])).sum())


WIDTH, REACH = 2e-3, 60.0
GRID = np.arange(-REACH, REACH, WIDTH)


@lru_cache
def loss_of(rate: float, sigma: float) -> npt.NDArray[np.float64]:
    x = np.arange(-12 * sigma, 1 + 12 * sigma, 1e-4 * max(sigma, 1))
    inside = np.exp(-((x - 1) ** 2) / (2 * sigma**2))
    mixed = (1 - rate) * np.exp(-(x**2) / (2 * sigma**2)) + rate * inside
    loss = np.log1p(rate * np.expm1((2 * x - 1) / (2 * sigma**2)))
    found, _ = np.histogram(loss, np.append(GRID, REACH) - WIDTH / 2, weights=mixed)
    return np.asarray(found / found.sum())


class Witness:
    """Records of each unit what it took part in, apart from every ledger."""

    def __init__(self) -> None:
        self.sums: dict[bytes, float] = defaultdict(float)
        self.sampled: list[tuple[float, float]] = []
        self.told: dict[int, list[bytes]] = {}

    def used(self, units: list[bytes], sigma: float) -> None:
        for unit in units:
            self.sums[unit] += 1 / sigma**2

    def check(self, ledger: Ledger) -> None:
        most = max(self.sums.values(), default=0.0)
        assert ledger.everyone + ledger.spent >= most - 1e-12
        assert ledger.epsilon >= gaussian_epsilon(math.sqrt(most), ledger.delta) - 1e-9
        delta = true_delta(ledger.epsilon, self.sampled, math.sqrt(most))
        assert delta <= 1.02 * ledger.delta
        assert len(self.sampled) + ledger.dropped <= ledger.position


@pytest.mark.parametrize("seed", range(30 if SOAK else 2))
def test_the_ledger_is_never_below_the_truth(seed: int) -> None:
    """Runs of all kinds, batch sizes, orders, restarts and drops at random. An owner sees each draw
    before deciding whether to go on with it, to restart, or to open another run."""
    choice, known, truth = random.Random(seed), registry(), Witness()
    known.ledgers.register("default", "default", 20.0, 1e-5, "example")
    runs: list[tuple[Budget, float, float]] = []
    for _ in range(40):
        action = choice.choice(["open", "draw", "draw", "draw", "restart", "use", "wide", "eval"])
        if action == "draw" and choice.random() < 0.05 and ledger_of(known).told is not None:
            known.ledgers.drop("default", "default", ledger_of(known).position)
        try:
            if action == "open" or not runs:
                rate, sigma = choice.choice([(2, 1.0), (2, 1.0), (4, 1.5)])
                run = opened(known, rate, noise_multiplier=sigma, **POISSON)
                runs.append((run, rate / 8, sigma))
            elif action == "restart":
                at = choice.randrange(len(runs))
                run, rate, sigma = runs[at]
                run.epoch = known.runs.claim(run.run_id)
            elif action == "draw":
                step(known, truth, *choice.choice(runs), choice)
            elif action == "eval":
                units = choice.sample(UNITS, 3)
                run = runs[0][0]
                known.ledgers.evaluate(
                    "default", "default", run.run_id, run.epoch, secrets.token_hex(16), units, 3.0
                )
                truth.used(units, 3.0)
            else:
                wide = {"sampling": "worst_case"} if action == "wide" else {}
                run = opened(known, noise_multiplier=4.0, **wide)
                units = [unit for unit in UNITS if choice.random() < 0.5]
                run.charge(units, noised=True)
                truth.used(UNITS if wide else units, 4.0)
        except DPBudgetExceededError:
            pass
        truth.check(ledger_of(known))
    assert ledger_of(known).epsilon <= 20.0


def step(
    known: Registry, truth: Witness, run: Budget, rate: float, sigma: float, choice: random.Random
) -> None:
    try:
        draw = run.draw(UNITS)
    except InvalidRequestError:
        told = ledger_of(known).told
        assert told is not None  # it waits for its step, and this run has other settings
        assert told.binding[:2] != (sigma, rate)
        return
    drawn, by_uses = units_of(draw), ledger_of(known).dropped > 0
    assert truth.told.setdefault(draw.position, drawn) == drawn  # the same, to whoever asks
    # The owner picks: unit 0 shall be in the step.
    if UNITS[0] not in drawn and choice.random() < 0.7:
        return
    usable = [unit for unit in drawn if unit not in run.admit(drawn)]
    run.charge(usable, noised=True, draw=draw)
    if by_uses:
        truth.used(usable, sigma)
    else:
        truth.sampled.append((rate, sigma))


def test_nobody_who_restarts_gets_another_draw() -> None:
    """The attack: whoever restarts until unit 0 is drawn waits for ever, or takes what there is."""
    known = registry()
    run = opened(known, 1, noise_multiplier=1.0, **POISSON)
    released, told = 0, dict[int, list[bytes]]()
    for _ in range(60):
        draw = run.draw(UNITS)
        assert told.setdefault(draw.position, units_of(draw)) == units_of(draw)
        if UNITS[0] in units_of(draw):
            run.charge(units_of(draw), noised=True, draw=draw)
            released += 1
        run.epoch = known.runs.claim(run.run_id)
    expected = ledger_of(known).position
    assert released == expected  # all that were told before a draw without unit 0
    stuck = [UNITS[0] in units_of(run.draw(UNITS)) for _ in range(5)]
    assert stuck == [False] * 5


# --- crashes -------------------------------------------------------------------------------------


def test_a_crash_between_telling_charging_and_noise_gives_nothing_to_choose() -> None:
    known = registry()
    run = opened(known, 4, noise_multiplier=1.0, **POISSON)
    first = run.draw(UNITS)
    run.epoch = known.runs.claim(run.run_id)  # killed after it was told
    again = run.draw(UNITS)
    assert (again.position, again.drawn) == (first.position, first.drawn)
    run.charge(units_of(again), noised=True, draw=again)
    run.epoch = known.runs.claim(run.run_id)  # killed before its noise: it may have been drawn
    assert run.draw(UNITS).position == first.position + 1
    with pytest.raises(InvalidRequestError, match="not told any more"):
        run.charge(units_of(first), noised=True, draw=first)


def test_a_call_that_is_repeated_tells_and_charges_once() -> None:
    known = registry()
    run = opened(known, 4, noise_multiplier=1.0, **POISSON)
    one, two = run.draw(UNITS), run.draw(UNITS)
    assert one == two
    asked = (
        "default", "default", run.run_id, run.epoch, "f" * 32, units_of(one), True, [], (),
        (one.position, one.units),
    )  # fmt: skip
    assert known.ledgers.charge(*asked) == known.ledgers.charge(*asked)
    assert ledger_of(known).position == 1


# --- the key -------------------------------------------------------------------------------------


def stored_keys(known: Registry) -> list[tuple[int, bytes]]:
    """Returns position and key of every draw key in the tables."""
    with known.database.reading() as connection:
        rows = connection.exec_driver_sql(
            "SELECT draw_position, wrapped_draw_key FROM datasets WHERE draw_position IS NOT NULL"
        ).all()
        keys = known.ledgers._book.draw_keys
        return [(at, keys._stored(connection, "default", "default", at)) for at, _ in rows]


@pytest.mark.parametrize("end", ["charge", "drop"])
def test_the_stored_key_of_a_position_gives_no_earlier_draw(end: str) -> None:
    """Many units, so that two draws are not equal by chance."""
    known, many = registry(), [number.to_bytes(16, "big") for number in range(300)]
    run = new_budget(known, private_config(
        Path("none"), batch_size=150, dp={"noise_multiplier": 8.0} | POISSON | {"dataset_size": 300}
    ))  # fmt: skip
    told = run.draw(many)
    ((position, before),) = stored_keys(known)
    assert drawn_of(before, position, b"".join(many), 0.5) == told.drawn
    if end == "charge":
        run.charge([many[at] for at in told.drawn], noised=True, draw=told)
    else:
        known.ledgers.drop("default", "default", position)
    ((now, after),) = stored_keys(known)
    assert (now, after != before) == (position + 1, True)
    assert drawn_of(after, position, b"".join(many), 0.5) != told.drawn
    assert run.draw(many).drawn == drawn_of(after, now, b"".join(many), 0.5)


def test_the_draw_key_is_wrapped_and_follows_a_rotation(tmp_path: Path) -> None:
    known = registry(tmp_path / "home")
    run = opened(known, 4, noise_multiplier=1.0, **POISSON)
    told = run.draw(UNITS)
    ((_, key),) = stored_keys(known)
    known.data_keys.rotate("default")
    known.data_keys.retire("default", "k1", {})
    assert run.draw(UNITS).drawn == told.drawn
    for file in (tmp_path / "home").glob("registry.db*"):
        assert key not in file.read_bytes()
        assert key.hex().encode() not in file.read_bytes()
    assert key not in known.ledgers.unit_key("default", "default")


# --- the filter of each unit ---------------------------------------------------------------------


def test_a_second_recipe_on_other_rows_is_free_and_on_the_same_rows_is_not() -> None:
    known = registry()
    plan = {"noise_multiplier": 2.0, "max_participations": 6}
    first, second = opened(known, **plan), opened(known, **plan)
    for _ in range(6):
        first.charge(UNITS[:4], noised=True)
        second.charge(UNITS[4:], noised=True)
    assert ledger_of(known).epsilon == gaussian_epsilon(math.sqrt(6 / 4), 1e-5)
    third = opened(known, noise_multiplier=2.0)
    assert third.admit([*UNITS, b"n" * 16]) == set()  # 8 pays for seven uses and more at sigma 2
    while (limited := third.admit([*UNITS, b"n" * 16])) == set():
        third.charge(UNITS[:1], noised=True)
    assert limited == {UNITS[0]}
    with pytest.raises(DPBudgetExceededError, match="pays for no further use"):
        third.admit(UNITS[:1])
    assert ledger_of(known).epsilon <= 8


def test_a_living_run_holds_its_plan_for_the_rows_that_it_has_touched() -> None:
    known = registry()
    first = opened(known, noise_multiplier=2.0, max_participations=11)  # all that epsilon 8 pays
    other = opened(known, noise_multiplier=2.0)
    first.charge(UNITS[:2], noised=True)
    assert other.admit(UNITS) == set(UNITS[:2])
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        other.charge(UNITS[1:3], noised=True)
    with pytest.raises(DPBudgetExceededError, match="reserv"):
        opened(known, noise_multiplier=2.0, sampling="worst_case").charge([], noised=True)
    known.runs.finish(first.run_id, first.epoch, "completed")
    assert other.admit(UNITS) == set()
    other.charge(UNITS[1:3], noised=True)


def test_a_run_that_is_charged_to_everyone_leaves_what_touched_rows_are_held_for() -> None:
    """The rows of two runs overlap in one row, which is held for both."""
    known = registry()
    plan = {"noise_multiplier": 2.0, "max_participations": 6}
    first, second = opened(known, **plan), opened(known, **plan)
    first.charge(UNITS[:2], noised=True)
    second.charge(UNITS[1:3], noised=True)  # row 1: 2 used, 10 held
    wide = {"noise_multiplier": 2.0, "sampling": "worst_case"}
    with pytest.raises(DPBudgetExceededError, match="reserv"):
        opened(known, **wide).charge([], noised=True)
    known.runs.park(second.run_id, second.epoch)
    opened(known, **wide).charge([], noised=True)
