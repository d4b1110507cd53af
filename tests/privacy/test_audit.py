"""Tests the self-audit: it passes the real private step and finds every broken one.

Each mutant is a private step with one mistake that people have made. The audit must fail it, by the
check that is named beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.gradients import PrivateGradient, by_name
from actors.engine.session import Session
from actors.privacy import attacks, self_audit, session
from actors.privacy.attacks import epsilon_bound, mean_shift, one_run_audit
from actors.privacy.clipping import ClippedSum, UnitGradients, privatize
from actors.privacy.noise import standard_normal
from actors.privacy.self_audit import AuditReport, run_audit
from actors.privacy.session import PrivateSession
from tg_tinker.records.accounting import gaussian_epsilon

Patch = pytest.MonkeyPatch
REPLAY, NOISE, GUESS, SHIFT = "neighbor replay", "noise fit", "one-run audit", "mean shift"
FEW = 500


@pytest.fixture(scope="module")
def report() -> AuditReport:
    told: list[str] = []
    before = torch.get_num_threads(), torch.get_rng_state()
    found = run_audit(progress=told.append)
    assert [message.split(":")[0] for message in told] == [REPLAY, NOISE, "canaries"]
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    return found


# --- the real step -----------------------------------------------------------------------------


def test_the_real_step_passes(report: AuditReport) -> None:
    assert report.passed, report.to_json()
    assert [check.name for check in report.checks] == [REPLAY, NOISE, GUESS, SHIFT]
    assert report.verdict == "no violation found, power 1.00 against noise 20 % too small"


def test_the_real_step_is_attacked_hard(report: AuditReport) -> None:
    """A check that looked at nothing would pass as well."""
    replay, _, guess, shift = (check.figures for check in report.checks)
    assert replay["sensitivity"] > 0.999
    assert replay["least_norm"] < 0.2
    assert replay["largest_norm"] > 20
    assert replay["draws"] == self_audit.MOST_CANARIES
    assert 0.5 < report.bound == guess["bound"] < report.claimed_epsilon
    assert guess["charged"] == pytest.approx(2, abs=1e-6)
    assert shift["shift"] == pytest.approx(1, abs=0.15)
    assert shift["tolerance"] == pytest.approx(0.1 * shift["mu"])
    assert shift["tolerance"] >= 3 * shift["standard_error"]


def test_a_report_becomes_plain_json_and_keeps_its_scores(report: AuditReport) -> None:
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["passed"] is True
    assert plain["checks"][0]["statement"].startswith("Removing one row moved")
    assert plain["power_half"] == 1
    assert "scores_in" not in plain
    assert len(report.scores_in) + len(report.scores_out) == report.steps * report.canaries


@pytest.mark.parametrize("wrong", [{"epsilon": 2.1}, {"epsilon": 0.0}, {"epsilon": math.nan}])
def test_a_claim_that_could_not_be_refuted_is_not_audited(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most 2"):
        run_audit(**wrong)


@pytest.mark.parametrize("count", [99, 10**6])
def test_too_few_or_too_many_canaries_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="canaries are"):
        run_audit(canaries=count)


# --- mutants -----------------------------------------------------------------------------------


class NoiseOff(PrivateSession):
    _noise = staticmethod(lambda count: torch.zeros(count, dtype=torch.float64))


class NoiseTooSmall(PrivateSession):
    _noise = staticmethod(lambda count: 0.8 * standard_normal(count))


class NoiseHalfInSteps(PrivateSession):
    """Noise that is right without rows and half as large with rows: only the canaries can show
    it."""

    _factor = 1.0

    def _noise(self, count: int) -> torch.Tensor:
        return self._factor * standard_normal(count)

    def optim_step(self, apply_dp_noise: bool = True) -> Any:
        self._factor = 0.5 if self._pending.rows else 1.0
        return super().optim_step(apply_dp_noise)


class NoiseNotNormal(PrivateSession):
    _noise = staticmethod(lambda count: standard_normal(count).sign())


class SeedOfTheRun(PrivateSession):
    """One stream of noise for the whole run, equal in every run with the same seed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        generator = torch.Generator().manual_seed(self.config.seed)
        self._noise = lambda count: torch.randn(count, dtype=torch.float64, generator=generator)


class SeedOfTheDraw(PrivateSession):
    """The same noise for every step, which also starts equally for every tensor."""

    @staticmethod
    def _noise(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, dtype=torch.float64, generator=generator)


class SeedOfTorch(PrivateSession):
    """Noise from torch's own generator, where dropout seeds it from the run, the step and the
    call."""

    _noise = staticmethod(lambda count: torch.randn(count, dtype=torch.float64))
    _seed_dropout = Session._seed_dropout


class LastCallOnly(PrivateSession):
    def forward_backward(self, *arguments: Any, **options: Any) -> Any:
        self._pending.total = ClippedSum.zero(self._parameters, self.dp.max_grad_norm)
        return super().forward_backward(*arguments, **options)


