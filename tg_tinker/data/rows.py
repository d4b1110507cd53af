"""Reads rows of text from a file, and makes endless shuffled batches of encoded rows.

    rows = read_rows("chats.jsonl")
    training, held_out = split_rows(rows, held_out=48, seed=0)

A row is a chat, ``{"messages": [{"role": "user", "content": "..."}, ...]}``, or a pair,
``{"prompt": "...", "completion": "..."}``. It may have an ``example_id``, which names the person or
document that it belongs to: the unit of privacy of a run with ``unit="id"``. Other columns of a
file are ignored. `chat` turns the text into tokens. In the SDK, only this module imports pyarrow.
Errors name files, rows and keys, never their contents.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tg_tinker.data.batch import BatchData
from tg_tinker.errors import InvalidRequestError, NotFoundError
from tg_tinker.texts import check_text

FORMS = (("messages",), ("prompt", "completion"))
"""The keys of a chat and of a pair. A row has all keys of exactly one of these two forms."""

Row = dict[str, Any]
_UNNAMED = "the row"
Encoded = tuple[list[int], list[int]]
"""The token ids of one row and its labels, of equal length."""

_ACCEPTED = 'a row is {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}'
ID = "example_id"
"""The key of a row's id, and the column that `read_rows` takes it from."""

_COLUMNS = [key for form in FORMS for key in form]
_T = TypeVar("_T")
_Reader = Callable[[Path, Sequence[str]], Iterator[tuple[str, object]]]


class EncodedWithId(tuple[list[int], list[int]]):
    """An encoded row that knows its id. It is equal to the plain pair."""

    example_id: str

    def __new__(cls, ids: list[int], labels: list[int], example_id: str) -> EncodedWithId:
        made = super().__new__(cls, (ids, labels))
        made.example_id = example_id
        return made

    def __getnewargs__(self) -> tuple[list[int], list[int], str]:
        return self[0], self[1], self.example_id


