"""Describes the run of a training actor, its locations, and its right to data keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.storage.capabilities import Capability


@dataclass(frozen=True)
class Place:
    """The identity and the locations of one run under one epoch.

    Attributes:
        store: the location of the run's artifacts.
        model_cache: the folder of converted base models.
        capability: what the actor shows to the registry to get data keys.
    """

    tenant: str
    run_id: str
    epoch: int
    store: str
    model_cache: Path
    capability: Capability

    @property
    def actor(self) -> str:
        """The name of the actor in records, ``RUN@EPOCH``."""
        return f"{self.run_id}@{self.epoch}"
