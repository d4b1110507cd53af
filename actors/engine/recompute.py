"""Computes activations again in the backward pass instead of keeping them (Chen et al. 2016).

transformers does this in train mode only, where many architectures also drop activations. Private
forward passes run in eval mode, so the layers are wrapped here, and every run uses this one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from actors.engine.attention import keeping_attention
from tg_tinker.errors import InvalidRequestError


class Recomputation:
    """A switch for the layers of one model, which keep only their inputs while it is on.

    Attributes:
        possible: whether the model has layers that may run twice.
        always: whether every forward pass of training uses this; else only those of long rows do.
        on: whether forward passes use this now.
    """

    def __init__(self, model: Any, always: bool) -> None:
        """Wraps the layers of a model.

        Raises:
            InvalidRequestError: if it is always wanted and the model has no layers for it.
        """
        layers = [*_layers(model)] if model.supports_gradient_checkpointing else []
        self.possible, self.always, self.on = bool(layers), always, False
        if always and not self.possible:
            raise InvalidRequestError(
                f"{type(model).__name__} cannot compute activations again: set"
                " activation_checkpointing=False"
            )
        for layer in layers:
            layer.forward = self._twice(layer.forward)

    @contextmanager
    def used(self, long: bool) -> Iterator[None]:
        """Makes forward passes in the context use this, if it is wanted for rows of this length."""
        self.on = self.possible and (long or self.always)
        try:
            yield
        finally:
            self.on = False

    def _twice(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*inputs: Any, **options: Any) -> Any:
            if not (self.on and torch.is_grad_enabled()):
                return forward(*inputs, **options)
            return checkpoint(
                forward, *inputs, use_reentrant=False, context_fn=keeping_attention, **options
            )

        return run


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the outermost layers that their architecture declares to be repeatable."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _layers(child)
