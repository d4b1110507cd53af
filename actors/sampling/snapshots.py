"""Captures the weights of a run at one step, in a form that travels to the sampler.

The callers of `take` and `opened` decide how many snapshots are kept and how they are sent. Both
load torch; the rest of the module does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tg_tinker.cluster.messages import SnapshotRef
from tg_tinker.config import LoRAConfig

if TYPE_CHECKING:
    from actors.engine.checkpoint import SessionState
    from actors.engine.gradients import Tensors
    from actors.engine.session import Session


@dataclass(frozen=True, repr=False)
class Snapshot:
    """The trained tensors of a run at one step. The tensors under one name never change.

    Attributes:
        name: a unique name for these weights.
        base: the digest of the base model on which the weights were trained.
        files: the digests of that model's kinds of files; None for weights of older versions.
        weights: the trained tensors by stored name.
        lora_config: the configuration of the run's adapter; None after full fine-tuning.
        adapter_config: PEFT's configuration; None after full fine-tuning.
    """

    name: str
    base: str
    files: Mapping[str, str] | None
    weights: Tensors
    lora_config: LoRAConfig | None
    adapter_config: dict[str, Any] | None

    @property
    def shared(self) -> bool:
        """Whether it can share a base model with others, because it is LoRA matrices alone."""
        return shares_base(self.lora_config)


def shares_base(lora: LoRAConfig | None) -> bool:
    return lora is not None and lora.bias == "none"


def take(session: Session, reference: SnapshotRef) -> dict[str, Any]:
    """Returns a copy of the session's weights in a form that travels: bytes and plain values."""
    import safetensors.torch

    state = session.live_state(include_optimizer=False)
    return {
        "name": reference.name,
        "base": session.base.digest,
        "files": dict(session.base.identity.files),
        "weights": safetensors.torch.save(state.weights),
        "lora_config": session.config.lora_config,
        "adapter_config": state.adapter_config,
    }


def of_state(name: str, state: SessionState, lora: LoRAConfig | None) -> Snapshot:
    """Returns the weights of a saved state as a snapshot."""
    base, files = state.geometry["base"], state.geometry.get("files")
    return Snapshot(name, base, files, state.weights, lora, state.adapter_config)


def opened(carried: dict[str, Any]) -> Snapshot:
    """Returns the snapshot that `take` captured."""
    import safetensors.torch

    return Snapshot(**(carried | {"weights": safetensors.torch.load(carried["weights"])}))
