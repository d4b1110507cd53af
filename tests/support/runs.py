"""Defines runs that lose their actor: what they train, and what must be restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.privacy_helpers import ROWS
from tg_tinker import ActorLostError, LoRAConfig, TrainingClient, TrainingConfig


def config(model: Path, **values: Any) -> TrainingConfig:
    defaults = {"model_ref": str(model), "lora_config": LoRAConfig(rank=4), "seed": 3}
    return TrainingConfig(**(defaults | values))


def train(tc: TrainingClient, *steps: int) -> list[Any]:
    """Trains steps by number, each on rows of its own."""
    handles = []
    for step in steps:
        handles.append(tc.forward_backward({"input_ids": ROWS[step % 4 : step % 4 + 2]}))
        handles.append(tc.optim_step())
    return [handle.result() for handle in handles]


def fingerprints(results: list[Any]) -> list[Any]:
    return [getattr(r, "gradient_hash", None) or (r.step, r.grad_norm) for r in results]


def lost(tc: TrainingClient) -> ActorLostError:
    with pytest.raises(ActorLostError) as caught:
        tc.forward_backward({"input_ids": ROWS[:2]}).result(timeout=60)
    return caught.value
