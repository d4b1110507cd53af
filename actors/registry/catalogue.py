"""The catalogue of artifacts: which there are, where their files lie, until when they may be
opened, and under which labels. `artifacts` enters, reseals and deletes them.

    id          for ever; what callers name, and what sealed files and wrapped key are bound to
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
from actors.registry.schema import ARTIFACTS, LABELS
from tg_tinker.errors import ActorLostError, IntegrityError, InvalidRequestError, NotFoundError
from tg_tinker.labels import check_labels
from tg_tinker.types import ArtifactInfo, ArtifactQuery

NEVER = "never"
"""What the audit log has in the place of a time where an artifact does not expire."""

EXPIRED = "artifact_expired"
"""The code of the `NotFoundError` that refuses to open one."""

_ORDER = (ARTIFACTS.c.created_at, ARTIFACTS.c.id)


class Catalogue:
    """The part of the registry that answers what artifacts there are."""

    def __init__(self, database: Database, writer: AuditWriter) -> None:
        self._database, self._writer = database, writer

    def get(self, tenant: str, artifact_id: str) -> ArtifactInfo:
        """One that is not deleted; it may have expired."""
        with self._database.reading() as connection:
            row = row_of(connection, tenant, artifact_id)
            return _info(row, _labels_of(connection, [row.id]))

    def openable(self, tenant: str, artifact_id: str) -> ArtifactInfo:
        """The same; raises NotFoundError, code `artifact_expired`, where its time is over."""
        with self._database.reading() as connection:
            row = openable_row(connection, tenant, artifact_id)
            return _info(row, _labels_of(connection, [row.id]))

    def find(
        self, tenant: str, query: ArtifactQuery = ArtifactQuery()  # noqa: B008 - it is frozen
    ) -> list[ArtifactInfo]:  # fmt: skip
        """Those of a tenant that fit and are not deleted, oldest first."""
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
        """(tenant, id, name in the store) of every artifact that is not deleted."""
        query = sa.select(ARTIFACTS.c.tenant, ARTIFACTS.c.id, ARTIFACTS.c.stored_as)
        with self._database.reading() as connection:
            rows = connection.execute(query.where(*LIVING))
            return [(row.tenant, row.id, row.stored_as) for row in rows]

    def entries(self, tenant: str) -> dict[str, tuple[str, str]]:
        """Manifest digest and expiry, as the audit log has them, of those not deleted, by id."""
        query = sa.select(ARTIFACTS).where(ARTIFACTS.c.tenant == tenant, *LIVING)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(*_ORDER))
            return {row.id: (row.manifest_sha256, _until(row.expires_at)) for row in rows}

    def gone(self, artifact_ids: Sequence[str]) -> list[str]:
        """Those of any tenant that nothing may open (any more): deleted, expired or unknown."""
        known = sa.select(ARTIFACTS.c.id).where(ARTIFACTS.c.id.in_(artifact_ids), *LIVING)
        with self._database.reading() as connection:
            there = set(connection.execute(known.where(_unexpired())).scalars())
        return [artifact_id for artifact_id in artifact_ids if artifact_id not in there]

    def check_manifest(self, tenant: str, artifact_id: str, manifest: bytes) -> None:
        """Refuses a manifest that is not the published one, or of a deleted or expired artifact."""
        with self._database.reading() as connection:
            row = openable_row(connection, tenant, artifact_id)
        if digest_of(manifest) != row.manifest_sha256:
            raise IntegrityError(
                f"the manifest of artifact {artifact_id} is not the one that was published"
            )

    def stored_as(self, tenant: str, artifact_id: str) -> str:
        """The name under which its files and its wrapped key lie in the store."""
        with self._database.reading() as connection:
            return str(row_of(connection, tenant, artifact_id).stored_as)

    def reachable(self, tenant: str) -> set[str]:
        """Names of folders in the store, and of wrapped keys, that artifacts need."""
        query = sa.select(ARTIFACTS.c.stored_as).where(ARTIFACTS.c.tenant == tenant, *LIVING)
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def reaches(self, tenant: str, name: str) -> bool:
        """Whether `reachable` has this name."""
        with self._database.reading() as connection:
            return reaches(connection, tenant, name)

    # --- labels and expiry -------------------------------------------------------------------

    def set_labels(self, tenant: str, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        """Puts these labels in the place of those that it has. The audit log says how many.

        Raises:
            InvalidRequestError: see `check_labels`.
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
        """Until when it may be opened, by the registry's clock; None is for ever.

        Raises:
            InvalidRequestError: a time that is past.
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
        """Ids of those whose time is over and that are still there."""
        query = sa.select(ARTIFACTS.c.id).where(
            ARTIFACTS.c.tenant == tenant, *LIVING, sa.not_(_unexpired())
        )
        with self._database.reading() as connection:
            return list(connection.execute(query.order_by(*_ORDER)).scalars())


LIVING = (ARTIFACTS.c.deleted_at.is_(None),)


def resume_point(connection: sa.Connection, run: Any) -> tuple[str | None, int]:
    """The artifact that a run comes back from, and its step; (None, 0) is the base model.

    What it saved or loaded last. Where that is gone, the newest that it saved: of a run that went
    on from an artifact the base model is not the beginning.

    Raises:
        ActorLostError: nothing is left that it can come back from.
    """
    if run.resume_from is None:
        return None, 0
    for artifact_id in (run.resume_from, last_artifact(connection, run.id)):
        this = (ARTIFACTS.c.id == artifact_id, ARTIFACTS.c.tenant == run.tenant)
        query = sa.select(ARTIFACTS.c.step).where(*this, *LIVING, _unexpired())
        if (step := connection.execute(query).scalar()) is not None:
            return artifact_id, int(step)
    raise ActorLostError(
        f"{run.id} cannot come back: the artifacts that it saved or loaded are deleted or expired."
        " service.set_expiry(id, None), or `tg-tinker artifacts expire --never ID`, opens one that"
        " has expired again; else create a new client",
        details={"epoch": run.epoch},
    )


def last_artifact(connection: sa.Connection, run_id: str) -> str | None:
    """What a run comes back from: saved last among those that may be opened.

    A copy counts by when its source was saved: copying an early state loses no steps.
    """
    return connection.execute(_LAST, {"run": run_id, "now": time.time()}).scalar_one_or_none()


def _unexpired(now: Any = None) -> sa.ColumnElement[bool]:
    now = time.time() if now is None else now
    return sa.or_(ARTIFACTS.c.expires_at.is_(None), ARTIFACTS.c.expires_at > now)


# Made once, see `runs`; at the end, since it needs the conditions above.
_LAST = (
    sa.select(ARTIFACTS.c.id)
    .where(ARTIFACTS.c.run_id == sa.bindparam("run"), *LIVING, _unexpired(sa.bindparam("now")))
    .order_by(ARTIFACTS.c.saved_at.desc())
    .limit(1)
)


def row_of(connection: sa.Connection, tenant: str, artifact_id: str) -> Any:
    query = sa.select(ARTIFACTS).where(
        ARTIFACTS.c.id == artifact_id, ARTIFACTS.c.tenant == tenant, *LIVING
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no artifact {artifact_id!r}: service.list_artifacts() names them")
    return row


def openable_row(connection: sa.Connection, tenant: str, artifact_id: str) -> Any:
    row = row_of(connection, tenant, artifact_id)
    if row.expires_at is not None and row.expires_at <= time.time():
        raise NotFoundError(
            f"artifact {artifact_id} expired at {_at(row.expires_at)} and is not opened any more:"
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
        place = connection.execute(
            sa.select(*_ORDER).where(
                ARTIFACTS.c.id == query.after, ARTIFACTS.c.tenant == tenant
            )  # deleted ones too: a page may end with one that is deleted before the next is read
        ).one_or_none()
        if place is None:
            raise NotFoundError(f"no artifact {query.after!r} ever: `after` is the last one's id")
        found.append(sa.tuple_(*_ORDER) > sa.tuple_(*place))
    return found


def label_rows(artifact_id: str, labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"artifact_id": artifact_id, "name": n, "value": v} for n, v in labels.items()]


def _labels_of(connection: sa.Connection, artifact_ids: Any) -> dict[str, dict[str, str]]:
    """Of some artifacts, or of those that a query selects."""
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


def tenant_of_artifact(connection: sa.Connection, artifact_id: str) -> str | None:
    """Returns the owner's tenant, or None if the artifact never existed; a deleted one has one."""
    query = sa.select(ARTIFACTS.c.tenant).where(ARTIFACTS.c.id == artifact_id)
    return connection.execute(query).scalar()


def reaches(connection: sa.Connection, tenant: str, name: str) -> bool:
    """Whether an artifact of this tenant needs the folder of this name in the store."""
    query = sa.select(ARTIFACTS.c.id).where(
        ARTIFACTS.c.tenant == tenant, ARTIFACTS.c.stored_as == name, *LIVING
    )
    return connection.execute(query).first() is not None
