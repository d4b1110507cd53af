"""Weights of a run at one step, as they travel to where they are sampled from.

How many are kept, and how they are sent, is up to those who take and fetch them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch

from tg_tinker.cluster.messages import SnapshotRef
from tg_tinker.config import LoRAConfig

if TYPE_CHECKING:
    from actors.engine.checkpoint import SessionState
    from actors.engine.gradients import Tensors
    from actors.engine.session import Session


@dataclass(frozen=True, repr=False)
class Snapshot:
    """Trained tensors by stored name. They never change under a name.

    Attributes:
        name: unique for these weights.
        base: digest of the base model they were trained on.
        lora_config: of the run; None after full fine-tuning.
        adapter_config: PEFT's, where there is one.
    """

    name: str
    base: str
    weights: Tensors
    lora_config: LoRAConfig | None
    adapter_config: dict[str, Any] | None

    @property
    def shared(self) -> bool:
        """Whether it can share a base model with others: LoRA matrices and nothing else."""
        return shares_base(self.lora_config)


def shares_base(lora: LoRAConfig | None) -> bool:
    return lora is not None and lora.bias == "none"


def take(session: Session, reference: SnapshotRef) -> dict[str, Any]:
    """A copy in a form that travels: bytes and plain values."""
    state = session.live_state(include_optimizer=False)
    return {
        "name": reference.name,
        "base": session.base.digest,
        "weights": safetensors.torch.save(state.weights),
        "lora_config": session.config.lora_config,
        "adapter_config": state.adapter_config,
    }


def of_state(name: str, state: SessionState, lora: LoRAConfig | None) -> Snapshot:
    """The weights of a saved state."""
    return Snapshot(name, state.geometry["base"], state.weights, lora, state.adapter_config)


def opened(carried: dict[str, Any]) -> Snapshot:
    """The inverse of `take`."""
    return Snapshot(**(carried | {"weights": safetensors.torch.load(carried["weights"])}))
