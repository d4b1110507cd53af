"""The state of a session between two steps, and its form as plain files.

safetensors and JSON only: reading an artifact never runs code. `staged` writes a safetensors file
into memory of its own, aligned and in one copy, so that training may go on at once. Sealing the
files and keeping them is left to others.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from actors.engine.gradients import Tensors
from actors.engine.lineage import Lineage
from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import Buffer

WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls them."""


@dataclass(frozen=True, repr=False)
class SessionState:
    """A session after its last `optim_step`.

    Attributes:
        weights: trainable tensors by stored name (PEFT's for an adapter).
        optimizer: moments, or None when left out.
        step: completed steps.
        geometry: what a session must share to load this state.
        plan: what must be equal for a resume to the bit.
        adapter_config: PEFT's, or None after full fine-tuning.
        lineage: what its weights were trained on, and whether that was private.
    """

    weights: Tensors
    optimizer: Tensors | None
    step: int
    geometry: dict[str, Any]
    plan: dict[str, Any]
    adapter_config: dict[str, Any] | None
    lineage: Lineage


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A state with what its owner attached and when it was saved."""

    state: SessionState
    metadata: dict[str, Any]
    timestamp: datetime


def to_files(checkpoint: Checkpoint) -> dict[str, Buffer]:
    """A copy of the state: it may change afterwards."""
    state = checkpoint.state
    described = {
        "step": state.step,
        "geometry": state.geometry,
        "plan": state.plan,
        "adapter_config": state.adapter_config,
        "lineage": asdict(state.lineage),
        "metadata": checkpoint.metadata,
        "timestamp": checkpoint.timestamp.isoformat(),
    }
    files: dict[str, Buffer] = {
        STATE: json.dumps(described).encode(), WEIGHTS: staged(state.weights)
    }  # fmt: skip
    if state.optimizer is not None:
        files[OPTIMIZER] = staged(state.optimizer)
    return files


def from_files(files: dict[str, bytes]) -> Checkpoint:
    """The inverse of `to_files`.

    Raises:
        IntegrityError: these files are not a session's state.
    """
    try:
        described = json.loads(files[STATE])
        state = SessionState(
            weights=safetensors.torch.load(files[WEIGHTS]),
            optimizer=safetensors.torch.load(files[OPTIMIZER]) if OPTIMIZER in files else None,
            step=described["step"],
            geometry=described["geometry"],
            plan=described["plan"],
            adapter_config=described["adapter_config"],
            lineage=Lineage(**described["lineage"]),
        )
        timestamp = datetime.fromisoformat(described["timestamp"])
        return Checkpoint(state, described["metadata"], timestamp)
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise IntegrityError("the files open, but they are not a session's state") from None


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
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
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
