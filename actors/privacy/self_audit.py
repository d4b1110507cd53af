"""An attack on the private step of this installation, the real one, with real charges.

    report = run_audit()
    print(report.verdict)  # no violation found, power 1.00 against noise 20 % too small

Four checks, from exact to statistical: what one row can change, whether the noise is what it
should be, what an attacker learns from one step, and how far a canary moves it. `attacks` makes
them; here they are run, one after the other, and reported. A tiny random model will do, for nothing
depends on what a model knows. Attacked are steps whose unit is the example, under the worst-case
contract. Not attacked are the accountants, who counts under the other contracts, and whatever lies
outside of `PrivateSession`.

Legend: C the L2 bound of a unit, mu = 1 / sigma. A canary is a made-up unit that an attacker looks
for.
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
    neighbour_replay,
    noise_fit,
    one_run_audit,
    play_canaries,
    standard_error,
    tolerance,
)
from actors.privacy.session import PrivateSession
from tg_tinker.records.accounting import gaussian_mu

MOST_EPSILON = 2.0
"""Above, the bound of one step stays so far below the claim that it could hardly fail."""

LEAST_CANARIES, MOST_CANARIES = 100, 16_384
"""In one step: at most one for each trainable value of the model."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        canaries: in each of `steps` steps, half of them in.
        bound: on epsilon from below, at 95 % confidence, of one step.
        mu_hat: how far a canary moved its score, in standard deviations of the score.
        scores_in, scores_out: of the canaries that were in the step or not, in units of C.
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
        """How probably the mean shift alone shows that only this part of the noise is there.

        By the normal approximation. The noise fit sees an error of 1 %, but in empty steps only.
        """
        count = self.steps * self.canaries
        wrong = NormalDist(1 / (noise * self.sigma), standard_error(count))
        near = tolerance(self.sigma, count)
        return 1 - wrong.cdf(1 / self.sigma + near) + wrong.cdf(1 / self.sigma - near)

    @property
    def power(self) -> float:
        """Against noise 20 % too small."""
        return self.power_against(0.8)

    @property
    def power_half(self) -> float:
        """Against half the noise."""
        return self.power_against(0.5)

    @property
    def verdict(self) -> str:
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            return f"VIOLATION: {', '.join(failed)}"
        return f"no violation found, power {self.power:.2f} against noise 20 % too small"

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the scores."""
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
    """Attacks private steps on this machine; about ten seconds.

    Args:
        progress: is told what begins.
        canaries: of each of four steps; the error of `mu_hat` falls with its square root.
        epsilon: what one step claims, at delta 1e-5; the noise follows from it.
        session_type: what is attacked.

    Raises:
        ValueError: too few or too many canaries, or an epsilon that could not be refuted.
    """
    if not 0 < epsilon <= MOST_EPSILON:
        raise ValueError(f"epsilon is {epsilon:g}: audit a claim above 0, at most {MOST_EPSILON:g}")
    if not LEAST_CANARIES <= canaries <= MOST_CANARIES:
        raise ValueError(f"canaries are {canaries}: take {LEAST_CANARIES} to {MOST_CANARIES}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are only slowed down by more
    try:
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), session_type)
            progress("neighbour replay: with and without each row")
            replay = neighbour_replay(bench)
            progress("noise fit: steps without rows")
            noise = noise_fit(bench)
            progress(f"canaries: {CANARY_STEPS} steps with half of {canaries} each")
            sigma = (1 + 1e-9) / gaussian_mu(epsilon, DELTA)  # rounded up: the ledger is exact
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
