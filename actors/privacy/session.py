"""A private run: the whole way from a batch to a weight, for a reviewer to read in order.

`forward_backward` clips each unit's gradient and adds it to the window. `optim_step` checks and
charges the budget, adds noise once, and moves the weights. Everything before the noise stays in
this process. What the other modules guarantee is in their docstrings: `units` (who counts),
`clipping` (the bound, the noise), `tg_tinker.records.ledger` (the budget).
"""

from __future__ import annotations

import math
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from actors.engine.batching import FlatStream, flat_streams, flatten
from actors.engine.checkpoint import SessionState
from actors.engine.gradients import PrivateGradient, Tensors, gradient_hash
from actors.engine.model import Base
from actors.engine.session import MAX_STREAM_TOKENS, Session
from actors.engine.timing import Stage, stage
from actors.privacy.capture import Recorder, capture
from actors.privacy.clipping import ClippedSum, UnitGradients, privatise
from actors.privacy.layers import refuse_mixing_layers, silence_dropout
from actors.privacy.noise import standard_normal
from actors.privacy.poisson import PoissonSampler
from actors.privacy.units import Window, unit_ids
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.data.hashing import resolve_batch_hash
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError
from tg_tinker.records.report import Charge
from tg_tinker.types import DPMetrics, ForwardBackwardResult, OptimStepResult

if TYPE_CHECKING:
    from actors.privacy.budget import Budget

UNIT_GRADIENT_BYTES = 256 * 2**20
"""Per-unit gradients held at a time: bounds the rows of a micro-batch."""

_MIN_STEPS_TO_JUDGE = 3


