"""Runs in the registry: who acts for one, how far it is, and where it comes back from."""

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
from actors.registry.schema import RUNS
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import ActorLostError, NotFoundError
from tg_tinker.records.report import dataset_of
from tg_tinker.types import CLOSED, NOT_STARTED, PARKED, TrainingClientInfo

# Made once: SQLAlchemy takes longer to put a statement together than the database to run it.
_RUN = sa.select(RUNS).where(RUNS.c.id == sa.bindparam("run"))
_SET = RUNS.update().where(RUNS.c.id == sa.bindparam("run"))
_BECAME = {"active": "run.resume", "completed": "run.complete", "failed": "run.fail"}


class Runs:
    """The part of the registry that knows runs, and which actor is the newest of each."""

    def __init__(self, database: Database, writer: AuditWriter, book: Book) -> None:
        self._database, self._writer, self._book = database, writer, book

    def create(self, tenant: str, config: str) -> str:
        """A new run id; its epoch is 0 until an actor claims it."""
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
        """The next epoch of a run: from now on the actors of earlier ones can publish nothing, and
        the run is at the step that it comes back in.

        Args:
            after: the epoch that whoever claims has found without an actor. Of two that bring a
                run back at once, one gets it.

        Raises:
            ActorLostError: somebody else claimed it since, or its artifacts are gone.
        """
        this = RUNS.c.id == run_id
        with self._database.change() as tx:
            run = tx.execute(sa.select(RUNS).where(this)).one()
            if after is not None and run.epoch != after:
                raise ActorLostError(
                    f"{run_id} was taken over by somebody else: reach its new actor"
                )
            epoch, (_, step) = run.epoch + 1, resume_point(tx, run)
            tx.execute(RUNS.update().where(this).values(epoch=epoch, step=step, ended=None))
            self._writer.note(tx, run.tenant, SDK, "run.claim", run_id, {"epoch": epoch})
            return int(epoch)

    def record(
        self, run_id: str, epoch: int, step: int, status: str,
        calls: Sequence[tuple[str, str]] | None = None, left_out: int = 0,
    ) -> bool:  # fmt: skip
        """Notes how far a run is; an actor of an earlier epoch is ignored, and so is a repeat.

        Args:
            calls: (batch hash, gradient hash) of each call of the step that was just completed;
                the audit log gets their HMACs. None where no step was made.
            left_out: steps just before this one that the actor has no hashes of any more.

        Returns:
            Whether it is the run's newest actor.
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
        """The run has no actor until it is asked for; the one that says so can do nothing more.
        Again it changes nothing.

        Raises:
            ActorLostError: the run has a newer actor.
        """
        this = RUNS.c.id == run_id
        with self._database.change() as tx:
            run = tx.execute(sa.select(RUNS).where(this)).one()
            if (run.epoch, run.ended) == (epoch + 1, PARKED):
                return  # only the answer was lost
            check_epoch(tx, run.tenant, run_id, epoch)
            tx.execute(RUNS.update().where(this).values(epoch=epoch + 1, ended=PARKED))
            self._writer.note(
                tx, run.tenant, f"{run_id}@{epoch}", "run.park", run_id, {"step": run.step}
            )

    def finish(self, run_id: str, epoch: int, status: str) -> None:
        """Ends a run as `completed` or `failed`; its last actor can note nothing more, and what it
        planned and has not used of a budget is free.

        Nothing happens to a run that is parked, or that a newer actor has taken over since.
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
            config = TrainingConfig.model_validate_json(run.config)
            if config.private:
                self._book.release(tx, run.tenant, dataset_of(config), run_id)

    def get(self, tenant: str, run_id: str) -> tuple[TrainingClientInfo, str]:
        """A run and its configuration as JSON.

        Raises:
            NotFoundError: this tenant has no such run.
        """
        with self._database.reading() as connection:
            row = _run(connection, tenant, run_id)
            return _info(connection, row), row.config

    def resume_point(self, tenant: str, run_id: str) -> tuple[str | None, int]:
        """The artifact that a run without an actor comes back from, and its step; None is the base
        model with the seed of the run, where it began.

        Raises:
            NotFoundError: this tenant has no such run.
            ActorLostError: it cannot come back: its artifacts are gone, or it was closed, or never
                started, without one.
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
        """All runs of a tenant, oldest first."""
        query = sa.select(RUNS).where(RUNS.c.tenant == tenant).order_by(RUNS.c.created_at)
        with self._database.reading() as connection:
            return [_info(connection, row) for row in connection.execute(query)]


def check_epoch(tx: sa.Connection, tenant: str, run_id: str, epoch: int) -> None:
    """Refuses an actor that is not its run's newest one."""
    current = tx.execute(
        sa.select(RUNS.c.epoch).where(RUNS.c.id == run_id, RUNS.c.tenant == tenant)
    ).scalar()
    if current is None:
        raise NotFoundError(f"no training client {run_id!r} of this tenant")
    if current != epoch:
        raise ActorLostError(
            f"this actor (epoch {epoch}) was replaced by epoch {current}: it may not charge,"
            " publish or load; use get_training_client to reach the new one"
        )


def _run(connection: sa.Connection, tenant: str, run_id: str) -> Any:
    """The row of a tenant's run."""
    row = connection.execute(_RUN, {"run": run_id}).one_or_none()
    if row is None or row.tenant != tenant:
        raise NotFoundError(
            f"no training client {run_id!r}: service.list_training_clients() names them"
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
