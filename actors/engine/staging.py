"""Tensors copied into the bytes of a safetensors file: the one copy that a save makes.

`safetensors.torch.save` copies twice, which would double the memory that a save of all weights
takes. The format is a header length, a JSON header, and the tensors' bytes
(https://github.com/huggingface/safetensors#format); safetensors itself reads the result.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def staged(tensors: Mapping[str, torch.Tensor]) -> memoryview:
    """A safetensors file of the tensors as they are now; they may change afterwards.

    Large elements come first, so that all are aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}  # fmt: skip
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    head = len(described).to_bytes(8, "little") + described
    file = _memory(len(head) + end)
    file[: len(head)] = head
    for name in order:
        start, stop = (len(head) + offset for offset in header[name]["data_offsets"])
        if stop > start:
            tensor = tensors[name]
            target = torch.frombuffer(file, dtype=torch.uint8, offset=start, count=stop - start)
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return file


def _memory(size: int) -> memoryview:
    """Zeros, in large pages where the system has them: to map small ones takes longer than the
    copy. It goes back to the system, not into a heap, once nobody holds it."""
    mapped = mmap.mmap(-1, size)
    with suppress(OSError, AttributeError):  # not Linux
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)
