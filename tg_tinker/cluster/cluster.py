"""One cluster, as a service uses it: who runs there, and where a new actor finds room."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from tg_tinker.backend import actors_backend, serve_backend
from tg_tinker.cluster.connection import check_encrypted, connect, living_nodes, refuse_another
from tg_tinker.cluster.messages import SampleRequest
from tg_tinker.cluster.named_actors import living_actors, named_actor
from tg_tinker.cluster.node import read, tls_is_on
from tg_tinker.cluster.ray_calls import ask, kill, lazy_ray, translated
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.config import ResourceConfig
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    PlacementError,
    StorageError,
)
from tg_tinker.storage.databases import REVISION, SQLITE, revision_on_record
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.types import ClusterStatus

_log = logging.getLogger("tg_tinker")


class Cluster:
    """A connection of this process to Ray; embedded clusters end with their last user."""

    placement_timeout_s = 120.0
    silent_s = 30.0
    _embedded_users = 0
    _started: ClassVar[set[str]] = set()  # runs, by embedded clusters of this process
    _lock = threading.Lock()

    def __init__(self, address: str | None, namespace: str) -> None:
        self.namespace = namespace
        with Cluster._lock:
            if lazy_ray().is_initialized():
                refuse_another(address)
                self.embedded = Cluster._embedded_users > 0
                check_encrypted()
            else:
                self.embedded = connect(address)
            Cluster._embedded_users += self.embedded
        self._open = True
        self._samplers: list[SamplerLink] = []

    @property
    def connected(self) -> bool:
        return self._open and bool(lazy_ray().is_initialized())

    def close(self) -> None:
        """Leaves the cluster; the last user of an embedded one ends it. Safe to repeat."""
        with Cluster._lock:
            if not self._open:
                return
            self._open = False
            for sampler in self._samplers:
                sampler.close()
            Cluster._embedded_users -= self.embedded
            if self.embedded and not Cluster._embedded_users:
                lazy_ray().shutdown()

    def registry(self, database: str, keyring: str, audit_keys: str) -> RemoteRegistry:
        """The one registry of the namespace; on a cluster it shares its database with none."""
        sole = not self.embedded
        if self.embedded and database.startswith(SQLITE):
            _upgrade(Path(database.removeprefix(f"{SQLITE}/")))
        with translated():
            actor = actors_backend().start_registry(
                self.namespace, database, keyring, audit_keys, sole
            )
            return RemoteRegistry(actor)

    def status(self) -> ClusterStatus:
        """Machines, what of them is free, and who trains there."""
        nodes = living_nodes()
        with translated():
            free = dict(lazy_ray().available_resources())
            address = lazy_ray().get_runtime_context().gcs_address
        machines = {node["NodeManagerAddress"]: dict(node["Resources"]) for node in nodes}
        living = living_actors(self.namespace)
        runs = sorted(name.partition("@")[0] for name in living if name.startswith("tc-"))
        return ClusterStatus(address, machines, free, tuple(runs), tls_is_on())

    def resources(self) -> dict[str, float]:
        with translated():
            return dict(lazy_ray().cluster_resources())

    def most_gpus(self, resources: ResourceConfig) -> float:
        """Of one node that a client's pins allow."""
        allowed = [node["Resources"] for node in living_nodes() if _allows(resources, node)]
        return max((has.get("GPU", 0) for has in allowed), default=0)

    def metrics_urls(self) -> list[str]:
        """Where Prometheus finds the metrics of each living node."""
        nodes = living_nodes()
        return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes]

    def start_training(
        self, resources: ResourceConfig, others: Callable[[], set[str]], **arguments: Any
    ) -> Any:
        """A placed training actor.

        Args:
            others: runs that a refusal may name: those of this tenant.

        Raises:
            PlacementError: the cluster is too small, or has no room within the deadline.
            InvalidRequestError: machines have joined it since, and Ray's TLS is off.
        """
        check_encrypted()
        num_cpus, num_gpus = resources.num_cpus or 0, resources.num_gpus or 0
        self._refuse_impossible(resources)
        Cluster._started.add(arguments["run_id"])
        with translated():
            actor = actors_backend().start_training(
                self.namespace, resources=resources, **arguments
            )
        placed = False
        try:
            with translated():
                ready = [actor.ready.remote()]
                placed = bool(lazy_ray().wait(ready, timeout=self.placement_timeout_s)[0])
        finally:
            if not placed:  # also after Ctrl-C: a waiting actor would take the next free place
                kill(actor)
        if not placed:
            raise PlacementError(
                f"no node had {num_cpus:g} CPUs and {num_gpus:g} GPUs{_pins(resources)} free within"
                f" {self.placement_timeout_s:g} s. Yours: {self._holders(others())}. Close a client"
                " or ask for less in ResourceConfig",
                details={"num_cpus": num_cpus, "num_gpus": num_gpus},
            )
        return actor

    def await_possible(self, resources: ResourceConfig) -> None:
        """For a run that had a place: the node that it had may come back.

        Raises:
            PlacementError: no living node could hold it within the deadline.
        """
        deadline = time.monotonic() + self.placement_timeout_s
        while True:
            try:
                return self._refuse_impossible(resources)
            except PlacementError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _refuse_impossible(self, resources: ResourceConfig) -> None:
        """What no waiting would help: one node must have all of it."""
        labels = resources.node_labels
        nodes = [n["Resources"] for n in living_nodes() if labels.items() <= n["Labels"].items()]
        if not nodes:
            raise PlacementError(
                f"no living node has the labels {labels}: start one with `ray start --labels`, or"
                " change node_labels in ResourceConfig",
                details={"node_labels": labels},
            )
        wanted = {"CPU": resources.num_cpus or 0, "GPU": resources.num_gpus or 0}
        wanted |= resources.custom_resources
        for name, amount in wanted.items():
            if amount > (most := max(has.get(name, 0) for has in nodes)):
                raise PlacementError(
                    f"the client wants {amount:g} {name}s, no node{_pins(resources)} has more than"
                    f" {most:g}: ask for less in ResourceConfig or add a larger node",
                    details={"resource": name, "wanted": amount, "most": most},
                )
        if not any(all(has.get(name, 0) >= wanted[name] for name in wanted) for has in nodes):
            raise PlacementError(
                f"no node has all of {wanted} together: ask for less in ResourceConfig or add one"
                " that has",
                details={"wanted": wanted},
            )

    def _holders(self, own: set[str]) -> str:
        with translated():
            free = lazy_ray().available_resources()
        living = {name.partition("@")[0] for name in living_actors(self.namespace)}
        runs = sorted(own & living)
        cpus, gpus = free.get("CPU", 0), free.get("GPU", 0)
        return f"{', '.join(runs) or 'no client'}; free are {cpus:g} CPUs and {gpus:g} GPUs"

    def would_see(self, run_id: str) -> bool:
        """Whether a run that has no actor here has none anywhere: embedded clusters of several
        processes may share one home, and see only their own actors."""
        return not self.embedded or run_id in Cluster._started

    def find_training(self, run_id: str, epoch: int) -> Any | None:
        """The living actor of a run's epoch, if there is one.

        One that is silent for long counts as lost: another may take its run over, after which it
        can publish and charge nothing even if it wakes up.
        """
        deadline = time.monotonic() + self.silent_s
        while True:
            try:
                actor = named_actor(self.namespace, f"{run_id}@{epoch}")
                ask(actor.ready, timeout=max(0.0, deadline - time.monotonic()))
                return actor
            except (ActorLostError, FutureTimeoutError):
                return None
            except ClusterUnavailableError:  # the network, perhaps, or it has just died
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.2)

    def sampler(self, key: bytes, **arguments: Any) -> SamplerLink:
        """The sampling application of a base model, deployed where it does not run yet."""
        where = {"namespace": self.namespace, "embedded": self.embedded, **arguments}
        with translated():
            self._samplers.append(SamplerLink(serve_backend().connect(**where), key))
        return self._samplers[-1]

    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None:
        """The same at an HTTP address."""
        place = {"namespace": self.namespace, **where}
        with translated():
            serve_backend().serve_http(host, port, replicas, place, **options)

    def kill_training(self, run_id: str, epoch: int) -> None:
        """Ends the actor of a run's epoch, where there is one."""
        with contextlib.suppress(ActorLostError, ClusterUnavailableError):
            kill(named_actor(self.namespace, f"{run_id}@{epoch}"))