class ActualDivisor(PrivateSession):
    def optim_step(self, apply_dp_noise: bool = True) -> Any:
        self._divisor = self._pending.rows or self._divisor
        return super().optim_step(apply_dp_noise)


class NoisePerCall(PrivateSession):
    """Noise on the sum of each call and none in the step: more calls give more noise."""

    def forward_backward(self, *arguments: Any, **options: Any) -> Any:
        result = super().forward_backward(*arguments, **options)
        std = (self.dp.noise_multiplier or 0) * self.dp.max_grad_norm
        values = self._pending.total.values
        values += std * standard_normal(len(values))
        return result

    _noise = staticmethod(lambda count: torch.zeros(count, dtype=torch.float64))


class DrawPerCall(PrivateSession):
    """A draw that is thrown away, once for each call that brings rows."""

    def forward_backward(self, examples: Any, **options: Any) -> Any:
        self._noise(len(examples))
        return super().forward_backward(examples, **options)


class NoisePerCallToo(NoisePerCall):
    """Noise on the sum of each call, and the step's own noise as well."""

    _noise = staticmethod(standard_normal)


def clip_the_batch(self: UnitGradients, total: ClippedSum) -> None:
    whole = ClippedSum.zero(total.sums, total.bound)
    CLIP(UnitGradients(self.values.sum(0, keepdim=True)), whole)
    whole.norms_before = whole.norms_before.expand(len(self.values))
    whole.norms_after = whole.norms_after.expand(len(self.values))
    total.add(whole)


def clip_each_tensor(self: UnitGradients, total: ClippedSum) -> None:
    parts = []
    for name, gradient in by_name(self.values, total.shapes).items():
        parts.append(ClippedSum.zero({name: total.sums[name]}, total.bound))
        CLIP(UnitGradients(gradient.flatten(1)), parts[-1])
    parts[0].values, parts[0].shapes = torch.cat([part.values for part in parts]), total.shapes
    total.add(parts[0])


def clip_nothing(self: UnitGradients, total: ClippedSum) -> None:
    loose = ClippedSum.zero(total.sums, 1e9)
    CLIP(self, loose)
    total.values += loose.values


def add_in_bfloat16(self: ClippedSum, other: ClippedSum) -> None:
    ADD(self, other)
    self.values.copy_(self.values.bfloat16())


def noise_of_the_mean(total: ClippedSum, **options: Any) -> PrivateGradient:
    return privatize(total, **(options | {"sigma": options["sigma"] / options["divisor"]}))


def noise_without_the_bound(total: ClippedSum, **options: Any) -> PrivateGradient:
    return privatize(total, **(options | {"sigma": options["sigma"] / total.bound}))


def noise_in_bfloat16(total: ClippedSum, **options: Any) -> PrivateGradient:
    found = privatize(total, **options)
    return PrivateGradient({n: t.bfloat16().float() for n, t in found.tensors.items()}, 0.0)


CLIP, ADD = UnitGradients.clip_into, ClippedSum.add

SESSIONS: dict[type[PrivateSession], set[str]] = {
    NoiseOff: {NOISE, GUESS, SHIFT},
    NoiseTooSmall: {NOISE},
    NoiseHalfInSteps: {SHIFT},
    NoiseNotNormal: {NOISE},
    SeedOfTheRun: {NOISE},
    SeedOfTheDraw: {NOISE},
    SeedOfTorch: {NOISE},
    LastCallOnly: {REPLAY, SHIFT},
    ActualDivisor: {REPLAY},
    NoisePerCall: {REPLAY},
    NoisePerCallToo: {REPLAY, NOISE},
    DrawPerCall: {REPLAY},
}
"""Session -> checks that must fail; others may."""

FUNCTIONS: list[tuple[Any, str, Callable[..., Any], set[str]]] = [
    (UnitGradients, "clip_into", clip_the_batch, {REPLAY, SHIFT}),
    (UnitGradients, "clip_into", clip_each_tensor, {REPLAY, SHIFT}),
    (UnitGradients, "clip_into", clip_nothing, {REPLAY, GUESS, SHIFT}),
    (ClippedSum, "add", add_in_bfloat16, {REPLAY}),
    (session, "privatize", noise_of_the_mean, {REPLAY, NOISE, GUESS, SHIFT}),
    (session, "privatize", noise_without_the_bound, {REPLAY, NOISE}),
    (session, "privatize", noise_in_bfloat16, {REPLAY}),
]
"""Where, which function, what in its place, checks that must fail."""


def assert_caught(by: set[str], session_type: type[PrivateSession] = PrivateSession) -> None:
    report = run_audit(canaries=FEW, session_type=session_type)
    failed = {check.name for check in report.checks if not check.passed}
    assert by <= failed, report.to_json()
    assert not report.passed
    assert report.verdict.startswith("VIOLATION: ")
    assert all(name in report.verdict for name in by)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("mutant", SESSIONS, ids=lambda kind: kind.__name__)
