"""Units of privacy: decides which unit a row belongs to, and which rows of a step count.

The ledger decides how often a unit may be used. `poisson` draws the units of a Poisson step.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.privacy.clipping import ClippedSum
from tg_tinker.data.batch import IGNORED, Example, require_ids
from tg_tinker.errors import InvalidRequestError

UNIT_BYTES = 16
MOST_REMEMBERED = 500_000
"""The units whose ids are remembered: about 100 MB of memory at most."""


def unit_ids(key: bytes, examples: Sequence[Example], unit: str) -> list[bytes]:
    """Returns the unit of each row as a keyed hash.

    Without the key of the dataset, nobody can test whether a hash belongs to a given row.

    Args:
        unit: ``example``, a distinct sequence of input ids, or ``id``, all rows of one id.

    Raises:
        InvalidRequestError: the unit is ``id`` and a row has no id.
    """
    if unit == "id":
        require_ids(examples)
    return [
        hmac.digest(key, _content(example, unit), hashlib.sha256)[:UNIT_BYTES]
        for example in examples
    ]


def ids_without_unit(dataset: str, unit_open: bool) -> InvalidRequestError:
    """Returns the error for rows with ids in a run whose unit of privacy nobody chose.

    Without this error, a caller who gives the rows of one person one id would believe that the
    person is protected as a whole.

    Args:
        unit_open: whether the unit of the dataset can still be chosen.
    """
    where = (
        ""
        if unit_open
        else f", with another dataset_id, since {dataset!r} has used example already"
    )
    return InvalidRequestError(
        "these rows have example_ids, but neither the run nor the dataset says whether an id is"
        " the unit of privacy; nothing was charged for them. Choose, and create the client again:"
        ' DPConfig(unit="example") protects each row by itself; DPConfig(unit="id") protects all'
        f" rows of an id together{where}"
    )


def _content(example: Example, unit: str) -> bytes:
    if unit == "id":
        return b"id\0" + str(example.example_id).encode()
    return b"example\0" + example.input_ids.astype("<i8").tobytes()


def row_defect(example: Example, vocab_size: int, context_length: int) -> str | None:
    """Returns why a row of a private run contributes zero, or None if the row counts.

    A defect never raises an error, so that a row can change the result only through its gradient.
    """
    kept = example.labels[example.labels != IGNORED]
    ids = np.concatenate([example.input_ids, kept])
    if len(example.input_ids) > context_length:
        return "too long"
    if ((ids < 0) | (ids >= vocab_size)).any():
        return "out of vocabulary"
    return None if example.num_labeled else "nothing labeled"


class SharedContents:
    """Counts rows whose tokens came before under another id, where the unit is one example.

    Such rows are one unit, so each of the people behind them is protected less than the unit. The
    count depends on the content of rows: it is for the data owner alone.
    """

    def __init__(self) -> None:
        # The unit -> a digest of the id that it came with first.
        self._first: dict[bytes, bytes] = {}

    def count(self, examples: Sequence[Example], units: Sequence[bytes]) -> int:
        """Returns how many of the rows have an id other than the first one of their unit.

        Units beyond the first `MOST_REMEMBERED` are not remembered.
        """
        shared = 0
        for example, unit in zip(examples, units, strict=True):
            if example.example_id is None:
                continue
            name = hashlib.sha256(example.example_id.encode()).digest()[:UNIT_BYTES]
            if len(self._first) < MOST_REMEMBERED:
                self._first.setdefault(unit, name)
            shared += self._first.get(unit, name) != name
        return shared


@dataclass(repr=False)
class Window:
    """The accumulation window of a private step: everything since the last `optim_step`.

    Attributes:
        total: the clipped sum.
        units: the units that the step uses, including units that contributed zero.
        sent: all units that were sent, including those that may not be used again.
        rows: the number of rows that were passed, including the rows that contributed zero.
        calls: (batch hash, gradient hash) of each call.
    """

    total: ClippedSum
    units: set[bytes] = field(default_factory=set)
    sent: set[bytes] = field(default_factory=set)
    rows: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)

    def admit(
        self, examples: Sequence[Example], units: Sequence[bytes], at_limit: set[bytes],
        vocab_size: int, context_length: int, whole_units: bool,
    ) -> tuple[list[list[Example]], set[bytes], Counter[str]]:  # fmt: skip
        """Decides which rows of a call count.

        A unit may appear once in a window. If `whole_units` is true (the unit is an id), all its
        rows come in one call; otherwise the unit has a single row. Later rows of the unit add zero,
        so that the unit moves the sum by at most C.

        Returns:
            The rows that count, grouped by unit; the units that this call uses up, including units
            whose rows all have a defect; the number of rows that do not count, by reason.
        """
        groups: dict[bytes, list[Example]] = {}
        taken: set[bytes] = set()
        skipped: Counter[str] = Counter()
        for example, unit in zip(examples, units, strict=True):
            repeated = unit in self.units or (unit in taken and not whole_units)
            if unit in at_limit or repeated:
                skipped["use limit reached" if unit in at_limit else "repeated in the step"] += 1
                continue
            taken.add(unit)
            defect = row_defect(example, vocab_size, context_length)
            if defect is None:
                groups.setdefault(unit, []).append(example)
            else:
                skipped[defect] += 1
        return list(groups.values()), taken, skipped
