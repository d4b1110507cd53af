"""One training run on one base model: the main path, without Ray.

    base = Base.load("path/to/model", cache=Path("cache"))
    session = Session(base, TrainingConfig(model_ref="path/to/model", lora_config=LoRAConfig()))
    session.forward_backward(examples)
    session.optim_step()

`forward_backward` adds to the window, `optim_step` consumes it. Between the two lives nothing
else: an artifact is the state after the last `optim_step`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from actors.engine.attention import keeping_attention
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
from actors.engine.model import Base, labelled_losses
from actors.engine.optim import Optimizer, learning_rate
from actors.engine.timing import Stage, stage
from tg_tinker.config import TrainingConfig
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
"""Tokens of one micro-batch: bounds activations. A longer row keeps few of them, and computes the
others again in the backward pass."""


class Session:
    """Adapter, optimizer, window and counters of one run."""

    def __init__(self, base: Base, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)  # first weights of the adapter
        self.base = base
        self.config = config
        self.step = 0
        self._parameters, self._adapter_config = make_trainable(base, config.lora_config)
        base.model.eval()  # fresh adapter layers start in train mode
        self._recomputing = False
        self._recompute_activations(config.resources.activation_checkpointing)
        self._optimizer = Optimizer(config.optimizer, self._parameters)
        self.lineage = Lineage(base.digest)
        self._open_window()

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def pending(self) -> bool:
        """Whether an `optim_step` now would find something that no artifact holds."""
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
        """Loss of a batch and, in train mode, its gradient added to the window.

        In eval mode dropout is off, nothing is differentiated, the window stays as it is.

        Raises:
            InvalidRequestError: see `check_bounds`.
            NonFiniteError: the loss is NaN or infinite.
        A failure in train mode spoils the window: the next `optim_step` drops it.
        """
        started = time.perf_counter()
        try:
            check_bounds(examples, self.base.vocab_size, self.base.context_length)
            with stage(Stage.HASH):
                digest = resolve_batch_hash(examples, batch_hash)
            if train:
                self._seed_dropout()
            total_loss, gradient = self._run(examples, train, check_cancelled)
            weight = sum(example.num_labelled for example in examples)
            # Hashed before it is added: `add` may keep and change the very tensors.
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
        """Consumes the window: mean gradient, learning rate, optimizer, next step.

        `apply_dp_noise` has a meaning in private runs only.

        Raises:
            InvalidRequestError: the run is completed, or nothing was accumulated.
            WindowSpoiledError: a `forward_backward` since the last step failed.
            NonFiniteError: the gradient is NaN or infinite; weights are untouched.
        Whatever is raised, the window is empty afterwards.
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
        """One optimizer step: the gradient's norm and the learning rate used."""
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
        return norm, rate

    @property
    def broken(self) -> bool:
        """A step failed where the weights may be half moved: only a new actor may go on."""
        return self._optimizer.half_moved

    # --- state -------------------------------------------------------------------------------

    def state(self, include_optimizer: bool = True) -> SessionState:
        """A copy of everything an artifact holds; training may go on at once."""
        live = self.live_state(include_optimizer)
        return replace(
            live,
            weights=_copied(live.weights),
            optimizer=None if live.optimizer is None else _copied(live.optimizer),
        )

    def live_state(self, include_optimizer: bool = True) -> SessionState:
        """The same with the tensors themselves: copy them before the next call changes them."""
        return SessionState(
            weights={name: p.detach() for name, p in self._parameters.items()},
            optimizer=self._optimizer.state() if include_optimizer else None,
            step=self.step,
            geometry=self._geometry(),
            plan=self._plan(),
            adapter_config=self._adapter_config,
            lineage=self.lineage,
        )

    def load(self, state: SessionState) -> tuple[str, ...]:
        """Takes over a state, or raises and changes nothing; returns warnings.

        Raises:
            ArtifactMismatchError: another base model, rank, target layers or optimizer.
        """
        self.check_fits(state)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.weights[name])
        self._optimizer.load(state.optimizer or {})
        self.step, self.lineage = state.step, state.lineage
        self._open_window()
        return self._warnings(state)

    def check_fits(self, state: SessionState) -> None:
        """Raises what `load` would refuse it with, and changes nothing."""
        mine = self._geometry()
        if state.optimizer is None:
            mine = mine | {"optimizer": state.geometry.get("optimizer")}
        for part, ours in mine.items():
            theirs = state.geometry.get(part)
            if ours != theirs:
                raise ArtifactMismatchError(
                    f"the artifact's {part} differs: {_difference(theirs, ours)}. Nothing was"
                    " loaded; create a client with the artifact's configuration",
                    details={"part": part},
                )
        if any(list(t.shape) != mine["shapes"].get(n) for n, t in state.weights.items()):
            raise ArtifactMismatchError("the artifact's tensors do not have their stated shapes")

    # --- inside ------------------------------------------------------------------------------

    def _run(
        self, examples: Sequence[Example], train: bool, check_cancelled: Callable[[], None]
    ) -> tuple[float, Tensors]:
        """Summed loss over all streams and, in train mode, the summed gradient."""
        self.base.model.train(train)
        limit = MAX_STREAM_TOKENS if self.base.flat else 0
        total, gradient = 0.0, GradientSum.zero()
        try:
            for stream in flat_streams(examples, limit):
                check_cancelled()
                total += self._run_stream(stream, train)
                if train:  # summed in float32 here, not in a parameter's own dtype
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
        """float32 [S]: the summed loss of each example of the stream."""
        long = stream.tokens.numel() > MAX_STREAM_TOKENS and self.base.can_recompute
        self._recompute_activations(long or self.config.resources.activation_checkpointing)
        losses = labelled_losses(self.base, stream)
        return sums_by_example(losses, stream.owners.to(losses.device), stream.size)

    def _recompute_activations(self, wanted: bool) -> None:
        """Activation checkpointing: bounds the memory of a row longer than a stream."""
        if wanted and not self._recomputing:
            self.base.model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": keeping_attention}
            )
        elif self._recomputing and not wanted:
            self.base.model.activation_checkpointing_disable()
        self._recomputing = wanted

    def _seed_dropout(self) -> None:
        """A function of (seed, step, call): no generator state needs to be saved."""
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
                " load_state of an earlier artifact makes it active again",
                details={"step": self.step},
            )
        if spoiled:
            raise WindowSpoiledError(
                f"step {self.step + 1} was dropped: a forward_backward before it failed or was"
                " cancelled. Weights are as before; repeat the step's batches",
                details={"step": self.step},
            )

    def _geometry(self) -> dict[str, Any]:
        lora = self.config.lora_config
        described = None if lora is None else lora.model_dump(mode="json", exclude={"dropout"})
        if described and isinstance(described["target_modules"], list):
            described["target_modules"].sort()  # a set of names: PEFT keeps no order
        return {
            "base": self.base.digest,
            "lora": described,
            "shapes": {name: list(p.shape) for name, p in sorted(self._parameters.items())},
            "optimizer": self.config.optimizer.name,
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

    def _warnings(self, state: SessionState) -> tuple[str, ...]:
        found = []
        if state.optimizer is None:
            found.append("the artifact has no optimizer state: its moments start from zero")
        changed = [k for k, v in self._plan().items() if state.plan.get(k) != v]
        if changed:
            found.append(f"not bit-exact: {', '.join(changed)} differ from when it was saved")
        return tuple(found)


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def _difference(theirs: Any, ours: Any) -> str:
    """The first unequal entry of two descriptions, short enough for a message."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                return f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
    return f"{theirs} there, {ours} here"