class SamplerLink:
    """The sampling application of a base model as a client reaches it: sealed both ways."""

    def __init__(self, application: Any, key: bytes) -> None:
        self._application = application
        self._key = key

    def sample(self, request: SampleRequest) -> Any:
        """All completions; Ctrl-C frees their slots."""
        with translated():
            sealed = self._application.sample(seal_payload(self._key, request))
        return open_payload(self._key, sealed).unwrap()

    def close(self) -> None:
        """Whatever state the cluster is in."""
        with contextlib.suppress(Exception):
            self._application.close()

    def stream(self, request: SampleRequest) -> Iterator[Any]:
        """Chunks as they grow; leaving the loop early frees their slots."""
        with translated():
            for sealed in self._application.stream(seal_payload(self._key, request)):
                yield open_payload(self._key, sealed).unwrap()


def _upgrade(file: Path) -> None:
    """Brings the registry of an embedded home to this release; a cluster's is its operator's."""
    found = revision_on_record(file)
    if found in (None, REVISION):
        return
    if read(file.parent) is not None:
        raise StorageError(
            f"the registry {file} is of an older release, and `tg-tinker up` started a cluster on"
            " its home that may still use it: `tg-tinker down`, then `tg-tinker registry upgrade`"
        )
    backup = file.with_name(
        f"{file.stem}-{found}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.db"
    )
    before, after = actors_backend().upgrade_registry(f"{SQLITE}/{file}", backup)
    if before != after:
        _log.warning(
            "upgraded the registry %s from revision %s to %s; as it was before, it is in %s",
            file, before, after, backup,
        )  # fmt: skip


def _allows(resources: ResourceConfig, node: Any) -> bool:
    has, pins = node["Resources"], resources.custom_resources.items()
    labelled = resources.node_labels.items() <= node["Labels"].items()
    return labelled and all(amount <= has.get(name, 0) for name, amount in pins)


def _pins(resources: ResourceConfig) -> str:
    pins = resources.custom_resources | resources.node_labels
    return f" with {pins}" if pins else ""
