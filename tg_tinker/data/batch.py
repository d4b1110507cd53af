"""Checks a training batch and converts it into the one form that all other code uses.

    from tg_tinker import BatchData
    BatchData(input_ids=[[5, 6, 7], [8, 9]], labels=[[-100, 6, 7], [8, 9]])

`normalize` turns a batch into checked `Example`s of different lengths, without padding.
`check_bounds` compares them with the limits of a model. This module needs neither torch nor a
tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError

IGNORED = -100
"""The label of a token that does not count in the loss (the Hugging Face convention)."""

FIELDS = ("input_ids", "attention_mask", "labels", "example_ids")
Row = npt.NDArray[np.int64]

_LARGEST = np.uint64(2**63 - 1)


class BatchData:
    """A training batch.

    Args:
        input_ids: the token ids, one row per example, as lists, numpy arrays or tensors. Rows may
            differ in length.
        attention_mask: 1 for a token to keep, 0 for padding at either end of a row. Without a mask
            all tokens are kept.
        labels: token ids of the same shape, -100 where no loss is wanted. Pass them aligned with
            `input_ids`: they are shifted inside. Without labels the inputs are the labels.
        example_ids: one string per row. In private runs with ``unit="id"`` it names the unit of
            privacy.
    """

    def __init__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        example_ids: Any = None,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.labels = labels
        self.example_ids = example_ids

    def __repr__(self) -> str:
        """Returns sizes only, so that a batch in a log does not show its tokens."""
        try:
            return f"BatchData({len(self)} rows, contents hidden)"
        except TypeError:
            return "BatchData(? rows, contents hidden)"

    def __len__(self) -> int:
        return len(self.input_ids)

    def emptied(self, rows: Iterable[int]) -> BatchData:
        """Returns this batch with empty stand-ins for the given rows: no token of them is labeled.

        A stand-in adds zero to the gradient, and in a private run it counts as its unit. Use it for
        a row of a drawn Poisson sample that your own code cannot process: the server refuses a step
        that lacks a drawn unit.

        Args:
            rows: indices of rows, from 0.

        Raises:
            InvalidRequestError: the batch has no such row.
        """
        chosen, labels = set(rows), self.input_ids if self.labels is None else self.labels
        if unknown := sorted(chosen - set(range(len(self)))):
            raise InvalidRequestError(
                f"the batch has {len(self)} rows and no row {unknown[0]}: pass indices from 0"
            )
        kept = [
            [IGNORED] * len(row) if index in chosen else row for index, row in enumerate(labels)
        ]
        return BatchData(self.input_ids, self.attention_mask, kept, self.example_ids)


@dataclass(frozen=True, repr=False)
class Example:
    """One normalized row of T tokens, without padding.

    Attributes:
        input_ids: int64 [T], T >= 1.
        labels: int64 [T]. The model predicts `labels[t]` from the tokens before t, so `labels[0]`
            does not count in the loss.
        example_id: the caller's name of the unit of privacy, or None.
    """

    input_ids: Row
    labels: Row
    example_id: str | None = None

    def __repr__(self) -> str:
        return f"Example({len(self.input_ids)} tokens, contents hidden)"

    @property
    def num_labeled(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())


def normalize(batch: BatchData | Mapping[str, Any], *, may_be_empty: bool = False) -> list[Example]:
    """Returns the rows of a batch, checked and without padding.

    Masked tokens at either end of a row are removed together with their labels.

    Args:
        may_be_empty: accept a batch without rows, as a Poisson sample can be.

    Raises:
        InvalidRequestError: a shape, a type or a mask is wrong. The message names the row and the
            field.
    """
    fields = _fields(batch)
    rows = _rows(fields["input_ids"], "input_ids")
    if not rows and not may_be_empty:
        raise InvalidRequestError("the batch is empty: pass at least one row of input_ids")
    masks, labels = _like(rows, fields, "attention_mask"), _like(rows, fields, "labels")
    names = _example_ids(fields["example_ids"], len(rows))
    return [
        _example(i, row, masks[i] if masks else None, labels[i] if labels else row, names[i])
        for i, row in enumerate(rows)
    ]


def from_examples(examples: Sequence[Example]) -> BatchData:
    """Returns the batch that `normalize` turns into these rows, with their ids.

    If a row has no id, the batch has no ids.
    """
    names = [example.example_id for example in examples]
    return BatchData(
        input_ids=[example.input_ids for example in examples],
        labels=[example.labels for example in examples],
        example_ids=None if None in names else names,
    )


def check_bounds(examples: Sequence[Example], vocab_size: int, context_length: int) -> None:
    """Checks that a model can take these rows and learn from them.

    Raises:
        InvalidRequestError: a row is longer than the context, an id is outside the vocabulary, or
            the whole batch has no labeled token.
    """
    for i, example in enumerate(examples):
        if len(example.input_ids) > context_length:
            raise InvalidRequestError(
                f"row {i} has {len(example.input_ids)} tokens, but the model's context is"
                f" {context_length}: cut or split the row",
                details={"row": i, "tokens": len(example.input_ids), "context": context_length},
            )
        kept = example.labels[example.labels != IGNORED]
        for name, ids in (("input_ids", example.input_ids), ("labels", kept)):
            _check_vocabulary(i, name, ids, vocab_size)
    if not any(example.num_labeled for example in examples):
        raise InvalidRequestError(
            "no token of the batch is labeled: in every row all labels after the first are -100."
            " Leave out `labels` to train on the inputs themselves"
        )


def _check_vocabulary(row: int, name: str, ids: Row, vocab_size: int) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        hint = " (only labels may be -100)" if name == "input_ids" else " or -100"
        raise InvalidRequestError(
            f"{name} of row {row} holds the id {int(outside[0])}, but the vocabulary is"
            f" 0..{vocab_size - 1}{hint}: use this model's tokenizer, `tc.tokenizer`",
            details={"row": row, "field": name, "vocab_size": vocab_size},
        )


def _fields(batch: BatchData | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(batch, BatchData):
        return {name: getattr(batch, name) for name in FIELDS}
    # Tested by its methods, because a tokenizer may return a dict that is no registered mapping.
    if not hasattr(batch, "keys"):
        raise InvalidRequestError(
            f"a batch must be a BatchData or a dict, got {type(batch).__name__}: pass the keys"
            f" {', '.join(FIELDS)}"
        )
    unknown = sorted(str(key) for key in batch if key not in FIELDS)
    if unknown:
        raise InvalidRequestError(f"unknown batch keys {unknown}; known keys: {', '.join(FIELDS)}")
    if batch.get("input_ids") is None:
        raise InvalidRequestError("the batch has no input_ids: pass one list of token ids per row")
    return {name: batch.get(name) for name in FIELDS}


def _rows(value: Any, name: str) -> list[Row]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise InvalidRequestError(f"{name} must be a list of rows, got {type(value).__name__}")
    return [_row(i, row, name) for i, row in enumerate(value)]


def _row(index: int, row: Any, name: str) -> Row:
    row = row.tolist() if hasattr(row, "tolist") else row
    if isinstance(row, str) or not hasattr(row, "__len__"):
        raise InvalidRequestError(
            f"{name} must be a list of rows: wrap a single row as [row]",
            details={"field": name, "row": index},
        )
    try:
        array = np.asarray(row)
    except (ValueError, OverflowError):
        array = np.empty(0, dtype=object)
    whole = array.dtype.kind in "iub" or array.size == len(row) == 0
    # Ids of 2^63 and more would wrap around: 2^64 - 100 would read as an ignored label.
    whole = whole and not (array.dtype == np.uint64 and (array > _LARGEST).any())
    if array.ndim != 1 or not whole:
        raise InvalidRequestError(
            f"{name} of row {index} must hold integers, one per token",
            details={"field": name, "row": index},
        )
    return array.astype(np.int64)


def _like(rows: list[Row], fields: dict[str, Any], name: str) -> list[Row] | None:
    """Returns a field as rows of the same lengths as `input_ids`, or None if it was left out."""
    if fields[name] is None:
        return None
    others = _rows(fields[name], name)
    if len(others) != len(rows):
        raise InvalidRequestError(
            f"{name} has {len(others)} rows, but input_ids has {len(rows)}: pass one for each"
        )
    for i, (row, other) in enumerate(zip(rows, others, strict=True)):
        if len(row) != len(other):
            raise InvalidRequestError(
                f"{name} of row {i} has {len(other)} entries, but its input_ids have {len(row)}:"
                " the lengths must be equal",
                details={"field": name, "row": i},
            )
    return others


def require_ids(examples: Sequence[Example]) -> None:
    """Checks that every row has an id, for runs in which the id is the unit of privacy.

    Raises:
        InvalidRequestError: a row has no id.
    """
    if any(example.example_id is None for example in examples):
        raise InvalidRequestError(
            'the unit of privacy is the id (unit="id"): pass example_ids, one per row'
        )


def _example_ids(value: Any, count: int) -> list[str | None]:
    if value is None:
        return [None] * count
    names = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(names, list | tuple) or not all(isinstance(n, str | int) for n in names):
        raise InvalidRequestError("example_ids must be a list of strings, one per row")
    if not all(str(name).isprintable() for name in names):
        raise InvalidRequestError("example_ids must be printable text, without line breaks")
    if len(names) != count:
        raise InvalidRequestError(
            f"example_ids has {len(names)} entries, but input_ids has {count} rows: pass one each"
        )
    return [str(name) for name in names]


def _example(index: int, row: Row, mask: Row | None, labels: Row, name: str | None) -> Example:
    start, stop = (0, len(row)) if mask is None else _kept(index, mask)
    if start == stop:
        raise InvalidRequestError(
            f"row {index} has no tokens: leave it out", details={"row": index}
        )
    return Example(row[start:stop], labels[start:stop], name)


def _kept(index: int, mask: Row) -> tuple[int, int]:
    if ((mask != 0) & (mask != 1)).any():
        raise InvalidRequestError(f"attention_mask of row {index} must hold 0 and 1 only")
    kept = np.flatnonzero(mask)
    if not len(kept):
        return 0, 0
    start, stop = int(kept[0]), int(kept[-1]) + 1
    if stop - start != len(kept):
        raise InvalidRequestError(
            f"attention_mask of row {index} has a hole: only padding at the ends can be masked."
            " To leave tokens out of the loss, set their labels to -100",
            details={"row": index},
        )
    return start, stop
