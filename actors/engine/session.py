"""Runs one training run on one base model: the main path, without Ray.

    base = Base.load("path/to/model", cache=Path("cache"))
    session = Session(base, TrainingConfig(model_ref="path/to/model", lora_config=LoRAConfig()))
    session.forward_backward(examples)
    session.optim_step()

`forward_backward` adds a gradient to the accumulation window, and `optim_step` consumes the window.
A session holds no other pending state. An artifact is the state after the last `optim_step`, so the
window is never part of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from actors.engine.averages import Averages
from actors.engine.batching import FlatStream, flat_streams
from actors.engine.checkpoint import SessionState
from actors.engine.gradients import (
    GradientSum,
    MeanGradient,
    PrivateGradient,
    Tensors,
    gradient_hash,
    take_gradients,
)
from actors.engine.lineage import Lineage
from actors.engine.lora import make_trainable
from actors.engine.losses import sums_by_example
from actors.engine.matmul import library
from actors.engine.model import Base, labeled_losses
from actors.engine.optim import Optimizer, kind, learning_rate
from actors.engine.recompute import Recomputation
from actors.engine.timing import Stage, stage
from tg_tinker.config import AverageKind, TrainingConfig
from tg_tinker.data.batch import Example, check_bounds
from tg_tinker.data.hashing import resolve_batch_hash
from tg_tinker.errors import (
    ArtifactMismatchError,
    InvalidRequestError,
    NonFiniteError,
    WindowSpoiledError,
)
from tg_tinker.types import ForwardBackwardResult, OptimStepResult

MAX_STREAM_TOKENS = 1024
"""The maximum tokens of one micro-batch, which bounds the memory of activations.

