"""Publishes, reseals and deletes artifacts: each change is one transaction with its audit row.

`catalogue` reads which artifacts exist. A name in the store is given out only once. Two callers
that reseal an artifact at the same time therefore never write to the same folder, and a folder that
one of them leaves behind belongs to no artifact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter, Details
from actors.registry.catalogue import (
    Catalogue,
    digest_of,
    label_rows,
    openable_row,
    row_of,
)
from actors.registry.database import Database
from actors.registry.lookups import owned
from actors.registry.orphans import refuse_buried
from actors.registry.runs import check_epoch
from actors.registry.schema import ARTIFACTS, LABELS, RUNS
from actors.storage.key_providers import KeyProvider
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError
from tg_tinker.labels import AVERAGED
from tg_tinker.types import ArtifactInfo


class Artifacts:
    """The part of the registry that changes which artifacts exist."""

    def __init__(
        self, database: Database, writer: AuditWriter, catalogue: Catalogue, keyring: KeyProvider
    ) -> None:
        self._database, self._writer = database, writer
        self._catalogue, self._keyring = catalogue, keyring

    def publish(
        self, tenant: str, run_id: str, epoch: int, artifact_id: str, step: int,
        size_bytes: int, include_optimizer: bool, manifest: bytes, key_id: str,
        labels: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Adds an artifact whose files are all in the store. A repeat changes nothing.

        Args:
            key_id: The id of the tenant key that wraps the artifact's data key.
            labels: The labels of the new artifact.

        Raises:
            ActorLostError: The run has a newer actor; this actor may publish nothing.
            StorageError: A sweep removes the files, or the tenant key was retired meanwhile.
        """
        who = f"{run_id}@{epoch}"
        with (
            self._writer.refusals(tenant, who, "artifact.save", artifact_id),
            self._database.change() as tx,
        ):
            if _is_entered(tx, tenant, artifact_id, artifact_id, manifest):
                return
            check_epoch(tx, tenant, run_id, epoch)
            refuse_buried(tx, tenant, artifact_id)
            self._refuse_retired(key_id)
            now, digest = _now(), digest_of(manifest)
            tx.execute(
                ARTIFACTS.insert().values(
                    id=artifact_id, tenant=tenant, run_id=run_id, step=step,
                    size_bytes=size_bytes, include_optimizer=include_optimizer,
                    manifest_sha256=digest, stored_as=artifact_id, names_given=1,
                    saved_at=_saving_time(tx, run_id, now), created_at=now,
                )
            )  # fmt: skip
            if labels:
                tx.execute(LABELS.insert(), label_rows(artifact_id, labels))
            if AVERAGED not in (labels or {}):
                _comes_back_from(tx, run_id, artifact_id)
            details: Details = {"step": step, "size_bytes": size_bytes, "manifest": digest}
            self._writer.note(tx, tenant, who, "artifact.save", artifact_id, details)

    def note_loaded(self, tenant: str, run_id: str, epoch: int, artifact_id: str) -> None:
        """Records that a run has loaded an artifact: from now on a lost actor of the run is
        restored from it.

        Raises:
            ActorLostError: The run has a newer actor.
            NotFoundError: The tenant never had such an artifact.
        """
        with self._database.change() as tx:
            check_epoch(tx, tenant, run_id, epoch)
            if owned(tx, ARTIFACTS, tenant, artifact_id) is None:
                raise NotFoundError(f"no artifact {artifact_id!r} of this tenant")
            _comes_back_from(tx, run_id, artifact_id)

    def publish_copy(
        self, tenant: str, source_id: str, artifact_id: str, size_bytes: int, manifest: bytes,
        key_id: str,
    ) -> ArtifactInfo:  # fmt: skip
        """Adds a copy whose files are all in the store, with the run, step and saving time of its
        source. A repeat changes nothing.

        Raises:
            NotFoundError: The source was deleted meanwhile, or has expired.
            StorageError: See `publish`.
        """
        with self._database.change() as tx:
            if _is_entered(tx, tenant, artifact_id, artifact_id, manifest):
                return self._catalogue.get(tenant, artifact_id)
            refuse_buried(tx, tenant, artifact_id)
            self._refuse_retired(key_id)
            source, digest = openable_row(tx, tenant, source_id), digest_of(manifest)
            kept = ("run_id", "step", "include_optimizer", "saved_at")
            tx.execute(
                ARTIFACTS.insert().values(
                    id=artifact_id, tenant=tenant, size_bytes=size_bytes, manifest_sha256=digest,
                    stored_as=artifact_id, names_given=1, created_at=_now(),
                    **{name: getattr(source, name) for name in kept},
                )
            )  # fmt: skip
            # A copy of averaged weights is no state of the run either.
            of_source = sa.and_(LABELS.c.artifact_id == source_id, LABELS.c.name == AVERAGED)
            averaged = sa.select(sa.literal(artifact_id), LABELS.c.name, LABELS.c.value)
            columns = ["artifact_id", "name", "value"]
            tx.execute(LABELS.insert().from_select(columns, averaged.where(of_source)))
            details: Details = {
                "source": source_id, "step": source.step, "size_bytes": size_bytes,
                "manifest": digest,
            }  # fmt: skip
            self._writer.note(tx, tenant, SDK, "artifact.copy", artifact_id, details)
        return self._catalogue.get(tenant, artifact_id)

    def _refuse_retired(self, key_id: str) -> None:
        """Refuses a key that was retired: its retirement counted the artifacts under it before this
        one was added."""
        if key_id not in self._keyring.key_ids:
            raise StorageError(
                f"tenant key {key_id!r} was retired while the artifact was saved, and nothing can"
                " open the artifact: save again"
            )

    def delete(self, tenant: str, artifact_id: str, event: str = "artifact.delete") -> str:
        """Marks an artifact as deleted for good: from now on an old copy of its files is refused.

        Returns:
            The name of the files to remove from the store.
        """
        this = ARTIFACTS.c.id == artifact_id
        with self._database.change() as tx:
            row = row_of(tx, tenant, artifact_id)
            tx.execute(ARTIFACTS.update().where(this).values(deleted_at=time.time()))
            tx.execute(LABELS.delete().where(LABELS.c.artifact_id == artifact_id))
            self._writer.note(tx, tenant, SDK, event, artifact_id)
        return str(row.stored_as)

    # --- resealing ---------------------------------------------------------------------------

    def begin_reseal(self, tenant: str, artifact_id: str) -> str:
        """Returns a name in the store, for the new files, that was never given out before."""
        with self._database.change() as tx:
            given = row_of(tx, tenant, artifact_id).names_given + 1
            this = ARTIFACTS.c.id == artifact_id
            tx.execute(ARTIFACTS.update().where(this).values(names_given=given))
        return f"{artifact_id}.{given}"

    def finish_reseal(
        self, tenant: str, artifact_id: str, before: str, stored_as: str, size_bytes: int,
        manifest: bytes, key_id: str,
    ) -> ArtifactInfo:  # fmt: skip
        """Switches an artifact to files under another name, which are complete and checked. A
        repeat changes nothing.

        Args:
            before: The name whose files were resealed.
            key_id: The id of the tenant key that wraps the new data key.

        Raises:
            NotFoundError: The artifact was deleted meanwhile, or has expired.
            InvalidRequestError: Somebody else has resealed the artifact, or has rotated the tenant
                key. An artifact under an older tenant key would be lost when that key is retired.
            StorageError: A sweep removes the new files.
        """
        with (
            self._writer.refusals(tenant, SDK, "artifact.reseal", artifact_id),
            self._database.change() as tx,
        ):
            if _is_entered(tx, tenant, artifact_id, stored_as, manifest):
                return self._catalogue.get(tenant, artifact_id)
            if openable_row(tx, tenant, artifact_id).stored_as != before:
                raise InvalidRequestError(
                    f"artifact {artifact_id} was resealed by somebody else at the same time: it"
                    " already has a fresh key; repeat the call if you want another one"
                )
            if key_id != self._keyring.primary:
                raise InvalidRequestError(
                    f"the tenant key was rotated while artifact {artifact_id} was resealed: the"
                    " artifact is unchanged; repeat the call"
                )
            refuse_buried(tx, tenant, stored_as)
            _switch(tx, self._writer, tenant, artifact_id, stored_as, size_bytes, manifest)
        return self._catalogue.get(tenant, artifact_id)


