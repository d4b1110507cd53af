"""Tests `normalize`: every accepted form of a batch becomes the same rows, all others are
refused."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker import BatchData, InvalidRequestError
from tg_tinker.data.batch import IGNORED, Example, check_bounds, normalize

ROWS = [[5, 6, 7], [8, 9, 10]]
LABELS = [[IGNORED, 6, 7], [8, 9, IGNORED]]
SECRET = 31337
"""A token id that no error and no repr may show."""


def plain(examples: list[Example]) -> list[tuple[list[int], list[int], str | None]]:
    return [(e.input_ids.tolist(), e.labels.tolist(), e.example_id) for e in examples]


def rows_of(**fields: Any) -> list[tuple[list[int], list[int], str | None]]:
    return plain(normalize(BatchData(**fields)))


quick = settings(max_examples=60, deadline=None)

# --- accepted forms --------------------------------------------------------------------------

CONTAINERS = {
    "lists": lambda rows: rows,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "numpy": np.array,
    "numpy uint8-sized": lambda rows: np.array(rows, dtype=np.int16),
    "numpy big-endian": lambda rows: np.array(rows, dtype=">i8"),
    "torch": torch.tensor,
    "torch int32": lambda rows: torch.tensor(rows, dtype=torch.int32),
    "a list of tensors": lambda rows: [torch.tensor(row) for row in rows],
    "a list of arrays": lambda rows: [np.array(row) for row in rows],
    "rows of small numpy integers": lambda rows: [[np.int8(i) for i in row] for row in rows],
    "rows of tensors of no dimension": lambda rows: [[torch.tensor(i) for i in r] for r in rows],
    "an object array": lambda rows: np.array(rows, dtype=object),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_same_rows(container: Any) -> None:
    mask = [[1, 1, 1], [1, 1, 0]]
    found = rows_of(
        input_ids=container(ROWS), attention_mask=container(mask), labels=container(LABELS)
    )
    assert found == [([5, 6, 7], [IGNORED, 6, 7], None), ([8, 9], [8, 9], None)]


@pytest.mark.parametrize("form", [dict, UserDict, lambda fields: BatchData(**fields)])
def test_a_dict_a_user_dict_and_a_batch_data_are_the_same(form: Any) -> None:
    fields = {"input_ids": ROWS, "labels": LABELS, "example_ids": ["a", "b"]}
    assert plain(normalize(form(fields))) == [
        ([5, 6, 7], [IGNORED, 6, 7], "a"),
        ([8, 9, 10], [8, 9, IGNORED], "b"),
    ]


class Encoding:
    """An object that is a mapping by its methods alone."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.keys, self.get, self.__iter = fields.keys, fields.get, fields.__iter__

    def __iter__(self) -> Iterator[str]:
        return self.__iter()


def test_what_only_behaves_like_a_dict_is_a_batch_too() -> None:
    assert plain(normalize(Encoding({"input_ids": ROWS}))) == rows_of(input_ids=ROWS)


def test_what_a_tokenizer_returns_is_a_batch() -> None:
    from transformers import BatchEncoding

    encoded = BatchEncoding(
        {"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]},
        tensor_type="pt",
    )
    assert plain(normalize(encoded)) == [([5, 6], [5, 6], None), ([7, 8, 9], [7, 8, 9], None)]


def test_normalized_rows_are_int64_whatever_came_in() -> None:
    for ids in (torch.tensor([[1, 2]], dtype=torch.uint8), [[np.uint8(1), np.uint8(2)]], [[True]]):
        example = normalize({"input_ids": ids})[0]
        assert example.input_ids.dtype == example.labels.dtype == np.int64


def test_missing_labels_mean_the_inputs() -> None:
    assert rows_of(input_ids=ROWS) == rows_of(input_ids=ROWS, labels=ROWS)


def test_a_key_that_is_none_counts_as_left_out() -> None:
    batch = {"input_ids": ROWS, "labels": None, "attention_mask": None, "example_ids": None}
    assert plain(normalize(batch)) == rows_of(input_ids=ROWS)


def test_the_first_label_of_a_row_is_not_counted() -> None:
    first, last = normalize({"input_ids": ROWS, "labels": LABELS})
    assert (first.num_labeled, last.num_labeled) == (2, 1)


def test_rows_may_differ_in_length() -> None:
    assert rows_of(input_ids=[[1], [2, 3]]) == [([1], [1], None), ([2, 3], [2, 3], None)]


def test_numbers_and_arrays_name_examples_too() -> None:
    assert [e[2] for e in rows_of(input_ids=ROWS, example_ids=np.array([7, 8]))] == ["7", "8"]


# --- padding ---------------------------------------------------------------------------------

ragged = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.integers(-100, 99)), min_size=1, max_size=5),
    min_size=1, max_size=4,
)  # fmt: skip


