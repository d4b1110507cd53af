"""Attacks the private step of this installation: the real step, with real charges.

    report = run_audit()
    print(report.verdict)  # no violation found, power 1.00 against noise 20 % too small

The audit makes four checks, from exact to statistical: what one row can change, whether the noise
is correct, what an attacker learns from one step, and how far a canary moves its score. `attacks`
has the checks; this module runs them in turn and reports the results. A tiny random model is
enough, because nothing depends on what a model has learned.

The audit attacks steps whose unit is the example, under the worst-case contract. It does not attack
the accountants, the counting of the other contracts, or anything outside `PrivateSession`.

Legend: C the L2 bound of a unit, mu = 1 / sigma. A canary is an artificial unit that an attacker
tries to detect.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from actors.privacy.attacks import (
    CANARY_STEPS,
    DELTA,
    Bench,
    Check,
    mean_shift,
    neighbor_replay,
    noise_fit,
    one_run_audit,
    play_canaries,
    standard_error,
    tolerance,
)
from actors.privacy.session import PrivateSession
from tg_tinker.records.accounting import gaussian_mu

MOST_EPSILON = 2.0
"""The largest epsilon to audit.

For a larger claim, the bound from one step stays so far below the claim that the check could hardly
fail.
"""

LEAST_CANARIES, MOST_CANARIES = 100, 16_384
"""The number of canaries in one step: at most one for each trainable value of the model."""


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit.

    Attributes:
        canaries: the number of canaries in each of `steps` steps; about half of them were in.
        bound: a lower bound on the epsilon of one step, at 95 % confidence.
        mu_hat: how far a canary moved its score, in standard deviations of the score.
        scores_in, scores_out: the scores of the canaries that were in the step, and of the others,
            in units of C.
    """

    checks: tuple[Check, ...]
    canaries: int
    steps: int
    claimed_epsilon: float
    delta: float
    sigma: float
    bound: float
    mu_hat: float
    scores_in: tuple[float, ...]
    scores_out: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def power_against(self, noise: float) -> float:
        """Returns the probability that the mean shift alone detects noise that is too small.

        The probability is a normal approximation. The noise fit also detects an error of 1 %, but
        in empty steps only.

        Args:
            noise: the size of the actual noise, as a part of the correct size.
        """
        count = self.steps * self.canaries
        wrong = NormalDist(1 / (noise * self.sigma), standard_error(count))
        near = tolerance(self.sigma, count)
        return 1 - wrong.cdf(1 / self.sigma + near) + wrong.cdf(1 / self.sigma - near)

    @property
    def power(self) -> float:
        """The power against noise that is 20 % too small; see `power_against`."""
        return self.power_against(0.8)

    @property
    def power_half(self) -> float:
        """The power against half the noise; see `power_against`."""
        return self.power_against(0.5)

    @property
    def verdict(self) -> str:
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            return f"VIOLATION: {', '.join(failed)}"
        return f"no violation found, power {self.power:.2f} against noise 20 % too small"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, without the scores."""
        plain = asdict(self) | {
            "checks": [asdict(check) for check in self.checks],
            "passed": self.passed, "verdict": self.verdict,
            "power": self.power, "power_half": self.power_half,
        }  # fmt: skip
        return {name: value for name, value in plain.items() if not name.startswith("scores")}


def run_audit(
    *,
    progress: Callable[[str], None] = lambda message: None,
    canaries: int = 5000,
    epsilon: float = 2.0,
    session_type: type[PrivateSession] = PrivateSession,
) -> AuditReport:
    """Attacks private steps on this machine, in about ten seconds, and returns the report.

    Args:
        progress: receives a message when a check begins.
        canaries: the number of canaries in each of four steps. The error of `mu_hat` falls with the
            square root of this number.
        epsilon: what one step claims, at delta 1e-5; the noise follows from it.
        session_type: the class that is attacked.

    Raises:
        ValueError: there are too few or too many canaries, or epsilon is not positive or too large
            to be refuted.
    """
    if not 0 < epsilon <= MOST_EPSILON:
        raise ValueError(
            f"epsilon is {epsilon:g}: use a value above 0 and at most {MOST_EPSILON:g}"
        )
    if not LEAST_CANARIES <= canaries <= MOST_CANARIES:
        raise ValueError(f"canaries are {canaries}: use {LEAST_CANARIES} to {MOST_CANARIES}")
    threads = torch.get_num_threads()
    # More threads make tensors of this size slower.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), session_type)
            progress("neighbor replay: with and without each row")
            replay = neighbor_replay(bench)
            progress("noise fit: steps without rows")
            noise = noise_fit(bench)
            progress(f"canaries: {CANARY_STEPS} steps with half of {canaries} each")
            # Rounded up, because the ledger checks the exact epsilon.
            sigma = (1 + 1e-9) / gaussian_mu(epsilon, DELTA)
            scores, inside, charged = play_canaries(bench, canaries, sigma, epsilon)
    finally:
        torch.set_num_threads(threads)
    guess, bound = one_run_audit(scores, inside, epsilon, charged)
    shift, mu_hat = mean_shift(scores, inside, sigma)
    return AuditReport(
        checks=(replay, noise, guess, shift), canaries=canaries,
        steps=CANARY_STEPS, claimed_epsilon=epsilon,
        delta=DELTA, sigma=sigma, bound=bound, mu_hat=mu_hat,
        scores_in=tuple(scores[inside].tolist()), scores_out=tuple(scores[~inside].tolist()),
    )  # fmt: skip