def adopt(
    tx: sa.Connection, writer: AuditWriter, tenant: str, artifact_id: str, stored_as: str,
    size_bytes: int, manifest: bytes,
) -> None:  # fmt: skip
    """Runs `Artifacts.finish_reseal` for files that a lost database knew. The caller has verified
    their manifest. The artifact may have expired, because it is not opened."""
    given = max(row_of(tx, tenant, artifact_id).names_given, _number(stored_as))
    this = ARTIFACTS.c.id == artifact_id
    tx.execute(ARTIFACTS.update().where(this).values(names_given=given))
    refuse_buried(tx, tenant, stored_as)
    _switch(tx, writer, tenant, artifact_id, stored_as, size_bytes, manifest)


def _switch(
    tx: sa.Connection, writer: AuditWriter, tenant: str, artifact_id: str, stored_as: str,
    size_bytes: int, manifest: bytes,
) -> None:  # fmt: skip
    digest = digest_of(manifest)
    values = {"stored_as": stored_as, "size_bytes": size_bytes, "manifest_sha256": digest}
    tx.execute(ARTIFACTS.update().where(ARTIFACTS.c.id == artifact_id).values(values))
    details: Details = {"stored_as": stored_as, "size_bytes": size_bytes, "manifest": digest}
    writer.note(tx, tenant, SDK, "artifact.reseal", artifact_id, details)


def _comes_back_from(tx: sa.Connection, run_id: str, artifact_id: str) -> None:
    tx.execute(RUNS.update().where(RUNS.c.id == run_id).values(resume_from=artifact_id))


def _is_entered(
    tx: sa.Connection, tenant: str, artifact_id: str, stored_as: str, manifest: bytes
) -> bool:
    """Returns whether these very files are the artifact already: then only the reply was lost."""
    row = owned(tx, ARTIFACTS, tenant, artifact_id, new=True)
    if row is None or row.deleted_at is not None:
        return False
    return (row.stored_as, row.manifest_sha256) == (stored_as, digest_of(manifest))


def _number(stored_as: str) -> int:
    """Returns the number in the name that a resealed artifact has in the store."""
    return int(stored_as.rpartition(".")[2])


def _saving_time(tx: sa.Connection, run_id: str, now: float) -> float:
    """Returns the time of a save for the order of a run's saves: later than that of every earlier
    save, also after the clock was set back."""
    saves = sa.select(sa.func.max(ARTIFACTS.c.saved_at)).where(ARTIFACTS.c.run_id == run_id)
    last = tx.execute(saves).scalar()
    return now if last is None else max(now, math.nextafter(last, math.inf))


def _now() -> float:
    """Returns the time in whole microseconds, as a `datetime` holds it. A query up to the time of
    an artifact then leaves that artifact out."""
    return round(time.time(), 6)
