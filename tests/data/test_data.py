"""Tests reading rows, splitting them, and endless batches."""

from __future__ import annotations

import copy
import json
import pickle
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.fakes import make_tokenizer
from tg_tinker.data.chat import encode_rows, render_row_prompt, split_turns
from tg_tinker.data.rows import (
    as_batch,
    check_row,
    ids_of,
    make_batches,
    name_of_row,
    read_rows,
    split_rows,
)
from tg_tinker.errors import InvalidRequestError, NotFoundError

PAIR = {"prompt": "2 + 2?", "completion": "4"}
CHAT = {
    "messages": [
        {"role": "user", "content": "héllo"},
        {"role": "assistant", "content": "hi"},
    ]
}
CANARY = "patient 4711"


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# --- files --------------------------------------------------------------------------------------


def test_jsonl_gives_its_rows_in_order(tmp_path: Path) -> None:
    assert read_rows(write_jsonl(tmp_path / "a.jsonl", PAIR, CHAT)) == [PAIR, CHAT]


def test_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n\n")
    assert read_rows(str(path)) == [PAIR]


@pytest.mark.parametrize("row", [PAIR, CHAT], ids=["pair", "chat"])
def test_parquet_gives_the_same_rows_as_jsonl(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = [row] * 3
    from_parquet = read_rows(write_parquet(tmp_path / "a.parquet", rows))
    assert from_parquet == read_rows(write_jsonl(tmp_path / "a.jsonl", *rows)) == rows


def test_other_columns_are_left_out(tmp_path: Path) -> None:
    row = {**CHAT, "prompt": "héllo", "source": "web"}
    assert read_rows(write_parquet(tmp_path / "a.parquet", [row])) == [CHAT]
    assert read_rows(write_jsonl(tmp_path / "a.jsonl", row)) == [CHAT]


def test_empty_fields_of_a_parquet_message_are_no_keys(tmp_path: Path) -> None:
    messages = [{**message, "tool_calls": None} for message in CHAT["messages"]]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"messages": pa.array([messages])}),
        path,
    )
    assert read_rows(path) == [CHAT]


@pytest.mark.parametrize(
    "line", ["{", '{"prompt": "' + CANARY, "\udcff".encode("utf-8", "surrogateescape")]
)
def test_a_broken_line_is_named_by_file_and_number_and_never_quoted(
    tmp_path: Path, line: str | bytes
) -> None:
    path = tmp_path / "a.jsonl"
    broken = line.encode() if isinstance(line, str) else line
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + broken + b"\n")
    with pytest.raises(InvalidRequestError, match=r"line 3 of .*a\.jsonl") as caught:
        read_rows(path)
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None  # a JSON error carries the whole line


def test_deep_nesting_is_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(InvalidRequestError, match="line 1"):
        read_rows(path)


@pytest.mark.parametrize(
    "row",
    [
        {"text": CANARY},
        {"prompt": CANARY},
        {"prompt": CANARY, "completion": None},
        {**PAIR, **CHAT},
        [CANARY],
        CANARY,
    ],
)
def test_a_row_of_another_form_is_refused_with_the_accepted_keys(tmp_path: Path, row: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"line 2 .*messages.*prompt.*completion"
    ) as caught:
        read_rows(write_jsonl(tmp_path / "a.jsonl", PAIR, row))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        CANARY,
        {"role": "user", "content": CANARY},
        [CANARY],
        [{"role": "user"}],
        [{"role": "user", "content": [CANARY]}],
        [{"role": "user", "content": CANARY, "tool_calls": [{"name": "f"}]}],
    ],
)
def test_a_chat_of_another_form_is_refused(tmp_path: Path, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="line 1") as caught:
        read_rows(write_jsonl(tmp_path / "a.jsonl", {"messages": messages}))
    assert CANARY not in str(caught.value)


HALF = f"{CANARY}\ud83d"
HALVES = [
    {**PAIR, "prompt": HALF},
    {**PAIR, "completion": HALF},
    {"messages": [CHAT["messages"][0], {"role": "assistant", "content": HALF}]},
    {"messages": [{"role": HALF, "content": "a"}]},
]
"""Rows with half an emoji."""


