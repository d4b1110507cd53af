"""Matrix products by oneDNN on x86 CPUs: the door to torch's own copy of it.

torch sends float32 products to MKL, which gives AMD's processors kernels of half their width:
measured on two cores of an EPYC, 105 to 215 GFLOP/s, where oneDNN in the same torch does 240 to
490. Weights stay where they are, in the layout they have (mapped pages stay shared), and nothing
is rounded to a shorter type. Anywhere else, products are torch's own.

Legend: T tokens, K features in, N features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ONEDNN = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_FEWEST_ROWS = 4
"""Below, MKL's products of a matrix and a vector are the faster ones."""

_NARROW = 64
"""A product with shorter rows is made transposed: oneDNN takes a fifth of the time for it."""


def library(weight: torch.Tensor) -> str:
    """Which library multiplies by such a weight: part of what makes two runs equal to the bit."""
    return "onednn" if _fits(weight) else "torch"


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., N]: x [..., K] times weight [N, K] transposed. Not differentiable: see `Linear`."""
    if _fits(x) and _fits(weight) and x.numel() >= _FEWEST_ROWS * x.shape[-1]:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's linear layer on these products; what is frozen keeps no input for its gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = upstream[0].flatten(0, -2)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            multiply(upstream[0], weight.T) if for_x else None,
            weight_gradient(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def weight_gradient(upstream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, K]: upstream [T, N] transposed times x [T, K]."""
    if x.shape[1] < _NARROW:
        return multiply(x.T, upstream.T).T
    return multiply(upstream.T, x.T)


def use_fast_layers(model: nn.Module) -> None:
    """Lets every plain linear layer multiply by oneDNN, where that is to be had."""
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.__class__ = Linear


def _fits(tensor: torch.Tensor) -> bool:
    return _ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32
