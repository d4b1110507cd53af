"""Converts the state of a session between two steps to plain files and back.

The files are safetensors and JSON only, so reading an artifact never runs code. `staged` writes a
safetensors file into separate memory, aligned and in one copy, so that training may continue at
once. Other packages seal and store the files.
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
from tg_tinker.config import AverageKind
from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import Buffer

WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"
AVERAGES = "averages.safetensors"

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The names of dtypes in safetensors."""


@dataclass(frozen=True, repr=False)
class SessionState:
    """The state of a session after its last `optim_step`.

    Attributes:
        weights: the trainable tensors by stored name (PEFT's name for an adapter).
        optimizer: the moments, or None if they were left out.
        step: the number of completed steps.
        geometry: the settings that a session must share with this state to load it.
        plan: the settings that must be equal for a bit-exact resume.
        adapter_config: PEFT's configuration, or None after full fine-tuning.
        lineage: the origin of the weights, and whether all their training was private.
        averages: the averages of the weights that the run keeps; None if it keeps none, or if the
            optimizer was left out.
        average: the kind of average that the weights are; None for the weights of a step. Training
            does not resume from an average.
    """

    weights: Tensors
    optimizer: Tensors | None
    step: int
    geometry: dict[str, Any]
    plan: dict[str, Any]
    adapter_config: dict[str, Any] | None
    lineage: Lineage
    averages: Tensors | None = None
    average: AverageKind | None = None


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A state with its owner's metadata and the time at which it was saved."""

    state: SessionState
    metadata: dict[str, Any]
    timestamp: datetime


def to_files(checkpoint: Checkpoint) -> dict[str, Buffer]:
    """Returns the files of a checkpoint. They are copies, so the state may change afterwards."""
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
    if state.average is not None:
        described["average"] = state.average
    files: dict[str, Buffer] = {
        STATE: json.dumps(described).encode(), WEIGHTS: staged(state.weights)
    }  # fmt: skip
    if state.optimizer is not None:
        files[OPTIMIZER] = staged(state.optimizer)
    if state.averages is not None:
        files[AVERAGES] = staged(state.averages)
    return files


def from_files(files: dict[str, bytes]) -> Checkpoint:
    """Returns the checkpoint that `to_files` wrote.

    Raises:
        IntegrityError: if these files do not hold the state of a session.
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
            averages=safetensors.torch.load(files[AVERAGES]) if AVERAGES in files else None,
            average=described.get("average"),
        )
        timestamp = datetime.fromisoformat(described["timestamp"])
        return Checkpoint(state, described["metadata"], timestamp)
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise IntegrityError("the files open, but do not hold the state of a session") from None


def staged(tensors: Mapping[str, torch.Tensor]) -> memoryview:
    """Returns a safetensors file of the tensors as they are now. They may change afterwards.

    Tensors with large elements come first, so that all tensors are aligned.
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
    """Returns zeroed memory, in large pages where the system has them.

    Mapping small pages would take longer than the copy. The memory returns to the system, not to a
    heap, once nothing refers to it.
    """
    mapped = mmap.mmap(-1, size)
    with suppress(OSError, AttributeError):  # not Linux
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)