def write_escaped(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row", HALVES)
def test_half_an_emoji_in_a_file_is_named_by_its_line(tmp_path: Path, row: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"of .*line 2 of .*a\.jsonl contains") as caught:
        read_rows(write_escaped(tmp_path / "a.jsonl", PAIR, row))
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_whole_emoji_is_read_in_either_notation(tmp_path: Path) -> None:
    row = {**PAIR, "prompt": "\U0001f600"}
    assert read_rows(write_escaped(tmp_path / "a.jsonl", row)) == [row]
    assert read_rows(write_jsonl(tmp_path / "b.jsonl", row)) == [row]


def test_a_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    wrong = pa.array([b"a"] * 1500 + [CANARY.encode() + b"\xff"]).cast(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(wrong), wrong.buffers())
    pq.write_table(pa.table({"prompt": texts, "completion": texts}), tmp_path / "a.parquet")
    with pytest.raises(InvalidRequestError, match=r"row 1500 of .*a\.parquet has a") as caught:
        read_rows(tmp_path / "a.parquet")
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None


def test_rows_remember_their_place_through_splits_and_pickles(tmp_path: Path) -> None:
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", PAIR, CHAT, PAIR))
    kept, held_out = split_rows(rows, 1, seed=0)
    named = {name_of_row(row, f"row {i}") for i, row in enumerate([*kept, *held_out])}
    assert len(named) == 3
    assert all(re.match(r"line [123] of .*a\.jsonl \(row [012]\)$", name) for name in named)
    for copied in (pickle.loads(pickle.dumps(rows[1])), copy.copy(rows[1]), rows[1]):  # noqa: S301
        assert copied == CHAT
        assert name_of_row(copied).endswith("line 2 of " + str(tmp_path / "a.jsonl"))
    parquet = read_rows(write_parquet(tmp_path / "b.parquet", [PAIR, PAIR]))
    assert name_of_row(parquet[1]) == f"row 1 of {tmp_path / 'b.parquet'}"


def test_a_row_without_a_place_and_a_name_with_one_stay_as_they_are(tmp_path: Path) -> None:
    (row,) = read_rows(write_jsonl(tmp_path / "a.jsonl", PAIR))
    assert name_of_row(dict(row), "row 7") == "row 7"
    assert name_of_row(dict(row)) == "the row"
    assert name_of_row(row, name_of_row(row, "row 7")) == name_of_row(row, "row 7")


@pytest.mark.parametrize("row", HALVES)
def test_half_an_emoji_in_a_row_of_a_program_is_named_by_its_number(row: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r" of row 3 contains a lone surrogate"):
        check_row(row, "row 3")


def test_a_row_that_was_spoiled_after_it_was_read_is_still_named_by_its_line(
    tmp_path: Path,
) -> None:
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", PAIR, PAIR))
    rows[1]["completion"] = HALF
    with pytest.raises(InvalidRequestError, match=r"line 2 of .*a\.jsonl \(row 1\) contains"):
        encode_rows(make_tokenizer(), rows)
    with pytest.raises(InvalidRequestError, match=r"line 2 of .*a\.jsonl contains"):
        render_row_prompt(make_tokenizer(), rows[1])


def test_a_number_is_no_prompt(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": 1, "completion": "a"}])
    with pytest.raises(InvalidRequestError, match=r"row 0 .*must be strings"):
        read_rows(path)


def test_a_bad_parquet_row_is_named_by_its_index(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [PAIR, {**PAIR, "completion": None}])
    with pytest.raises(InvalidRequestError, match=r"row 1 of .*a\.parquet"):
        read_rows(path)


def test_parquet_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x"}])
    with pytest.raises(InvalidRequestError, match="none of the columns"):
        read_rows(path)


@pytest.mark.parametrize("damage", ["text", "empty", "flipped"])
def test_damaged_parquet_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [PAIR] * 2000)
    content = bytearray(path.read_bytes())
    content[10:60] = b"\xff" * 50
    path.write_bytes({"text": b"no parquet", "empty": b"", "flipped": bytes(content)}[damage])
    with pytest.raises(InvalidRequestError, match="not a readable Parquet file"):
        read_rows(path)


def test_unknown_extensions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n")
    with pytest.raises(InvalidRequestError, match=r"'\.csv'.*\.jsonl.*\.parquet"):
        read_rows(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"b\.jsonl"):
        read_rows(tmp_path / "b.jsonl")


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InvalidRequestError, match="no rows"):
        read_rows(path)


# --- splits and batches -------------------------------------------------------------------------


def test_a_split_uses_each_row_once() -> None:
    training, held_out = split_rows(range(100), held_out=20, seed=3)
    assert len(held_out) == 20
    assert sorted(training + held_out) == list(range(100))
    assert held_out != list(range(20))


def test_a_split_depends_on_the_seed_alone() -> None:
    assert split_rows(range(50), 5, seed=1) == split_rows(range(50), 5, seed=1)
    assert split_rows(range(50), 5, seed=1) != split_rows(range(50), 5, seed=2)


@pytest.mark.parametrize("held_out", [10, 11, -1])
def test_a_split_must_leave_rows_to_train_on(held_out: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"hold out {held_out} of 10"):
        split_rows(range(10), held_out, seed=0)