A longer row keeps few activations and computes the others again in the backward pass."""


FILES = "files"
"""The part of a geometry with the digests of the base model's kinds of files. The states of older
versions do not have it."""


class Session:
    """The adapter, optimizer, accumulation window and counters of one run."""

    def __init__(self, base: Base, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)  # first weights of the adapter
        self.base = base
        self.config = config
        self.step = 0
        self._trainable = make_trainable(base, config.lora_config)
        self._parameters = self._trainable.moved
        base.model.eval()  # fresh adapter layers start in train mode
        always = config.resources.activation_checkpointing
        self.recomputation = Recomputation(base.model, always)
        # Of an adapter, the trained values that the base model has too: its biases.
        self._base_values = {
            name: parameter.detach().clone()
            for name, parameter in self._parameters.items()
            if config.lora_config is not None and ".lora_" not in name
        }
        self._optimizer = Optimizer(config.optimizer, self._parameters)
        self._averages = Averages(config.optimizer, self._parameters)
        self.lineage = Lineage(base.digest)
        self._open_window()

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def pending(self) -> bool:
        """Whether the window holds examples or is spoiled, which no artifact records."""
        return self._window.count > 0 or self._spoiled

    @property
    def completed(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.step >= limit

    # --- the step ----------------------------------------------------------------------------

    def forward_backward(
        self,
        examples: Sequence[Example],
        *,
        train: bool = True,
        batch_hash: str | None = None,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> ForwardBackwardResult:
        """Computes the loss of a batch and, in train mode, adds its gradient to the window.

        In eval mode dropout is off, no gradient is computed, and the window stays as it is.
        A failure in train mode spoils the window: the next `optim_step` drops it.

        Raises:
            InvalidRequestError: if `check_bounds` or `resolve_batch_hash` rejects the batch.
            NonFiniteError: if the loss is NaN or infinite.
        """
        started = time.perf_counter()
        try:
            check_bounds(examples, self.base.vocab_size, self.base.context_length)
            with stage(Stage.HASH):
                digest = resolve_batch_hash(examples, batch_hash)
            if train:
                self._seed_dropout()
            total_loss, gradient = self._run(examples, train, check_cancelled)
            weight = sum(example.num_labeled for example in examples)
            # Hashed before the addition, because `add` may keep and change these tensors.
            with stage(Stage.HASH):
                fingerprint = gradient_hash(gradient) if train else ""
            if train:
                self._window.add(GradientSum(gradient, weight, len(examples)))
        except BaseException:
            self._spoiled |= train
            raise
        return ForwardBackwardResult(
            loss=total_loss / weight,
            batch_hash=digest,
            gradient_hash=fingerprint,
            num_tokens=sum(len(example.input_ids) for example in examples),
            latency_ms=1e3 * (time.perf_counter() - started),
        )

    def optim_step(self, apply_dp_noise: bool = True) -> OptimStepResult:
        """Consumes the window: moves the weights by its mean gradient and completes a step.

        `apply_dp_noise` has an effect in private runs only. The window is empty afterwards, also
        if this method raises.

        Raises:
            InvalidRequestError: if the run is completed, or nothing was accumulated.
            WindowSpoiledError: if a `forward_backward` since the last step failed.
            NonFiniteError: if the gradient is NaN or infinite. The weights are unchanged.
        """
        started = time.perf_counter()
        window, spoiled = self._window, self._spoiled
        self._open_window()
        self._refuse(spoiled)
        norm, rate = self._move(window.mean())
        self.lineage = self.lineage.unguarded()
        return OptimStepResult(
            grad_norm=norm,
            learning_rate=rate,
            step=self.step,
            dp_metrics=None,
            latency_ms=1e3 * (time.perf_counter() - started),
        )

    def _move(self, gradient: MeanGradient | PrivateGradient) -> tuple[float, float]:
        """Makes one optimizer step; returns the gradient's norm and the learning rate used."""
        settings = self.config.optimizer
        rate = learning_rate(settings, self.step, self.config.max_steps)
        with stage(Stage.OPTIMIZER):
            norm = self._optimizer.step(
                gradient,
                lr=rate,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                max_grad_norm=settings.max_grad_norm,
            )
            self.step += 1
            self._averages.add(self.step)
        return norm, rate

    @property
    def broken(self) -> bool:
        """Whether a failed step may have moved some weights: then only a new actor may continue."""
        return self._optimizer.half_moved

    # --- comparison with the base model ----------------------------------------------------------

    def row_losses(
        self, examples: Sequence[Example], check_cancelled: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Returns the mean loss of each row over its labeled tokens in eval mode, in nats.

        Nothing else of the session changes. The rows must fit the model and have labels.
        """
        # On a bfloat16 model, kernels for another length round so differently that a row would
        # change the losses of the rows beside it.
        limit = MAX_STREAM_TOKENS if self.base.flat and self.base.dtype == torch.float32 else 0
        found: list[float] = []
        with torch.no_grad():
            for stream in flat_streams(examples, limit):
                check_cancelled()
                sums = self._losses(stream).double().cpu()
                found += (sums / stream.label_counts()).tolist()
        return found

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Puts the base model in place of the adapted model while the context is open.

        Raises:
            InvalidRequestError: all weights are trained, so those of the base model are gone.
        """
        if self.config.lora_config is None:
            raise InvalidRequestError(
                "this run trains all weights, so the weights of its base model are gone and nothing"
                " can be compared with them: train an adapter (lora_config)"
            )
        # An adapter whose B is zero adds zero.
        replaced = {
            name: self._base_values.get(name, torch.zeros_like(parameter))
            for name, parameter in self._parameters.items()
            if name in self._base_values or name.endswith(".lora_B.weight")
        }
        kept = {name: self._parameters[name].detach().clone() for name in replaced}
        try:
            self._put(replaced)
            yield
        finally:
            self._put(kept)

    def _put(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._parameters[name].copy_(value)

    # --- state -------------------------------------------------------------------------------

    def state(self, include_optimizer: bool = True) -> SessionState:
        """Returns a copy of the state that an artifact holds. Training may continue at once."""
        live = self.live_state(include_optimizer)
        return replace(
            live,
            weights=_copied(live.weights),
            optimizer=None if live.optimizer is None else _copied(live.optimizer),
            averages=None if live.averages is None else _copied(live.averages),
        )

    def live_state(self, include_optimizer: bool = True) -> SessionState:
        """Returns the state with the live tensors. Copy them before the next call changes them."""
        return SessionState(
            weights={name: p.detach() for name, p in self._trainable.saved.items()},
            optimizer=self._optimizer.state() if include_optimizer else None,
            averages=(self._averages.state() or None) if include_optimizer else None,
            step=self.step,
            geometry=self._geometry() | {FILES: dict(self.base.identity.files)},
            plan=self._plan(),
            adapter_config=self._trainable.adapter_config,
            lineage=self.lineage,
        )

    def averaged_state(self, kind: AverageKind) -> SessionState:
        """Returns a state for sampling that holds averaged weights, some of its tensors live.

        An average of released weights costs no privacy: the lineage is that of the run.

        Raises:
            InvalidRequestError: if the run keeps no such average, or no step has entered it yet.
        """
        averaged = self._averages.of(kind)
        live = self.live_state(include_optimizer=False)
        return replace(live, weights=live.weights | averaged, average=kind)

    def load(self, state: SessionState) -> tuple[str, ...]:
        """Loads a state and returns warnings, or raises and changes nothing.

        Raises:
            ArtifactMismatchError: if the base model, rank, target layers or optimizer differ.
        """
        self.check_fits(state)
        with torch.no_grad():
            for name, parameter in self._trainable.saved.items():
                parameter.copy_(state.weights[name])
        self._optimizer.load(state.optimizer or {})
        anew = self._averages.load(state.averages or {}, state.step)
        self.step, self.lineage = state.step, state.lineage
        self._open_window()
        return self._warnings(state, anew)

    def check_fits(self, state: SessionState) -> None:
        """Raises the error with which `load` would refuse the state, and changes nothing."""
        if state.average is not None:
            raise ArtifactMismatchError(
                f"the artifact holds averaged weights ({state.average}), which were saved to be"
                " sampled: no step of the run had these weights, and no optimizer state belongs to"
                " them. Nothing was loaded; to resume, load an artifact that was saved without"
                " average=",
                details={"part": "average"},
            )
        mine = self._geometry()
        if state.optimizer is None:
            mine = mine | {"optimizer": state.geometry.get("optimizer")}
        for part, ours in mine.items():
            theirs = state.geometry.get(part)
            if ours != theirs and not (part == "base" and self.base.known_as(theirs)):
                raise ArtifactMismatchError(
                    f"the artifact's {part} differs: {_difference(theirs, ours)}. Nothing was"
                    " loaded; create a client with the configuration of the artifact",
                    details={"part": part},
                )
        self.base.refuse_other_files(state.geometry.get(FILES))
        if any(list(t.shape) != mine["shapes"].get(n) for n, t in state.weights.items()):
            raise ArtifactMismatchError(
                "the artifact's tensors do not have the shapes that the artifact states"
            )

    # --- inside ------------------------------------------------------------------------------

    def _run(
        self, examples: Sequence[Example], train: bool, check_cancelled: Callable[[], None]
    ) -> tuple[float, Tensors]:
        """Returns the summed loss over all streams and, in train mode, the summed gradient."""
        self.base.model.train(train)
        limit = MAX_STREAM_TOKENS if self.base.flat else 0
        total, gradient = 0.0, GradientSum.zero()
        try:
            for stream in flat_streams(examples, limit):
                check_cancelled()
                total += self._run_stream(stream, train)
                if train:  # the sum is float32, whatever the dtype of a parameter
                    gradient.add(GradientSum(take_gradients(self._parameters)))
            return total, gradient.tensors
        finally:
            self.base.model.eval()
            for parameter in self._parameters.values():
                parameter.grad = None

    def _run_stream(self, stream: FlatStream, train: bool) -> float:
        if not len(stream.targets):
            return 0.0
        with torch.set_grad_enabled(train):
            loss = self._losses(stream).sum()
        if not torch.isfinite(loss):
            raise NonFiniteError(
                "the loss is not finite: the weights may have diverged; lower the learning rate"
                " and load an earlier artifact"
            )
        if train:
            with stage(Stage.BACKWARD):
                loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _losses(self, stream: FlatStream) -> torch.Tensor:
        """Returns the summed loss of each example of the stream: float32 [S], in nats."""
        long = stream.tokens.numel() > MAX_STREAM_TOKENS
        with self.recomputation.used(long):
            losses = labeled_losses(self.base, stream)
        return sums_by_example(losses, stream.owners.to(losses.device), stream.size)

    def _seed_dropout(self) -> None:
        """Seeds torch from (seed, step, call), so that no generator state needs to be saved."""
        place = f"{self.config.seed}/{self.step}/{self._calls}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(place).digest()[:8], "big"))
        self._calls += 1

    def _open_window(self) -> None:
        self._window = GradientSum.zero()
        self._calls = 0
        self._spoiled = False

    def _refuse(self, spoiled: bool) -> None:
        if self.completed:
            raise InvalidRequestError(
                f"the run is completed: step {self.step} of max_steps {self.config.max_steps}."
                " To make it active again, call load_state with an earlier artifact",
                details={"step": self.step},
            )
        if spoiled:
            raise WindowSpoiledError(
                f"step {self.step + 1} was dropped: a forward_backward before it failed or was"
                " canceled. The weights are unchanged; repeat the batches of the step",
                details={"step": self.step},
            )

    def _geometry(self) -> dict[str, Any]:
        lora = self.config.lora_config
        # Without `freeze_a` an adapter is described as by versions that did not know it.
        left_out = {"dropout"} if lora is not None and lora.freeze_a else {"dropout", "freeze_a"}
        described = None if lora is None else lora.model_dump(mode="json", exclude=left_out)
        if described and isinstance(described["target_modules"], list):
            described["target_modules"].sort()  # these are a set of names: PEFT keeps no order
        return {
            "base": self.base.digest,
            "lora": described,
            "shapes": {name: list(p.shape) for name, p in sorted(self._trainable.saved.items())},
            "optimizer": kind(self.config.optimizer),
        }

    def _plan(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "threads": torch.get_num_threads(),
            "stream_tokens": MAX_STREAM_TOKENS if self.base.flat else 0,
            "dtype": str(self.base.dtype),
            "device": self.base.device.type,
            "torch": torch.__version__,
            "matmul": library(next(iter(self._parameters.values()))),
        }

    def _warnings(self, state: SessionState, anew: list[str]) -> tuple[str, ...]:
        found = []
        if state.optimizer is None:
            found.append("the artifact has no optimizer state: the moments start from zero")
        if FILES not in state.geometry:
            found.append(
                "the artifact is of an older version, which compares a base model by its weights"
                " and config.json only: make sure that its tokenizer and chat template are the same"
            )
        if anew:
            found.append(
                f"the artifact has no {' and no '.join(anew)} average of this configuration: the"
                f" average begins at step {state.step + 1}"
            )
        changed = [k for k, v in self._plan().items() if state.plan.get(k) != v]
        if changed:
            found.append(
                f"not bit-exact: {', '.join(changed)} differ from when the artifact was saved"
            )
        return tuple(found)


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def _difference(theirs: Any, ours: Any) -> str:
    """Returns the first unequal entry of two descriptions, short enough for a message."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                return f"{key} is {theirs.get(key)} in the artifact, {ours.get(key)} here"
    return f"{theirs} in the artifact, {ours} here"
