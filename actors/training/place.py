"""Which run a training actor has, where its things lie, and what lets it have data keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.storage.capabilities import Capability


@dataclass(frozen=True)
class Place:
    """Of one run under one epoch.

    Attributes:
        store: where its artifacts lie.
        model_cache: where converted base models lie.
        capability: what the registry gives data keys for.
    """

    tenant: str
    run_id: str
    epoch: int
    store: str
    model_cache: Path
    capability: Capability

    @property
    def actor(self) -> str:
        """The actor by name, as records have it."""
        return f"{self.run_id}@{self.epoch}"
