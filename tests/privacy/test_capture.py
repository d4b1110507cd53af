"""Tests that captured layers separate the gradients of units, in whatever shape tokens come."""

from __future__ import annotations

import pytest
import torch

from actors.privacy.capture import CapturedLinear, Recorder

BOUNDS = (0, 3, 7)


@pytest.mark.parametrize("shape", [(7, 4), (1, 7, 4), (1, 1, 7, 4), (7, 1, 4)], ids=str)
def test_a_stream_may_come_in_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, recorder = torch.nn.Linear(4, 2, bias=False), Recorder()
    captured = CapturedLinear(layer, "w", recorder)
    x, upstream = torch.randn(shape), torch.randn(*shape[:-1], 2)
    with recorder.recording(BOUNDS) as found:
        product = captured(x)
        product.mul_(2.0)  # as some models do
        product.backward(upstream)
    assert layer.weight.grad is None
    rows, above = x.reshape(7, 4), 2 * upstream.reshape(7, 2)
    for unit, (start, stop) in enumerate(((0, 3), (3, 7))):
        torch.testing.assert_close(found["w"][unit], above[start:stop].T @ rows[start:stop])


@pytest.mark.parametrize("shape", [(6, 4), (2, 7, 4), (1, 7, 2, 4)], ids=str)
def test_other_tokens_than_those_of_the_stream_are_refused(shape: tuple[int, ...]) -> None:
    """An expert may see some of the tokens, or a layer each token twice."""
    layer, recorder = torch.nn.Linear(4, 2, bias=False), Recorder()
    with recorder.recording(BOUNDS):
        loss = CapturedLinear(layer, "w", recorder)(torch.randn(shape)).sum()
        with pytest.raises(ValueError, match="not the 7 of the stream"):
            loss.backward()
