"""Compares the contracts of private training for a dataset, without a cluster or a home."""

from __future__ import annotations

from tg_tinker.backend import actors_backend
from tg_tinker.records.planning import PrivacyPlan


def plan_privacy(
    rows: int,
    epsilon: float,
    epochs: int = 1,
    *,
    delta: float | None = None,
    batch_size: int | None = None,
    max_grad_norm: float = 1.0,
    held_out_rows: int | None = None,
) -> PrivacyPlan:
    """Returns what a privacy budget buys under each contract. Nothing is charged or sent.

        print(plan_privacy(rows=3692, epsilon=8.0, epochs=3))

    Args:
        rows: the number of units in the dataset.
        epsilon: the budget of the dataset.
        epochs: how often each row is used, on average.
        delta: None takes 1e-5, or 0.1 / rows if that is smaller.
        batch_size: the smallest expected batch to compare; None takes the power of 2 nearest to the
            root of `rows`. Batches of 2, 4 and 8 times the size follow, up to `rows`.
        max_grad_norm: C, the L2 bound of one unit's gradient.
        held_out_rows: the rows of private evaluations; None takes a tenth of `rows`.

    Raises:
        InvalidRequestError: a number is out of range, or the batch is larger than the dataset.
        DPBudgetExceededError: no noise is enough for this budget.
    """
    return actors_backend().plan_privacy(
        rows, epsilon, epochs, delta=delta, batch_size=batch_size, max_grad_norm=max_grad_norm,
        held_out_rows=held_out_rows,
    )  # fmt: skip