@quick
@given(ragged, st.data())
def test_padding_on_either_side_is_cut_with_its_labels(rows: Any, data: st.DataObject) -> None:
    """This also holds when the padding has real token ids and real labels."""
    ids, masks, labels = [], [], []
    for row in rows:
        left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        ids.append([77] * left + [i for i, _ in row] + [77] * right)
        masks.append([0] * left + [1] * len(row) + [0] * right)
        labels.append([55] * left + [j for _, j in row] + [55] * right)
    found = rows_of(input_ids=ids, attention_mask=masks, labels=labels)
    assert found == [([i for i, _ in row], [j for _, j in row], None) for row in rows]


@quick
@given(st.lists(st.integers(0, 1), min_size=1, max_size=9))
def test_a_mask_is_taken_exactly_when_it_is_one_run_of_ones(mask: list[int]) -> None:
    inner = "".join(map(str, mask)).strip("0")
    batch = BatchData([[*range(len(mask))]], attention_mask=[mask])
    if inner and "0" not in inner:
        assert len(normalize(batch)[0].input_ids) == len(inner)
    else:
        with pytest.raises(InvalidRequestError, match="row 0"):
            normalize(batch)


def test_a_hole_in_the_mask_is_refused_with_the_way_out() -> None:
    with pytest.raises(InvalidRequestError, match=r"row 1 has a hole.*labels to -100") as caught:
        rows_of(input_ids=ROWS, attention_mask=[[1, 1, 1], [1, 0, 1]])
    assert caught.value.details == {"row": 1}


