"""Says what the actors of a run occupy on this cluster, and where a sampler finds its things.

Finding a node that has the room is for `cluster`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tg_tinker.cluster.cluster import Cluster
from tg_tinker.config import ResourceConfig, TrainingConfig

PIN = 0.001
"""Of each custom resource of a client, for its sampler: it places it there, and leaves the rest."""


class Placement:
    """On one cluster, of actors that use one home and one store."""

    def __init__(self, cluster: Cluster, home: Path, store: str) -> None:
        self._cluster, self._home, self._store = cluster, home, store

    def resources(self, wanted: ResourceConfig) -> ResourceConfig:
        """The defaults of `ResourceConfig` made explicit for this cluster."""
        embedded = self._cluster.embedded
        gpus = wanted.num_gpus
        if gpus is None:
            gpus = min(1.0, self._cluster.most_gpus(wanted))
        cpus = (0 if embedded else 1) if wanted.num_cpus is None else wanted.num_cpus
        threads = wanted.num_threads or (None if embedded else max(1, int(cpus)))
        made_explicit = {"num_cpus": cpus, "num_gpus": gpus, "num_threads": threads}
        return wanted.model_copy(update=made_explicit)

    def of_sampler(self, config: TrainingConfig) -> dict[str, Any]:
        """Where the sampler of a base model finds things, and what it occupies."""
        resources = self.resources(config.resources)
        return {
            "model_ref": config.model_ref,
            "dtype": config.dtype,
            "home": str(self._home),
            "store": self._store,
            "num_cpus": 0 if self._cluster.embedded else 1,
            "num_gpus": resources.num_gpus or 0,
            "resources": dict.fromkeys(resources.custom_resources, PIN),
            "labels": resources.node_labels,
            "threads": resources.num_threads,
        }


def with_absolute_path(config: TrainingConfig) -> TrainingConfig:
    """Actors work in directories of their own."""
    if not Path(config.model_ref).exists():
        return config
    return config.model_copy(update={"model_ref": str(Path(config.model_ref).absolute())})
