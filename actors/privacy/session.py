"""Runs private training: the whole path from a batch to the weights. A reviewer reads it in order.

`forward_backward` clips the gradient of each unit and adds it to the accumulation window.
`optim_step` checks and charges the budget, adds noise once, and moves the weights. Gradients
without noise stay in this process. Losses, norms before and after clipping, clip counts, hashes and
warnings have no noise: they are for the data owner alone and lie outside the guarantee.

The docstrings of the other modules state what these modules guarantee: `units` (which rows count),
`unit_gradients` (the gradient of each unit), `clipping` (the bound and the noise), `poisson` (the
samples that the server draws), `tg_tinker.records.ledger` (the budget).
"""

from __future__ import annotations

import math
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from actors.engine.checkpoint import SessionState
from actors.engine.gradients import PrivateGradient, gradient_hash
from actors.engine.model import Base
from actors.engine.session import Session
from actors.engine.timing import Stage, stage
from actors.privacy.budget import Budget
from actors.privacy.clipping import ClippedSum, privatize
from actors.privacy.evaluation import HeldOut, clipped_sum, multiplier, released, units_of
from actors.privacy.gradient_probes import probe
from actors.privacy.known_units import OverlapWarnings
from actors.privacy.layers import refuse_mixing_layers
from actors.privacy.noise import standard_normal
from actors.privacy.poisson import PoissonDraws
from actors.privacy.unit_gradients import UnitBackward
from actors.privacy.units import SharedContents, Window
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.data.hashing import resolve_batch_hash
from tg_tinker.errors import DPBudgetExceededError, TGTinkerError
from tg_tinker.records.entries import POISSON
from tg_tinker.records.report import Charge
from tg_tinker.types import DPMetrics, ForwardBackwardResult, OptimStepResult, PrivateEvalResult

_MIN_STEPS_TO_JUDGE = 3


