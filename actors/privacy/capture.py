"""Computes the per-unit gradients of LoRA layers in one ordinary backward pass.

A captured layer computes y = x W^T as before. In the backward pass it gives autograd the gradient
of x, but no gradient of W. The layer itself computes a gradient of W for each unit: the upstream
gradient times the input, over the tokens of that unit alone. This is the method of Goodfellow 2015,
arXiv:1510.01799, without the norm trick: for T > r tokens, the gradients themselves cost less.
Backward runs once per layer, with no, reentrant or non-reentrant activation checkpointing. Hooks
would not work with checkpointing.

Legend: T tokens of a stream, U units in it, one after another, r the rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from actors.engine.gradients import Tensors
from actors.engine.matmul import Linear, by_rows, multiply


class Recorder:
    """A collector of the gradients that the captured layers of one model compute."""

    def __init__(self) -> None:
        self._bounds: tuple[int, ...] = ()
        self._gradients: Tensors = {}

    @property
    def active(self) -> bool:
        return bool(self._bounds)

    @contextmanager
    def recording(self, bounds: tuple[int, ...]) -> Iterator[Tensors]:
        """Captures the gradients of backward passes inside the context.

        Yields a dictionary that the backward passes fill with float32 [U, ...] by parameter name.

        Args:
            bounds: U + 1 offsets of the units in the stream, from 0 to T.
        """
        self._bounds, self._gradients = bounds, {}
        try:
            yield self._gradients
        finally:
            self._bounds, self._gradients = (), {}

    def add(self, name: str, upstream: torch.Tensor, inputs: torch.Tensor) -> None:
        """Adds the gradient of one use of a layer: upstream [T, out], inputs [T, in]."""
        length = self._bounds[-1]
        if len(inputs) != length:
            raise ValueError(f"{name} sees {len(inputs)} rows, not the {length} of the stream")
        found = _per_unit(upstream, inputs, self._bounds).float()
        # If a layer is used several times, the gradients of all uses add up.
        if name in self._gradients:
            self._gradients[name] += found
        else:
            self._gradients[name] = found


class CapturedLinear(Linear):
    """A linear layer without bias that uses the weight of another layer."""

    def __init__(self, layer: nn.Linear, name: str, recorder: Recorder) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self._name, self._recorder = name, recorder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self._recorder.active and torch.is_grad_enabled()):
            return super().forward(x)
        return by_rows(_Captured.apply, x, self.weight, self._recorder, self._name)


class _Captured(torch.autograd.Function):
    """The product of a captured layer.

    `weight` requires a gradient, so autograd calls `backward` even where `x` requires none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, recorder: Recorder, name: str
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = recorder, name
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        recorder, name = ctx.place
        recorder.add(name, upstream[0], x)
        # None for the weight: its gradient summed over units must not exist at all.
        for_x = multiply(upstream[0], weight.T) if ctx.needs_input_grad[0] else None
        return for_x, None, None, None


def capture(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Recorder | None:
    """Replaces the adapter layers by captured layers and returns their recorder.

    Returns None, and changes nothing, if a trainable tensor would not be captured.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = [
        (parent, child, layer, names[id(layer.weight)])
        for parent in model.modules()
        for child, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and _is_plain_adapter(layer, names.get(id(layer.weight)))
    ]
    if {name for *_, name in found} != set(parameters):
        return None
    recorder = Recorder()
    for parent, child, layer, name in found:
        parent.register_module(child, CapturedLinear(layer, name, recorder))
    return recorder


def _is_plain_adapter(layer: nn.Linear, name: str | None) -> bool:
    """Returns whether `capture` supports the layer: a LoRA matrix without bias.

    A full weight matrix is not supported, because it would need U gradients of its size.
    """
    adapter = name is not None and (".lora_A." in name or ".lora_B." in name)
    return adapter and type(layer) in (nn.Linear, Linear) and layer.bias is None


def _per_unit(
    upstream: torch.Tensor, inputs: torch.Tensor, bounds: tuple[int, ...]
) -> torch.Tensor:
    """Returns [U, out, in]: upstream^T inputs over the tokens of each unit."""
    sizes = {stop - start for start, stop in pairwise(bounds)}
    if len(sizes) == 1:
        size = sizes.pop()
        left = upstream.reshape(-1, size, upstream.shape[1]).transpose(1, 2)
        return torch.bmm(left, inputs.reshape(-1, size, inputs.shape[1]))
    found = upstream.new_empty(len(bounds) - 1, upstream.shape[1], inputs.shape[1])
    for unit, (start, stop) in enumerate(pairwise(bounds)):
        torch.mm(upstream[start:stop].T, inputs[start:stop], out=found[unit])
    return found
