"""States of a run on their way to artifacts: those asked for, and those that a run saves by itself.

Training waits for the copy of its state only; sealing, storing and entering it go on beside. What
an artifact is made of is up to `actors.artifacts.publish`, what a state is to the engine.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from actors.artifacts.delete import delete
from actors.artifacts.publish import Draft, Write, publish
from actors.engine.checkpoint import Checkpoint, to_files
from actors.engine.session import Session
from actors.registry.head_keeper import HeadKeeper
from actors.registry.registry import Registry
from actors.storage.store import ArtifactStore
from actors.training.place import Place
from tg_tinker.cluster.messages import Saving
from tg_tinker.config import CheckpointConfig
from tg_tinker.errors import NotFoundError, TGTinkerError
from tg_tinker.labels import AUTOMATIC
from tg_tinker.storage.envelope import Buffer
from tg_tinker.types import ArtifactQuery, SaveStateResult

MOST_COPIES = 2
"""States that are copied and not saved yet: the next save waits, and training with it."""

KEPT_SAVES = 64
"""Outcomes of saves that can be asked for."""


class Schedule:
    """Says after which steps a run saves itself."""

    def __init__(
        self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = config.every_steps
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._clock = clock
        self.begin_at(0)

    def begin_at(self, step: int) -> None:
        """The state of this step was just saved, or loaded: the next one is counted from it."""
        self._step, self._time = step, self._clock()

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        by_steps = self._steps is not None and step - self._step >= self._steps
        return by_steps or (
            self._seconds is not None and self._clock() - self._time >= self._seconds
        )


class Saver:
    """Saves the states of one run, in the order in which it was asked.

    `begin`, `after_step` and `begin_at` belong to the training thread, all else to any.

    Attributes:
        drafts: states that are being saved, by artifact id; their files are read from here.
        problem: of the last automatic save; empty once one has succeeded.
    """

    def __init__(
        self, place: Place, registry: Registry, store: ArtifactStore, heads: HeadKeeper | None,
        config: CheckpointConfig, write: Write,
    ) -> None:  # fmt: skip
        self.drafts: dict[str, Draft] = {}
        self.problem = ""
        self._place = place
        self._registry = registry
        self._store = store
        self._heads = heads
        self._keep = config.keep
        self._write = write
        self._schedule = Schedule(config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")  # in the order of calls
        self._saves: OrderedDict[str, Future[SaveStateResult]] = OrderedDict()
        self._copies = threading.Semaphore(MOST_COPIES)

    def begin(
        self, session: Session, include_optimizer: bool, metadata: dict[str, Any],
        labels: Mapping[str, str] | None = None,
    ) -> Saving:  # fmt: skip
        """Copies the state and goes on; waits while as many copies as may be in memory are on
        their way already."""
        self._copies.acquire()
        try:
            state = session.live_state(include_optimizer)
            checkpoint = Checkpoint(state, metadata, datetime.now(UTC))
            files, shown = to_files(checkpoint), self._place.capability
            draft = Draft(self._registry, self._store, shown, files)
            self.drafts[draft.artifact_id] = draft  # before the thread may look for it
            saving = self._thread.submit(self._publish, draft, checkpoint, labels)
        except BaseException:
            self._copies.release()
            raise
        saving.add_done_callback(lambda _: self._copies.release())
        self._saves[draft.artifact_id] = saving
        while len(self._saves) > KEPT_SAVES:
            self._saves.popitem(last=False)
        return Saving(draft.artifact_id)

    def outcome(self, saving: Saving, wait: bool = True) -> SaveStateResult | None:
        """What became of a save; None while it goes on, unless told to wait."""
        found = self._saves.get(saving.artifact_id)
        if found is None:
            raise NotFoundError(
                f"it is not known any more whether {saving.artifact_id} was saved: see"
                " service.list_artifacts()"
            )
        return found.result() if wait or found.done() else None

    # --- by itself ---------------------------------------------------------------------------

    def begin_at(self, step: int) -> None:
        """The state of this step was loaded: the next automatic save is counted from it."""
        self._schedule.begin_at(step)

    def after_step(self, session: Session) -> None:
        """Saves if that is due: all but the copy goes on beside training, and no step waits for it
        or fails with it."""
        if not self._schedule.due(session.step) or not self._copies.acquire(blocking=False):
            return
        step = session.step
        self._schedule.begin_at(step)
        with self._beside_training(step):
            try:
                checkpoint = Checkpoint(session.live_state(), {}, datetime.now(UTC))
                files = to_files(checkpoint)
                saving = self._thread.submit(self._save_by_itself, checkpoint, files)
            except BaseException:
                self._copies.release()
                raise
            saving.add_done_callback(lambda _: self._copies.release())

    def prune(self) -> None:
        """Deletes what the run saved by itself beyond the newest ones to keep. Artifacts that were
        given other labels since are not among them."""
        place, (label,) = self._place, AUTOMATIC.items()
        query = ArtifactQuery(run=place.run_id, label=label)
        for info in self._registry.catalogue.find(place.tenant, query)[: -self._keep]:
            delete(self._registry, place.store, place.tenant, info.artifact_id)

    # --- inside ------------------------------------------------------------------------------

    def _save_by_itself(self, checkpoint: Checkpoint, files: dict[str, Buffer]) -> None:
        with self._beside_training(checkpoint.state.step):
            draft = Draft(self._registry, self._store, self._place.capability, files)
            self.drafts[draft.artifact_id] = draft
            self._publish(draft, checkpoint, AUTOMATIC)
            self.prune()
            self.problem = ""

    @contextmanager
    def _beside_training(self, step: int) -> Iterator[None]:
        """Around an automatic checkpoint: what fails, be it memory, is a warning of a later step.
        This one was made and paid for."""
        try:
            yield
        except Exception as error:
            said = error.message if isinstance(error, TGTinkerError) else type(error).__name__
            self.problem = (
                f"the automatic checkpoint of step {step} failed, training goes on: {said}"
            )

    def _publish(
        self, draft: Draft, checkpoint: Checkpoint, labels: Mapping[str, str] | None = None
    ) -> SaveStateResult:
        """Seals, stores and enters it, beside training."""
        place, state = self._place, checkpoint.state
        try:
            if self._heads is not None:  # first: what an artifact was saved under is on record
                self._heads.keep()
            size, encryption = publish(
                self._registry, self._store, draft, run_id=place.run_id, epoch=place.epoch,
                step=state.step, include_optimizer=state.optimizer is not None, labels=labels,
                write=self._write,
            )  # fmt: skip
        finally:
            del self.drafts[draft.artifact_id]  # and the copy with it
        return SaveStateResult(
            draft.artifact_id, size, encryption, checkpoint.metadata, checkpoint.timestamp
        )
