"""The state of a session between two steps, and its form as plain files.

safetensors and JSON only: reading an artifact never runs code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from actors.engine.gradients import Tensors
from actors.engine.lineage import Lineage
from actors.engine.staging import staged
from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import Buffer

WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"


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
