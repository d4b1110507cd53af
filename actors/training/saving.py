"""Artifacts that a run saves by itself: when, and which of them stay."""

from __future__ import annotations

import time
from collections.abc import Callable

from actors.artifacts.delete import delete
from actors.registry.registry import Registry
from tg_tinker.cluster.messages import ArtifactQuery
from tg_tinker.config import CheckpointConfig
from tg_tinker.labels import AUTOMATIC


class Schedule:
    """Says after which steps a run saves itself."""

    def __init__(
        self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = config.every_steps
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._clock = clock
        self.begin_at(0)

    def begin_at(self, step: int) -> None:
        """The state of this step was just saved, or loaded: the next one is counted from it."""
        self._step, self._time = step, self._clock()

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        by_steps = self._steps is not None and step - self._step >= self._steps
        return by_steps or (
            self._seconds is not None and self._clock() - self._time >= self._seconds
        )


def prune(registry: Registry, store: str, tenant: str, run_id: str, keep: int) -> None:
    """Deletes what a run saved by itself beyond the newest `keep`. Artifacts that were given other
    labels since are not among them."""
    (label,) = AUTOMATIC.items()
    for info in registry.artifacts(tenant, ArtifactQuery(run=run_id, label=label))[:-keep]:
        delete(registry, store, tenant, info.artifact_id)
