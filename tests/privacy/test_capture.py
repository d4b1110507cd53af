"""Tests that captured layers separate the gradients of units, in whatever shape tokens come."""

from __future__ import annotations

import pytest
import torch

from actors.privacy.capture import Capture, CapturedLinear

BOUNDS = (0, 3, 7)
CPU = torch.device("cpu")


def captured(layer: torch.nn.Linear) -> tuple[CapturedLinear, Capture]:
    slots = Capture({"w": layer.weight.shape})
    return CapturedLinear(layer, "w", slots), slots


@pytest.mark.parametrize("shape", [(7, 4), (1, 7, 4), (1, 1, 7, 4), (7, 1, 4)], ids=str)
def test_a_stream_may_come_in_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2, bias=False)
    replaced, slots = captured(layer)
    x, upstream = torch.randn(shape), torch.randn(*shape[:-1], 2)
    with slots.units(BOUNDS, CPU) as found:
        product = replaced(x)
        product.mul_(2.0)  # as some models do
        product.backward(upstream)
    assert layer.weight.grad is None
    rows, above = x.reshape(7, 4), 2 * upstream.reshape(7, 2)
    for unit, (start, stop) in enumerate(((0, 3), (3, 7))):
        expected = above[start:stop].T @ rows[start:stop]
        torch.testing.assert_close(found[unit].view(2, 4), expected)


@pytest.mark.parametrize("shape", [(6, 4), (2, 7, 4), (1, 7, 2, 4)], ids=str)
def test_other_tokens_than_those_of_the_stream_are_refused(shape: tuple[int, ...]) -> None:
    """An expert may see some of the tokens, or a layer each token twice."""
    replaced, slots = captured(torch.nn.Linear(4, 2, bias=False))
    with slots.units(BOUNDS, CPU), pytest.raises(ValueError, match="not the 7 of the stream"):
        replaced(torch.randn(shape))


class Twice(torch.nn.Module):
    """A model that uses one captured layer twice, with another layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.slots = captured(torch.nn.Linear(4, 2, bias=False))
        self.between = torch.nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.between(self.shared(x)).relu()).square().sum()

    def of_units(self, x: torch.Tensor, bounds: tuple[int, ...], run: object) -> torch.Tensor:
        with self.slots.units(bounds, CPU) as found:
            run(x).backward()  # type: ignore[operator]
        return found


def test_the_uses_of_a_layer_add_up() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(7, 4)
    found = model.of_units(x, BOUNDS, model)
    for unit, (start, stop) in enumerate(((0, 3), (3, 7))):
        model(x[start:stop]).backward()
        torch.testing.assert_close(found[unit].view(2, 4), model.shared.weight.grad)
        model.shared.weight.grad = None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_a_captured_layer_compiles_whole() -> None:
    """A compiled function has no side effects: the gradients are those of an input, the slot."""
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(1, 7, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for bounds in (BOUNDS, (0, 2, 7)):
        found = model.of_units(x, bounds, compiled)
        torch.testing.assert_close(found, model.of_units(x, bounds, model))
