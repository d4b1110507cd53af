"""Artifacts entered, resealed and deleted: each change is one transaction with its row of the audit
log. `catalogue` says what there is.

A name in the store is given out once: two that reseal at the same time never meet in a folder,
and what one of them left behind is nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter, Details
from actors.registry.catalogue import (
    LIVING,
    Catalogue,
    digest_of,
    label_rows,
    openable_row,
    row_of,
)
from actors.registry.database import Database
from actors.registry.orphans import refuse_buried
from actors.registry.runs import check_epoch
from actors.registry.schema import ARTIFACTS, LABELS, RUNS
from actors.storage.key_providers import KeyProvider
from tg_tinker.errors import InvalidRequestError, StorageError
from tg_tinker.types import ArtifactInfo


class Artifacts:
    """The part of the registry that changes what artifacts there are."""

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
                    manifest_sha256=digest, stored_as=artifact_id, names_given=1, saved_at=now,
                    created_at=now,
                )
            )  # fmt: skip
            if labels:
                tx.execute(LABELS.insert(), label_rows(artifact_id, labels))
            _comes_back_from(tx, run_id, artifact_id)
            details: Details = {"step": step, "size_bytes": size_bytes, "manifest": digest}
            self._writer.note(tx, tenant, who, "artifact.save", artifact_id, details)

    def note_loaded(self, tenant: str, run_id: str, epoch: int, artifact_id: str) -> None:
        """From now on a lost actor of this run comes back from an artifact that it has loaded.

        Raises:
            ActorLostError: the run has a newer actor.
        """
        with self._database.change() as tx:
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
            details: Details = {
                "source": source_id, "step": source.step, "size_bytes": size_bytes,
                "manifest": digest,
            }  # fmt: skip
            self._writer.note(tx, tenant, SDK, "artifact.copy", artifact_id, details)
        return self._catalogue.get(tenant, artifact_id)

    def _refuse_retired(self, key_id: str) -> None:
        """A key that was retired counted the artifacts under it before this one was entered."""
        if key_id not in self._keyring.key_ids:
            raise StorageError(
                f"tenant key {key_id!r} was retired while the artifact was saved, and nothing opens"
                " it any more: save again"
            )

    def delete(self, tenant: str, artifact_id: str, event: str = "artifact.delete") -> str:
        """Marks it deleted, for good: an old copy of its files is refused from now on.

        Returns:
            The name of what is to be removed from the store.
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
        """A name in the store that nothing had before, for the new files."""
        with self._database.change() as tx:
            given = row_of(tx, tenant, artifact_id).names_given + 1
            this = ARTIFACTS.c.id == artifact_id
            tx.execute(ARTIFACTS.update().where(this).values(names_given=given))
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
            self._writer.refusals(tenant, SDK, "artifact.reseal", artifact_id),
            self._database.change() as tx,
        ):
            if _is_entered(tx, tenant, artifact_id, stored_as, manifest):
                return self._catalogue.get(tenant, artifact_id)
            if openable_row(tx, tenant, artifact_id).stored_as != before:
                raise InvalidRequestError(
                    f"artifact {artifact_id} was resealed by somebody else at the same time: it is"
                    " under a fresh key; repeat the call for another one"
                )
            if key_id != self._keyring.primary:
                raise InvalidRequestError(
                    f"the tenant key was rotated while artifact {artifact_id} was resealed: it is"
                    " as it was; repeat the call"
                )
            refuse_buried(tx, tenant, stored_as)
            _switch(tx, self._writer, tenant, artifact_id, stored_as, size_bytes, manifest)
        return self._catalogue.get(tenant, artifact_id)


def adopt(
    tx: sa.Connection, writer: AuditWriter, tenant: str, artifact_id: str, stored_as: str,
    size_bytes: int, manifest: bytes,
) -> None:  # fmt: skip
    """`Artifacts.finish_reseal` of files that a lost database knew, and whose manifest the caller
    has verified. The artifact is not opened, so it may have expired."""
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
    """Whether these very files are the artifact already, and only the answer was lost."""
    this = (ARTIFACTS.c.id == artifact_id, ARTIFACTS.c.tenant == tenant, *LIVING)
    files = (ARTIFACTS.c.stored_as == stored_as, ARTIFACTS.c.manifest_sha256 == digest_of(manifest))
    return tx.execute(sa.select(ARTIFACTS.c.id).where(*this, *files)).first() is not None


def _number(stored_as: str) -> int:
    """Of the name that a resealed artifact has in the store."""
    return int(stored_as.rpartition(".")[2])


def _now() -> float:
    """In whole microseconds, which a `datetime` holds: who lists up to one's time leaves it out."""
    return round(time.time(), 6)
