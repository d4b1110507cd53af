"""Releases the held-out loss of the present weights with noise, and charges the held-out dataset.

The loss itself would need much noise, because a single row may have any loss. Its difference from
the base model's loss is small for most rows, and is clipped to two nats per token:

    x_u    = mean over the rows of unit u of (loss of the present weights - loss of the base model)
    value  = (sum over u of clip(x_u, -2, 2) + noise) / n

A null unit, and a unit that does not count, adds exactly zero. So replacing a unit by a null unit
moves the sum by at most 2, and noise of standard deviation std x n is one Gaussian mechanism with
mu = 2 / (std x n) for each unit that counts. n is public, and never the number of units that count.

A unit that another dataset of the tenant knows does not count: the ledger of that dataset would not
be charged for it. Nor does a unit that has reached its limit in the held-out ledger.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.engine.session import Session
from actors.privacy.budget import Budget
from actors.privacy.clipping import Noise
from actors.privacy.known_units import known_elsewhere
from actors.privacy.noise import LEAST_SIGMA
from actors.privacy.units import row_defect, unit_ids
from actors.registry.head_keeper import HeadKeeper
from tg_tinker.data.batch import Example, require_ids
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, NotFoundError
from tg_tinker.records.accounting import EVALUATION_BOUND, SIGMA_RANGE
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge

_GRID = 2.0**-10
"""The grid of a released value, in standard deviations. The last bits of a float that holds a sum
and its noise can tell the sum (Mironov 2012, doi:10.1145/2382196.2382264). The grid is far coarser
than these bits, and hides nothing that the noise does not hide anyway."""


@dataclass(repr=False)
class HeldOut:
    """The access of one run to the ledger of a held-out dataset.

    Attributes:
        budget: the budget of the run itself.
        dataset, unit, key: the held-out dataset, its unit, and the key of its unit hashes.
        unit_stated: whether somebody chose the unit, as far as is known; see `Budget`.
        heads: puts heads of the held-out ledger into the store; None without a store.
        last: the head position of the ledger after the last charge; empty before the first.
    """

    budget: Budget
    dataset: str
    unit: str
    key: bytes
    unit_stated: bool = False
    heads: HeadKeeper | None = None
    last: str = ""

    @classmethod
    def opened(cls, budget: Budget, dataset: str) -> HeldOut:
        """Returns the access to a registered dataset.

        Raises:
            InvalidRequestError: the run trains on this dataset.
            NotFoundError: no dataset of this tenant has this name.
        """
        if dataset == budget.dataset:
            raise InvalidRequestError(
                f"this run trains on dataset {dataset!r}: register the held-out rows as a dataset"
                " of their own, with service.register_dataset"
            )
        keys = budget.registry.ledgers.unit_keys(budget.tenant)
        if dataset not in keys:
            raise NotFoundError(
                f"no dataset {dataset!r}: register the held-out rows with"
                " service.register_dataset, which gives them an epsilon of their own"
            )
        return cls(budget, dataset, *keys[dataset])

    def refresh(self) -> None:
        """Reads the unit again until somebody has chosen it."""
        if not self.unit_stated:
            entries = self.budget.registry.ledgers.entries(self.budget.tenant, self.dataset)
            ledger = Ledger.replay(entries)
            self.unit, self.unit_stated = ledger.registered["unit"], ledger.unit_stated

    def admitted(self, units: Sequence[bytes], sigma: float) -> list[bytes]:
        """Returns those of the units that the held-out dataset can pay for.

        Raises:
            DPBudgetExceededError: it can pay for none of them.
        """
        at_limit = self.budget.registry.ledgers.at_limit(
            self.budget.tenant, self.dataset, self.budget.run_id, sorted(units), sigma
        )
        if units and at_limit.issuperset(units):
            raise DPBudgetExceededError(
                f"dataset {self.dataset!r} cannot pay for any of these units again at this noise."
                " Use a larger std, or other held-out rows; training is not affected"
            )
        return [unit for unit in units if unit not in at_limit]

    def charge(self, units: Sequence[bytes], sigma: float) -> Charge:
        """Charges one draw of noise durably, and returns the receipt.

        Raises:
            DPBudgetExceededError: another client took the budget since `admitted`; nothing was
                charged.
            LedgerMismatchError: see `Budget.charge`.
        """
        if self.heads is not None:
            self.heads.check()
        budget = self.budget
        charge = budget.registry.ledgers.evaluate(
            budget.tenant, self.dataset, budget.run_id, budget.epoch, secrets.token_hex(16),
            sorted(units), sigma, [self.last] if self.last else [], self.unit,
        )  # fmt: skip
        self.last = charge.place
        return charge


@dataclass(repr=False)
class Units:
    """The units of one call.

    Attributes:
        count: the number of units of the call, whether they count or not.
        fresh: the units that no other dataset knows. Units whose rows have a defect are among them,
            because the ledger must not tell which rows have one.
        rows: the rows that count, by unit.
        skipped: the number of rows that do not count, by reason.
    """

    count: int = 0
    fresh: list[bytes] = field(default_factory=list)
    rows: dict[bytes, list[Example]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def units_of(
    held_out: HeldOut, examples: Sequence[Example], in_window: set[bytes], session: Session
) -> Units:
    """Returns the units of a call, and which of them count.

    Args:
        in_window: the training units of the open step, which no ledger knows yet.

    Raises:
        InvalidRequestError: the held-out dataset protects ids, or one that the weights were trained
            on does, and rows lack them; or rows have ids, and nobody chose the unit of the dataset.
    """
    budget, base = held_out.budget, session.base
    held_out.refresh()
    if not held_out.unit_stated and any(example.example_id is not None for example in examples):
        raise InvalidRequestError(
            "these rows have example_ids, but nobody has said whether an id is the unit of dataset"
            f" {held_out.dataset!r}, which the first run on it has registered; nothing was charged."
            " Register the held-out rows under another dataset_id, with"
            ' service.register_dataset(..., unit="id") or unit="example"'
        )
    keys = budget.registry.ledgers.unit_keys(budget.tenant)
    # Without ids nobody sees whether a row belongs to a person in the training data.
    if any(keys[name][0] == "id" for name in keys.keys() & session.lineage.ledgers.keys()):
        require_ids(examples)
    training = unit_ids(budget.key, examples, keys[budget.dataset][0])
    elsewhere = known_elsewhere(budget, keys, examples, held_out.dataset)
    units = unit_ids(held_out.key, examples, held_out.unit)
    known = {
        unit
        for unit, own, names in zip(units, training, elsewhere, strict=True)
        if names or own in in_window
    }
    found = Units(len(set(units)), sorted(set(units) - known))
    for example, unit in zip(examples, units, strict=True):
        defect = row_defect(example, base.vocab_size, base.context_length)
        repeated = held_out.unit == "example" and unit in found.rows
        if unit in known:
            found.skipped["known under another dataset"] += 1
        elif repeated or defect:
            found.skipped[defect or "repeated in the call"] += 1
        else:
            found.rows.setdefault(unit, []).append(example)
    return found


def clipped_sum(
    session: Session, units: Sequence[list[Example]], check_cancelled: Callable[[], None]
) -> float:
    """Returns the sum of the parts of these units, each given by its rows. It has no noise.

    A unit without rows, or whose loss is not finite, adds zero.
    """
    examples = [example for rows in units for example in rows]
    present = session.row_losses(examples, check_cancelled)
    with session.as_base():
        of_base = session.row_losses(examples, check_cancelled)
    differences = iter([a - b for a, b in zip(present, of_base, strict=True)])
    means = [sum(next(differences) for _ in rows) / len(rows) for rows in units if rows]
    return math.fsum(
        max(-EVALUATION_BOUND, min(EVALUATION_BOUND, mean)) for mean in means if math.isfinite(mean)
    )


def multiplier(std: float, count: int) -> float:
    """Returns sigma, in units of `EVALUATION_BOUND`, that gives the mean of `count` units this std.

    Raises:
        InvalidRequestError: the ledger cannot account for so much or so little noise.
    """
    sigma = std * count / EVALUATION_BOUND
    least, most = LEAST_SIGMA, SIGMA_RANGE[1]
    if not least <= sigma <= most:
        raise InvalidRequestError(
            f"std {std:g} for {count} units is noise of {sigma:.3g} times the part of one unit,"
            f" outside {least:g} to {most:g}: use another std"
        )
    return sigma


def released(total: float, charge: Charge, count: int, noise: Noise) -> float:
    """Returns the sum with noise, divided by `count`, from the one draw that the charge pays for.

    Args:
        count: the public divisor n.
        noise: returns float64 [k] of independent standard normal values, given k.
    """
    std = charge.spend() * EVALUATION_BOUND
    grid = 2.0 ** math.floor(math.log2(_GRID * std / count))
    return round((total + std * float(noise(1))) / count / grid) * grid
