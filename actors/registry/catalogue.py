"""Reads the index of artifacts: which exist, where their files are, when they expire, and their
labels.

`artifacts` publishes, reseals and deletes artifacts.

    id          never changes; callers name it, and sealed files and wrapped key are bound to it
    stored_as   name of the folder and the key file in the store: the id, `ID.2` once resealed, ...
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter, Details
from actors.registry.database import Database
from actors.registry.lookups import owned
from actors.registry.schema import ARTIFACTS, LABELS, RUNS
from tg_tinker.errors import ActorLostError, IntegrityError, InvalidRequestError, NotFoundError
from tg_tinker.labels import AVERAGED, check_labels
from tg_tinker.types import ArtifactInfo, ArtifactQuery

NEVER = "never"
"""The text that the audit log has instead of a time if an artifact does not expire."""

EXPIRED = "artifact_expired"
"""The code of the `NotFoundError` that refuses to open an expired artifact."""

_ORDER = (ARTIFACTS.c.created_at, ARTIFACTS.c.id)


class Catalogue:
    """The part of the registry that knows which artifacts exist."""

    def __init__(self, database: Database, writer: AuditWriter) -> None:
        self._database, self._writer = database, writer

    def get(self, tenant: str, artifact_id: str) -> ArtifactInfo:
        """Returns an artifact that is not deleted; it may have expired."""
        with self._database.reading() as connection:
            row = row_of(connection, tenant, artifact_id)
            return _info(row, _labels_of(connection, [row.id]))

    def openable(self, tenant: str, artifact_id: str) -> ArtifactInfo:
        """Returns an artifact that is neither deleted nor expired. Raises NotFoundError, with code
        `artifact_expired` for an expired one."""
        with self._database.reading() as connection:
            row = openable_row(connection, tenant, artifact_id)
            return _info(row, _labels_of(connection, [row.id]))

    def find(
        self, tenant: str, query: ArtifactQuery = ArtifactQuery()  # noqa: B008 - it is frozen
    ) -> list[ArtifactInfo]:  # fmt: skip
        """Returns a tenant's artifacts that match the query and are not deleted, oldest first."""
        with self._database.reading() as connection:
            found = (
                sa.select(ARTIFACTS)
                .where(ARTIFACTS.c.tenant == tenant, *LIVING)
                .where(*_conditions(connection, tenant, query))
                .order_by(*_ORDER)
                .limit(query.limit)
            )
            labels = _labels_of(connection, found.with_only_columns(ARTIFACTS.c.id))
            return [_info(row, labels) for row in connection.execute(found)]

    def all(self) -> list[tuple[str, str, str]]:
        """Returns (tenant, id, name in the store) of every artifact that is not deleted."""
        query = sa.select(ARTIFACTS.c.tenant, ARTIFACTS.c.id, ARTIFACTS.c.stored_as)
        with self._database.reading() as connection:
            rows = connection.execute(query.where(*LIVING))
            return [(row.tenant, row.id, row.stored_as) for row in rows]

    def entries(self, tenant: str) -> dict[str, tuple[str, str]]:
        """Returns manifest digest and expiry, in the audit log's notation, of artifacts that are
        not deleted; by id."""
        query = sa.select(ARTIFACTS).where(ARTIFACTS.c.tenant == tenant, *LIVING)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(*_ORDER))
            return {row.id: (row.manifest_sha256, _until(row.expires_at)) for row in rows}

    def gone(self, artifact_ids: Sequence[str]) -> list[str]:
        """Returns those ids, of any tenant, that nothing may open: deleted, expired or unknown
        artifacts."""
        known = sa.select(ARTIFACTS.c.id).where(ARTIFACTS.c.id.in_(artifact_ids), *LIVING)
        with self._database.reading() as connection:
            there = set(connection.execute(known.where(_unexpired())).scalars())
        return [artifact_id for artifact_id in artifact_ids if artifact_id not in there]

    def check_manifest(self, tenant: str, artifact_id: str, manifest: bytes) -> None:
        """Refuses a manifest that is not the published one, or that belongs to a deleted or expired
        artifact."""
        with self._database.reading() as connection:
            row = openable_row(connection, tenant, artifact_id)
        if digest_of(manifest) != row.manifest_sha256:
            raise IntegrityError(
                f"the manifest of artifact {artifact_id} is not the one that was published"
            )

    def stored_as(self, tenant: str, artifact_id: str) -> str:
        """Returns the name under which the artifact's files and its wrapped key are in the
        store."""
        with self._database.reading() as connection:
            return str(row_of(connection, tenant, artifact_id).stored_as)

    def reachable(self, tenant: str) -> set[str]:
        """Returns the names of folders and wrapped keys in the store that artifacts need."""
        query = sa.select(ARTIFACTS.c.stored_as).where(ARTIFACTS.c.tenant == tenant, *LIVING)
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def reaches(self, tenant: str, name: str) -> bool:
        """Returns whether `reachable` contains this name."""
        with self._database.reading() as connection:
            return reaches(connection, tenant, name)

    # --- labels and expiry -------------------------------------------------------------------

    def set_labels(self, tenant: str, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        """Replaces all labels of an artifact. The audit log records their number only.

        Raises:
            InvalidRequestError: See `check_labels`.
        """
        check_labels(labels)
        rows = label_rows(artifact_id, labels)
        with self._database.change() as tx:
            row_of(tx, tenant, artifact_id)
            tx.execute(LABELS.delete().where(LABELS.c.artifact_id == artifact_id))
            if rows:
                tx.execute(LABELS.insert(), rows)
            self._writer.note(tx, tenant, SDK, "artifact.label", artifact_id, {"labels": len(rows)})
        return self.get(tenant, artifact_id)

    def set_expiry(self, tenant: str, artifact_id: str, when: datetime | None) -> ArtifactInfo:
        """Sets the time until which an artifact may be opened, by the registry's clock. None means
        forever.

        Raises:
            InvalidRequestError: The time is past.
        """
        moment = None if when is None else when.timestamp()
        if moment is not None and moment <= time.time():
            raise InvalidRequestError(
                f"{_at(moment)} is past: name a later time, or delete the artifact"
            )
        with self._database.change() as tx:
            row_of(tx, tenant, artifact_id)
            this = ARTIFACTS.c.id == artifact_id
            tx.execute(ARTIFACTS.update().where(this).values(expires_at=moment))
            details: Details = {"expires_at": _until(moment)}
            self._writer.note(tx, tenant, SDK, "artifact.expiry", artifact_id, details)
        return self.get(tenant, artifact_id)

    def expired(self, tenant: str) -> list[str]:
        """Returns the ids of artifacts that have expired and are not deleted, oldest first."""
        query = sa.select(ARTIFACTS.c.id).where(
            ARTIFACTS.c.tenant == tenant, *LIVING, sa.not_(_unexpired())
        )
        with self._database.reading() as connection:
            return list(connection.execute(query.order_by(*_ORDER)).scalars())


LIVING = (ARTIFACTS.c.deleted_at.is_(None),)


def resume_point(connection: sa.Connection, run: Any) -> tuple[str | None, int]:
    """Returns the artifact from which a run is restored, and its step; (None, 0) means the base
    model.

    It is the artifact that the run saved or loaded last. If that artifact is gone, it is the newest
    one that the run saved. A run that continued from an artifact never restarts from the base
    model.

    Raises:
        ActorLostError: No artifact is left from which the run can be restored.
    """
    if run.resume_from is None:
        return None, 0
    for artifact_id in (run.resume_from, last_artifact(connection, run.id)):
        this = (ARTIFACTS.c.id == artifact_id, ARTIFACTS.c.tenant == run.tenant)
        query = sa.select(ARTIFACTS.c.step).where(*this, *LIVING, _unexpired())
        if (step := connection.execute(query).scalar()) is not None:
            return artifact_id, int(step)
    raise ActorLostError(
        f"{run.id} cannot be restored: the artifacts that it saved or loaded are deleted or"
        " expired. service.set_expiry(id, None), or `tg-tinker artifacts expire --never ID`, makes"
        " an expired artifact usable again; otherwise create a new client",
        details={"epoch": run.epoch},
    )


def last_artifact(connection: sa.Connection, run_id: str) -> str | None:
    """Returns the id of the artifact that a run saved last and that may be opened; None if there is
    none. Averaged weights do not count, because no run resumes from them.

    A copy counts by the time at which its source was saved, so copying an early state loses no
    steps.
    """
    return connection.execute(_LAST, {"run": run_id, "now": time.time()}).scalar_one_or_none()


def _unexpired(now: Any = None) -> sa.ColumnElement[bool]:
    now = time.time() if now is None else now
    return sa.or_(ARTIFACTS.c.expires_at.is_(None), ARTIFACTS.c.expires_at > now)


_RESUMABLE = ~sa.exists().where(LABELS.c.artifact_id == ARTIFACTS.c.id, LABELS.c.name == AVERAGED)

# Built once, see `runs`. It is here because it needs the conditions above.
_LAST = (
    sa.select(ARTIFACTS.c.id)
    .where(
        ARTIFACTS.c.run_id == sa.bindparam("run"),
        *LIVING,
        _RESUMABLE,
        _unexpired(sa.bindparam("now")),
    )
    .order_by(ARTIFACTS.c.saved_at.desc())
    .limit(1)
)


def row_of(connection: sa.Connection, tenant: str, artifact_id: str) -> Any:
    row = owned(connection, ARTIFACTS, tenant, artifact_id)
    if row is None or row.deleted_at is not None:
        raise NotFoundError(f"no artifact {artifact_id!r}: service.list_artifacts() lists them")
    return row


def openable_row(connection: sa.Connection, tenant: str, artifact_id: str) -> Any:
    row = row_of(connection, tenant, artifact_id)
    if row.expires_at is not None and row.expires_at <= time.time():
        raise NotFoundError(
            f"artifact {artifact_id} expired at {_at(row.expires_at)} and can no longer be opened:"
            " service.set_expiry(id, None), or `tg-tinker artifacts expire --never"
            f" {artifact_id}`, keeps it; service.delete_expired(), or `tg-tinker artifacts delete"
            " --expired`, removes it",
            code=EXPIRED,
        )
    return row


def _conditions(
    connection: sa.Connection, tenant: str, query: ArtifactQuery
) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if query.run is not None:
        owned(connection, RUNS, tenant, query.run)
        found.append(ARTIFACTS.c.run_id == query.run)
    if query.label is not None:
        name, value = query.label
        having = sa.select(LABELS.c.artifact_id).where(
            LABELS.c.name == name, LABELS.c.value == value
        )
        found.append(ARTIFACTS.c.id.in_(having))
    if query.newer_than is not None:
        found.append(ARTIFACTS.c.created_at > query.newer_than.timestamp())
    if query.older_than is not None:
        found.append(ARTIFACTS.c.created_at < query.older_than.timestamp())
    if query.after is not None:
        # Deleted artifacts count too: the last one of a page may be deleted before the next page.
        place = owned(connection, ARTIFACTS, tenant, query.after)
        if place is None:
            raise NotFoundError(
                f"no artifact {query.after!r} ever existed: `after` is an artifact's id"
            )
        found.append(sa.tuple_(*_ORDER) > sa.tuple_(place.created_at, place.id))
    return found


def label_rows(artifact_id: str, labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"artifact_id": artifact_id, "name": n, "value": v} for n, v in labels.items()]