def test_a_row_that_is_all_padding_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="row 1 has no tokens"):
        rows_of(input_ids=ROWS, attention_mask=[[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("value", [2, -1, 255])
def test_a_mask_of_anything_but_0_and_1_is_refused(value: int) -> None:
    with pytest.raises(InvalidRequestError, match="row 1 must hold 0 and 1 only"):
        rows_of(input_ids=ROWS, attention_mask=[[1, 1, 1], [1, 1, value]])


# --- wrong shapes and types ------------------------------------------------------------------


@pytest.mark.parametrize("batch", [{"input_ids": []}, BatchData([]), BatchData(np.zeros((0, 3)))])
def test_an_empty_batch_is_refused(batch: Any) -> None:
    with pytest.raises(InvalidRequestError, match="the batch is empty"):
        normalize(batch)


@pytest.mark.parametrize("batch", [None, 5, "text", [[1, 2]], np.array([[1, 2]])])
def test_something_that_is_no_batch_is_told_the_keys(batch: Any) -> None:
    with pytest.raises(InvalidRequestError, match="input_ids, attention_mask, labels, example_ids"):
        normalize(batch)


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"\['lables'\]; known keys: input_ids,.*labels"):
        normalize({"input_ids": ROWS, "lables": ROWS})


@pytest.mark.parametrize("batch", [{}, {"labels": ROWS}, {"input_ids": None}, BatchData(None)])
def test_a_batch_without_input_ids_is_refused(batch: Any) -> None:
    with pytest.raises(InvalidRequestError, match="input_ids"):
        normalize(batch)


@pytest.mark.parametrize("field", ["attention_mask", "labels", "example_ids"])
def test_fields_of_unequal_row_counts_are_refused(field: str) -> None:
    for count in (0, 1, 3):
        value = ["a"] * count if field == "example_ids" else [[1, 1, 1]] * count
        match = rf"{field} has {count} \w+, but input_ids has 2"
        with pytest.raises(InvalidRequestError, match=match):
            rows_of(input_ids=ROWS, **{field: value})


@pytest.mark.parametrize("field", ["attention_mask", "labels"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_rows_of_unequal_lengths_are_refused(field: str, length: int) -> None:
    match = f"{field} of row 1 has {length} entries.* 3"
    with pytest.raises(InvalidRequestError, match=match) as caught:
        rows_of(input_ids=ROWS, **{field: [[1, 1, 1], [1] * length]})
    assert caught.value.details == {"field": field, "row": 1}


WRONG_ROWS = {
    "a float": [1, 2.0],
    "a float tensor": torch.tensor([1.0, 2.0]),
    "a fraction": [1.5, SECRET],
    "a string": ["31337", "2"],
    "a number and a string": [1, "31337"],
    "None": [SECRET, None],
    "a list inside": [[SECRET], [2]],
    "an uneven list inside": [1, [SECRET, 2]],
    "too deep": [[[SECRET]]],
    "beyond 64 bits": [2**70, SECRET],
    "a set": {SECRET, 2},
    "a dict": {SECRET: 2, 3: 4},
    "bytes": b"31337",
    "complex": [1j, 2],
}


@pytest.mark.parametrize("field", ["input_ids", "attention_mask", "labels"])
@pytest.mark.parametrize("row", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_of_anything_but_integers_are_refused(row: Any, field: str) -> None:
    fields: dict[str, Any] = {"input_ids": [[1, 1], [1, 1]], field: [[1, 1], row]}
    with pytest.raises(
        InvalidRequestError, match=rf"{field} of row 1 must hold integers"
    ) as caught:
        normalize(fields)
    assert str(SECRET) not in str(caught.value)


@pytest.mark.parametrize("field", ["input_ids", "attention_mask", "labels"])
@pytest.mark.parametrize(
    "value", [[1, 1], np.array([1, 1]), torch.tensor([1, 1]), ["31337"], b"ab"]
)
def test_a_single_row_is_told_to_be_wrapped(value: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{field} must be a list of rows") as caught:
        normalize({"input_ids": [[1, 1]], field: value})
    assert str(SECRET) not in str(caught.value)


@pytest.mark.parametrize("value", ["31337", 31337, 1.0, np.array(31337), iter([[31337]])])
def test_a_field_that_is_no_list_is_refused_without_its_value(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="input_ids must be a list of rows") as caught:
        normalize({"input_ids": value})
    assert str(SECRET) not in str(caught.value)


@pytest.mark.parametrize("value", ["ab", 5, [None, "a"], ["a", ["b"]], {"a": 1, "b": 2}])
def test_example_ids_are_one_name_per_row_or_refused(value: Any) -> None:
    """A string is not a list of its letters, and None is not a name."""
    with pytest.raises(InvalidRequestError, match="example_ids must be a list of strings"):
        rows_of(input_ids=ROWS, example_ids=value)


# --- bounds of a model -----------------------------------------------------------------------


def bounds(batch: dict[str, Any], vocab_size: int = 100, context_length: int = 8) -> None:
    check_bounds(normalize(batch), vocab_size, context_length)


def test_ids_and_rows_at_their_bounds_are_taken() -> None:
    bounds({"input_ids": [[0, 99] * 4], "labels": [[0, 99, IGNORED, 1] * 2]})


@pytest.mark.parametrize("wrong", [100, -1, IGNORED, 2**40, -(2**63)])
def test_an_id_outside_the_vocabulary_is_named_with_its_row_and_range(wrong: int) -> None:
    match = rf"input_ids of row 1 holds the id {wrong}, but the vocabulary is 0\.\.99.*\.tokenizer"
    with pytest.raises(InvalidRequestError, match=match) as caught:
        bounds({"input_ids": [[1, 2], [3, wrong]], "labels": [[1, 2], [3, 4]]})
    assert caught.value.details == {"row": 1, "field": "input_ids", "vocab_size": 100}


@pytest.mark.parametrize("wrong", [100, -1, -101])
def test_a_label_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"labels of row 0 holds the id {wrong}"):
        bounds({"input_ids": [[1, 2]], "labels": [[1, wrong]]})


def test_an_id_beyond_int64_is_never_taken() -> None:
    with pytest.raises(InvalidRequestError):
        bounds({"input_ids": [[2**63, 2**63]]})


def test_a_row_longer_than_the_context_is_refused_with_both_lengths() -> None:
    match = "row 1 has 9 tokens, but the model's context is 8"
    with pytest.raises(InvalidRequestError, match=match):
        bounds({"input_ids": [[1] * 8, [1] * 9]})


def test_padding_does_not_count_towards_the_context() -> None:
    bounds({"input_ids": [[1] * 12], "attention_mask": [[0] * 2 + [1] * 8 + [0] * 2]})


@pytest.mark.parametrize(
    "labels", [[[IGNORED] * 3, [IGNORED] * 3], [[5, IGNORED, IGNORED], [IGNORED] * 3]]
)
def test_a_batch_without_a_label_that_counts_is_refused(labels: list[list[int]]) -> None:
    with pytest.raises(InvalidRequestError, match="no token of the batch is labeled"):
        bounds({"input_ids": ROWS, "labels": labels})


def test_one_labeled_row_is_enough() -> None:
    bounds({"input_ids": ROWS, "labels": [[IGNORED] * 3, [IGNORED, IGNORED, 5]]})


# --- nothing shows ---------------------------------------------------------------------------


def test_the_repr_of_batch_and_example_hides_contents() -> None:
    batch = BatchData([[SECRET, 2]], labels=[[SECRET, 2]], example_ids=["patient 31337"])
    assert repr(batch) == "BatchData(1 rows, contents hidden)"
    assert repr(normalize(batch)) == "[Example(2 tokens, contents hidden)]"
    assert repr(BatchData(iter([[SECRET]]))) == "BatchData(? rows, contents hidden)"


def test_a_batch_has_as_many_rows_as_it_says() -> None:
    assert len(BatchData(np.array(ROWS))) == 2


def test_ids_past_int64_are_refused_not_wrapped() -> None:
    for row in ([2**64 - 100] * 3, [2**63] * 3, [2**64] * 3):
        with pytest.raises(InvalidRequestError, match="integers"):
            normalize({"input_ids": [[1, 2, 3]], "labels": [row]})
