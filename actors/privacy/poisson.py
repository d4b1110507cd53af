"""Poisson samples of one run: units are registered once, and each step has exactly the drawn units.

The registry draws, from the stream of the dataset (`actors.registry.draws`), and keeps the key. The
actor sends the keyed hashes of its units, is told who is drawn, and checks that the step has these
units. The charge of the step uses the draw up; `session` adds noise once for each charge. Until
then, this run and every run with the same settings is told the same draw: after a crash, in a new
client, and in another order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.privacy.budget import Budget
from actors.registry.draws import Draw
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError


class PoissonDraws:
    """The samples of one run under the `poisson` contract. Under other contracts it is not used."""

    def __init__(self, budget: Budget, config: TrainingConfig) -> None:
        self._budget = budget
        self._dp = config.dp_config or DPConfig()
        self._max_steps = config.max_steps
        # In the order of the rows, and as the registry takes them.
        self._units: list[bytes] = []
        self._sorted: list[bytes] = []
        self._draw: Draw | None = None

    def register(self, examples: Sequence[Example]) -> list[list[int]]:
        """Registers the units that later samples are drawn from; returns the rows of each unit.

        Raises:
            InvalidRequestError: the run has another contract, or the number of distinct units is
                not `dataset_size`.
        """
        if self._dp.sampling != "poisson":
            raise InvalidRequestError(
                f"the contract of this run is {self._dp.sampling!r}: samples are drawn under"
                ' DPConfig(sampling="poisson") only'
            )
        rows: dict[bytes, list[int]] = {}
        for index, unit in enumerate(self._budget.units_of(examples)):
            # A repeated example is left out, because it would add zero.
            if self._budget.unit == "id" or unit not in rows:
                rows.setdefault(unit, []).append(index)
        if len(rows) != self._dp.dataset_size:
            raise InvalidRequestError(
                f"the dataset has {len(rows)} distinct units in {len(examples)} rows, but the run"
                f" was created with DPConfig(dataset_size={self._dp.dataset_size}): pass exactly"
                " that many distinct units",
                details={"units": len(rows), "rows": len(examples)},
            )
        self._budget.note(rows)
        self._units, self._sorted = list(rows), sorted(rows)
        return list(rows.values())

    def draw(self, step: int) -> list[int]:
        """Returns the units of the next step, as ascending indices into the result of `register`;
        possibly none.

        Args:
            step: the number of completed steps.

        Raises:
            InvalidRequestError: no dataset is registered, or a draw of the dataset with other
                settings or units waits for its step.
            DPBudgetExceededError: the budget cannot pay for the step of another sample.
        """
        if not self._units:
            raise InvalidRequestError(
                "no dataset is registered for Poisson samples: use tc.poisson_batches(dataset)"
            )
        if self._max_steps is not None and step >= self._max_steps:
            raise DPBudgetExceededError(
                f"no step is left: all {step} steps that were planned are made. sample and"
                " save_state still work"
            )
        self._draw = self._budget.draw(self._sorted)
        drawn = {self._sorted[at] for at in self._draw.drawn}
        return [index for index, unit in enumerate(self._units) if unit in drawn]

    def check(self, units: set[bytes]) -> Draw:
        """Returns the draw of a step, if the step was sent exactly its units.

        Raises:
            InvalidRequestError: nothing was drawn, or rows are missing, added or changed. The draw
                stays.
        """
        if self._draw is None:
            raise InvalidRequestError(
                "under Poisson sampling the server draws the units of each step: take the batches"
                " from tc.poisson_batches(dataset)"
            )
        if units != {self._sorted[at] for at in self._draw.drawn}:
            raise InvalidRequestError(
                "the rows of this step are not the drawn sample, so Poisson accounting would not"
                " hold for it. The step was dropped and nothing was charged; the sample still"
                " waits: pass each batch of tc.poisson_batches(dataset) whole, in one step. Rows"
                " that your code cannot use may be sent as batch.emptied(rows), which add zero"
            )
        return self._draw