def encoded(count: int) -> list[tuple[list[int], list[int]]]:
    return [([i, i], [-100, i]) for i in range(count)]


def first_ids(batches: Any, count: int) -> list[list[int]]:
    return [[row[0] for row in batch.input_ids] for batch in islice(batches, count)]


def test_batches_are_full_and_cover_each_epoch_once() -> None:
    drawn = first_ids(make_batches(encoded(10), batch_size=4, seed=0), 5)
    assert [len(batch) for batch in drawn] == [4] * 5
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_batches_keep_labels_with_their_row() -> None:
    batch = next(make_batches(encoded(6), 3, seed=0))
    assert batch.labels == [[-100, row[0]] for row in batch.input_ids]


def test_equal_seeds_give_equal_batches() -> None:
    def draw(seed: int) -> list[list[int]]:
        return first_ids(make_batches(encoded(20), 3, seed), 12)

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_batches_may_be_larger_than_the_data() -> None:
    assert [len(b) for b in first_ids(make_batches(encoded(2), 5, seed=0), 3)] == [5, 5, 5]


@pytest.mark.parametrize(("rows", "size"), [(0, 4), (4, 0)])
def test_batches_of_nothing_are_refused_at_once(rows: int, size: int) -> None:
    with pytest.raises(InvalidRequestError):
        make_batches(encoded(rows), size, seed=0)


# --- ids of rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_jsonl, lambda path, *rows: write_parquet(path, [*rows])])
@pytest.mark.parametrize("row", [PAIR, CHAT], ids=["pair", "chat"])
def test_a_row_keeps_its_id_to_the_batch(tmp_path: Path, write: Any, row: dict[str, Any]) -> None:
    name = "a.jsonl" if write is write_jsonl else "a.parquet"
    found = read_rows(write(tmp_path / name, *({**row, "example_id": i} for i in ("ann", "bob"))))
    assert found == [{**row, "example_id": "ann"}, {**row, "example_id": "bob"}]
    encoded = encode_rows(make_tokenizer(), found)
    assert encoded == encode_rows(make_tokenizer(), [row, row])
    assert as_batch(encoded).example_ids == ["ann", "bob"]
    (batch,) = islice(make_batches(encoded, 4, seed=0), 1)
    assert sorted(batch.example_ids) == ["ann", "ann", "bob", "bob"]
    held, kept = split_rows(encoded, 1, seed=0)
    assert sorted([*(ids_of(held) or []), *(ids_of(kept) or [])]) == ["ann", "bob"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_another_column_may_hold_the_ids(tmp_path: Path, suffix: str) -> None:
    rows = [{**PAIR, "customer": 7, "example_id": "not this"}, {**PAIR, "customer": 8}]
    path = tmp_path / f"a.{suffix}"
    write_jsonl(path, *rows) if suffix == "jsonl" else write_parquet(path, rows)
    found = read_rows(path, id_column="customer")
    assert [row["example_id"] for row in found] == ["7", "8"]
    with pytest.raises(InvalidRequestError, match="has no 'client'"):
        read_rows(path, id_column="client")


@pytest.mark.parametrize("value", [1.5, True, "", "a\nb", ["a"], {"a": 1}])
def test_an_id_is_printable_text_or_a_whole_number(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="example_id of line 1") as refusal:
        read_rows(write_jsonl(tmp_path / "a.jsonl", {**PAIR, "example_id": value}))
    assert "a\nb" not in str(refusal.value)


def test_rows_with_and_without_ids_make_no_batch() -> None:
    mixed = encode_rows(make_tokenizer(), [{**PAIR, "example_id": "ann"}, PAIR])
    with pytest.raises(InvalidRequestError, match="1 of 2 rows have an example_id"):
        as_batch(mixed)
    assert as_batch(encode_rows(make_tokenizer(), [PAIR])).example_ids is None


def test_the_turns_of_a_chat_keep_its_id() -> None:
    messages = [*CHAT["messages"], *CHAT["messages"]]
    turns = split_turns({"messages": messages, "example_id": "ann"})
    assert [turn["example_id"] for turn in turns] == ["ann", "ann"]
    assert ids_of(encode_rows(make_tokenizer(), turns)) == ["ann", "ann"]
    assert ids_of(encode_rows(make_tokenizer(), split_turns({**PAIR, "example_id": 7}))) == ["7"]


def test_an_encoded_row_with_an_id_survives_copies() -> None:
    (row,) = encode_rows(make_tokenizer(), [{**PAIR, "example_id": "ann"}])
    for again in (copy.deepcopy(row), pickle.loads(pickle.dumps(row))):  # noqa: S301 - our own
        assert again == row
        assert ids_of([again]) == ["ann"]
