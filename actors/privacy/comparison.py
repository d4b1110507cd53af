"""Compares what a budget buys under each contract, before any data is sent.

    print(compare_contracts(rows=3692, epsilon=8.0, epochs=3))

The numbers come from the planner and the accountants that a real run uses, on a fresh ledger.
"""

from __future__ import annotations

import math

from actors.privacy.accountants import epsilon_after
from actors.privacy.plan import calibrated_noise
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.errors import InvalidRequestError
from tg_tinker.records.accounting import EVALUATION_BOUND, gaussian_epsilon, gaussian_mu
from tg_tinker.records.entries import registration
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.planning import PlannedEvaluations, PlannedRun, PrivacyPlan

LARGER = (1, 2, 4, 8)
"""The batch sizes of the comparison, in units of the first."""

STDS = (0.02, 0.05, 0.1, 0.2)
"""The standard deviations of private evaluations, in nats."""


def compare_contracts(
    rows: int,
    epsilon: float,
    epochs: int,
    *,
    delta: float | None = None,
    batch_size: int | None = None,
    max_grad_norm: float = 1.0,
    held_out_rows: int | None = None,
) -> PrivacyPlan:
    """Returns batch sizes, noise and steps under each contract, and what they depend on.

    Args:
        rows: the units of the dataset.
        epsilon: the budget of the dataset, which is fresh.
        epochs: how often each row is used, on average.
        delta: by default 1e-5, or 0.1 / rows if that is smaller.
        batch_size: the smallest batch; by default the power of 2 nearest to the root of `rows`.
        max_grad_norm: C.
        held_out_rows: the rows of private evaluations; by default a tenth of `rows`.

    Raises:
        InvalidRequestError: a number is out of range, or the batch is larger than the dataset.
        DPBudgetExceededError: no noise is enough for this budget.
    """
    held_out = max(1, rows // 10) if held_out_rows is None else held_out_rows
    first = batch_size if batch_size is not None else 2 ** round(math.log2(max(1, rows)) / 2)
    for name, number in (("rows", rows), ("epochs", epochs), ("batch_size", first),
                         ("held_out_rows", held_out)):  # fmt: skip
        if number < 1:
            raise InvalidRequestError(f"{name} is {number}: give a number of 1 or more")
    if not 0 < epsilon < math.inf:
        raise InvalidRequestError(f"epsilon is {epsilon:g}: give a positive, finite number")
    if not 0 < max_grad_norm < math.inf:
        raise InvalidRequestError(f"max_grad_norm is {max_grad_norm:g}: give a positive number")
    if delta is not None and not 0 < delta < 1:
        raise InvalidRequestError(f"delta is {delta:g}: give a number between 0 and 1")
    if first > rows:
        raise InvalidRequestError(f"batch_size {first} exceeds the {rows} rows: lower batch_size")
    comparison = _Comparison(
        rows, epsilon, epochs, min(1e-5, 0.1 / rows) if delta is None else delta, max_grad_norm
    )
    batches = [first * larger for larger in LARGER if first * larger <= rows]
    drawn = [comparison.run("poisson", batch) for batch in batches]
    runs = [
        *(comparison.run("participation", batch) for batch in batches),
        *drawn,
        *(
            comparison.run("client_poisson", batch, one)
            for batch, one in zip(batches, drawn, strict=True)
        ),
        *(comparison.run("worst_case", batch) for batch in batches),
    ]
    return comparison.plan(runs, held_out)


class _Comparison:
    """A comparison for one dataset and one budget."""

    def __init__(
        self, rows: int, epsilon: float, epochs: int, delta: float, max_grad_norm: float
    ) -> None:
        self.rows, self.epsilon, self.epochs = rows, epsilon, epochs
        self.delta, self.bound = delta, max_grad_norm

    def run(self, contract: str, batch: int, like: PlannedRun | None = None) -> PlannedRun:
        """Returns the run with the least noise; `like` has the same noise, under another name."""
        steps = math.ceil(self.rows * self.epochs / batch)
        sigma = like.noise_multiplier if like else self._noise(contract, batch, steps)
        return PlannedRun(
            contract, batch, steps, sigma, sigma * self.bound / batch,
            like.epsilon if like else self._spent(contract, sigma, batch / self.rows, steps),
        )  # fmt: skip

    def _noise(self, contract: str, batch: int, steps: int) -> float:
        uses = self.epochs if contract == "participation" else None
        dp = DPConfig.model_validate({
            "sampling": contract, "target_epsilon": self.epsilon, "target_delta": self.delta,
            "max_grad_norm": self.bound, "dataset_size": self.rows, "max_participations": uses,
        })  # fmt: skip
        config = TrainingConfig(model_ref="-", batch_size=batch, max_steps=steps)
        fresh = Ledger()
        fresh.append(registration("-", self.epsilon, self.delta, "example", born=""))
        return calibrated_noise(dp, config, fresh)

    def _spent(self, contract: str, sigma: float, rate: float, steps: int) -> float:
        if contract == "poisson":
            return epsilon_after("prv", sigma, rate, steps, self.delta)
        count = self.epochs if contract == "participation" else steps
        return gaussian_epsilon(math.sqrt(count) / sigma, self.delta)

    def plan(self, runs: list[PlannedRun], held_out: int) -> PrivacyPlan:
        smallest = runs[0].batch_size
        first = {run.contract: run for run in runs if run.batch_size == smallest}
        drawn, counted = first["poisson"], first["participation"]
        # Poisson must be worth its assumption that nobody learns who was drawn.
        best = "poisson" if drawn.noise < 0.95 * counted.noise else "participation"
        return PrivacyPlan(
            self.rows, self.epochs, self.epsilon, self.delta, self.bound, tuple(runs), best,
            self._reasons(first), self._twice(first[best]), held_out,
            tuple(self._evaluations(std, held_out) for std in STDS),
        )  # fmt: skip

    def _reasons(self, first: dict[str, PlannedRun]) -> dict[str, str]:
        counted = first["participation"].noise
        drawn, worst = (first[name].noise / counted for name in ("poisson", "worst_case"))
        rate = first["poisson"].batch_size / self.rows
        return {
            "participation": f"{self.epochs} uses of each row cost the same at every batch size,"
            " and nothing is assumed about how batches are drawn.",
            "poisson": f"a step misses a row with probability {1 - rate:.3g}, which needs"
            f" {drawn:.3g}x the noise of participation; nobody may learn who was drawn.",
            "client_poisson": "the noise of poisson, but you vouch for the draws.",
            "worst_case": f"every step counts against every row, which needs {worst:.3g}x the"
            " noise of participation; for data without units to count.",
        }

    def _twice(self, best: PlannedRun) -> str:
        """Returns what twice the rows buy at twice the batch: the same rate, steps and uses."""
        rate = best.batch_size / self.rows
        epsilon = self._spent(best.contract, 2 * best.noise_multiplier, rate, best.steps)
        return (
            f"Twice the rows, in batches of {2 * best.batch_size:,}, would halve the noise"
            f" ({best.noise / 2:.3g}) at the same epsilon, or keep it at epsilon {epsilon:.3g}."
        )

    def _evaluations(self, std: float, held_out: int) -> PlannedEvaluations:
        mu = EVALUATION_BOUND / (std * held_out)
        count = math.floor((gaussian_mu(self.epsilon, self.delta) / mu) ** 2)
        return PlannedEvaluations(std, gaussian_epsilon(mu, self.delta), count)
