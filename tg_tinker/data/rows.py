"""Rows of text from a file, and endless shuffled batches of encoded rows.

    rows = read_rows("chats.jsonl")
    training, held_out = split_rows(rows, held_out=48, seed=0)

A row is a chat, ``{"messages": [{"role": "user", "content": "..."}, ...]}``, or a pair,
``{"prompt": "...", "completion": "..."}``; other columns of a file are left out. This module is
the only one of the SDK that knows pyarrow. Turning text into tokens is the work of `chat`.
Errors name files, rows and keys, never what stands in them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tg_tinker.data.batch import BatchData
from tg_tinker.errors import InvalidRequestError, NotFoundError

FORMS = (("messages",), ("prompt", "completion"))
"""The keys of a chat and of a pair. A row holds all keys of exactly one of them."""

Row = dict[str, Any]
Encoded = tuple[list[int], list[int]]
"""Token ids of one row and its labels, of equal length."""

_ACCEPTED = 'a row is {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}'
_COLUMNS = [key for form in FORMS for key in form]
_T = TypeVar("_T")


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a `.jsonl` or `.parquet` file, checked.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: another extension, a broken file, or a row of another form, named by
            its line (JSONL, from 1) or its index (Parquet, from 0).
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}: pass a .jsonl or .parquet file")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InvalidRequestError(
            f"{path} ends in {path.suffix!r}: pass a .jsonl file (one JSON object per line) or a"
            " .parquet file"
        )
    rows = [check_row(row, where) for where, row in readers[path.suffix.lower()](path)]
    if not rows:
        raise InvalidRequestError(f"{path} has no rows; {_ACCEPTED}")
    return rows


def check_row(row: object, where: str) -> Row:
    """The row with the keys of its form and nothing else.

    Args:
        row: what was read.
        where: how an error should call it, such as ``row 3``.
    """
    if not isinstance(row, Mapping):
        raise InvalidRequestError(f"{where} is not an object; {_ACCEPTED}")
    forms = [form for form in FORMS if all(row.get(key) is not None for key in form)]
    if len(forms) != 1:
        found = "both forms" if forms else "neither form"
        raise InvalidRequestError(f"{where} has {found}; {_ACCEPTED}")
    if forms[0] == ("messages",):
        return {"messages": _check_messages(row["messages"], where)}
    if not all(isinstance(row[key], str) for key in forms[0]):
        raise InvalidRequestError(f"{where}: prompt and completion must be strings")
    return {key: row[key] for key in forms[0]}


def split_rows(rows: Sequence[_T], held_out: int, seed: int) -> tuple[list[_T], list[_T]]:
    """(training rows, held-out rows): a random split that only `seed` and the length decide."""
    if not 0 <= held_out < len(rows):
        raise InvalidRequestError(
            f"cannot hold out {held_out} of {len(rows)} rows: at least one must be left to train"
            " on; pass more rows or hold out fewer"
        )
    order = _shuffled(len(rows), _generator(seed))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def make_batches(encoded: Sequence[Encoded], batch_size: int, seed: int) -> Iterator[BatchData]:
    """Endless batches of exactly `batch_size` rows; equal seeds give equal batches.

    Every epoch uses each row once, in a new order. What an epoch leaves over goes into the next
    one's first batch.
    """
    if not encoded:
        raise InvalidRequestError("no rows to make batches of: pass at least one")
    if batch_size < 1:
        raise InvalidRequestError(f"batch_size must be at least 1, got {batch_size}")
    return _batches(encoded, batch_size, _generator(seed))


def as_batch(encoded: Sequence[Encoded]) -> BatchData:
    """Encoded rows, ragged, as one batch."""
    return BatchData(
        input_ids=[ids for ids, _ in encoded], labels=[labels for _, labels in encoded]
    )


def _batches(
    encoded: Sequence[Encoded], batch_size: int, generator: random.Random
) -> Iterator[BatchData]:
    order = _endless(len(encoded), generator)
    while True:
        yield as_batch([encoded[i] for i in islice(order, batch_size)])


def _endless(count: int, generator: random.Random) -> Iterator[int]:
    while True:
        yield from _shuffled(count, generator)


def _generator(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - the order of rows is no secret


def _shuffled(count: int, generator: random.Random) -> list[int]:
    # `random()` is the one method that Python promises to repeat across versions.
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _check_messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError(f"{where}: messages must be a list with at least one message")
    return [
        _check_message(message, f"message {i} of {where}") for i, message in enumerate(messages)
    ]


def _check_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f'{where} is not an object; pass {{"role", "content"}}')
    # Dropping a filled key, such as a tool call, would train on another conversation.
    filled = {key for key, value in message.items() if value is not None}
    strings = all(isinstance(message.get(key), str) for key in ("role", "content"))
    if filled != {"role", "content"} or not strings:
        raise InvalidRequestError(
            f'{where} must have the keys "role" and "content", both strings, and no other'
        )
    return {"role": message["role"], "content": message["content"]}


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"line {number} of {path}"
                yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> object:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        pass  # The parser's error carries the line: it must not become the context of ours.
    else:
        return value
    raise InvalidRequestError(f"{where} is not valid JSON in UTF-8; {_ACCEPTED}")


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    rows = (row for batch in _load_parquet(path).to_batches(1024) for row in batch.to_pylist())
    for index, row in enumerate(rows):
        yield f"row {index} of {path}", row


def _load_parquet(path: Path) -> Any:
    """The columns of a row, as a pyarrow table."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            table = file.read(columns=columns)
    except (pyarrow.ArrowException, OSError):
        raise InvalidRequestError(f"{path} is not a readable Parquet file") from None
    if not columns:
        raise InvalidRequestError(f"{path} has none of the columns of a row; {_ACCEPTED}")
    return table
