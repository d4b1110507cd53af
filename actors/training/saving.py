"""Turns states of a run into artifacts: saves that a client asks for, and automatic saves.

Training waits only until its state is copied. Sealing, storing and registering the copy run beside
training. `actors.artifacts.publish` defines the artifact; the engine defines the state.
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
from tg_tinker.config import AverageKind, CheckpointConfig
from tg_tinker.errors import NotFoundError, TGTinkerError
from tg_tinker.labels import AUTOMATIC, AVERAGED
from tg_tinker.storage.envelope import Buffer
from tg_tinker.types import ArtifactQuery, SaveStateResult

MOST_COPIES = 2
"""The maximum number of states that are copied but not saved yet.

A further save that a client asks for waits, and training waits with it.
"""

KEPT_SAVES = 64
"""The number of saves whose outcome is kept."""


class Schedule:
    """The schedule of automatic saves."""

    def __init__(
        self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = config.every_steps
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._clock = clock
        self.begin_at(0)

    def begin_at(self, step: int) -> None:
        """Counts to the next automatic save from this step, which was just saved or loaded."""
        self._step, self._time = step, self._clock()

    def due(self, step: int) -> bool:
        """Returns whether to save after this step."""
        by_steps = self._steps is not None and step - self._step >= self._steps
        return by_steps or (
            self._seconds is not None and self._clock() - self._time >= self._seconds
        )


class Saver:
    """A queue that saves the states of one run in the order of the calls.

    The training thread calls `begin`, `after_step` and `begin_at`; any thread may call the rest.

    Attributes:
        drafts: states that are being saved, by artifact id; the storage actor reads their files.
        problem: the error of the last automatic save; empty once an automatic save has succeeded.
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
        # One thread, so that saves run in the order of the calls.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._saves: OrderedDict[str, Future[SaveStateResult]] = OrderedDict()
        self._copies = threading.Semaphore(MOST_COPIES)

    def begin(
        self, session: Session, include_optimizer: bool, metadata: dict[str, Any],
        labels: Mapping[str, str] | None = None, average: AverageKind | None = None,
    ) -> Saving:  # fmt: skip
        """Copies the state, starts to save the copy and returns.

        Waits for an earlier save while memory already holds `MOST_COPIES` copies.

        Args:
            average: the kind of average to save for sampling; None saves the state itself.

        Raises:
            InvalidRequestError: see `Session.averaged_state`. Nothing is saved.
        """
        self._copies.acquire()
        try:
            if average is None:
                state = session.live_state(include_optimizer)
            else:
                state, labels = session.averaged_state(average), {AVERAGED: average}
            checkpoint = Checkpoint(state, metadata, datetime.now(UTC))
            files, shown = to_files(checkpoint), self._place.capability
            draft = Draft(self._registry, self._store, shown, files)
            # Before the thread starts, because it looks for the draft.
            self.drafts[draft.artifact_id] = draft
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
        """Returns the outcome of a save; waits for it, or returns None while the save runs.

        Raises:
            NotFoundError: the outcome is no longer kept.
            TGTinkerError: the save failed with this error.
        """
        found = self._saves.get(saving.artifact_id)
        if found is None:
            raise NotFoundError(
                f"the outcome of saving {saving.artifact_id} is no longer kept: see"
                " service.list_artifacts()"
            )
        return found.result() if wait or found.done() else None

    # --- by itself ---------------------------------------------------------------------------

    def begin_at(self, step: int) -> None:
        """Counts to the next automatic save from this step, whose state was loaded."""
        self._schedule.begin_at(step)

    def after_step(self, session: Session) -> None:
        """Makes an automatic save if one is due.

        Everything except the copy runs beside training. No step waits for an automatic save or
        fails with it.
        """
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
        """Deletes the automatic saves of the run, except for the newest ones to keep.

        Artifacts whose automatic label was replaced are not deleted.
        """
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
        """Turns a failure of an automatic checkpoint, even of memory, into a warning.

        A later step returns the warning. The present step does not fail: it was made and paid for.
        """
        try:
            yield
        except Exception as error:
            said = error.message if isinstance(error, TGTinkerError) else type(error).__name__
            self.problem = (
                f"the automatic checkpoint of step {step} failed, training continues: {said}"
            )

    def _publish(
        self, draft: Draft, checkpoint: Checkpoint, labels: Mapping[str, str] | None = None
    ) -> SaveStateResult:
        """Seals, stores and registers an artifact, beside training."""
        place, state = self._place, checkpoint.state
        try:
            # First, so that the store has the ledger head that the artifact was saved under.
            if self._heads is not None:
                self._heads.keep()
            size, encryption = publish(
                self._registry, self._store, draft, run_id=place.run_id, epoch=place.epoch,
                step=state.step, include_optimizer=state.optimizer is not None, labels=labels,
                write=self._write,
            )  # fmt: skip
        finally:
            del self.drafts[draft.artifact_id]  # This also releases the copy.
        return SaveStateResult(
            draft.artifact_id, size, encryption, checkpoint.metadata, checkpoint.timestamp
        )
