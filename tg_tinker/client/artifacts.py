"""The part of `ServiceClient` that is about saved artifacts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tg_tinker.backend import provided
from tg_tinker.cluster.messages import ArtifactQuery
from tg_tinker.errors import InvalidRequestError
from tg_tinker.labels import check_labels, parse_label
from tg_tinker.types import ArtifactInfo, Orphan

MOST_LISTED = 10_000
"""Artifacts of one page, where a page is asked for."""


class ArtifactCalls:
    """Lists, opens, changes and removes artifacts of one tenant, in one store.

    What is copied, resealed, exported or verified is decrypted in the program that calls. That
    process then writes no core file any more: its RLIMIT_CORE is 0 for good, soft and hard.
    """

    _registry: Any
    _store: str
    _tenant: str

    def list_artifacts(
        self,
        *,
        run: str | None = None,
        label: str | None = None,
        newer_than: datetime | None = None,
        older_than: datetime | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> list[ArtifactInfo]:
        """Saved artifacts of this tenant that fit all that is asked, oldest first.

        Args:
            run: the id of the training client that saved them.
            label: ``name=value``.
            newer_than, older_than: by `created_at`, with a time zone.
            after: the last id of the page before; it may have been deleted since.
            limit: at most so many, 1 to 10,000; all when None.

        Raises:
            InvalidRequestError: a value out of range or of another form.
            NotFoundError: there never was an artifact `after`.
        """
        for when in (newer_than, older_than):
            _check_time(when)
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (whole and 1 <= limit <= MOST_LISTED):
            raise InvalidRequestError(
                f"limit={limit!r:.80} is out of range: a whole number in [1, {MOST_LISTED}]"
            )
        wanted = None if label is None else parse_label(label)
        query = ArtifactQuery(run, wanted, newer_than, older_than, after, limit)
        artifacts: list[ArtifactInfo] = self._registry.artifacts(self._tenant, query)
        return artifacts

    def get_artifact(self, artifact_id: str) -> ArtifactInfo:
        """One artifact; `NotFoundError` if there is none of this id."""
        artifact: ArtifactInfo = self._registry.artifact(self._tenant, artifact_id)
        return artifact

    def set_labels(self, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        """Gives an artifact these labels in place of those that it has.

        They are for finding it again (`list_artifacts(label="stage=prod")`) and lie in the registry
        in clear: what is secret belongs into `save_state(metadata=...)`.

        Raises:
            InvalidRequestError: more than 16, or a name or value of another form.
        """
        check_labels(labels)
        labelled: ArtifactInfo = self._registry.set_labels(self._tenant, artifact_id, dict(labels))
        return labelled

    def set_expiry(self, artifact_id: str, when: datetime | None) -> ArtifactInfo:
        """Until when an artifact may be opened, by the registry's clock; None is for ever.

        From then on loading, sampling, copying and exporting it raise `NotFoundError` with the
        code `artifact_expired`, and a run does not come back from it. It is listed, and its files
        stay, until `delete_expired`; until then another expiry makes it open again.

        Raises:
            InvalidRequestError: a time that is past, or without a time zone.
        """
        _check_time(when)
        with provided("covered_change")(self._registry, self._store, self._tenant):
            changed: ArtifactInfo = self._registry.set_expiry(self._tenant, artifact_id, when)
        return changed

    def delete_expired(self) -> Iterator[tuple[str, str]]:
        """Deletes all artifacts of this tenant whose time is over.

        Yields:
            An artifact's id, and what went wrong: empty where nothing did.
        """
        yield from provided("delete_expired")(self._registry, self._store, self._tenant)

    def copy_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Another artifact of the same content, run and step, under a key of its own.

        It has neither labels nor an expiry. A run still comes back from what it saved last.

        Raises:
            NotFoundError: there is none of this id, or it has expired.
            IntegrityError: it is not what was saved; there is no copy.
        """
        copied: ArtifactInfo = provided("copy_artifact")(
            self._registry, self._store, self._tenant, artifact_id
        )
        return copied

    def reseal_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Encrypts an artifact anew under a fresh key; its id stays, the old files and key go.

        For when a data key may have become known. Broken off anywhere, the artifact is whole. Who
        kept a copy of the old files and the keyring can still read the copy.

        Raises:
            NotFoundError: there is none of this id, or it has expired.
            IntegrityError: it is not what was saved; nothing was changed.
            InvalidRequestError: somebody else resealed it or rotated the tenant key meanwhile.
        """
        resealed: ArtifactInfo = provided("reseal_artifact")(
            self._registry, self._store, self._tenant, artifact_id
        )
        return resealed

    def delete_artifact(self, artifact_id: str, *, lost: bool = False) -> None:
        """Deletes an artifact for good: its entry, its key, its files.

        Args:
            lost: also if this store has no file of it any more. Else that is refused, as the files
                of an artifact in another store would stay.

        Raises:
            NotFoundError: there is none of this id, or no file of it in this store.
        """
        provided("delete_artifact")(
            self._registry, self._store, self._tenant, artifact_id, lost=lost
        )

    def shred_artifact(self, artifact_id: str) -> list[str]:
        """Deletes an artifact, its key first; returns what that does not reach, as sentences.

        The same is gone as after `delete_artifact`. The difference is in the order, broken off
        anywhere nothing opens it any more, in the audit log's `artifact.shred`, and in the answer.
        """
        not_reached: list[str] = provided("shred_artifact")(
            self._registry, self._store, self._tenant, artifact_id
        )
        return not_reached

    def export_adapter(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """Writes a LoRA artifact, decrypted, as a PEFT directory that must not exist yet."""
        target = Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidRequestError(f"{target} exists: export into a new or empty directory")
        provided("export_adapter")(self._registry, self._store, self._tenant, artifact_id, target)
        return target

    def verify_artifacts(self, artifact_id: str | None = None) -> Iterator[tuple[str, str]]:
        """Reads artifacts of this tenant again and checks them as `load_state` would.

        Args:
            artifact_id: one alone. None is all but those that have expired.

        Yields:
            Its id, and what is wrong with it: empty where nothing is.

        Raises:
            NotFoundError: there is no artifact of this id.
        """
        yield from provided("verify_artifacts")(
            self._registry, self._store, self._tenant, artifact_id
        )

    def sweep_store(self, min_age_s: float = 3600.0, dry_run: bool = False) -> Iterator[Orphan]:
        """Removes files of this tenant that belong to no artifact, as they are gone through.

        What a sweep finds is noted, and removed by a later one that finds it unchanged. An artifact
        is never touched; a save that is still under way then fails typed, and leaves nothing.

        Args:
            min_age_s: seconds between the two sweeps, by the store's clock; longer than any file
                of a save takes to upload.
            dry_run: only tell what would be done.

        Yields:
            What was found, once it is dealt with.

        Raises:
            IntegrityError: the registry is an older copy, or another one uses the store.
        """
        if not 0 <= min_age_s < math.inf:
            raise InvalidRequestError(f"min_age_s={min_age_s}: it must be 0 or more seconds")
        found: Iterator[Orphan] = provided("sweep_store")(
            self._registry, self._store, self._tenant, min_age_s, dry_run
        )
        return found


def _check_time(when: datetime | None) -> None:
    if when is not None and not isinstance(when, datetime):
        raise InvalidRequestError(
            f"{when!r:.80} is no datetime: say datetime(..., tzinfo=timezone.utc)"
        )
    if when is not None and when.utcoffset() is None:
        raise InvalidRequestError(
            f"{when.isoformat()} has no time zone: say datetime(..., tzinfo=timezone.utc)"
        )
