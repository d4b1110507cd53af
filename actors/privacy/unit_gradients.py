"""Runs the backward passes of a private run, one gradient per unit, and makes their clipped sum.

Rows travel in streams. The gradient of a unit is clipped once it includes all rows of the unit.
`capture` has the fast path that separates units; `gradient_probes` tests it on each model.
`clipping` bounds what a unit adds. `session` decides which rows are passed, and what happens to the
sum.

Legend: U units of a stream, each one example or all rows of one id; S rows of a stream; P trainable
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from actors.engine.batching import FlatStream, flat_streams
from actors.engine.gradients import by_name
from actors.engine.model import Base
from actors.engine.session import MAX_STREAM_TOKENS
from actors.engine.timing import Stage, stage
from actors.privacy.capture import Capture, capture
from actors.privacy.clipping import ClippedSum, Rule, UnitGradients
from actors.privacy.layers import adapter_dropout
from tg_tinker.data.batch import Example

UNIT_GRADIENT_BYTES = 256 * 2**20
"""Bytes of per-unit gradients in memory at a time: this bounds the rows of a micro-batch."""


class UnitBackward:
    """The backward passes of one model that trains privately.

    Args:
        parameters: all trainable parameters, by name.
        losses: returns float32 [S] to differentiate: the summed loss of each row of a stream.
        rule: how the gradient of a unit is bounded; see `UnitGradients.clip_into`.

    Attributes:
        capture: the fast path; None where rows go one by one through ordinary autograd, which
            needs no rule for any layer and is exact for tied weights.
        slow_because: why there is no fast path; empty where there is one.
    """

    def __init__(
        self,
        base: Base,
        parameters: Mapping[str, torch.nn.Parameter],
        losses: Callable[[FlatStream], torch.Tensor],
        rule: Rule = "flat",
    ) -> None:
        self.base = base
        self.parameters = parameters
        self.losses = losses
        self._rule = rule
        self.capture: Capture | None = capture(base.model, parameters)
        self.slow_because = "" if self.capture else "it trains more than matrices of an adapter"

    @property
    def path(self) -> str:
        """How the gradients of units are computed: ``fast`` or ``row by row``."""
        return "fast" if self.capture else "row by row"

    def clipped_sum(
        self, groups: list[list[Example]], bound: float, check_cancelled: Callable[[], None]
    ) -> tuple[float, ClippedSum]:
        """Returns the token-weighted mean loss and the clipped sum over these units.

        Rows whose loss is not finite are left out of the loss. The loss is NaN if no row remains.
        """
        rows = [example for group in groups for example in group]
        owners = [index for index, group in enumerate(groups) for _ in group]
        total = ClippedSum.zero(self.parameters, bound)
        # They stay on the device: to read one would wait for the micro-batch.
        loss = torch.zeros((), dtype=torch.float64, device=self.base.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.base.device)
        # The gradient of a unit that has more rows in the next stream.
        rest: torch.Tensor | None = None
        try:
            with adapter_dropout(self.base.model):
                for stream in flat_streams(rows, *self.stream_limits()):
                    check_cancelled()
                    here, owners = owners[: stream.size], owners[stream.size :]
                    by_row, by_unit = self.of_stream(stream, here)
                    if rest is not None:
                        by_unit[0] += rest
                    goes_on = bool(owners) and owners[0] == here[-1]
                    by_unit, rest = cut_last(by_unit) if goes_on else (by_unit, None)
                    with stage(Stage.CLIP):
                        UnitGradients(by_unit, self._rule).clip_into(total)
                    del by_unit  # before the next stream makes others
                    finite = torch.isfinite(by_row)
                    counts = stream.label_counts().to(by_row.device)
                    loss += torch.where(finite, by_row, 0.0).sum()
                    tokens += torch.where(finite, counts, 0).sum()
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None
        labeled = int(tokens)
        return (float(loss) / labeled if labeled else math.nan), total

    def of_stream(self, stream: FlatStream, owners: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the summed loss of each row, and the gradients of the units: float32 [U, P].

        The mean loss of each row over its own labeled tokens is differentiated. So neither the
        length of a row nor the other rows scale its gradient.
        """

        def backward() -> torch.Tensor:
            by_row = self.losses(stream)
            means = by_row / stream.label_counts().clamp(min=1).to(by_row)
            with stage(Stage.BACKWARD):
                means.sum().backward()  # type: ignore[no-untyped-call]
            return by_row.detach()

        # Without a capture a stream has one row, whose gradient is that of its unit.
        if self.capture is None:
            return backward(), self._taken()
        with self.capture.units(unit_bounds(stream, owners), self.base.device) as captured:
            by_row = backward()
        return by_row, captured

    def _taken(self) -> torch.Tensor:
        """Returns the gradient of the parameters as float32 [1, P], and removes it from them.

        A parameter that took no part has a gradient of zeros.
        """
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        values = sum(shape.numel() for shape in shapes.values())
        taken = torch.empty(1, values, device=self.base.device)
        for name, into in by_name(taken[0], shapes).items():
            parameter = self.parameters[name]
            into.zero_() if parameter.grad is None else into.copy_(parameter.grad)
            parameter.grad = None
        return taken

    def stream_limits(self) -> tuple[int, int]:
        """Returns the limits of a micro-batch, (tokens, rows); 0 tokens means one row each."""
        if self.capture is None:
            return 0, 1
        values = sum(parameter.numel() for parameter in self.parameters.values())
        rows = UNIT_GRADIENT_BYTES // (4 * values)
        return MAX_STREAM_TOKENS if self.base.flat else 0, max(1, rows)


def cut_last(by_unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients without the last unit, which goes on in the next stream, and a copy of
    the last."""
    return by_unit[:-1], by_unit[-1].clone()


def unit_bounds(stream: FlatStream, owners: Sequence[int]) -> tuple[int, ...]:
    """Returns the U + 1 offsets of the units in a stream, given the owner of each row."""
    starts = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
    return (*(stream.bounds[i] for i in starts), stream.bounds[-1])
