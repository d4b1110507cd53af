"""Computes the per-unit gradients of LoRA layers in one ordinary backward pass.

A captured layer computes y = x W^T as before. In the backward pass it gives autograd the gradient
of x, but no gradient of W. Each layer also has a *slot*: an input [U, out, in] that the product
does not use. Its gradient is defined as the gradient of W for each unit: the upstream gradient
times the input, over the tokens of that unit alone. This is the method of Goodfellow 2015,
arXiv:1510.01799, without the norm trick: for T > r tokens, the gradients themselves cost less.

Autograd adds up the uses of a slot as those of any input. So a layer is a function without side
effects, which may be computed again (activation checkpointing) and compiled. Hooks on layers would
not work with checkpointing.

Legend: T tokens of a stream, U units in it, one after another, r the rank of the adapter, P the
number of trainable values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from actors.engine.gradients import Shapes, by_name
from actors.engine.matmul import Linear, by_rows, multiply


class Capture:
    """The slots of the captured layers of one model. There are none outside of `units`.

    Args:
        shapes: of all trainable tensors, in the order of the values of a unit.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self.slots: dict[str, torch.Tensor] = {}
        self.bounds: tuple[int, ...] = ()

    @contextmanager
    def units(self, bounds: tuple[int, ...], device: torch.device) -> Iterator[torch.Tensor]:
        """Captures the gradients of backward passes inside the context.

        Yields float32 [U, P], zero at first, to which the backward passes add.

        Args:
            bounds: U + 1 offsets of the units in the stream, from 0 to T.
        """
        values = sum(shape.numel() for shape in self._shapes.values())
        flat = torch.zeros(len(bounds) - 1, values, device=device)
        for name, gradient in by_name(flat, self._shapes).items():
            # One zero, seen as a whole slot: only the shape counts.
            slot = torch.zeros((), device=device).expand(gradient.shape).requires_grad_()
            slot.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_move, gradient)
            )
            self.slots[name] = slot
        self.bounds = bounds
        try:
            yield flat
        finally:
            self.slots, self.bounds = {}, ()


class CapturedLinear(Linear):
    """A linear layer without bias that uses the weight of another layer."""

    def __init__(self, layer: nn.Linear, name: str, capture: Capture) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self._name, self._capture = name, capture

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self._capture.slots and torch.is_grad_enabled()):
            return super().forward(x)
        slot, bounds = self._capture.slots[self._name], self._capture.bounds
        tokens = x.numel() // x.shape[-1]
        if tokens != bounds[-1]:
            raise ValueError(f"{self._name} sees {tokens} rows, not the {bounds[-1]} of the stream")
        return by_rows(_Captured.apply, x, self.weight, slot, bounds)


class _Captured(torch.autograd.Function):
    """The product of a captured layer.

    `slot` requires a gradient, so autograd calls `backward` even where `x` requires none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        slot: torch.Tensor,
        bounds: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = multiply(upstream[0], weight.T) if ctx.needs_input_grad[0] else None
        # None for the weight: its gradient summed over units must not exist at all.
        return for_x, None, _per_unit(upstream[0], x, ctx.bounds).float(), None


def capture(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Capture | None:
    """Replaces the adapter layers by captured layers and returns their slots.

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
    slots = Capture({name: parameter.shape for name, parameter in parameters.items()})
    for parent, child, layer, name in found:
        parent.register_module(child, CapturedLinear(layer, name, slots))
    return slots


def _move(gradient: torch.Tensor, slot: torch.Tensor) -> None:
    """Moves the gradient of a slot to its place in the flat tensor, so that none exists twice."""
    if slot.grad is not None:
        gradient += slot.grad
        slot.grad = None


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
    return torch.stack(
        [upstream[start:stop].T @ inputs[start:stop] for start, stop in pairwise(bounds)]
    )