def test_a_mutant_session_is_caught(mutant: type[PrivateSession]) -> None:
    assert_caught(SESSIONS[mutant], mutant)


@pytest.mark.parametrize(
    ("owner", "name", "mutant", "by"), FUNCTIONS, ids=[one[2].__name__ for one in FUNCTIONS]
)
def test_a_mutant_function_is_caught(
    monkeypatch: Patch, owner: Any, name: str, mutant: Callable[..., Any], by: set[str]
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert_caught(by)


def test_a_subclass_without_a_mistake_passes_with_few_canaries() -> None:
    """The mistake makes a mutant fail, not the small number of canaries."""

    class Same(PrivateSession):
        pass

    report = run_audit(canaries=FEW, session_type=Same)
    assert report.passed, report.to_json()
    assert report.power < 0.9 < report.power_half


# --- the arithmetic ----------------------------------------------------------------------------


def scores(m: int, mu: float, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    inside = generator.random(m) < 0.5
    return inside + generator.standard_normal(m) / mu, inside


def paper_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Returns the p-value of Steinke et al. 2023, appendix D, with its loops, by math alone."""
    rate = 1 / (1 + math.exp(-epsilon))
    chance = [math.comb(r, k) * rate**k * (1 - rate) ** (r - k) for k in range(r + 1)]
    most = 0.0
    for i in range(1, v + 1):
        most = max(most, sum(chance[v - i : v]) / i)
    return min(1.0, sum(chance[v:]) + 2 * m * delta * most)


@pytest.mark.parametrize(
    ("m", "r", "v"), [(1000, 100, 90), (1000, 100, 60), (50, 50, 50), (9, 1, 0)]
)
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_the_bound_is_that_of_the_paper(m: int, r: int, v: int, delta: float) -> None:
    for epsilon in (0.0, 0.5, 2.0):
        expected = paper_p_value(m, r, v, epsilon, delta)
        assert attacks._p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)
    bound = epsilon_bound(m, r, v, delta, 0.05)
    if bound:
        assert paper_p_value(m, r, v, bound, delta) == pytest.approx(0.05, rel=1e-6)
    else:
        assert paper_p_value(m, r, v, 0.0, delta) >= 0.05


def test_all_guesses_right_give_what_randomised_response_allows() -> None:
    bound = epsilon_bound(1000, 100, 100, 0.0, 0.05)
    assert (1 / (1 + math.exp(-bound))) ** 100 == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_the_bound_stays_below_the_truth_and_grows_with_it(mu: float) -> None:
    truth = gaussian_epsilon(mu, 1e-5)
    bounds = [one_run_audit(*scores(5000, mu, seed), 2.0, 2.0)[1] for seed in range(20)]
    assert max(bounds) <= truth
    assert np.median(bounds) > 0.35 * truth


def test_guesses_or_charges_beyond_the_claim_fail() -> None:
    far, near = scores(5000, 4.0, 0), scores(5000, 0.5, 0)
    assert not one_run_audit(*far, 2.0, 2.0)[0].passed
    assert one_run_audit(*near, 2.0, 2.0)[0].passed
    for charged in (2.1, math.inf):
        assert not one_run_audit(*near, 2.0, charged)[0].passed


@pytest.mark.parametrize(("wrong", "passes"), [(1.0, True), (0.8, False), (1.3, False)])
def test_the_shift_tells_noise_of_another_size(wrong: float, passes: bool) -> None:
    check, mu_hat = mean_shift(*scores(20_000, 0.5 / wrong, seed=1), sigma=2.0)
    assert check.passed is passes
    assert mu_hat == pytest.approx(0.5 / wrong, abs=4 * check.figures["standard_error"])


def described(canaries: int) -> AuditReport:
    return AuditReport((), canaries, 1, 2.0, 1e-5, 2.0, 0.0, 0.0, (), ())


@pytest.mark.parametrize("noise", [0.5, 0.8])
@pytest.mark.parametrize("canaries", [1000, 5000])
def test_the_power_is_how_often_small_noise_is_noticed(canaries: int, noise: float) -> None:
    noticed = [
        not mean_shift(*scores(canaries, 0.5 / noise, seed), sigma=2.0)[0].passed
        for seed in range(400)
    ]
    power = described(canaries).power_against(noise)
    assert float(np.mean(noticed)) == pytest.approx(power, abs=0.08)


def test_a_sound_step_fails_once_in_two_thousand_times() -> None:
    assert described(5000).power_against(1.0) == pytest.approx(1 / 2150, rel=0.01)


def test_the_verdict_names_what_failed() -> None:
    good, bad = attacks.Check("a", True, "", {}), attacks.Check("b", False, "", {})
    report = AuditReport((good, bad), 5000, 4, 2.0, 1e-5, 2.0, 0.0, 0.0, (), ())
    assert report.verdict == "VIOLATION: b"
    assert not report.passed
