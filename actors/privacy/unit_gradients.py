"""Runs the backward passes of a private run, one gradient per unit, and makes their clipped sum.

Rows travel in streams. The gradient of a unit is clipped once it includes all rows of the unit.
`capture` has the fast path that separates units; each model is probed for it. `clipping` bounds
what a unit adds. `session` decides which rows are passed, and what happens to the sum.

Legend: U units of a stream, each one example or all rows of one id; S rows of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from actors.engine.batching import FlatStream, flat_streams, flatten
from actors.engine.gradients import Tensors, take_gradients
from actors.engine.model import Base
from actors.engine.session import MAX_STREAM_TOKENS
from actors.engine.timing import Stage, stage
from actors.privacy.capture import Recorder, capture
from actors.privacy.clipping import ClippedSum, Rule, UnitGradients
from tg_tinker.data.batch import Example

UNIT_GRADIENT_BYTES = 256 * 2**20
"""Bytes of per-unit gradients in memory at a time: this bounds the rows of a micro-batch."""


class UnitBackward:
    """The backward passes of one model that trains privately.

    Args:
        parameters: all trainable parameters, by name.
        losses: returns float32 [S] to differentiate: the summed loss of each row of a stream.
        rule: how the gradient of a unit is bounded; see `UnitGradients.clip`.

    Attributes:
        recorder: the fast path; None where rows go one by one through ordinary autograd.
    """

    def __init__(
        self,
        base: Base,
        parameters: Mapping[str, torch.nn.Parameter],
        losses: Callable[[FlatStream], torch.Tensor],
        rule: Rule = "flat",
    ) -> None:
        self._base = base
        self._parameters = parameters
        self._losses = losses
        self._rule = rule
        self.recorder: Recorder | None = None
        self.recorder = self._probed_recorder()

    def clipped_sum(
        self, groups: list[list[Example]], bound: float, check_cancelled: Callable[[], None]
    ) -> tuple[float, ClippedSum]:
        """Returns the token-weighted mean loss and the clipped sum over these units.

        Rows whose loss is not finite are left out of the loss. The loss is NaN if no row remains.
        """
        rows = [example for group in groups for example in group]
        owners = [index for index, group in enumerate(groups) for _ in group]
        total = ClippedSum.zero(self._parameters, bound)
        loss, tokens = 0.0, 0
        # The gradient of a unit that has more rows in the next stream.
        rest: Tensors = {}
        self._base.model.train(True)
        try:
            for stream in flat_streams(rows, *self.stream_limits()):
                check_cancelled()
                here, owners = owners[: stream.size], owners[stream.size :]
                by_row, by_unit = self.of_stream(stream, here)
                for name, part in rest.items():
                    by_unit[name][0] += part
                rest = cut_last(by_unit) if owners and owners[0] == here[-1] else {}
                # Clipping empties `by_unit`; the next stream makes another one.
                with stage(Stage.CLIP):
                    total.add(UnitGradients(by_unit, self._rule).clip(bound))
                finite = torch.isfinite(by_row)
                loss += float(by_row[finite].sum())
                tokens += int(stream.label_counts()[finite.cpu()].sum())
        finally:
            self._base.model.eval()
            for parameter in self._parameters.values():
                parameter.grad = None
        return (loss / tokens if tokens else math.nan), total

    def of_stream(self, stream: FlatStream, owners: list[int]) -> tuple[torch.Tensor, Tensors]:
        """Returns the summed loss of each row, and the gradients as float32 [U, ...] by name.

        The mean loss of each row over its own labeled tokens is differentiated. So neither the
        length of a row nor the other rows scale its gradient.
        """

        def backward() -> torch.Tensor:
            by_row = self._losses(stream)
            means = by_row / stream.label_counts().clamp(min=1).to(by_row)
            with stage(Stage.BACKWARD):
                means.sum().backward()  # type: ignore[no-untyped-call]
            return by_row.detach()

        # Without a recorder a stream has one row, whose gradient is that of its unit.
        if self.recorder is None:
            by_row = backward()
            taken = take_gradients(self._parameters)
            return by_row, {name: tensor[None] for name, tensor in taken.items()}
        bounds = unit_bounds(stream, owners)
        with self.recorder.recording(bounds) as captured:
            by_row = backward()
        for name, parameter in self._parameters.items():
            # The layer of a parameter that was not captured took no part.
            if name not in captured:
                shape = (len(bounds) - 1, *parameter.shape)
                captured[name] = torch.zeros(shape, device=parameter.device)
        return by_row, captured

    def stream_limits(self) -> tuple[int, int]:
        """Returns the limits of a micro-batch, (tokens, rows); 0 tokens means one row each."""
        if self.recorder is None:
            return 0, 1
        values = sum(parameter.numel() for parameter in self._parameters.values())
        rows = UNIT_GRADIENT_BYTES // (4 * values)
        return MAX_STREAM_TOKENS if self._base.flat else 0, max(1, rows)

    def _probed_recorder(self) -> Recorder | None:
        """Returns the fast path if its gradients on this model equal those of ordinary autograd.

        Returns None otherwise. Then the rows go one by one through ordinary autograd, which needs
        no rule for any layer and is exact for tied weights.
        """
        recorder = capture(self._base.model, self._parameters)
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            # B starts at zero, so the gradient of A would be zero.
            with torch.no_grad():
                for parameter in self._parameters.values():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            return recorder if recorder and self.captures_rightly(recorder) else None
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])
                    parameter.grad = None

    def captures_rightly(self, recorder: Recorder) -> bool:
        """Returns whether the recorder's gradients of several rows at once are correct.

        They are compared with the gradients that autograd computes for each row alone.
        """
        sizes = (5, 9, 3) if self._base.flat else (9,)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(self._base.vocab_size, (n,), generator=generator) for n in sizes]
        examples = [Example(row.numpy(), row.numpy()) for row in rows]
        before, self.recorder = self.recorder, recorder
        try:
            together = self.of_stream(flatten(examples), [*range(len(examples))])[1]
        except (RuntimeError, ValueError):
            return False
        finally:
            self.recorder = None
        alone = [self.of_stream(flatten([example]), [0])[1] for example in examples]
        self.recorder = before
        tolerance = 1e-3 if self._base.dtype == torch.float32 else 5e-2
        return all(
            (together[name][unit] - one[name][0]).norm() <= tolerance * one[name].norm() + 1e-12
            for unit, one in enumerate(alone)
            for name in one
        )


def cut_last(by_unit: Tensors) -> Tensors:
    """Removes and returns the last unit, which has more rows in the next stream."""
    last = {name: tensor[-1].clone() for name, tensor in by_unit.items()}
    by_unit.update({name: tensor[:-1] for name, tensor in by_unit.items()})
    return last


def unit_bounds(stream: FlatStream, owners: Sequence[int]) -> tuple[int, ...]:
    """Returns the U + 1 offsets of the units in a stream, given the owner of each row."""
    starts = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
    return (*(stream.bounds[i] for i in starts), stream.bounds[-1])