def _labels_of(connection: sa.Connection, artifact_ids: Any) -> dict[str, dict[str, str]]:
    """Returns the labels of some artifacts, or of those that a query selects; by id."""
    found: dict[str, dict[str, str]] = {}
    query = sa.select(LABELS).where(LABELS.c.artifact_id.in_(artifact_ids))
    for row in connection.execute(query.order_by(LABELS.c.name)):
        found.setdefault(row.artifact_id, {})[row.name] = row.value
    return found


def _info(row: Any, labels: Mapping[str, dict[str, str]]) -> ArtifactInfo:
    return ArtifactInfo(
        artifact_id=row.id,
        training_client_id=row.run_id,
        step=row.step,
        size_bytes=row.size_bytes,
        include_optimizer=row.include_optimizer,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        labels=labels.get(row.id, {}),
        expires_at=None if row.expires_at is None else datetime.fromtimestamp(row.expires_at, UTC),
    )


def digest_of(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()


def _until(moment: float | None) -> str:
    return NEVER if moment is None else _at(moment)


def _at(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def reaches(connection: sa.Connection, tenant: str, name: str) -> bool:
    """Returns whether an artifact of this tenant needs the folder of this name in the store."""
    query = sa.select(ARTIFACTS.c.id).where(
        ARTIFACTS.c.tenant == tenant, ARTIFACTS.c.stored_as == name, *LIVING
    )
    return connection.execute(query).first() is not None
