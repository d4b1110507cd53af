"""Draws Poisson samples: units are registered once, and each step takes exactly the drawn units.

`PoissonSampler` draws. `PoissonDraws` gives a run access to the sampler: it registers the units and
charges each draw before anyone sees it. `session` adds noise once for each draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from actors.privacy.budget import Budget
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ServiceError
from tg_tinker.records.report import Charge
from tg_tinker.storage.envelope import keystream


class PoissonSampler:
    """A sampler that draws each unit into a step with probability `rate`.

    The draws of the units are independent and come from operating-system entropy. A draw is charged
    before anyone sees it, and it stays until a step has used it. Until then, another call of
    `draw`, another registration and other weights give the same draw. A new client, or a client
    after a crash, gets a new draw and pays for both. A draw is never saved.
    """

    def __init__(self, units: Sequence[bytes], rate: float) -> None:
        self._units = list(units)
        self._rate = rate
        self._drawn: list[int] | None = None
        self._charge: Charge | None = None

    @property
    def paid(self) -> bool:
        """Whether a draw waits for its step. The draw is paid, so the step needs no budget."""
        return self._charge is not None

    def draws_from(self, units: Sequence[bytes]) -> bool:
        """Returns whether the sampler has these units, and so keeps its draw.

        Raises:
            InvalidRequestError: the sampler has other units, and a draw of them is open.
        """
        if self._drawn is not None and units != self._units:
            raise InvalidRequestError(
                "a drawn sample waits for its step: pass the same dataset, in the same order"
            )
        return units == self._units

    def draw(self, charge: Callable[[list[bytes]], Charge]) -> list[int]:
        """Returns the indices of the units of the next step, in ascending order; possibly none.

        Args:
            charge: charges a new draw durably. If it raises an error, there is no draw.
        """
        if self._drawn is None:
            words = np.frombuffer(keystream(8 * len(self._units)), dtype="<u8")
            uniforms = (words >> np.uint64(11)) * 2.0**-53
            drawn = np.flatnonzero(uniforms < self._rate).tolist()
            self._charge = charge([self._units[i] for i in drawn])
            self._drawn = drawn
        return self._drawn

    def check(self, units: set[bytes]) -> None:
        """Refuses a step whose units are not exactly the draw. The draw stays.

        Raises:
            InvalidRequestError: there is no draw, or rows are missing, added or changed.
        """
        if self._drawn is None or units != {self._units[i] for i in self._drawn}:
            raise InvalidRequestError(
                "the rows of this step are not the drawn sample, so Poisson accounting would not"
                " hold for it. The step was dropped; the sample is paid for and still waits: pass"
                " each batch of tc.poisson_batches(dataset) whole, in one step"
            )

    def use(self) -> Charge:
        """Returns the charge of the draw and ends the draw; the caller has called `check`."""
        if self._charge is None:
            raise ServiceError("no sample was drawn for this step")
        charge, self._charge, self._drawn = self._charge, None, None
        return charge


class PoissonDraws:
    """The samples of one run under the `poisson` contract. Under other contracts it is not used."""

    def __init__(self, budget: Budget, config: TrainingConfig) -> None:
        self._budget = budget
        self._dp = config.dp_config or DPConfig()
        self._expected = config.batch_size * config.gradient_accumulation_steps
        self._max_steps = config.max_steps
        self._sampler: PoissonSampler | None = None

    @property
    def paid(self) -> bool:
        """Whether a draw waits for its step. The draw is paid, so the step needs no budget."""
        return self._sampler is not None and self._sampler.paid

    def register(self, examples: Sequence[Example]) -> list[list[int]]:
        """Registers the units that later samples are drawn from; returns the rows of each unit.

        Raises:
            InvalidRequestError: the run has another contract, the number of distinct units is not
                `dataset_size`, or the units differ while a draw is open.
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
        if self._sampler is None or not self._sampler.draws_from(list(rows)):
            self._sampler = PoissonSampler(list(rows), self._expected / len(rows))
        return list(rows.values())

    def draw(self, step: int) -> list[int]:
        """Returns the units of the next step, as indices into the result of `register`.

        The draw is paid before anyone sees it, so a sample that is discarded costs a step.

        Args:
            step: the number of completed steps.

        Raises:
            InvalidRequestError: no dataset is registered.
            DPBudgetExceededError: the budget cannot pay for another sample.
        """
        if self._sampler is None:
            raise InvalidRequestError(
                "no dataset is registered for Poisson samples: use tc.poisson_batches(dataset)"
            )
        if self._max_steps is not None and step >= self._max_steps:
            raise DPBudgetExceededError(
                f"no step is left: all {step} steps that were planned are made. sample and"
                " save_state still work"
            )
        return self._sampler.draw(self._pay)

    def check(self, units: set[bytes]) -> None:
        """Refuses a step whose units are not exactly the draw; see `PoissonSampler.check`."""
        if self._sampler is None:
            raise InvalidRequestError(
                "under Poisson sampling the server draws the units of each step: take the batches"
                " from tc.poisson_batches(dataset)"
            )
        self._sampler.check(units)

    def use(self) -> Charge:
        """Returns the charge of the draw and ends the draw; see `PoissonSampler.use`."""
        if self._sampler is None:
            raise ServiceError("no sample was drawn for this step")
        return self._sampler.use()

    def _pay(self, units: list[bytes]) -> Charge:
        self._budget.admit([])
        return self._budget.charge(units, noised=True)
