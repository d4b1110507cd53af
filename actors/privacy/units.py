"""Units of privacy: who a row belongs to, and which rows of a step count.

How often a unit may be used is the ledger's, which units a Poisson step has is `poisson`'s.
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

UNIT_BYTES = 16


def unit_ids(key: bytes, examples: Sequence[Example], unit: str) -> list[bytes]:
    """Each row's unit as a keyed hash: without the data set's key nobody can look for a row.

    Args:
        unit: ``example``, a distinct sequence of input ids, or ``id``, all rows of an id.

    Raises:
        InvalidRequestError: a row without an id where ids are the unit.
    """
    if unit == "id":
        require_ids(examples)
    return [
        hmac.digest(key, _content(example, unit), hashlib.sha256)[:UNIT_BYTES]
        for example in examples
    ]


def _content(example: Example, unit: str) -> bytes:
    if unit == "id":
        return b"id\0" + str(example.example_id).encode()
    return b"example\0" + example.input_ids.astype("<i8").tobytes()


def row_defect(example: Example, vocab_size: int, context_length: int) -> str | None:
    """Why a row of a private run contributes zero instead of raising: an error would tell."""
    kept = example.labels[example.labels != IGNORED]
    ids = np.concatenate([example.input_ids, kept])
    if len(example.input_ids) > context_length:
        return "too long"
    if ((ids < 0) | (ids >= vocab_size)).any():
        return "out of vocabulary"
    return None if example.num_labelled else "nothing labelled"


@dataclass(repr=False)
class Window:
    """What a private step has collected.

    Attributes:
        total: the clipped sum.
        units: all units of the step, those that contributed zero included.
        rows: rows that were passed.
        calls: (batch hash, gradient hash) of each call.
    """

    total: ClippedSum
    units: set[bytes] = field(default_factory=set)
    rows: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)

    def admit(
        self, examples: Sequence[Example], units: Sequence[bytes], at_limit: set[bytes],
        vocab_size: int, context_length: int, whole_units: bool,
    ) -> tuple[list[list[Example]], set[bytes], Counter[str]]:  # fmt: skip
        """Rows that count, unit by unit; the units they take up; how many rows do not count.

        A unit may come once in a window: all its rows in one call when `whole_units` (the unit
        is an id), a single row otherwise. Later rows of it add zero, so that it moves the sum
        by C at most.
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