class PrivateSession(Session):
    """A session under differential privacy. `docs/privacy.md` states the guarantee."""

    # No argument and no setting replaces the noise.
    _noise = staticmethod(standard_normal)

    def __init__(self, base: Base, config: TrainingConfig, budget: Budget) -> None:
        refuse_mixing_layers(base.model)
        self.dp = config.dp_config or DPConfig()
        self.budget = budget
        self.poisson = PoissonDraws(budget, config)
        self._overlaps = OverlapWarnings(budget)
        self._releasing = False
        self._rows_per_step: list[int] = []
        self._shared = SharedContents()
        # An upper bound of the charged units of the dataset; None once the owner was warned.
        self._units_at_most: float | None = math.inf
        super().__init__(base, config)
        self._divisor = config.batch_size * config.gradient_accumulation_steps
        self.unit_backward = UnitBackward(base, self._parameters, self._losses, self.dp.clipping)
        probe(self.unit_backward, self.recomputation)
        budget.open()

    @property
    def pending(self) -> bool:
        return self._pending.rows > 0 or self._spoiled

    @property
    def broken(self) -> bool:
        """Whether a step failed after its charge, or the session is broken as in `Session`."""
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
        """Returns the loss of a batch; in train mode, adds its clipped gradients to the window.

        A row that cannot count, or may not count, adds zero and is reported. It never raises an
        error, so that a row can change the result only through its gradient. The loss covers the
        rows that count.

        Raises:
            DPBudgetExceededError: no step is left, or none of these units may be used again.
            InvalidRequestError: the call has the wrong shape; nothing was added.
        """
        if not train:
            result = super().forward_backward(examples, train=False, batch_hash=batch_hash)
            return self._shown(result)
        started = time.perf_counter()
        try:
            with stage(Stage.HASH):
                digest = resolve_batch_hash(examples, batch_hash)
            units = self.budget.units_of(examples)
            at_limit = self.budget.admit(units)
            overlaps = self._overlaps.of(examples)
            groups, taken, skipped = self._pending.admit(
                examples, units, at_limit, self.base.vocab_size, self.base.context_length,
                whole_units=self.budget.unit == "id",
            )  # fmt: skip
            self._seed_dropout()
            loss, total = self.unit_backward.clipped_sum(
                groups, self.dp.max_grad_norm, check_cancelled
            )
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
        self._pending.sent |= set(units)
        self._pending.rows += len(examples)
        self._pending.calls.append((digest, fingerprint))
        skipped["gradient not finite"] += int(total.non_finite)
        return self._shown(
            ForwardBackwardResult(
                loss=loss,
                batch_hash=digest,
                gradient_hash=fingerprint,
                num_tokens=sum(len(example.input_ids) for example in examples),
                latency_ms=1e3 * (time.perf_counter() - started),
                warnings=(
                    *_explain(skipped, len(examples)),
                    *self._judge_contents(examples, units),
                    *overlaps,
                ),
            )
        )

    def optim_step(self, apply_dp_noise: bool = True) -> OptimStepResult:
        """Makes one private step: check, charge, noise, weights. The guarantee needs this order.

        Raises:
            DPBudgetExceededError: the budget cannot pay. Weights, optimizer, ledger and step are
                unchanged.
            WindowSpoiledError, InvalidRequestError: the step is refused for the reason in the
                message. Weights, optimizer, ledger and step are unchanged.
        After any error the window is empty.
        """
        started = time.perf_counter()
        window, spoiled, refusal = self._pending, self._spoiled, self._refusal
        self._open_window()
        try:
            self._refuse_step(window, spoiled, refusal)
            with stage(Stage.CHARGE):
                charge = self._charged(window, apply_dp_noise)
            norm, rate = self._release(window, charge)
        finally:
            window.total.wipe()
        shown = self.dp.show_private_metrics or not self._sampled
        return OptimStepResult(
            grad_norm=norm,
            learning_rate=rate,
            step=self.step,
            dp_metrics=self._metrics(window, charge),
            latency_ms=1e3 * (time.perf_counter() - started) if shown else math.nan,
            warnings=(self._judge_batch_size(window) if shown else ())
            + self._judge_delta(window, charge),
        )

    def _charged(self, window: Window, noised: bool) -> Charge:
        """Returns the durable charge of the step. Under `poisson` it uses the draw up."""
        draw = self.poisson.check(window.sent) if self.dp.sampling == "poisson" else None
        return self.budget.charge(window.units, window.calls, noised=noised, draw=draw)

    def _release(self, window: Window, charge: Charge) -> tuple[float, float]:
        """Adds noise to the whole sum, then moves the weights; returns norm and learning rate.

        A failure in between ends the session: a second draw of noise for the same sum would be a
        second release without a charge.
        """
        self._releasing = True
        with stage(Stage.NOISE):
            gradient: PrivateGradient = privatize(
                window.total, sigma=charge.spend(), divisor=self._divisor, noise=self._noise
            )
        norm, rate = self._move(gradient)
        self.lineage = self.lineage.charged(charge.dataset, charge.place)
        if not charge.noised:
            self.lineage = self.lineage.unguarded()
        self._releasing = False
        return norm, rate

    # --- evaluation ----------------------------------------------------------------------------

    def private_eval(
        self,
        examples: Sequence[Example],
        held_out: HeldOut,
        std: float,
        num_units: int | None = None,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> PrivateEvalResult:
        """Releases the held-out loss with noise: losses, charge, noise; see `evaluation`.

        A failure after the charge releases nothing. A repeat of the call is charged again.

        Raises:
            DPBudgetExceededError: the held-out dataset cannot pay; nothing was charged.
            InvalidRequestError: the call has the wrong shape, or the run trains all weights;
                nothing was charged.
        """
        units = units_of(held_out, examples, self._pending.units, self)
        count = num_units or units.count
        sigma = multiplier(std, count)
        admitted = held_out.admitted(units.fresh, sigma)
        counting = [units.rows.pop(unit, []) for unit in admitted]
        units.skipped["use limit reached"] += sum(map(len, units.rows.values()))
        total = clipped_sum(self, counting, check_cancelled)
        check_cancelled()
        # Whoever chooses by this value brings the held-out units into the weights of this run.
        self.budget.link([held_out.dataset])
        charge = held_out.charge(admitted, sigma)
        value = released(total, charge, count, self._noise)
        self.lineage = self.lineage.evaluated(held_out.dataset, charge.place)
        shown = self.dp.show_private_metrics
        return PrivateEvalResult(
            value=value,
            std=std,
            num_units=count,
            dataset_id=held_out.dataset,
            epsilon_before=charge.total_epsilon - charge.epsilon_spent,
            epsilon_after=charge.total_epsilon,
            delta=charge.delta,
            warnings=_explain(units.skipped, len(examples), "mean") if shown else (),
        )

    # --- state -------------------------------------------------------------------------------

    def load(self, state: SessionState) -> tuple[str, ...]:
        """Loads a state as in `Session`; refuses a state without a guarantee unless it is allowed.

        Raises:
            LineageError: see `Lineage.refuse_unguarded`.
        """
        self.check_fits(state)
        # The link is on record before any weight changes.
        self.budget.link(state.lineage.ledgers)
        self._pending.total.wipe()
        warnings = super().load(state)
        if self.lineage.guarantee == "none":
            warnings += ("these weights have no privacy guarantee, so this run will have none",)
        return warnings

    def check_fits(self, state: SessionState) -> None:
        state.lineage.refuse_unguarded(self.dp.allow_nonprivate_init)
        super().check_fits(state)

    # --- inside ------------------------------------------------------------------------------

    def _seed_dropout(self) -> None:
        """Seeds torch from new entropy for each call; the seed is never stored.

        The dropout masks of a stream follow one another, so an additional row shifts the masks of
        all rows behind it. With known masks, the bound on the effect of one row would not hold.
        """
        torch.manual_seed(secrets.randbits(63))

    def _open_window(self) -> None:
        super()._open_window()
        self._pending = Window(ClippedSum.zero(self._parameters, self.dp.max_grad_norm))
        self._refusal: DPBudgetExceededError | None = None

    def _drop(self, refusal: DPBudgetExceededError) -> None:
        """Wipes the window. An `optim_step` that is already queued raises the same refusal."""
        self._pending.total.wipe()
        self._open_window()
        self._refusal = refusal

    def _refuse_step(
        self, window: Window, spoiled: bool, refusal: DPBudgetExceededError | None
    ) -> None:
        self._refuse(spoiled)
        if refusal is not None:
            raise refusal

    def _metrics(self, window: Window, charge: Charge) -> DPMetrics:
        """Returns the metrics of a step, with medians of the norms over its units.

        The medians are NaN if the step has no units or the metrics are hidden.
        """
        total = window.total
        before, after = total.norms_before.tolist(), total.norms_after.tolist()
        shown = self.dp.show_private_metrics and bool(before)
        return DPMetrics(
            noise_applied=charge.noised,
            epsilon_spent=charge.epsilon_spent,
            total_epsilon=charge.total_epsilon,
            delta=charge.delta,
            grad_norm_before_clip=statistics.median(before) if shown else math.nan,
            grad_norm_after_clip=statistics.median(after) if shown else math.nan,
            num_clipped=total.num_clipped if self.dp.show_private_metrics else 0,
        )

    def _shown(self, result: ForwardBackwardResult) -> ForwardBackwardResult:
        if self.dp.show_private_metrics:
            return result
        hidden = replace(result, loss=math.nan, gradient_hash="", warnings=())
        # Sizes and times tell which units were drawn, and the accounting of samples needs that
        # nobody knows them.
        return replace(hidden, num_tokens=0, latency_ms=math.nan) if self._sampled else hidden

    @property
    def _sampled(self) -> bool:
        return self.dp.sampling in POISSON

    def _judge_delta(self, window: Window, charge: Charge) -> tuple[str, ...]:
        """Warns once, when so many units are charged that delta x units is 1 or more.

        A stated `dataset_size` was checked when the client was created.
        """
        if self.dp.dataset_size is not None or self._units_at_most is None:
            return ()
        self._units_at_most += len(window.units)
        if charge.delta * self._units_at_most < 1:
            return ()
        # The step is made: a registry that does not answer must not lose its result.
        with suppress(TGTinkerError):
            self._units_at_most = units = self.budget.counted_units()
            if charge.delta * units >= 1:
                self._units_at_most = None
                return (
                    f"{units} units were charged, and delta {charge.delta:g} x {units} is"
                    f" {charge.delta * units:.3g}: from 1 on, delta allows the data of whole units"
                    " to leak, and the certificate says so. Register the dataset, under another"
                    f" dataset_id, with a delta far below {1 / units:.2g}",
                )
        return ()

    def _judge_contents(
        self, examples: Sequence[Example], units: Sequence[bytes]
    ) -> tuple[str, ...]:
        """Warns of rows that belong to several ids, where the unit is one example."""
        shared = 0 if self.budget.unit == "id" else self._shared.count(examples, units)
        if not shared:
            return ()
        return (
            f"{shared} of {len(examples)} rows have the tokens of earlier rows with another id:"
            ' under unit="example" they are one unit, so each of these people alone is protected'
            " less than the unit; see docs/privacy.md",
        )

    def _judge_batch_size(self, window: Window) -> tuple[str, ...]:
        """Warns of a step without rows, and once if the divisor is far from the rows of a step."""
        if not window.rows and self.dp.sampling != "poisson":
            return ("this step had no rows: it moved the weights by noise alone",)
        self._rows_per_step.append(window.rows)
        if len(self._rows_per_step) != _MIN_STEPS_TO_JUDGE:
            return ()
        median = statistics.median(self._rows_per_step)
        if self._divisor / 2 <= median <= 2 * self._divisor:
            return ()
        return (
            f"a step has {median:g} rows (median of {_MIN_STEPS_TO_JUDGE}), but batch_size x"
            f" gradient_accumulation_steps is {self._divisor}. Gradients are divided by the latter,"
            " so the noise is not scaled to your batches: set batch_size to the rows of a step",
        )


def _explain(skipped: Counter[str], rows: int, to: str = "gradient") -> tuple[str, ...]:
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    if not told:
        return ()
    return (f"{skipped.total()} of {rows} rows added nothing to the {to}: {told}",)
