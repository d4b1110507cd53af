"""A cluster of two nodes that differ, and clients with reservations on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tg_tinker import LoRAConfig, ResourceConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.client.home import init_home
from tg_tinker.cluster.authentication import make_token, require_token


@pytest.fixture(scope="module")
def cluster_of_two() -> Iterator[str]:
    """Yields the address of a cluster: a head with two GPUs, and a node with its own resource
    and label."""
    from ray.cluster_utils import Cluster

    # Not where `ray start` leaves its address: other programs here would find this cluster.
    folder = tempfile.mkdtemp(prefix="tg-", dir="/tmp")
    make_token()
    require_token()  # as each cluster that a program may join
    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}  # GPUs on paper
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(num_cpus=4, resources={"team-a": 1}, labels={"zone": "north"})
    found.wait_for_nodes()
    yield found.address
    found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connected(address: str, home: Path) -> Iterator[ServiceClient]:
    """Yields a service of a new home on a running cluster, and leaves the cluster afterwards."""
    import ray

    init_home(home)
    with ServiceClient(address=address) as service:
        yield service
    ray.shutdown()


def config_of(model: Path, lora: LoRAConfig | None, **more: Any) -> TrainingConfig:
    return TrainingConfig(model_ref=str(model), lora_config=lora, **more)


def create(service: ServiceClient, model: Path, **resources: Any) -> TrainingClient:
    config = config_of(model, LoRAConfig(rank=2), resources=ResourceConfig(**resources))
    return service.create_training_client(config)


def asked(tc: TrainingClient, work: Any) -> Any:
    import ray

    return ray.get(tc._calls.link.actor.__ray_call__.remote(work))
