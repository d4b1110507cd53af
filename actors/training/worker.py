"""Implements the operations of one run in a plain class. `actor` wraps the class in a Ray actor.

Each public method that `TRAINING_OPERATIONS` names is one operation of the API. `saving` turns
states into artifacts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from actors.artifacts.adapters import imported
from actors.artifacts.fetch import fetch
from actors.artifacts.publish import Write, write
from actors.engine.caches import Way
from actors.engine.checkpoint import SessionState, from_files
from actors.engine.loading import Progress
from actors.engine.memory import check_room
from actors.engine.model import Base, compute_dtype, use_threads
from actors.engine.session import Session
from actors.privacy.budget import Budget
from actors.privacy.evaluation import HeldOut
from actors.privacy.session import PrivateSession
from actors.registry.head_keeper import HeadKeeper
from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest, meet
from actors.sampling.snapshots import shares_base, take
from actors.storage.store import ArtifactStore
from actors.training.place import Place
from actors.training.saving import Saver
from tg_tinker.cluster.messages import TRAINING_OPERATIONS, Request, Saving, SnapshotRef
from tg_tinker.config import AverageKind, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.errors import (
    InvalidRequestError,
    NonFiniteError,
    NotFoundError,
    TGTinkerError,
    WindowSpoiledError,
)
from tg_tinker.labels import AUTOMATIC
from tg_tinker.records.report import dataset_of
from tg_tinker.sampling import NOT_SAMPLED, SAMPLED_SLOWLY
from tg_tinker.types import (
    ForwardBackwardResult,
    LoadStateResult,
    ModelInfo,
    OptimStepResult,
    PrivateEvalResult,
)

Check = Callable[[], None]

SNAPSHOTS, WHOLE_SNAPSHOTS = 8, 2
"""The numbers of snapshots that are kept for samplers: of adapters, and of whole models."""

_WARNINGS: dict[Way | None, tuple[str, ...]] = {
    None: (NOT_SAMPLED,),
    Way.WHOLE: (SAMPLED_SLOWLY,),
}
"""What a new client says of the way in which its model is sampled."""


SLOW = (
    "the gradients of single rows are computed row by row, which is as slow as batches of one row,"
    " because {}"
)
"""What a new private client says where its model has no fast path."""


def _path(session: Session) -> tuple[str, str]:
    """Returns how a session computes the gradients of units, and why they are slow if they are."""
    if not isinstance(session, PrivateSession):
        return "", ""
    return session.unit_backward.path, session.unit_backward.slow_because


class Worker:
    """The operations of one training client.

    Attributes:
        heads: puts heads of the ledger into the store; None if the run is not private.
        parked: whether the worker has saved its run and given it up.
        saver: turns states into artifacts; any thread may call its `outcome`.
    """

    def __init__(
        self, place: Place, config: TrainingConfig, registry: Registry, progress: Progress,
        write: Write = write,
    ) -> None:  # fmt: skip
        self._place = place
        self._registry = registry
        self._store = ArtifactStore(place.store)
        # The registry is compared with the store now, not at the first save.
        meet(registry, self._store, place.tenant, place.actor)
        # An older copy of the database lacks the row of this head, and so is detected.
        keep_newest(registry, self._store, place.tenant)
        self._threads = use_threads(config.resources.num_threads)
        self._budget: Budget | None = None
        self.heads: HeadKeeper | None = None
        # Before the model is loaded, so that a plan that the budget cannot pay is refused at once.
        if config.private:
            progress("planning the privacy budget")
            dtype = compute_dtype(config.dtype)
            self.heads = HeadKeeper(
                registry, place.store, place.tenant, dataset_of(config), place.actor
            )
            where = registry, place.tenant, place.run_id, place.epoch
            self._budget = Budget.planned(*where, config, dtype)
            self._budget.heads = self.heads
        base = Base.load(
            config.model_ref, cache=place.model_cache, dtype=config.dtype, progress=progress,
            check_room=partial(check_room, config),
        )  # fmt: skip
        self._held_outs: dict[str, HeldOut] = {}
        self._snapshots: OrderedDict[str, dict[str, Any]] = OrderedDict()
        # Held while weights change or are copied.
        self._changing = threading.Lock()
        self.saver = Saver(place, registry, self._store, self.heads, config.checkpoints, write)
        self.parked = False
        # Counts how often the weights may have changed.
        self._generation = 0
        # The failure of the last step, until a sample has raised it.
        self._failure: TGTinkerError | None = None
        # The hashes of the calls in the open window, and those of a step that is not recorded yet.
        self._calls: list[tuple[str, str]] = []
        self._stepped: list[tuple[str, str]] | None = None
        progress("preparing the trainable weights")
        self.session = (
            Session(base, config)
            if self._budget is None
            else PrivateSession(base, config, self._budget)
        )

    def run(self, request: Request, check_cancelled: Check) -> Any:
        """Runs the operation that the request names, and returns its result."""
        if request.operation not in TRAINING_OPERATIONS:
            raise AttributeError(request.operation)
        if self._budget is not None:
            self._budget.known = request.ledger
        return getattr(self, request.operation)(check_cancelled, **request.arguments)

    def model_info(self) -> ModelInfo:
        base = self.session.base
        path, why = _path(self.session)
        return ModelInfo(
            vocab_size=base.vocab_size,
            context_length=base.context_length,
            num_trainable=self.session.num_trainable,
            base_digest=base.digest,
            dtype=str(base.dtype).removeprefix("torch."),
            device=str(base.device),
            flat_stream=base.flat,
            sampling="" if base.sampling is None else base.sampling.value,
            num_threads=self._threads,
            unit_gradients=path,
            slow_because=why,
            warnings=_WARNINGS.get(base.sampling, ()) + ((SLOW.format(why),) if why else ()),
        )

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.session.base.tokenizer_files()

    def take_step(self) -> list[tuple[str, str]] | None:
        """Returns the call hashes of the step that was just completed, or None if there is none.

        The hashes are returned once, because each step is recorded once.
        """
        stepped, self._stepped = self._stepped, None
        return stepped

    @property
    def status(self) -> str:
        return "completed" if self.session.completed else "active"

    # --- operations --------------------------------------------------------------------------

    def forward_backward(
        self, check_cancelled: Check, examples: list[Example], batch_hash: str | None, train: bool
    ) -> ForwardBackwardResult:
        result = self.session.forward_backward(
            examples, train=train, batch_hash=batch_hash, check_cancelled=check_cancelled
        )
        if train:
            self._calls.append((result.batch_hash, result.gradient_hash))
        return result

    def optim_step(self, check_cancelled: Check, apply_dp_noise: bool) -> OptimStepResult:
        check_cancelled()
        self._failure = None
        calls, self._calls = self._calls, []
        try:
            with self._changing:
                self._generation += 1
                result = self.session.optim_step(apply_dp_noise)
                self._stepped = calls
            self.saver.after_step(self.session)
            return self._told(result)
        except (WindowSpoiledError, NonFiniteError) as failure:
            self._failure = failure
            raise

    def register_units(self, check_cancelled: Check, examples: list[Example]) -> list[list[int]]:
        return self._private_session().poisson.register(examples)

    def draw_units(self, check_cancelled: Check) -> list[int]:
        session = self._private_session()
        drawn = session.poisson.draw(session.step)
        self._note_charge()
        return drawn

    def private_eval(
        self, check_cancelled: Check, examples: list[Example], dataset_id: str, std: float,
        num_units: int | None,
    ) -> PrivateEvalResult:  # fmt: skip
        session, held_out = self._private_session(), self._held_out(dataset_id)
        # The base model stands in place of the adapted one meanwhile, and nobody may copy it.
        with self._changing:
            result = session.private_eval(examples, held_out, std, num_units, check_cancelled)
        if held_out.heads is not None:
            held_out.heads.charged()
            problem = held_out.heads.problem
            result = replace(result, warnings=(*result.warnings, *filter(None, (problem,))))
        return result

    def snapshot(self, check_cancelled: Check) -> SnapshotRef:
        """Keeps the present weights for samplers, and returns a reference to them.

        Raises the error of the last step once if the step failed, because the sample was meant to
        use the weights after that step.
        """
        check_cancelled()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self.latest()

    def latest(self) -> SnapshotRef:
        """Returns a reference to the weights after the last completed step, from any thread."""
        with self._changing:
            return self._kept()

    def _kept(self) -> SnapshotRef:
        place, lora = self._place, self.session.config.lora_config
        version = f"{place.run_id}@{self.session.step}"
        reference = SnapshotRef(
            f"{version}.{place.epoch}.{self._generation}", version,
            place.actor, shares_base(lora), place.tenant,
        )  # fmt: skip
        if reference.name not in self._snapshots:
            kept = SNAPSHOTS if reference.shared else WHOLE_SNAPSHOTS
            while len(self._snapshots) >= kept:
                self._snapshots.popitem(last=False)
            self._snapshots[reference.name] = take(self.session, reference)
        return reference

    def taken(self, name: str) -> dict[str, Any]:
        """Returns the tensors of a snapshot, from any thread.

        Raises:
            NotFoundError: the snapshot is no longer kept.
        """
        found = self._snapshots.get(name)
        if found is None:
            raise NotFoundError("the weights for this sample are no longer kept: sample again")
        return found

    def save_state(
        self, check_cancelled: Check, include_optimizer: bool, metadata: dict[str, Any],
        average: AverageKind | None = None,
    ) -> Saving:  # fmt: skip
        """Copies the state and returns. `Saver.outcome` waits until the artifact is durable.

        Waits for an earlier save while memory already holds `saving.MOST_COPIES` copies.
        """
        check_cancelled()
        return self.saver.begin(self.session, include_optimizer, metadata, average=average)

    def park(self, check_cancelled: Check) -> None:
        """Saves the state and gives up the run. Another actor serves all later calls.

        Raises:
            InvalidRequestError: gradients wait for their step. Nothing changed.
        """
        check_cancelled()
        if self.session.pending:
            raise InvalidRequestError(
                "gradients wait for their optim_step, and an artifact cannot hold them: finish the"
                " step, then park"
            )
        place = self._place
        self.saver.outcome(self.saver.begin(self.session, True, {}, AUTOMATIC))
        self._registry.runs.record(place.run_id, place.epoch, self.session.step, self.status)
        self._registry.runs.park(place.run_id, place.epoch)
        self.parked = True
        with suppress(TGTinkerError):
            self.saver.prune()

    def load_state(self, check_cancelled: Check, artifact_id: str) -> LoadStateResult:
        """Reads and verifies the whole artifact, then changes the session in one step."""
        check_cancelled()
        files = fetch(self._registry, self._store, self._place.capability, artifact_id)
        checkpoint = from_files(files)
        self._registry.heads.check_lineage(
            self._place.tenant, checkpoint.state.lineage.ledgers, artifact_id, self._place.actor
        )
        warnings = self._take_over(checkpoint.state)
        place = self._place
        self._registry.artifacts.note_loaded(place.tenant, place.run_id, place.epoch, artifact_id)
        return LoadStateResult(
            artifact_id, self.session.step, checkpoint.metadata, checkpoint.timestamp, warnings
        )

    def load_adapter(self, check_cancelled: Check, config: dict[str, Any], weights: bytes) -> None:
        """Loads an adapter from PEFT files made elsewhere; see `imported` for refusals."""
        check_cancelled()
        state = imported(config, weights, self.session.live_state(include_optimizer=False))
        # Checked before the import is recorded, because a refused adapter is not imported.
        self.session.check_fits(state)
        # Recorded before a weight changes: an import that cannot be recorded does not happen.
        self._registry.audit_log.record_import(
            self._place.tenant, self._place.actor, self._place.run_id
        )
        self._take_over(state)

    # --- inside ------------------------------------------------------------------------------

    def _told(self, result: OptimStepResult) -> OptimStepResult:
        """Returns the result with warnings about failed checkpoints and missing ledger heads."""
        self._note_charge()
        problems = (self.saver.problem, self.heads.problem if self.heads is not None else "")
        return replace(result, warnings=(*result.warnings, *filter(None, problems)))

    def _note_charge(self) -> None:
        if self.heads is not None:
            self.heads.charged()

    def _take_over(self, state: SessionState) -> tuple[str, ...]:
        """Loads a whole state or nothing, and returns the warnings."""
        with self._changing:
            self._generation += 1
            warnings = self.session.load(state)
        self._calls = []
        self._failure = None
        self.saver.begin_at(self.session.step)
        return warnings

    def _held_out(self, dataset_id: str) -> HeldOut:
        """Returns the access of this run to the ledger of a held-out dataset.

        It is kept: it remembers the end of the ledger, and which head of it the store has.
        """
        if dataset_id not in self._held_outs:
            held_out = HeldOut.opened(self._private_session().budget, dataset_id)
            place = self._place
            held_out.heads = HeadKeeper(
                self._registry, place.store, place.tenant, dataset_id, place.actor, every=1
            )
            self._held_outs[dataset_id] = held_out
        return self._held_outs[dataset_id]

    def _private_session(self) -> PrivateSession:
        if not isinstance(self.session, PrivateSession):
            raise InvalidRequestError(
                "this run is not private: only a run with a DPConfig draws Poisson samples and"
                " evaluates privately"
            )
        return self.session

    @property
    def broken(self) -> bool:
        """Whether a step failed halfway. Then only a new actor may continue the run."""
        return self.session.broken