def read_rows(path: str | Path, id_column: str | None = None) -> list[Row]:
    """Returns all rows of a `.jsonl` or `.parquet` file, checked, as `RowOfFile`s.

    Args:
        id_column: the column with the ids of the rows, which every row must have. None takes the
            column ``example_id`` of the rows that have one.

    Raises:
        NotFoundError: the file does not exist.
        InvalidRequestError: the file has another extension, is damaged or holds no row, or a row
            has another form. The message names the row by its line (JSONL, from 1) or its index
            (Parquet, from 0).
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}: pass a .jsonl or .parquet file")
    readers: dict[str, _Reader] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InvalidRequestError(
            f"{path} ends in {path.suffix!r}: pass a .jsonl file (one JSON object per line) or a"
            " .parquet file"
        )
    found = readers[path.suffix.lower()](path, [*_COLUMNS, id_column or ID])
    rows: list[Row] = [
        RowOfFile(check_row(_with_id(row, id_column, where), where), where) for where, row in found
    ]
    if not rows:
        raise InvalidRequestError(f"{path} has no rows: {_ACCEPTED}")
    return rows


class RowOfFile(Row):
    """A row that knows its place, such as ``line 2 of chats.jsonl``, for later errors.

    It is equal to a plain dict with the same keys and values.
    """

    __slots__ = ("place",)

    def __init__(self, row: Row, place: str) -> None:
        super().__init__(row)
        self.place = place


def name_of_row(row: object, name: str = _UNNAMED) -> str:
    """Returns how an error names a row: by its place in a file too, if it comes from one.

    Args:
        name: a name such as ``row 3``. A name that has the place already is returned unchanged.
    """
    if not isinstance(row, RowOfFile) or name.startswith(row.place):
        return name
    return row.place if name == _UNNAMED else f"{row.place} ({name})"


def check_row(row: object, where: str) -> Row:
    """Returns the row with only the keys of its form, and its id if it has one.

    Args:
        row: the object that was read.
        where: the name of the row in error messages, such as ``row 3``; see `name_of_row`.

    Raises:
        InvalidRequestError: the row is no chat and no pair, is both, or a text of it is no valid
            text; or its id is no printable text and no whole number.
    """
    where = name_of_row(row, where)
    if not isinstance(row, Mapping):
        raise InvalidRequestError(f"{where} is not an object: {_ACCEPTED}")
    forms = [form for form in FORMS if all(row.get(key) is not None for key in form)]
    if len(forms) != 1:
        found = "both forms" if forms else "neither form"
        raise InvalidRequestError(f"{where} has {found}: {_ACCEPTED}")
    name = {} if row.get(ID) is None else {ID: _check_id(row[ID], where)}
    if forms[0] == ("messages",):
        return {"messages": check_messages(row["messages"], where)} | name
    if not all(isinstance(row[key], str) for key in forms[0]):
        raise InvalidRequestError(f"{where}: prompt and completion must be strings")
    return {key: check_text(row[key], f"the {key} of {where}") for key in forms[0]} | name


def split_rows(rows: Sequence[_T], held_out: int, seed: int) -> tuple[list[_T], list[_T]]:
    """Returns (training rows, held-out rows), a random split.

    The split depends only on `seed` and on the numbers of rows.

    Raises:
        InvalidRequestError: `held_out` is negative or leaves no row for training.
    """
    if not 0 <= held_out < len(rows):
        raise InvalidRequestError(
            f"cannot hold out {held_out} of {len(rows)} rows: at least one row must be left for"
            " training. Pass more rows or hold out fewer"
        )
    order = _shuffled(len(rows), _generator(seed))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def make_batches(encoded: Sequence[Encoded], batch_size: int, seed: int) -> Iterator[BatchData]:
    """Yields batches of exactly `batch_size` rows without end; equal seeds give equal batches.

    Every epoch uses each row once, in a new order. Rows that an epoch leaves over go into the
    first batch of the next epoch.

    Raises:
        InvalidRequestError: there are no rows, or `batch_size` is below 1.
    """
    if not encoded:
        raise InvalidRequestError("no rows to make batches from: pass at least one row")
    if batch_size < 1:
        raise InvalidRequestError(f"batch_size must be at least 1, got {batch_size}")
    return _batches(encoded, batch_size, _generator(seed))


def as_batch(encoded: Sequence[Encoded]) -> BatchData:
    """Returns encoded rows as one batch, without padding, with the ids of the rows.

    Raises:
        InvalidRequestError: see `ids_of`.
    """
    return BatchData(
        input_ids=[ids for ids, _ in encoded],
        labels=[labels for _, labels in encoded],
        example_ids=ids_of(encoded),
    )


def ids_of(encoded: Sequence[Encoded]) -> list[str] | None:
    """Returns the id of each row, or None if no row has one.

    Raises:
        InvalidRequestError: some of the rows have an id and others have none.
    """
    names = [row.example_id for row in encoded if isinstance(row, EncodedWithId)]
    if names and len(names) < len(encoded):
        raise InvalidRequestError(
            f"{len(names)} of {len(encoded)} rows have an example_id: give every row one, or none"
        )
    return names or None


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
    # Python promises equal values in all its versions for `random()`, but not for `shuffle()`.
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError(f"{where}: messages must be a list with at least one message")
    return [
        _check_message(message, f"message {i} of {where}") for i, message in enumerate(messages)
    ]


def _check_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f'{where} is not an object: pass {{"role", "content"}}')
    # Without a filled key, such as a tool call, the row would be another conversation.
    filled = {key for key, value in message.items() if value is not None}
    strings = all(isinstance(message.get(key), str) for key in ("role", "content"))
    if filled != {"role", "content"} or not strings:
        raise InvalidRequestError(
            f'{where} must have the keys "role" and "content", both strings, and no other key'
        )
    keys = ("role", "content")
    return {key: check_text(message[key], f"the {key} of {where}") for key in keys}


def _with_id(row: object, column: str | None, where: str) -> object:
    """Returns the row with the value of this column as its id."""
    if column is None or not isinstance(row, Mapping):
        return row
    if row.get(column) is None:
        raise InvalidRequestError(
            f"{where} has no {column!r}: each row needs an id in the column that id_column names"
        )
    return {**row, ID: row[column]}


def _check_id(value: object, where: str) -> str:
    # A float would merge or split ids by its rounding, and True would be one.
    if type(value) not in (str, int) or not str(value).isprintable() or value == "":
        raise InvalidRequestError(
            f"the {ID} of {where} must be printable text or a whole number: it names the person or"
            " the document of the row"
        )
    return check_text(str(value), f"the {ID} of {where}")


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"line {number} of {path}"
                yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> object:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        pass  # raised below: the parser's error holds the line and must not become our context
    else:
        return value
    raise InvalidRequestError(f"{where} is not valid JSON in UTF-8: {_ACCEPTED}")


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    begun = 0
    for batch in _load_parquet(path, columns).to_batches(1024):
        for index, row in enumerate(_decoded(batch, begun, path), begun):
            yield f"row {index} of {path}", row
        begun += batch.num_rows


def _decoded(batch: Any, begun: int, path: Path) -> list[Row]:
    """Returns the rows of a batch of pyarrow; their numbers start at `begun`."""
    try:
        rows: list[Row] = batch.to_pylist()
    except UnicodeDecodeError:
        pass  # raised below: this error holds the text and must not become our context
    else:
        return rows
    bad = begun + next(i for i in range(batch.num_rows) if not _is_text(batch.slice(i, 1)))
    raise InvalidRequestError(
        f"row {bad} of {path} has a text that is not UTF-8: write the file again with valid strings"
    )


def _is_text(batch: Any) -> bool:
    try:
        batch.to_pylist()
    except UnicodeDecodeError:
        return False
    return True


def _load_parquet(path: Path, wanted: Sequence[str]) -> Any:
    """Returns the columns that a row may have, as a pyarrow table."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            table = file.read(columns=columns)
    except (pyarrow.ArrowException, OSError):
        raise InvalidRequestError(f"{path} is not a readable Parquet file") from None
    if not set(columns) & set(_COLUMNS):
        raise InvalidRequestError(f"{path} has none of the columns of a row: {_ACCEPTED}")
    return table
