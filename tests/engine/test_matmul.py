"""Tests products by oneDNN, forward and backward, against torch's own in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from actors.engine.matmul import Linear, library, multiply, use_fast_layers

SHAPES = [(1, 8, 16), (3, 8, 16), (5, 48, 7), (33, 7, 128), (64, 128, 96)]
"""T, K, N: below and above the fewest rows, with narrow and wide sides."""


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("trains", ["input", "weight", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_and_its_gradients_equal_torchs(
    shape: tuple[int, int, int], trains: str, bias: bool
) -> None:
    tokens, features, out = shape
    torch.manual_seed(0)
    ours = torch.nn.Linear(features, out, bias=bias).requires_grad_(trains != "input")
    exact = deepcopy(ours).double()
    use_fast_layers(ours)
    assert type(ours) is (Linear if library(ours.weight) == "onednn" else torch.nn.Linear)
    x = torch.randn(1, tokens, features)
    x1, x2 = (t.requires_grad_(trains != "weight") for t in (x.clone(), x.double()))
    upstream = torch.randn(1, tokens, out)
    y1, y2 = ours(x1), exact(x2)
    y1.backward(upstream)
    y2.backward(upstream.double())
    torch.testing.assert_close(y1.double(), y2, rtol=1e-5, atol=1e-5)
    pairs = [(x1, x2), *zip(ours.parameters(), exact.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(8,), (6, 8), (1, 6, 8), (1, 1, 6, 8), (2, 3, 8), (0, 8)], ids=str
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_model_may_change_a_product_in_place(shape: tuple[int, ...], bias: bool) -> None:
    ours = torch.nn.Linear(8, 5, bias=bias)
    plain = deepcopy(ours)
    ours.__class__ = Linear
    x = torch.randn(shape)
    for layer in (ours, plain):
        product = layer(x)
        assert product.shape == (*shape[:-1], 5)
        product.mul_(3.0)
        product += 1
        product.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_layer_keeps_no_input_for_the_backward_pass() -> None:
    layer = torch.nn.Linear(8, 8).requires_grad_(False)
    layer.__class__ = Linear
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 8, requires_grad=True))
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]


def test_products_are_not_rounded_to_a_shorter_type() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 512, generator=generator) for _ in range(2))
    exact = x.double() @ w.double().T
    assert float((multiply(x, w) - exact).norm() / exact.norm()) < 1e-6
    assert library(w.bfloat16()) == "torch"
