"""Defines what a comparison of private runs holds: `PrivacyPlan`, as `plan_privacy` returns it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tg_tinker.records.accounting import EVALUATION_BOUND


@dataclass(frozen=True)
class PlannedRun:
    """One way to spend the budget.

    Attributes:
        contract: as `DPConfig.sampling`.
        batch_size: the expected rows in a step.
        steps: the number of steps.
        noise_multiplier: sigma, the smallest that the budget pays for.
        noise: the standard deviation of the noise in each value of a step's mean gradient,
            sigma x C / batch_size.
        epsilon: what all steps spend.
    """

    contract: str
    batch_size: int
    steps: int
    noise_multiplier: float
    noise: float
    epsilon: float


@dataclass(frozen=True)
class PlannedEvaluations:
    """How many private evaluations the budget of a held-out set pays for.

    Attributes:
        std: the standard deviation of the released mean loss difference, in nats.
        epsilon: what one evaluation spends.
        count: how many fit.
    """

    std: float
    epsilon: float
    count: int


@dataclass(frozen=True)
class PrivacyPlan:
    """A comparison of the contracts for one dataset and budget.

    Attributes:
        rows, epochs, epsilon, delta, max_grad_norm: what was asked.
        runs: for each contract, its batch sizes in rising order.
        best: the contract with the least noise at the smallest batch size.
        reasons: for each contract, one sentence.
        twice_the_rows: what twice the rows would buy.
        held_out_rows: the rows of the held-out set.
        evaluations: from precise to coarse.
    """

    rows: int
    epochs: int
    epsilon: float
    delta: float
    max_grad_norm: float
    runs: tuple[PlannedRun, ...]
    best: str
    reasons: dict[str, str]
    twice_the_rows: str
    held_out_rows: int
    evaluations: tuple[PlannedEvaluations, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.rows:,} rows, {self.epochs} epochs, epsilon {self.epsilon:g} at delta"
            f" {self.delta:g}, C = {self.max_grad_norm:g}"
        )
        yield ""
        yield f"{'contract':<15}{'batch':>7}{'steps':>8}{'sigma':>10}{'noise':>11}{'epsilon':>9}"
        for run in self.runs:
            yield (
                f"{run.contract:<15}{run.batch_size:>7,}{run.steps:>8,}"
                f"{run.noise_multiplier:>10.4g}{run.noise:>11.3g}{run.epsilon:>9.3g}"
            )
        yield ""
        yield "noise: standard deviation in each value of a step's mean gradient, sigma x C / batch"
        yield "A larger batch has less noise, but makes fewer steps in the same epochs."
        yield ""
        yield f"Best here: {self.best}."
        for contract, reason in self.reasons.items():
            yield f"- {contract}: {reason}"
        yield f"- {self.twice_the_rows}"
        yield ""
        yield (
            f"Private evaluations on {self.held_out_rows:,} held-out rows, loss differences clipped"
            f" to {EVALUATION_BOUND:g} nats, charged to that set's own ledger with the same budget:"
        )
        for one in self.evaluations:
            yield f"- std {one.std:g}: epsilon {one.epsilon:.3g} each, {one.count:,} fit"
