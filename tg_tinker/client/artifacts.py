"""Lists, opens, changes and removes the artifacts of one tenant in one store.

This module checks the arguments of the caller. The upper packages handle files and keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from tg_tinker.backend import Registry, actors_backend
from tg_tinker.errors import InvalidRequestError
from tg_tinker.labels import check_labels, parse_label
from tg_tinker.texts import check_path
from tg_tinker.types import ArtifactInfo, ArtifactQuery, Orphan

MOST_LISTED = 10_000
"""The maximum `limit` of one page of artifacts."""


class Artifacts:
    """The part of `ServiceClient` about artifacts; `ServiceClient` documents each method.

    To copy, reseal, export or verify an artifact decrypts it in the calling process. From then on
    this process writes no core file: its soft and hard RLIMIT_CORE are permanently 0.
    """

    def __init__(self, registry: Registry, store: str, tenant: str) -> None:
        self._registry, self._store, self._tenant = registry, store, tenant

    def find(
        self,
        run: str | None,
        label: str | None,
        newer_than: datetime | None,
        older_than: datetime | None,
        after: str | None,
        limit: int | None,
    ) -> list[ArtifactInfo]:
        for when in (newer_than, older_than):
            _check_time(when)
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (whole and 1 <= limit <= MOST_LISTED):
            raise InvalidRequestError(
                f"limit={limit!r:.80} is out of range: use a whole number in [1, {MOST_LISTED}]"
            )
        wanted = None if label is None else parse_label(label)
        query = ArtifactQuery(run, wanted, newer_than, older_than, after, limit)
        artifacts: list[ArtifactInfo] = self._registry.catalogue.find(self._tenant, query)
        return artifacts

    def get(self, artifact_id: str) -> ArtifactInfo:
        artifact: ArtifactInfo = self._registry.catalogue.get(self._tenant, artifact_id)
        return artifact

    def set_labels(self, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        check_labels(labels)
        labeled: ArtifactInfo = self._registry.catalogue.set_labels(
            self._tenant, artifact_id, dict(labels)
        )
        return labeled

    def set_expiry(self, artifact_id: str, when: datetime | None) -> ArtifactInfo:
        _check_time(when)
        with actors_backend().covered_change(self._registry, self._store, self._tenant):
            changed: ArtifactInfo = self._registry.catalogue.set_expiry(
                self._tenant, artifact_id, when
            )
        return changed

    def delete_expired(self) -> Iterator[tuple[str, str]]:
        yield from actors_backend().delete_expired(self._registry, self._store, self._tenant)

    def copy(self, artifact_id: str) -> ArtifactInfo:
        copied: ArtifactInfo = actors_backend().copy_artifact(
            self._registry, self._store, self._tenant, artifact_id
        )
        return copied

    def reseal(self, artifact_id: str) -> ArtifactInfo:
        resealed: ArtifactInfo = actors_backend().reseal_artifact(
            self._registry, self._store, self._tenant, artifact_id
        )
        return resealed

    def delete(self, artifact_id: str, lost: bool) -> None:
        actors_backend().delete_artifact(
            self._registry, self._store, self._tenant, artifact_id, lost=lost
        )

    def shred(self, artifact_id: str) -> list[str]:
        not_reached: list[str] = actors_backend().shred_artifact(
            self._registry, self._store, self._tenant, artifact_id
        )
        return not_reached

    def export_adapter(self, artifact_id: str, target: Path) -> Path:
        check_path(target)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidRequestError(
                f"{target} already exists: export into a new or empty directory"
            )
        actors_backend().export_adapter(
            self._registry, self._store, self._tenant, artifact_id, target
        )
        return target

    def verify(self, artifact_id: str | None) -> Iterator[tuple[str, str]]:
        yield from actors_backend().verify_artifacts(
            self._registry, self._store, self._tenant, artifact_id
        )

    def sweep(self, min_age_s: float, dry_run: bool) -> Iterator[Orphan]:
        if not 0 <= min_age_s < math.inf:
            raise InvalidRequestError(
                f"min_age_s={min_age_s} is out of range: it must be finite, and 0 or more seconds"
            )
        found: Iterator[Orphan] = actors_backend().sweep_store(
            self._registry, self._store, self._tenant, min_age_s, dry_run
        )
        return found


def _check_time(when: datetime | None) -> None:
    if when is not None and not isinstance(when, datetime):
        raise InvalidRequestError(
            f"{when!r:.80} is not a datetime: use datetime(..., tzinfo=timezone.utc)"
        )
    if when is not None and when.utcoffset() is None:
        raise InvalidRequestError(
            f"{when.isoformat()} has no time zone: use datetime(..., tzinfo=timezone.utc)"
        )
