"""Poisson samples: units are registered once, and each step takes exactly the drawn ones.

`PoissonSampler` draws; `PoissonDraws` is a run's way to it: which units there are, and that each
draw is paid before it is told. That noise is added once for a draw is left to `session`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from actors.privacy.budget import Budget
from actors.privacy.units import unit_ids
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ServiceError
from tg_tinker.records.report import Charge
from tg_tinker.storage.envelope import keystream


class PoissonSampler:
    """Draws each unit into a step with probability `rate`, on its own, from OS entropy.

    A draw is charged before anyone sees it, and stays until a step has used it: asking again,
    registering again or loading other weights gives the same one, and whoever leaves it for
    another, in a new client or after a crash, has paid for both. It is never saved.
    """

    def __init__(self, units: Sequence[bytes], rate: float) -> None:
        self._units = list(units)
        self._rate = rate
        self._drawn: list[int] | None = None
        self._charge: Charge | None = None

    @property
    def paid(self) -> bool:
        """Whether a draw waits for its step, which needs no budget any more."""
        return self._charge is not None

    def draws_from(self, units: Sequence[bytes]) -> bool:
        """Whether it has these units, and so keeps its draw.

        Raises:
            InvalidRequestError: it has others, and a draw of them is open.
        """
        if self._drawn is not None and units != self._units:
            raise InvalidRequestError(
                "a drawn sample waits for its step: pass the same data set, in the same order"
            )
        return units == self._units

    def draw(self, charge: Callable[[list[bytes]], Charge]) -> list[int]:
        """Indices of the units of the next step, in order; may be empty.

        `charge` makes a new draw durable; what it raises leaves no draw.
        """
        if self._drawn is None:
            words = np.frombuffer(keystream(8 * len(self._units)), dtype="<u8")
            uniforms = (words >> np.uint64(11)) * 2.0**-53
            drawn = np.flatnonzero(uniforms < self._rate).tolist()
            self._charge = charge([self._units[i] for i in drawn])
            self._drawn = drawn
        return self._drawn

    def check(self, units: set[bytes]) -> None:
        """Refuses a step whose units are not exactly the draw; the draw stays.

        Raises:
            InvalidRequestError: nothing was drawn, or rows are missing, added or changed.
        """
        if self._drawn is None or units != {self._units[i] for i in self._drawn}:
            raise InvalidRequestError(
                "the rows of this step are not the drawn sample, so Poisson accounting would not"
                " hold for it: pass each batch of tc.poisson_batches(dataset) to forward_backward"
                " whole, in one step. The step was dropped; the sample waits, and is paid for"
            )

    def use(self) -> Charge:
        """The charge of the draw, which `check` has found right; the next draw is another."""
        if self._charge is None:
            raise ServiceError("no sample was drawn for this step")
        charge, self._charge, self._drawn = self._charge, None, None
        return charge


class PoissonDraws:
    """The samples of one run, where the server draws them; idle under any other contract."""

    def __init__(self, budget: Budget, config: TrainingConfig) -> None:
        self._budget = budget
        self._dp = config.dp_config or DPConfig()
        self._expected = config.batch_size * config.gradient_accumulation_steps
        self._max_steps = config.max_steps
        self._sampler: PoissonSampler | None = None

    @property
    def paid(self) -> bool:
        """Whether a draw waits for its step, which needs no budget any more."""
        return self._sampler is not None and self._sampler.paid

    def register(self, examples: Sequence[Example]) -> list[list[int]]:
        """Takes the data set that later samples are drawn from; the rows of each of its units.

        Raises:
            InvalidRequestError: another contract, not `dataset_size` distinct units, or other
                units while a draw is open.
        """
        if self._dp.sampling != "poisson":
            raise InvalidRequestError(
                f"the contract of this run is {self._dp.sampling!r}: samples are drawn under"
                ' DPConfig(sampling="poisson") only'
            )
        rows: dict[bytes, list[int]] = {}
        for index, unit in enumerate(unit_ids(self._budget.key, examples, self._dp.unit)):
            if self._dp.unit == "id" or unit not in rows:  # a repeated example would add zero
                rows.setdefault(unit, []).append(index)
        if len(rows) != self._dp.dataset_size:
            raise InvalidRequestError(
                f"the data set has {len(rows)} distinct units in {len(examples)} rows,"
                f" DPConfig(dataset_size={self._dp.dataset_size}) was agreed: they must be equal",
                details={"units": len(rows), "rows": len(examples)},
            )
        if self._sampler is None or not self._sampler.draws_from(list(rows)):
            self._sampler = PoissonSampler(list(rows), self._expected / len(rows))
        return list(rows.values())

    def draw(self, step: int) -> list[int]:
        """The units of the step after `step` completed ones, as indices into what `register`
        returned.

        Paid before they are told: a sample that is thrown away to get another costs a step.

        Raises:
            DPBudgetExceededError: the budget pays for no further sample.
        """
        if self._sampler is None:
            raise InvalidRequestError("register a data set first: use tc.poisson_batches(dataset)")
        if self._max_steps is not None and step >= self._max_steps:
            raise DPBudgetExceededError(
                f"no step is left: all {step} that were planned are made. sample and"
                " save_state still work"
            )
        return self._sampler.draw(self._pay)

    def check(self, units: set[bytes]) -> None:
        """Refuses a step whose units are not exactly the draw; the draw stays."""
        if self._sampler is None:
            raise InvalidRequestError(
                "under Poisson sampling the server draws each step: take the batches from"
                " tc.poisson_batches(dataset)"
            )
        self._sampler.check(units)

    def use(self) -> Charge:
        """The charge of the draw, for the step that `check` has found right."""
        if self._sampler is None:
            raise ServiceError("no sample was drawn for this step")
        return self._sampler.use()

    def _pay(self, units: list[bytes]) -> Charge:
        self._budget.admit([])
        return self._budget.charge(units, noised=True)
