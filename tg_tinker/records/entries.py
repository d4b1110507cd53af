"""Defines the entries of a ledger: their format, hash and position."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from tg_tinker.errors import DPBudgetExceededError, IntegrityError, InvalidRequestError
from tg_tinker.records.accounting import filter_order

Entry = dict[str, Any]


VERSION = 2
"""The version of the rules for all new entries. A ledger of version 1 gets an entry `upgrade`
before its next entry."""


GENESIS = "0" * 64


CHAIN = ("seq", "prev", "hash")


# At most nine digits: no chain gets that long, and every database can store the number.
_AT = re.compile(r"(0|[1-9]\d{0,8})-([0-9a-f]{64})", re.ASCII)


REFUSALS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    DPBudgetExceededError, InvalidRequestError,
)  # fmt: skip


UNITS = ("example", "id")


POISSON = ("poisson", "client_poisson")


GAUSSIAN = ("participation", "worst_case")


PAID = ("charge", "unnoised", "evaluation")
"""The types of the entries that each pay for one draw of noise."""


def registration(dataset: str, epsilon: float | None, delta: float, unit: str, born: str) -> Entry:
    """Returns the body of a ledger's first entry; the budget determines its Renyi order."""
    return {
        "type": "register", "version": VERSION, "dataset": dataset, "epsilon": epsilon,
        "delta": delta, "unit": unit, "born": born,
        "order": filter_order(math.inf if epsilon is None else epsilon, delta),
    }  # fmt: skip


UPGRADE: Entry = {"type": "upgrade", "version": VERSION}
"""The body of the entry from which on an older ledger follows the rules of this version."""


def is_newer(entry: Mapping[str, Any], types: Collection[str]) -> bool:
    """Returns whether a newer release wrote an entry: its hash is right, and its version or its
    type is not known here.

    Args:
        types: the types that this release knows.
    """
    kind, version = entry.get("type"), entry.get("version")
    unknown = is_text(kind) and kind not in types
    later = kind in ("register", "upgrade") and type(version) is int and version > VERSION
    return (unknown or later) and entry.get("hash") == entry_hash(entry)


def place_of(seq: int, found: str) -> str:
    """Returns the position of an entry in a chain as text, ``SEQ-HASH``."""
    return f"{seq}-{found}"


def is_place(text: str) -> bool:
    """Returns whether `parse_place` accepts the text."""
    return _AT.fullmatch(text) is not None


def parse_place(place: str) -> tuple[int, str]:
    """Returns the (seq, hash) of a text that `place_of` made.

    Raises:
        IntegrityError: `place_of` makes no such text.
    """
    match = _AT.fullmatch(place) if isinstance(place, str) else None
    if match is None:
        raise IntegrityError("this is not a position in a ledger, SEQ-HASH: it was changed")
    return int(match[1]), match[2]


def entry_hash(entry: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of an entry's canonical JSON without its own hash, in hex."""
    body = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def whole(value: Any) -> int:
    """Returns a count unchanged. Raises ValueError unless it is an int (no bool) of 0 or more."""
    if type(value) is not int or value < 0:
        raise ValueError("not a whole number")
    return value


def real(value: Any) -> float:
    """Returns a number as a float. Raises ValueError unless it is an int (no bool) or a float."""
    if type(value) not in (int, float):
        raise ValueError("not a number")
    return float(value)


def is_digest(value: Any) -> bool:
    """Returns whether a value is 32 bytes in lower-case hex."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def check_table(rows: tuple[tuple[int, float], ...], floor: float) -> None:
    """Checks a table of (steps, epsilon) rows.

    Raises:
        ValueError: the steps do not rise, the epsilons fall, or one is below `floor`, the exact
            epsilon of a single step.
    """
    for before, row in zip(((0, floor * (1 - 1e-6)), *rows), rows, strict=False):
        if not (row[0] > before[0] and row[1] >= before[1]):
            raise ValueError("the table must rise, and start at one step's epsilon or above")
