"""The copy that a save makes: a safetensors file, of the moment it was asked for."""

from __future__ import annotations

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.staging import staged

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6))
def test_the_bytes_are_those_that_safetensors_writes(described: dict[str, object]) -> None:
    tensors = {
        name: (3 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in described.items()
    }  # type: ignore[misc]
    assert bytes(staged(tensors)) == safetensors.torch.save(tensors)


def test_later_changes_are_not_in_the_copy() -> None:
    weight = torch.ones(5, 3)
    file = staged({"w": weight, "turned": weight.T})
    weight.zero_()
    found = safetensors.torch.load(bytes(file))
    assert torch.equal(found["w"], torch.ones(5, 3))
    assert found["turned"].shape == (3, 5)
