"""Finds rows of a batch that other datasets of the same tenant know.

Unit hashes are keyed by dataset, so equal rows under two datasets look different to everybody but
the registry. Here the training actor hashes a row under the key of each dataset of its tenant, and
asks which of these hashes are known. The keys stay in this memory for the length of one lookup. The
answers depend on content: they are for the data owner alone, and belong into no certificate, log or
metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from actors.privacy.budget import Budget
from actors.privacy.units import unit_ids
from tg_tinker.data.batch import Example
from tg_tinker.errors import TGTinkerError

CALLS, ROWS, DATASETS = 3, 1000, 32
"""How much `OverlapWarnings` looks up: the first calls of an actor, the first rows of each of these
calls, and the first datasets by name."""


def known_elsewhere(
    budget: Budget, keys: Mapping[str, tuple[str, bytes]], examples: Sequence[Example],
    dataset: str, most: int | None = None,
) -> list[set[str]]:  # fmt: skip
    """Returns for each row the datasets of this tenant, other than `dataset`, that know its unit.

    A row without an id is unknown to a dataset whose unit is the id: nobody can tell whose it is.

    Args:
        keys: unit and key of each dataset of the tenant; see `Ledgers.unit_keys`.
        most: the number of datasets to look at; None looks at all of them.
    """
    hashes = {
        name: [_hashed(example, *keys[name]) for example in examples]
        for name in sorted(keys.keys() - {dataset})[:most]
    }
    asked = {name: sorted({*by_row} - {b""}) for name, by_row in hashes.items()}
    known = budget.registry.ledgers.known_units(budget.tenant, asked)
    return [
        {name for name, by_row in hashes.items() if by_row[row] in known[name]}
        for row in range(len(examples))
    ]


def _hashed(example: Example, unit: str, key: bytes) -> bytes:
    """Returns the unit of a row under one dataset, or nothing if the row lacks its id."""
    if unit == "id" and example.example_id is None:
        return b""
    return unit_ids(key, [example], unit)[0]


class OverlapWarnings:
    """Warns the owner, in the first calls of an actor, of rows that another dataset has paid for.

    This is how a forgotten `dataset_id` shows: the run then spends the budget of `default`.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._left = CALLS

    def of(self, examples: Sequence[Example]) -> tuple[str, ...]:
        """Returns a warning for each dataset that knows some of these rows."""
        if not self._left or not examples:
            return ()
        self._left -= 1
        budget, rows = self._budget, examples[:ROWS]
        found: Counter[str] = Counter()
        # This is a courtesy: a dataset whose key is lost must not stop a run on another one.
        with suppress(TGTinkerError):
            keys = budget.registry.ledgers.unit_keys(budget.tenant)
            for names in known_elsewhere(budget, keys, rows, budget.dataset, DATASETS):
                found.update(names)
        return tuple(
            f"{count} of these {len(rows)} rows were charged under {name}, and this run is charged"
            f" to {budget.dataset}: did you forget dataset_id? A person in both datasets is"
            " protected by the sum of their epsilons only"
            for name, count in sorted(found.items())
        )
