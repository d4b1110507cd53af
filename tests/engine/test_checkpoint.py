"""Tests the copy that a save makes: a safetensors file of the moment at which it was requested."""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.checkpoint import staged

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6))
def test_safetensors_reads_what_was_there(described: dict[str, Any]) -> None:
    tensors = {
        name: (3 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in described.items()
    }
    file = bytes(staged(tensors))
    found = safetensors.torch.load(file)
    assert found.keys() == tensors.keys()
    start = 8 + int.from_bytes(file[:8], "little")
    for name, entry in json.loads(file[8:start]).items():
        assert torch.equal(found[name], tensors[name])
        assert found[name].dtype == tensors[name].dtype
        assert (start + entry["data_offsets"][0]) % tensors[name].element_size() == 0


def test_the_bytes_are_those_of_safetensors() -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(4), "c": torch.tensor(1.5)}
    assert bytes(staged(tensors)) == safetensors.torch.save(tensors)


def test_later_changes_are_not_in_the_copy() -> None:
    weight = torch.ones(5, 3)
    file = staged({"w": weight, "turned": weight.T})
    weight.zero_()
    found = safetensors.torch.load(bytes(file))
    assert torch.equal(found["w"], torch.ones(5, 3))
    assert found["turned"].shape == (3, 5)
