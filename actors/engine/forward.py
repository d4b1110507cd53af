"""Runs a model over tokens, and returns logits at the wanted positions only.

Logits of all positions would take more memory than the rest of a pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


def logits_at(model: Any, wanted: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
    """Returns the logits [len(wanted), V] of a pass over one row, and all outputs of the model.

    Args:
        wanted: positions of the row, int64.
        options: the arguments of the model.
    """
    if accepts(model, "logits_to_keep"):
        outputs = model(**options, logits_to_keep=wanted)
        return outputs.logits[0], outputs
    outputs = model(**options)
    return outputs.logits[0, wanted], outputs


def accepts(model: Any, name: str) -> bool:
    """Returns whether the forward pass of a model has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters
