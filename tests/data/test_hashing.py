"""Tests the batch hash: recomputes it from its documented format, and shows which batches differ
in it."""

from __future__ import annotations

import doctest
import hashlib
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tg_tinker import InvalidRequestError, batch_hash
from tg_tinker.data import hashing
from tg_tinker.data.batch import IGNORED, normalize
from tg_tinker.data.hashing import hash_examples, resolve_batch_hash

Rows = list[list[tuple[int, int]]]
ids = st.integers(0, 2**40)
ragged = st.lists(
    st.lists(st.tuples(ids, st.one_of(st.just(IGNORED), ids)), min_size=1, max_size=4),
    min_size=1, max_size=4,
)  # fmt: skip


quick = settings(max_examples=60, deadline=None)


def batch_of(rows: Rows) -> dict[str, Any]:
    return {
        "input_ids": [[i for i, _ in row] for row in rows],
        "labels": [[label for _, label in row] for row in rows],
    }


def recomputed(rows: Rows) -> str:
    """Returns the hash of version 1, computed from the words of the docstring alone."""
    content = b"tg-tinker batch v1\n" + struct.pack("<q", len(rows))
    for row in rows:
        content += struct.pack("<q", len(row))
        content += struct.pack(f"<{len(row)}q", *(i for i, _ in row))
        content += struct.pack(f"<{len(row)}q", *(label for _, label in row))
    return "sha256:" + hashlib.sha256(content).hexdigest()


@quick
@given(ragged)
def test_anyone_can_recompute_the_hash_from_its_description(rows: Rows) -> None:
    assert batch_hash(batch_of(rows)) == recomputed(rows)


def test_the_hash_of_version_1_never_changes() -> None:
    """A fixed vector shows that hashes which owners keep stay comparable."""
    batch = {"input_ids": [[5, 6, 7], [8]], "labels": [[IGNORED, 6, 7], [8]]}
    assert batch_hash(batch) == VECTOR


VECTOR = "sha256:d036bb02f12e87d5f0266070c3d47e8eb7179350168a799158805d7af89e9540"


@quick
@given(ragged, st.data())
def test_padding_never_changes_the_hash(rows: Rows, data: st.DataObject) -> None:
    padded: dict[str, Any] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        left, right = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
        filler = data.draw(st.integers(0, 99))
        padded["input_ids"].append([filler] * left + [i for i, _ in row] + [filler] * right)
        padded["labels"].append([filler] * left + [j for _, j in row] + [IGNORED] * right)
        padded["attention_mask"].append([0] * left + [1] * len(row) + [0] * right)
    assert batch_hash(padded) == recomputed(rows)


@pytest.mark.parametrize(
    "form",
    [
        np.array,
        torch.tensor,
        lambda rows: np.array(rows, dtype=np.int32),
        lambda rows: np.array(rows, dtype=">i8"),
        lambda rows: np.asfortranarray(rows),
        lambda rows: torch.tensor(rows, dtype=torch.int16),
        lambda rows: tuple(np.array(row) for row in rows),
    ],
)
def test_dtype_and_container_never_change_the_hash(form: Any) -> None:
    rows, labels = [[1, 2, 300], [4, 5, 6]], [[IGNORED, 2, 300], [4, 5, IGNORED]]
    assert batch_hash({"input_ids": form(rows), "labels": form(labels)}) == batch_hash(
        {"input_ids": rows, "labels": labels}
    )


def test_left_out_labels_and_example_ids_never_change_the_hash() -> None:
    rows = [[1, 2], [3]]
    named = {"input_ids": rows, "labels": rows, "example_ids": ["a", "b"]}
    assert batch_hash(named) == batch_hash({"input_ids": rows})


@quick
@given(ragged, st.data())
def test_one_changed_token_or_label_changes_the_hash(rows: Rows, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(rows) - 1))
    at = data.draw(st.integers(0, len(rows[row]) - 1))
    which = data.draw(st.sampled_from(["input_ids", "labels"]))
    batch = batch_of(rows)
    before, new = batch_hash(batch), data.draw(ids)
    assume(new != batch[which][row][at])
    batch[which][row][at] = new
    assert batch_hash(batch) != before


@quick
@given(ragged, ragged)
def test_batches_have_one_hash_only_if_they_are_equal(one: Rows, other: Rows) -> None:
    assert (batch_hash(batch_of(one)) == batch_hash(batch_of(other))) == (one == other)


@pytest.mark.parametrize(
    "other", [[[1, 2], [3, 4]], [[1], [2, 3, 4]], [[3, 4], [1, 2]], [[1, 2, 3, 4, 0]]]
)
def test_another_split_or_order_of_the_same_tokens_changes_the_hash(other: Any) -> None:
    assert batch_hash({"input_ids": other}) != batch_hash({"input_ids": [[1, 2, 3, 4]]})


def test_tokens_cannot_pass_as_labels_or_lengths() -> None:
    """Swapped ids and labels, and a row that spells out two rows, hash differently."""
    swapped = {"input_ids": [[2, 1]], "labels": [[1, 2]]}
    assert batch_hash(swapped) != batch_hash({"input_ids": [[1, 2]], "labels": [[2, 1]]})
    two = {"input_ids": [[1], [1]], "labels": [[1], [1]]}
    assert batch_hash(two) != batch_hash({"input_ids": [[1, 1]], "labels": [[1, 1]]})


# --- what a call reports ---------------------------------------------------------------------

EXAMPLES = normalize({"input_ids": [[5, 6, 7]]})


@pytest.mark.parametrize("own", ["batch 17", "", "SHA256:abc", "md5:00"])
def test_a_callers_own_string_is_echoed(own: str) -> None:
    assert resolve_batch_hash(EXAMPLES, own) == own


def test_without_a_string_the_hash_is_computed() -> None:
    assert resolve_batch_hash(EXAMPLES, None) == hash_examples(EXAMPLES)


def test_a_right_sha256_is_accepted_and_a_wrong_one_refused_with_both() -> None:
    right = hash_examples(EXAMPLES)
    assert resolve_batch_hash(EXAMPLES, right) == right
    for wrong in ("sha256:", "sha256:" + "0" * 64, right[:-1], right + " "):
        with pytest.raises(InvalidRequestError) as caught:
            resolve_batch_hash(EXAMPLES, wrong)
        assert right in str(caught.value)
        assert wrong in str(caught.value)


def test_the_example_in_the_docstring_is_true() -> None:
    failed, tried = doctest.testmod(hashing)
    assert tried > 0
    assert failed == 0


def test_hashing_needs_no_torch() -> None:
    program = (
        "import sys; from tg_tinker.data.hashing import batch_hash;"
        "batch_hash({'input_ids': [[1]]}); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
