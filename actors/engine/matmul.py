"""Computes matrix products on x86 CPUs by oneDNN. Only this module calls torch's copy of oneDNN.

torch sends float32 products to MKL, which gives AMD's processors kernels of half their width:
measured on two cores of an EPYC, MKL does 105 to 215 GFLOP/s, and oneDNN in the same torch 240 to
490. Weights stay in place and keep their layout (mapped pages stay shared), and nothing is rounded
to a shorter type. Where torch has no MKL or oneDNN, and on GPUs, products are torch's own.

Legend: T tokens, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_ONEDNN = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_FEWEST_ROWS = 4
"""With fewer rows, MKL's matrix-vector products are faster."""

_NARROW = 64
"""A product with shorter rows is computed transposed, which takes oneDNN a fifth of the time."""


def library(weight: torch.Tensor) -> str:
    """Returns the name of the library that multiplies by this weight.

    Two runs can be equal to the bit only if they use the same library.
    """
    return "onednn" if _fits(weight) else "torch"


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x [..., K] times weight [N, K] transposed, plus bias [N] if any: [..., N].

    The product is not differentiable: see `Linear`.
    """
    if x.numel() and _fits(x) and _fits(weight) and x.numel() >= _FEWEST_ROWS * x.shape[-1]:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's linear layer with these products. A frozen layer keeps no input for a gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_rows(_Linear.apply, x, self.weight, self.bias)


def by_rows(function: Callable[..., torch.Tensor], x: torch.Tensor, *others: Any) -> torch.Tensor:
    """Returns an autograd function of x [..., K] and others: [..., N].

    The function itself sees rows [T, K]. oneDNN's product of another shape is a view, and a model
    must not change a view in place that was made inside an autograd function.
    """
    product = function(x.reshape(-1, x.shape[-1]), *others)
    return product.view(*x.shape[:-1], product.shape[-1])  # -1 is unknown where there are no rows


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
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            multiply(upstream[0], weight.T) if for_x else None,
            weight_gradient(upstream[0], x) if for_weight else None,
            upstream[0].sum(0) if for_bias else None,
        )


def weight_gradient(upstream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of a weight [N, K]: upstream [T, N] transposed times x [T, K]."""
    if x.shape[1] < _NARROW:
        return multiply(x.T, upstream.T).T
    return multiply(upstream.T, x.T)


def use_fast_layers(model: nn.Module) -> None:
    """Makes every plain linear layer multiply by oneDNN where it is available."""
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.__class__ = Linear


def _fits(tensor: torch.Tensor) -> bool:
    return _ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32
