"""Stores runs: which actor owns a run, its last step, and the artifact it is restored from."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter
from actors.registry.book import Book
from actors.registry.catalogue import last_artifact, resume_point
from actors.registry.database import Database
from actors.registry.lookups import owned
from actors.registry.schema import RUNS
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import ActorLostError, NotFoundError
from tg_tinker.records.report import dataset_of
from tg_tinker.types import CLOSED, NOT_STARTED, PARKED, TrainingClientInfo

# Built once: building a statement in SQLAlchemy takes longer than running it in the database.
_RUN = sa.select(RUNS).where(RUNS.c.id == sa.bindparam("run"))
_SET = RUNS.update().where(RUNS.c.id == sa.bindparam("run"))
_BECAME = {"active": "run.resume", "completed": "run.complete", "failed": "run.fail"}


class Runs:
    """The part of the registry that knows runs, and the newest actor of each run."""

    def __init__(self, database: Database, writer: AuditWriter, book: Book) -> None:
        self._database, self._writer, self._book = database, writer, book

    def create(self, tenant: str, config: str) -> str:
        """Creates a run and returns its id; its epoch is 0 until an actor claims the run."""
        run_id = f"tc-{secrets.token_hex(8)}"
        with self._database.change() as tx:
            tx.execute(
                RUNS.insert().values(
                    id=run_id, tenant=tenant, config=config, status="active", epoch=0, step=0,
                    created_at=time.time(),
                )
            )  # fmt: skip
            self._writer.note(tx, tenant, SDK, "run.create", run_id)
        return run_id

    def claim(self, run_id: str, after: int | None = None) -> int:
        """Claims the next epoch of a run, and returns it. From now on the actors of earlier epochs
        can publish nothing. The run's step becomes that of the artifact from which it is restored.

        Args:
            after: The epoch that the caller found without an actor. If two callers restore a run at
                once, only one of them gets it.

        Raises:
            ActorLostError: Somebody else has claimed the run since, or its artifacts are gone.
        """
        this = RUNS.c.id == run_id
        with self._database.change() as tx:
            run = tx.execute(sa.select(RUNS).where(this)).one()
            if after is not None and run.epoch != after:
                raise ActorLostError(
                    f"{run_id} was taken over by somebody else: use get_training_client to reach"
                    " its new actor"
                )
            epoch, (_, step) = run.epoch + 1, resume_point(tx, run)
            tx.execute(RUNS.update().where(this).values(epoch=epoch, step=step, ended=None))
            self._writer.note(tx, run.tenant, SDK, "run.claim", run_id, {"epoch": epoch})
            return int(epoch)

    def record(
        self, run_id: str, epoch: int, step: int, status: str,
        calls: Sequence[tuple[str, str]] | None = None, left_out: int = 0,
    ) -> bool:  # fmt: skip
        """Records the step and status of a run. A call from an actor of an earlier epoch is
        ignored, and so is a repeat.

        Args:
            calls: The batch hash and gradient hash of each call of the step that was just
                completed; the audit log gets their HMACs. None means that no step was made.
            left_out: The number of steps just before this one whose hashes the actor no longer has.

        Returns:
            Whether the caller is the run's newest actor.
        """
        who = f"{run_id}@{epoch}"
        with self._database.change() as tx:
            run = tx.execute(_RUN, {"run": run_id}).one_or_none()
            if run is not None and run.epoch == epoch:
                tx.execute(_SET, {"run": run_id, "step": step, "status": status})
                if calls is not None and step != run.step:
                    details = self._writer.step_details(run_id, step, calls)
                    details |= {"left_out": left_out} if left_out else {}
                    self._writer.note(tx, run.tenant, who, "step", run_id, details)
                if status != run.status:
                    self._writer.note(tx, run.tenant, who, _BECAME[status], run_id, {"step": step})
        if run is not None and run.epoch != epoch and calls is not None:
            self._writer.note_refusal(run.tenant, who, "step", run_id, ActorLostError.code)
        return run is not None and run.epoch == epoch

    def park(self, run_id: str, epoch: int) -> None:
        """Parks a run: it has no actor until somebody asks for it. The actor that calls this can do
        nothing more, and the budget that the run reserved and has not used is released. A repeat
        changes nothing.

        Raises:
            ActorLostError: The run has a newer actor.
        """
        this = RUNS.c.id == run_id
        with self._database.change() as tx:
            run = tx.execute(sa.select(RUNS).where(this)).one()
            if (run.epoch, run.ended) == (epoch + 1, PARKED):
                return  # A repeat: only the reply was lost.
            check_epoch(tx, run.tenant, run_id, epoch)
            tx.execute(RUNS.update().where(this).values(epoch=epoch + 1, ended=PARKED))
            self._writer.note(
                tx, run.tenant, f"{run_id}@{epoch}", "run.park", run_id, {"step": run.step}
            )
            self._release(tx, run)

    def finish(self, run_id: str, epoch: int, status: str) -> None:
        """Ends a run as `completed` or `failed`. Its last actor can record nothing more, and the
        budget that the run reserved and has not used is released.

        Nothing happens to a run that is parked, or that a newer actor has claimed.
        """
        this = (RUNS.c.id == run_id, RUNS.c.epoch == epoch)
        with self._database.change() as tx:
            run = tx.execute(sa.select(RUNS).where(*this)).one_or_none()
            if run is None:
                return
            ended = CLOSED if status == "completed" else NOT_STARTED
            values = {"status": status, "epoch": epoch + 1, "ended": ended}
            tx.execute(RUNS.update().where(*this).values(values))
            if status != run.status:
                self._writer.note(tx, run.tenant, SDK, _BECAME[status], run_id, {"step": run.step})
            self._release(tx, run)

    def _release(self, tx: sa.Connection, run: Any) -> None:
        """Releases what a run reserved of its dataset's budget and has not used."""
        config = TrainingConfig.model_validate_json(run.config)
        if config.private:
            self._book.release(tx, run.tenant, dataset_of(config), run.id)

    def get(self, tenant: str, run_id: str) -> tuple[TrainingClientInfo, str]:
        """Returns a run, and its configuration as JSON.

        Raises:
            NotFoundError: The tenant has no such run.
        """
        with self._database.reading() as connection:
            row = _run(connection, tenant, run_id)
            return _info(connection, row), row.config

    def resume_point(self, tenant: str, run_id: str) -> tuple[str | None, int]:
        """Returns the artifact from which a run without an actor is restored, and its step. None
        and 0 mean the base model with the run's seed, where it began.

        Raises:
            NotFoundError: The tenant has no such run.
            ActorLostError: The run cannot be restored: its artifacts are gone; or it was closed, or
                never started, and has saved none.
        """
        with self._database.reading() as connection:
            run = _run(connection, tenant, run_id)
            if run.ended is not None and run.resume_from is None:
                raise ActorLostError(
                    f"{run_id} was {run.ended} and saved no artifact: its {run.step} steps are"
                    " lost; create a new client",
                    details={"epoch": run.epoch, "lost_steps": run.step},
                )
            return resume_point(connection, run)

    def of(self, tenant: str) -> list[TrainingClientInfo]:
        """Returns all runs of a tenant, oldest first."""
        query = sa.select(RUNS).where(RUNS.c.tenant == tenant).order_by(RUNS.c.created_at)
        with self._database.reading() as connection:
            return [_info(connection, row) for row in connection.execute(query)]


def check_epoch(tx: sa.Connection, tenant: str, run_id: str, epoch: int) -> None:
    """Refuses an actor that is not the newest actor of its run."""
    run = owned(tx, RUNS, tenant, run_id)
    if run is None:
        raise NotFoundError(f"no training client {run_id!r} of this tenant")
    if run.epoch != epoch:
        raise ActorLostError(
            f"this actor (epoch {epoch}) was replaced by epoch {run.epoch}: it may not charge,"
            " publish or load; use get_training_client to reach the new actor"
        )


def _run(connection: sa.Connection, tenant: str, run_id: str) -> Any:
    """Returns the row of a tenant's run."""
    row = owned(connection, RUNS, tenant, run_id)
    if row is None:
        raise NotFoundError(
            f"no training client {run_id!r}: service.list_training_clients() lists them"
        )
    return row


def _info(connection: sa.Connection, row: Any) -> TrainingClientInfo:
    return TrainingClientInfo(
        training_client_id=row.id,
        status=row.status,
        step=row.step,
        epoch=row.epoch,
        model_ref=json.loads(row.config)["model_ref"],
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        last_artifact_id=last_artifact(connection, row.id),
        reason=row.ended or "",
    )
