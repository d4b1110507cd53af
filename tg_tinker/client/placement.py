"""Determines the resources of a run's actors on this cluster, and the settings of its sampler.

`cluster` finds a node that has these resources.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tg_tinker.cluster.cluster import Cluster
from tg_tinker.config import ResourceConfig, TrainingConfig

PIN = 0.001
"""The amount that a sampler reserves of each custom resource of its client.

The reservation places the sampler on these nodes and leaves the rest of the resource free.
"""


class Placement:
    """The placement of actors on one cluster, with one home and one store."""

    def __init__(self, cluster: Cluster, home: Path, store: str) -> None:
        self._cluster, self._home, self._store = cluster, home, store

    def resources(self, wanted: ResourceConfig) -> ResourceConfig:
        """Returns `wanted` with its defaults replaced by the values for this cluster."""
        embedded = self._cluster.embedded
        gpus = wanted.num_gpus
        if gpus is None:
            gpus = min(1.0, self._cluster.most_gpus(wanted))
        cpus = (0 if embedded else 1) if wanted.num_cpus is None else wanted.num_cpus
        threads = wanted.num_threads or (None if embedded else max(1, int(cpus)))
        made_explicit = {"num_cpus": cpus, "num_gpus": gpus, "num_threads": threads}
        return wanted.model_copy(update=made_explicit)

    def of_sampler(self, config: TrainingConfig) -> dict[str, Any]:
        """Returns the paths, the model and the resources of the sampler of a base model."""
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
    """Returns the configuration with an absolute path to a local model.

    Actors have other working directories. A `model_ref` that is not a path stays as it is.
    """
    if not Path(config.model_ref).exists():
        return config
    return config.model_copy(update={"model_ref": str(Path(config.model_ref).absolute())})