class PrivateSession(Session):
    """A session under differential privacy; see `docs/privacy.md` for what that promises."""

    _noise = staticmethod(standard_normal)  # no argument or setting replaces it

    def __init__(self, base: Base, config: TrainingConfig, budget: Budget) -> None:
        refuse_mixing_layers(base.model)
        silence_dropout(base.model)
        self.dp = config.dp_config or DPConfig()
        self.budget = budget
        self._releasing = False
        self._sampler: PoissonSampler | None = None
        self._rows_per_step: list[int] = []
        super().__init__(base, config)
        self._divisor = config.batch_size * config.gradient_accumulation_steps
        self._recorder = self._probed_recorder()
        budget.open()

    @property
    def pending(self) -> bool:
        paid = self._sampler is not None and self._sampler.paid
        return self._pending.rows > 0 or self._spoiled or paid

    @property
    def broken(self) -> bool:
        """A step was charged and then failed, or as in `Session`."""
        return self._releasing or super().broken

    # --- the step ----------------------------------------------------------------------------

    def forward_backward(
        self,
        examples: Sequence[Example],
        *,
        train: bool = True,
        batch_hash: str | None = None,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> ForwardBackwardResult:
        """Loss of a batch and, in train mode, its clipped per-unit gradients in the window.

        A row that cannot or may not count adds zero and is reported; it never raises, so that
        one row can change the result by its gradient only. The loss is over the rows that count.

        Raises:
            DPBudgetExceededError: no step, or no use of any of these units, is left.
            InvalidRequestError: the call has the wrong shape; nothing was added.
        """
        if not train:
            result = super().forward_backward(examples, train=False, batch_hash=batch_hash)
            return self._shown(result)
        started = time.perf_counter()
        try:
            with stage(Stage.HASH):
                digest = resolve_batch_hash(examples, batch_hash)
            units = unit_ids(self.budget.key, examples, self.dp.unit)
            paid = self._sampler is not None and self._sampler.paid
            at_limit = set() if paid else self.budget.admit(units)
            groups, taken, skipped = self._pending.admit(
                examples, units, at_limit, self.base.vocab_size, self.base.context_length,
                whole_units=self.dp.unit == "id",
            )  # fmt: skip
            self._seed_dropout()
            loss, total = self._clipped_sum(groups, check_cancelled)
            with stage(Stage.HASH):
                fingerprint = gradient_hash(total.sums)
        except DPBudgetExceededError as refusal:
            self._drop(refusal)
            raise
        except BaseException:
            self._spoiled = True
            raise
        self._pending.total.add(total)
        total.wipe()
        self._pending.units |= taken
        self._pending.rows += len(examples)
        self._pending.calls.append((digest, fingerprint))
        skipped["gradient not finite"] += total.non_finite
        return self._shown(
            ForwardBackwardResult(
                loss=loss,
                batch_hash=digest,
                gradient_hash=fingerprint,
                num_tokens=sum(len(example.input_ids) for example in examples),
                latency_ms=1e3 * (time.perf_counter() - started),
                warnings=_explain(skipped, len(examples)),
            )
        )

    def optim_step(self, apply_dp_noise: bool = True) -> OptimStepResult:
        """One private step. Its order is the guarantee.

        Raises:
            DPBudgetExceededError: the budget cannot pay; weights, optimizer, ledger and step
                are as they were.
            WindowSpoiledError, InvalidRequestError: the same, see the message.
        Whatever is raised, the window is empty afterwards.
        """
        started = time.perf_counter()
        window, spoiled, refusal = self._pending, self._spoiled, self._refusal
        self._open_window()
        try:
            self._refuse_step(window, spoiled, refusal)
            with stage(Stage.CHARGE):
                charge = self._charged(window, apply_dp_noise)  # durable when it returns
            norm, rate = self._release(window, charge)
        finally:
            window.total.wipe()
        return OptimStepResult(
            grad_norm=norm,
            learning_rate=rate,
            step=self.step,
            dp_metrics=self._metrics(window, charge),
            latency_ms=1e3 * (time.perf_counter() - started),
            warnings=self._judge_batch_size(window),
        )

    def _charged(self, window: Window, noised: bool) -> Charge:
        """The step's charge: of its rows now, or that of the sample the server drew for it."""
        if self._sampler is None:
            return self.budget.charge(window.units, window.calls, noised=noised)
        if noised:
            return self._sampler.use()
        charge = self.budget.charge(window.units, window.calls, noised=False)
        self._sampler.use()
        return charge

    def _release(self, window: Window, charge: Charge) -> tuple[float, float]:
        """Noise on the whole sum, then the weights. A failure in between ends the session:
        a second draw for the same sum would be a second, uncharged release."""
        self._releasing = True
        with stage(Stage.NOISE):
            gradient: PrivateGradient = privatise(
                window.total, sigma=charge.spend(), divisor=self._divisor, noise=self._noise
            )
        norm, rate = self._move(gradient)
        self.lineage = self.lineage.charged(charge.dataset, charge.place)
        if not charge.noised:
            self.lineage = self.lineage.unguarded()
        self._releasing = False
        return norm, rate

    # --- Poisson samples -----------------------------------------------------------------------

    def register_units(self, examples: Sequence[Example]) -> list[list[int]]:
        """Takes the data set that later samples are drawn from; the rows of each of its units.

        Raises:
            InvalidRequestError: another contract, not `dataset_size` distinct units, or other
                units while a draw is open.
        """
        if self.dp.sampling != "poisson":
            raise InvalidRequestError(
                f"the contract of this run is {self.dp.sampling!r}: samples are drawn under"
                ' DPConfig(sampling="poisson") only'
            )
        rows: dict[bytes, list[int]] = {}
        for index, unit in enumerate(unit_ids(self.budget.key, examples, self.dp.unit)):
            if self.dp.unit == "id" or unit not in rows:  # a repeated example would add zero
                rows.setdefault(unit, []).append(index)
        if len(rows) != self.dp.dataset_size:
            raise InvalidRequestError(
                f"the data set has {len(rows)} distinct units in {len(examples)} rows,"
                f" DPConfig(dataset_size={self.dp.dataset_size}) was agreed: they must be equal",
                details={"units": len(rows), "rows": len(examples)},
            )
        if self._sampler is None or not self._sampler.draws_from(list(rows)):
            self._sampler = PoissonSampler(list(rows), self._divisor / len(rows))
        return list(rows.values())

    def draw_units(self) -> list[int]:
        """The units of the next step, as indices into what `register_units` returned.

        Paid before they are told: a sample that is thrown away to get another costs a step.

        Raises:
            DPBudgetExceededError: the budget pays for no further sample.
        """
        if self._sampler is None:
            raise InvalidRequestError("register a data set first: use tc.poisson_batches(dataset)")
        if self.completed:
            raise DPBudgetExceededError(
                f"no step is left: all {self.step} that were planned are made. sample and"
                " save_state still work"
            )
        return self._sampler.draw(self._pay)

    def _pay(self, units: list[bytes]) -> Charge:
        self.budget.admit([])
        return self.budget.charge(units, noised=True)

    # --- state -------------------------------------------------------------------------------

    def load(self, state: SessionState) -> tuple[str, ...]:
        """As in any session; what was trained without privacy is refused unless allowed.

        Raises:
            LineageError: see `Lineage.refuse_unguarded`.
        """
        self.check_fits(state)
        self.budget.link(state.lineage.ledgers)  # on record before any weight changes
        self._pending.total.wipe()
        warnings = super().load(state)
        if self.lineage.guarantee == "none":
            warnings += ("these weights have no privacy guarantee, and nor will this run's",)
        return warnings

    def check_fits(self, state: SessionState) -> None:
        state.lineage.refuse_unguarded(self.dp.allow_nonprivate_init)
        super().check_fits(state)

    # --- inside ------------------------------------------------------------------------------

    def _seed_dropout(self) -> None:
        """Afresh for each call and never stored. The masks of a stream follow one another, so a
        row more shifts those of all behind it: known masks would void the bound of one row."""
        torch.manual_seed(secrets.randbits(63))

    def _clipped_sum(
        self, groups: list[list[Example]], check_cancelled: Callable[[], None]
    ) -> tuple[float, ClippedSum]:
        """Token-mean loss (NaN without a finite row) and the sum over these units."""
        rows = [example for group in groups for example in group]
        owners = [index for index, group in enumerate(groups) for _ in group]
        total = ClippedSum.zero(self._parameters, self.dp.max_grad_norm)
        loss, tokens = 0.0, 0
        rest: Tensors = {}  # of a unit whose rows go on in the next stream
        self.base.model.train(True)
        try:
            for stream in flat_streams(rows, *self._stream_limits()):
                check_cancelled()
                here, owners = owners[: stream.size], owners[stream.size :]
                by_row, by_unit = self._unit_gradients(stream, here)
                for name, part in rest.items():
                    by_unit[name][0] += part
                rest = _cut_last(by_unit) if owners and owners[0] == here[-1] else {}
                with stage(Stage.CLIP):  # empties `by_unit`: the next stream makes its own
                    total.add(UnitGradients(by_unit).clip(self.dp.max_grad_norm))
                finite = torch.isfinite(by_row)
                loss += float(by_row[finite].sum())
                tokens += int(stream.label_counts()[finite.cpu()].sum())
        finally:
            self.base.model.eval()
            for parameter in self._parameters.values():
                parameter.grad = None
        return (loss / tokens if tokens else math.nan), total

    def _unit_gradients(
        self, stream: FlatStream, owners: list[int]
    ) -> tuple[torch.Tensor, Tensors]:
        """Summed loss of each row, and float32 [U, ...] by name.

        Differentiated is each row's mean over its own tokens, so that neither its length nor
        its neighbours scale it.
        """

        def backward() -> torch.Tensor:
            by_row = self._losses(stream)
            means = by_row / stream.label_counts().clamp(min=1).to(by_row)
            with stage(Stage.BACKWARD):
                means.sum().backward()  # type: ignore[no-untyped-call]
            return by_row.detach()

        if self._recorder is None:  # a stream of one row: its gradient is the unit's
            by_row = backward()
            return by_row, {name: tensor[None] for name, tensor in self._take_gradients().items()}
        bounds = unit_bounds(stream, owners)
        with self._recorder.recording(bounds) as captured:
            by_row = backward()
        for name, parameter in self._parameters.items():
            if name not in captured:  # its layer took no part
                shape = (len(bounds) - 1, *parameter.shape)
                captured[name] = torch.zeros(shape, device=parameter.device)
        return by_row, captured

    def _stream_limits(self) -> tuple[int, int]:
        """(tokens, rows) of a micro-batch; 0 tokens are one row each."""
        if self._recorder is None:
            return 0, 1
        rows = UNIT_GRADIENT_BYTES // (4 * self.num_trainable)
        return MAX_STREAM_TOKENS if self.base.flat else 0, max(1, rows)

    def _probed_recorder(self) -> Recorder | None:
        """The fast way, if it finds on this model what ordinary autograd finds row by row.

        None for any other trainable set, whose rows go one by one through ordinary autograd:
        no rule can be missing there, and tied weights are exact.
        """
        recorder = capture(self.base.model, self._parameters)
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            with torch.no_grad():  # B starts at zero, which would hide every gradient of A
                for parameter in self._parameters.values():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            return recorder if recorder and self._captures_rightly(recorder) else None
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])
                    parameter.grad = None

    def _captures_rightly(self, recorder: Recorder) -> bool:
        sizes = (5, 9, 3) if self.base.flat else (9,)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(self.base.vocab_size, (n,), generator=generator) for n in sizes]
        examples = [Example(row.numpy(), row.numpy()) for row in rows]
        self._recorder = recorder
        try:
            together = self._unit_gradients(flatten(examples), [*range(len(examples))])[1]
        except (RuntimeError, ValueError):
            return False
        self._recorder = None
        alone = [self._unit_gradients(flatten([example]), [0])[1] for example in examples]
        tolerance = 1e-3 if self.base.dtype == torch.float32 else 5e-2
        return all(
            (together[name][unit] - one[name][0]).norm() <= tolerance * one[name].norm() + 1e-12
            for unit, one in enumerate(alone)
            for name in one
        )

    def _open_window(self) -> None:
        super()._open_window()
        self._pending = Window(ClippedSum.zero(self._parameters, self.dp.max_grad_norm))
        self._refusal: DPBudgetExceededError | None = None

    def _drop(self, refusal: DPBudgetExceededError) -> None:
        """Wipes the window; the `optim_step` that is already queued gets the same refusal."""
        self._pending.total.wipe()
        self._open_window()
        self._refusal = refusal

    def _refuse_step(
        self, window: Window, spoiled: bool, refusal: DPBudgetExceededError | None
    ) -> None:
        self._refuse(spoiled)
        if refusal is not None:
            raise refusal
        if self.dp.sampling == "poisson":
            if self._sampler is None:
                raise InvalidRequestError(
                    "under Poisson sampling the server draws each step: take the batches from"
                    " tc.poisson_batches(dataset)"
                )
            self._sampler.check(window.units)

    def _metrics(self, window: Window, charge: Charge) -> DPMetrics:
        """Medians over the units of the step; NaN for a step without units, or where hidden."""
        total = window.total
        shown = self.dp.show_private_metrics and bool(total.norms_before)
        return DPMetrics(
            noise_applied=charge.noised,
            epsilon_spent=charge.epsilon_spent,
            total_epsilon=charge.total_epsilon,
            delta=charge.delta,
            grad_norm_before_clip=statistics.median(total.norms_before) if shown else math.nan,
            grad_norm_after_clip=statistics.median(total.norms_after) if shown else math.nan,
            num_clipped=total.num_clipped if self.dp.show_private_metrics else 0,
        )

    def _shown(self, result: ForwardBackwardResult) -> ForwardBackwardResult:
        if self.dp.show_private_metrics:
            return result
        return replace(result, loss=math.nan, gradient_hash="", warnings=())

    def _judge_batch_size(self, window: Window) -> tuple[str, ...]:
        """Says that a step had no rows, and once that the divisor is far from those that come."""
        if not window.rows and self.dp.sampling != "poisson":
            return ("no rows came for this step: it moved the weights by noise alone",)
        self._rows_per_step.append(window.rows)
        if len(self._rows_per_step) != _MIN_STEPS_TO_JUDGE:
            return ()
        median = statistics.median(self._rows_per_step)
        if self._divisor / 2 <= median <= 2 * self._divisor:
            return ()
        return (
            f"a step has {median:g} rows (median of {_MIN_STEPS_TO_JUDGE}), batch_size x"
            f" gradient_accumulation_steps is {self._divisor}: gradients are divided by the latter,"
            " so the noise is not scaled to your batches. Set batch_size to the rows of a step",
        )


def _cut_last(by_unit: Tensors) -> Tensors:
    """Takes away the last unit, whose rows go on in the next stream."""
    last = {name: tensor[-1].clone() for name, tensor in by_unit.items()}
    by_unit.update({name: tensor[:-1] for name, tensor in by_unit.items()})
    return last


def unit_bounds(stream: FlatStream, owners: Sequence[int]) -> tuple[int, ...]:
    """U + 1 offsets of the units of a stream whose rows have these owners, row by row."""
    starts = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
    return (*(stream.bounds[i] for i in starts), stream.bounds[-1])


def _explain(skipped: Counter[str], rows: int) -> tuple[str, ...]:
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    if not told:
        return ()
    return (f"{skipped.total()} of {rows} rows added nothing to the gradient: {told}",)
