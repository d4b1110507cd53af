"""Poisson samples: units are registered once, and each step takes exactly the drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tg_tinker.errors import InvalidRequestError, ServiceError
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
