"""One run: its session, its artifacts, its completions. A plain class; Ray is in its shell.

Each public method named in `TRAINING_OPERATIONS` is one operation of the API.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actors.artifacts import fetch, publish
from actors.budget import Budget
from actors.engine import Session
from actors.model import Base, Progress, compute_dtype, use_threads
from actors.private import PrivateSession
from actors.registry import Registry
from actors.snapshots import shares_base, take
from actors.state import Checkpoint, from_files, to_files
from actors.store import ArtifactStore
from tg_tinker.batch import Example
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import (
    InvalidRequestError,
    NonFiniteError,
    NotFoundError,
    TGTinkerError,
    WindowSpoiledError,
)
from tg_tinker.types import (
    ForwardBackwardResult,
    LoadStateResult,
    ModelInfo,
    OptimStepResult,
    SaveStateResult,
)
from tg_tinker.wire import TRAINING_OPERATIONS, Request, SnapshotRef

Check = Callable[[], None]

SNAPSHOTS, WHOLE_SNAPSHOTS = 8, 2
"""Kept for samplers to fetch: of adapters, and of whole models."""


@dataclass(frozen=True)
class Place:
    """Which run this is, and where its things lie."""

    tenant: str
    run_id: str
    epoch: int
    store: str
    model_cache: Path


class Worker:
    """The operations of one training client."""

    def __init__(
        self, place: Place, config: TrainingConfig, registry: Registry, progress: Progress
    ) -> None:
        self._place = place
        self._registry = registry
        self._store = ArtifactStore(place.store)
        self._threads = use_threads(config.resources.num_threads)
        budget = None
        if config.private:  # before the model: a plan that cannot be paid is refused at once
            progress("planning the privacy budget")
            dtype = compute_dtype(config.dtype)
            where = registry, place.tenant, place.run_id, place.epoch
            budget = Budget.planned(*where, config, dtype)
        base = Base.load(
            config.model_ref, cache=place.model_cache, dtype=config.dtype, progress=progress
        )
        self._snapshots: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._changing = threading.Lock()  # held while weights change or are copied
        self._generation = 0  # of the weights: rises whenever they may have changed
        self._failure: TGTinkerError | None = None  # of the last step, not told to a sample yet
        progress("preparing the trainable weights")
        self.session = (
            Session(base, config) if budget is None else PrivateSession(base, config, budget)
        )

    def run(self, request: Request, check_cancelled: Check) -> Any:
        """One operation by name, with its arguments."""
        if request.operation not in TRAINING_OPERATIONS:
            raise AttributeError(request.operation)
        return getattr(self, request.operation)(check_cancelled, **request.arguments)

    def model_info(self) -> ModelInfo:
        base = self.session.base
        return ModelInfo(
            vocab_size=base.vocab_size,
            context_length=base.context_length,
            num_trainable=self.session.num_trainable,
            base_digest=base.digest,
            dtype=str(base.dtype).removeprefix("torch."),
            device=str(base.device),
            flat_stream=base.flat,
            num_threads=self._threads,
        )

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.session.base.tokenizer_files()

    @property
    def status(self) -> str:
        return "completed" if self.session.completed else "active"

    # --- operations --------------------------------------------------------------------------

    def forward_backward(
        self, check_cancelled: Check, examples: list[Example], batch_hash: str | None, train: bool
    ) -> ForwardBackwardResult:
        return self.session.forward_backward(
            examples, train=train, batch_hash=batch_hash, check_cancelled=check_cancelled
        )

    def optim_step(self, check_cancelled: Check, apply_dp_noise: bool) -> OptimStepResult:
        check_cancelled()
        self._failure = None
        try:
            with self._changing:
                self._generation += 1
                return self.session.optim_step(apply_dp_noise)
        except (WindowSpoiledError, NonFiniteError) as failure:
            self._failure = failure
            raise

    def register_units(self, check_cancelled: Check, examples: list[Example]) -> list[list[int]]:
        return self._private_session().register_units(examples)

    def draw_units(self, check_cancelled: Check) -> list[int]:
        return self._private_session().draw_units()

    def snapshot(self, check_cancelled: Check) -> SnapshotRef:
        """The weights as they are, kept for whoever samples from them.

        Raises what the last step failed with, once: the sample was meant to see that step.
        """
        check_cancelled()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self.latest()

    def latest(self) -> SnapshotRef:
        """The weights after the last completed step, from any thread."""
        with self._changing:
            return self._kept()

    def _kept(self) -> SnapshotRef:
        place, lora = self._place, self.session.config.lora_config
        version = f"{place.run_id}@{self.session.step}"
        reference = SnapshotRef(
            f"{version}.{place.epoch}.{self._generation}", version,
            f"{place.run_id}@{place.epoch}", shares_base(lora),
        )  # fmt: skip
        if reference.name not in self._snapshots:
            kept = SNAPSHOTS if reference.shared else WHOLE_SNAPSHOTS
            while len(self._snapshots) >= kept:
                self._snapshots.popitem(last=False)
            self._snapshots[reference.name] = take(self.session, reference)
        return reference

    def taken(self, name: str) -> dict[str, Any]:
        """A snapshot, from any thread."""
        found = self._snapshots.get(name)
        if found is None:
            raise NotFoundError("the weights of this sample are gone already: sample again")
        return found

    def save_state(
        self, check_cancelled: Check, include_optimizer: bool, metadata: dict[str, Any]
    ) -> SaveStateResult:
        """Seals the state in this process; returns when it is durable and entered."""
        check_cancelled()
        state = self.session.state(include_optimizer)
        checkpoint = Checkpoint(state, metadata, datetime.now(UTC))
        artifact_id, size, encryption = publish(
            self._registry,
            self._store,
            to_files(checkpoint),
            tenant=self._place.tenant,
            run_id=self._place.run_id,
            epoch=self._place.epoch,
            step=state.step,
            include_optimizer=include_optimizer,
        )
        return SaveStateResult(artifact_id, size, encryption, metadata, checkpoint.timestamp)

    def load_state(self, check_cancelled: Check, artifact_id: str) -> LoadStateResult:
        """Reads and verifies everything, then changes the session in one go."""
        check_cancelled()
        files = fetch(self._registry, self._store, self._place.tenant, artifact_id)
        checkpoint = from_files(files)
        with self._changing:
            self._generation += 1
            warnings = self.session.load(checkpoint.state)
        self._failure = None
        return LoadStateResult(
            artifact_id, self.session.step, checkpoint.metadata, checkpoint.timestamp, warnings
        )

    # --- inside ------------------------------------------------------------------------------

    def _private_session(self) -> PrivateSession:
        if not isinstance(self.session, PrivateSession):
            raise InvalidRequestError(
                "this run is not private: only a run with a DPConfig draws Poisson samples"
            )
        return self.session

    @property
    def broken(self) -> bool:
        """A private step was charged and then failed: only a new actor may go on."""
        return isinstance(self.session, PrivateSession) and self.session.broken
