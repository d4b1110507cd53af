"""The index of artifacts: which there are, where their files lie, until when, and under which
labels. Each change is one transaction with its row of the audit log.

    id          for ever; what callers name, and what sealed files and wrapped key are bound to
    stored_as   name of the folder and the key file in the store: the id, `ID.2` once resealed, ...

A name in the store is given out once: two that reseal at the same time never meet in a folder,
and what one of them left behind is nobody's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import SDK, Details
from actors.registry.database import METADATA, RUNS, check_epoch
from actors.registry.orphans import Orphans
from tg_tinker.cluster.messages import ArtifactQuery
from tg_tinker.errors import (
    ActorLostError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
)
from tg_tinker.labels import check_labels
from tg_tinker.types import ArtifactInfo

NEVER = "never"
"""What the audit log has in the place of a time where an artifact does not expire."""

EXPIRED = "artifact_expired"
"""The code of the `NotFoundError` that refuses to open one."""

_artifacts = sa.Table(
    "artifacts",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("include_optimizer", sa.Boolean, nullable=False),
    sa.Column("manifest_sha256", sa.String, nullable=False),
    sa.Column("stored_as", sa.String, nullable=False),
    sa.Column("names_given", sa.Integer, nullable=False),  # of folders, the id among them
    sa.Column("saved_at", sa.Float, nullable=False),  # of a copy: when its source was saved
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("deleted_at", sa.Float),
)
_labels = sa.Table(
    "artifact_labels",
    METADATA,
    sa.Column("artifact_id", sa.String, sa.ForeignKey("artifacts.id"), primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
_ORDER = (_artifacts.c.created_at, _artifacts.c.id)


class ArtifactIndex(Orphans):
    """The part of the registry that knows artifacts."""

    # --- entries -----------------------------------------------------------------------------

    def publish(
        self, tenant: str, run_id: str, epoch: int, artifact_id: str, step: int,
        size_bytes: int, include_optimizer: bool, manifest: bytes, key_id: str,
        labels: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Enters an artifact whose files are all in the store; a repeat changes nothing.

        Args:
            key_id: of the tenant key that its data key is wrapped under.
            labels: that it is born with.

        Raises:
            ActorLostError: the run has a newer actor; this one may publish nothing.
            StorageError: a sweep removes its files, or its tenant key was retired meanwhile.
        """
        who = f"{run_id}@{epoch}"
        with (
            self._refusals_noted(tenant, who, "artifact.save", artifact_id),
            self._change() as tx,
        ):
            if _is_entered(tx, tenant, artifact_id, artifact_id, manifest):
                return
            check_epoch(tx, tenant, run_id, epoch)
            self._refuse_buried(tx, tenant, artifact_id)
            self._refuse_retired(key_id)
            now, digest = _now(), _digest(manifest)
            tx.execute(
                _artifacts.insert().values(
                    id=artifact_id, tenant=tenant, run_id=run_id, step=step,
                    size_bytes=size_bytes, include_optimizer=include_optimizer,
                    manifest_sha256=digest, stored_as=artifact_id, names_given=1, saved_at=now,
                    created_at=now,
                )
            )  # fmt: skip
            if labels:
                tx.execute(_labels.insert(), _label_rows(artifact_id, labels))
            _comes_back_from(tx, run_id, artifact_id)
            details: Details = {"step": step, "size_bytes": size_bytes, "manifest": digest}
            self._note(tx, tenant, who, "artifact.save", artifact_id, details)

    def note_loaded(self, tenant: str, run_id: str, epoch: int, artifact_id: str) -> None:
        """From now on a lost actor of this run comes back from an artifact that it has loaded.

        Raises:
            ActorLostError: the run has a newer actor.
        """
        with self._change() as tx:
            check_epoch(tx, tenant, run_id, epoch)
            _comes_back_from(tx, run_id, artifact_id)

    def publish_copy(
        self, tenant: str, source_id: str, artifact_id: str, size_bytes: int, manifest: bytes,
        key_id: str,
    ) -> ArtifactInfo:  # fmt: skip
        """Enters a copy whose files are all in the store: of the same run, step and time of saving.
        A repeat changes nothing.

        Raises:
            NotFoundError: the source was deleted meanwhile, or has expired.
            StorageError: see `publish`.
        """
        with self._change() as tx:
            if _is_entered(tx, tenant, artifact_id, artifact_id, manifest):
                return self.artifact(tenant, artifact_id)
            self._refuse_buried(tx, tenant, artifact_id)
            self._refuse_retired(key_id)
            source, digest = _openable(tx, tenant, source_id), _digest(manifest)
            kept = ("run_id", "step", "include_optimizer", "saved_at")
            tx.execute(
                _artifacts.insert().values(
                    id=artifact_id, tenant=tenant, size_bytes=size_bytes, manifest_sha256=digest,
                    stored_as=artifact_id, names_given=1, created_at=_now(),
                    **{name: getattr(source, name) for name in kept},
                )
            )  # fmt: skip
            details: Details = {
                "source": source_id, "step": source.step, "size_bytes": size_bytes,
                "manifest": digest,
            }  # fmt: skip
            self._note(tx, tenant, SDK, "artifact.copy", artifact_id, details)
        return self.artifact(tenant, artifact_id)

    def _refuse_retired(self, key_id: str) -> None:
        """A key that was retired counted the artifacts under it before this one was entered."""
        if key_id not in self._keyring.key_ids:
            raise StorageError(
                f"tenant key {key_id!r} was retired while the artifact was saved, and nothing opens"
                " it any more: save again"
            )

    def delete_artifact(self, tenant: str, artifact_id: str, event: str = "artifact.delete") -> str:
        """Marks it deleted, for good: an old copy of its files is refused from now on.

        Returns:
            The name of what is to be removed from the store.
        """
        this = _artifacts.c.id == artifact_id
        with self._change() as tx:
            row = _row(tx, tenant, artifact_id)
            tx.execute(_artifacts.update().where(this).values(deleted_at=time.time()))
            tx.execute(_labels.delete().where(_labels.c.artifact_id == artifact_id))
            self._note(tx, tenant, SDK, event, artifact_id)
        return str(row.stored_as)

    # --- resealing ---------------------------------------------------------------------------

    def begin_reseal(self, tenant: str, artifact_id: str) -> str:
        """A name in the store that nothing had before, for the new files."""
        with self._change() as tx:
            given = _row(tx, tenant, artifact_id).names_given + 1
            this = _artifacts.c.id == artifact_id
            tx.execute(_artifacts.update().where(this).values(names_given=given))
        return f"{artifact_id}.{given}"

    def finish_reseal(
        self, tenant: str, artifact_id: str, before: str, stored_as: str, size_bytes: int,
        manifest: bytes, key_id: str,
    ) -> ArtifactInfo:  # fmt: skip
        """From now on the artifact is what lies under another name, complete and checked. A repeat
        changes nothing.

        Args:
            before: the name whose files were resealed.
            key_id: of the tenant key that the new data key is wrapped under.

        Raises:
            NotFoundError: it was deleted meanwhile, or has expired.
            InvalidRequestError: somebody else has resealed it, or rotated the tenant key: under an
                older one it would be lost when that is retired.
            StorageError: a sweep removes the new files.
        """
        with (
            self._refusals_noted(tenant, SDK, "artifact.reseal", artifact_id),
            self._change() as tx,
        ):
            if _is_entered(tx, tenant, artifact_id, stored_as, manifest):
                return self.artifact(tenant, artifact_id)
            if _openable(tx, tenant, artifact_id).stored_as != before:
                raise InvalidRequestError(
                    f"artifact {artifact_id} was resealed by somebody else at the same time: it is"
                    " under a fresh key; repeat the call for another one"
                )
            if key_id != self._keyring.primary:
                raise InvalidRequestError(
                    f"the tenant key was rotated while artifact {artifact_id} was resealed: it is"
                    " as it was; repeat the call"
                )
            self._refuse_buried(tx, tenant, stored_as)
            self._switch(tx, tenant, artifact_id, stored_as, size_bytes, manifest)
        return self.artifact(tenant, artifact_id)

    def _adopt(
        self, tenant: str, artifact_id: str, stored_as: str, size_bytes: int, manifest: bytes
    ) -> None:
        """`finish_reseal` of files that a lost database knew. It is not opened, so it may have
        expired."""
        with self._change() as tx:
            given = max(_row(tx, tenant, artifact_id).names_given, _number(stored_as))
            this = _artifacts.c.id == artifact_id
            tx.execute(_artifacts.update().where(this).values(names_given=given))
            self._refuse_buried(tx, tenant, stored_as)
            self._switch(tx, tenant, artifact_id, stored_as, size_bytes, manifest)

    def _switch(
        self, tx: sa.Connection, tenant: str, artifact_id: str, stored_as: str, size_bytes: int,
        manifest: bytes,
    ) -> None:  # fmt: skip
        digest = _digest(manifest)
        values = {"stored_as": stored_as, "size_bytes": size_bytes, "manifest_sha256": digest}
        tx.execute(_artifacts.update().where(_artifacts.c.id == artifact_id).values(values))
        details: Details = {"stored_as": stored_as, "size_bytes": size_bytes, "manifest": digest}
        self._note(tx, tenant, SDK, "artifact.reseal", artifact_id, details)

    def stored_as(self, tenant: str, artifact_id: str) -> str:
        """The name under which its files and its wrapped key lie in the store."""
        with self._reading() as connection:
            return str(_row(connection, tenant, artifact_id).stored_as)

    def reachable(self, tenant: str) -> set[str]:
        """Names of folders in the store, and of wrapped keys, that artifacts need."""
        query = sa.select(_artifacts.c.stored_as).where(_artifacts.c.tenant == tenant, *_LIVING)
        with self._reading() as connection:
            return set(connection.execute(query).scalars())

    def reaches(self, tenant: str, name: str) -> bool:
        """Whether `reachable` has this name."""
        with self._reading() as connection:
            return self._reaches(connection, tenant, name)

    # --- looking -----------------------------------------------------------------------------

    def artifact(self, tenant: str, artifact_id: str) -> ArtifactInfo:
        """One that is not deleted; it may have expired."""
        with self._reading() as connection:
            row = _row(connection, tenant, artifact_id)
            return _info(row, _labels_of(connection, [row.id]))

    def openable(self, tenant: str, artifact_id: str) -> ArtifactInfo:
        """The same; raises NotFoundError, code `artifact_expired`, where its time is over."""
        with self._reading() as connection:
            row = _openable(connection, tenant, artifact_id)
            return _info(row, _labels_of(connection, [row.id]))

    def artifacts(
        self, tenant: str, query: ArtifactQuery = ArtifactQuery()  # noqa: B008 - it is frozen
    ) -> list[ArtifactInfo]:  # fmt: skip
        """Those of a tenant that fit and are not deleted, oldest first."""
        with self._reading() as connection:
            found = (
                sa.select(_artifacts)
                .where(_artifacts.c.tenant == tenant, *_LIVING)
                .where(*_conditions(connection, tenant, query))
                .order_by(*_ORDER)
                .limit(query.limit)
            )
            labels = _labels_of(connection, found.with_only_columns(_artifacts.c.id))
            return [_info(row, labels) for row in connection.execute(found)]

    def all_artifacts(self) -> list[tuple[str, str, str]]:
        """(tenant, id, name in the store) of every artifact that is not deleted."""
        query = sa.select(_artifacts.c.tenant, _artifacts.c.id, _artifacts.c.stored_as)
        with self._reading() as connection:
            rows = connection.execute(query.where(*_LIVING))
            return [(row.tenant, row.id, row.stored_as) for row in rows]

    def entries(self, tenant: str) -> dict[str, tuple[str, str]]:
        """Manifest digest and expiry, as the audit log has them, of those not deleted, by id."""
        query = sa.select(_artifacts).where(_artifacts.c.tenant == tenant, *_LIVING)
        with self._reading() as connection:
            rows = connection.execute(query.order_by(*_ORDER))
            return {row.id: (row.manifest_sha256, _until(row.expires_at)) for row in rows}

    def gone(self, artifact_ids: Sequence[str]) -> list[str]:
        """Those of any tenant that nothing may open (any more): deleted, expired or unknown."""
        known = sa.select(_artifacts.c.id).where(_artifacts.c.id.in_(artifact_ids), *_LIVING)
        with self._reading() as connection:
            there = set(connection.execute(known.where(_unexpired())).scalars())
        return [artifact_id for artifact_id in artifact_ids if artifact_id not in there]

    def check_manifest(self, tenant: str, artifact_id: str, manifest: bytes) -> None:
        """Refuses a manifest that is not the published one, or of a deleted or expired artifact."""
        with self._reading() as connection:
            row = _openable(connection, tenant, artifact_id)
        if _digest(manifest) != row.manifest_sha256:
            raise IntegrityError(
                f"the manifest of artifact {artifact_id} is not the one that was published"
            )

    # --- labels and expiry -------------------------------------------------------------------

    def set_labels(self, tenant: str, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        """Puts these labels in the place of those that it has. The audit log says how many.

        Raises:
            InvalidRequestError: see `check_labels`.
        """
        check_labels(labels)
        rows = _label_rows(artifact_id, labels)
        with self._change() as tx:
            _row(tx, tenant, artifact_id)
            tx.execute(_labels.delete().where(_labels.c.artifact_id == artifact_id))
            if rows:
                tx.execute(_labels.insert(), rows)
            self._note(tx, tenant, SDK, "artifact.label", artifact_id, {"labels": len(rows)})
        return self.artifact(tenant, artifact_id)

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
        with self._change() as tx:
            _row(tx, tenant, artifact_id)
            this = _artifacts.c.id == artifact_id
            tx.execute(_artifacts.update().where(this).values(expires_at=moment))
            details: Details = {"expires_at": _until(moment)}
            self._note(tx, tenant, SDK, "artifact.expiry", artifact_id, details)
        return self.artifact(tenant, artifact_id)

    def expired(self, tenant: str) -> list[str]:
        """Ids of those whose time is over and that are still there."""
        query = sa.select(_artifacts.c.id).where(
            _artifacts.c.tenant == tenant, *_LIVING, sa.not_(_unexpired())
        )
        with self._reading() as connection:
            return list(connection.execute(query.order_by(*_ORDER)).scalars())

    # --- inside ------------------------------------------------------------------------------

    def _reaches(self, connection: sa.Connection, tenant: str, name: str) -> bool:
        query = sa.select(_artifacts.c.id).where(
            _artifacts.c.tenant == tenant, _artifacts.c.stored_as == name, *_LIVING
        )
        return connection.execute(query).first() is not None

    def _tenant_of_artifact(self, artifact_id: str) -> str | None:
        """Of one that is deleted, too."""
        query = sa.select(_artifacts.c.tenant).where(_artifacts.c.id == artifact_id)
        with self._reading() as connection:
            return connection.execute(query).scalar()


_LIVING = (_artifacts.c.deleted_at.is_(None),)


def _comes_back_from(tx: sa.Connection, run_id: str, artifact_id: str) -> None:
    tx.execute(RUNS.update().where(RUNS.c.id == run_id).values(resume_from=artifact_id))


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
        this = (_artifacts.c.id == artifact_id, _artifacts.c.tenant == run.tenant)
        query = sa.select(_artifacts.c.step).where(*this, *_LIVING, _unexpired())
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


def _is_entered(
    tx: sa.Connection, tenant: str, artifact_id: str, stored_as: str, manifest: bytes
) -> bool:
    """Whether these very files are the artifact already, and only the answer was lost."""
    this = (_artifacts.c.id == artifact_id, _artifacts.c.tenant == tenant, *_LIVING)
    files = (_artifacts.c.stored_as == stored_as, _artifacts.c.manifest_sha256 == _digest(manifest))
    return tx.execute(sa.select(_artifacts.c.id).where(*this, *files)).first() is not None


def _unexpired(now: Any = None) -> sa.ColumnElement[bool]:
    now = time.time() if now is None else now
    return sa.or_(_artifacts.c.expires_at.is_(None), _artifacts.c.expires_at > now)


# Made once, see `registry`; at the end, since it needs the conditions above.
_LAST = (
    sa.select(_artifacts.c.id)
    .where(_artifacts.c.run_id == sa.bindparam("run"), *_LIVING, _unexpired(sa.bindparam("now")))
    .order_by(_artifacts.c.saved_at.desc())
    .limit(1)
)


def _row(connection: sa.Connection, tenant: str, artifact_id: str) -> Any:
    query = sa.select(_artifacts).where(
        _artifacts.c.id == artifact_id, _artifacts.c.tenant == tenant, *_LIVING
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no artifact {artifact_id!r}: service.list_artifacts() names them")
    return row


def _openable(connection: sa.Connection, tenant: str, artifact_id: str) -> Any:
    row = _row(connection, tenant, artifact_id)
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
        found.append(_artifacts.c.run_id == query.run)
    if query.label is not None:
        name, value = query.label
        having = sa.select(_labels.c.artifact_id).where(
            _labels.c.name == name, _labels.c.value == value
        )
        found.append(_artifacts.c.id.in_(having))
    if query.newer_than is not None:
        found.append(_artifacts.c.created_at > query.newer_than.timestamp())
    if query.older_than is not None:
        found.append(_artifacts.c.created_at < query.older_than.timestamp())
    if query.after is not None:
        place = connection.execute(
            sa.select(*_ORDER).where(
                _artifacts.c.id == query.after, _artifacts.c.tenant == tenant
            )  # deleted ones too: a page may end with one that is deleted before the next is read
        ).one_or_none()
        if place is None:
            raise NotFoundError(f"no artifact {query.after!r} ever: `after` is the last one's id")
        found.append(sa.tuple_(*_ORDER) > sa.tuple_(*place))
    return found


def _label_rows(artifact_id: str, labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"artifact_id": artifact_id, "name": n, "value": v} for n, v in labels.items()]


def _labels_of(connection: sa.Connection, artifact_ids: Any) -> dict[str, dict[str, str]]:
    """Of some artifacts, or of those that a query selects."""
    found: dict[str, dict[str, str]] = {}
    query = sa.select(_labels).where(_labels.c.artifact_id.in_(artifact_ids))
    for row in connection.execute(query.order_by(_labels.c.name)):
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


def _number(stored_as: str) -> int:
    """Of the name that a resealed artifact has in the store."""
    return int(stored_as.rpartition(".")[2])


def _now() -> float:
    """In whole microseconds, which a `datetime` holds: who lists up to one's time leaves it out."""
    return round(time.time(), 6)


def _digest(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()


def _until(moment: float | None) -> str:
    return NEVER if moment is None else _at(moment)


def _at(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
