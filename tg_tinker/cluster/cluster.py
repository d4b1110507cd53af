"""Provides the cluster of a service: its living actors, and the placement of new actors."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from tg_tinker.backend import actors_backend, serve_backend
from tg_tinker.cluster.connection import (
    check_encrypted,
    check_requires_token,
    connect,
    living_nodes,
    refuse_another,
)
from tg_tinker.cluster.messages import SampleRequest
from tg_tinker.cluster.named_actors import living_actors, named_actor
from tg_tinker.cluster.node import read, tls_is_on
from tg_tinker.cluster.ray_calls import (
    ask,
    check_process,
    inherited,
    kill,
    lazy_ray,
    translated,
)
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.config import ResourceConfig
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    PlacementError,
    StorageError,
)
from tg_tinker.storage.databases import REVISION, revision_on_record
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.storage.sqlite_files import sqlite_file, sqlite_url
from tg_tinker.types import ClusterStatus

_log = logging.getLogger("tg_tinker")


class Cluster:
    """A connection of this process to Ray; an embedded cluster ends with its last user."""

    placement_timeout_s = 120.0
    silent_s = 30.0
    drain_s = 8.0  # `docker stop` waits 10 before it kills
    _embedded_users = 0
    _serves_http = False  # whether the embedded cluster does
    _started: ClassVar[set[str]] = set()  # ids of the runs that this process has started
    _lock = threading.Lock()

    def __init__(self, address: str | None, namespace: str) -> None:
        check_process()
        self.namespace = namespace
        with Cluster._lock:
            if lazy_ray().is_initialized():
                refuse_another(address)
                self.embedded = Cluster._embedded_users > 0
                check_requires_token()
                check_encrypted()
            else:
                self.embedded = connect(address)
            Cluster._embedded_users += self.embedded
        self._open = True
        self._samplers: list[SamplerLink] = []

    @property
    def connected(self) -> bool:
        return self._open and not inherited() and bool(lazy_ray().is_initialized())

    def end_http(self) -> None:
        """Gives the answers of an HTTP server that ends with this connection `drain_s` to end."""
        if self.connected and Cluster._serves_http and Cluster._embedded_users == 1:
            Cluster._serves_http = False
            with contextlib.suppress(Exception), translated():
                serve_backend().end_http(self.drain_s)

    def close(self) -> None:
        """Leaves the cluster, and ends an embedded cluster without other users; may be repeated.

        In a forked process this does nothing: the connection belongs to the other process.
        """
        if inherited():
            return
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
        """Returns the registry of the namespace, and starts the registry if it does not run.

        On a cluster that is not embedded, registries that were opened earlier on the same database
        can then change nothing. On an embedded cluster they work beside each other.
        """
        sole = not self.embedded
        if self.embedded and (file := sqlite_file(database)) is not None:
            _upgrade(file)
        with translated():
            actor = actors_backend().start_registry(
                self.namespace, database, keyring, audit_keys, sole
            )
            return RemoteRegistry(actor)

    def status(self) -> ClusterStatus:
        """Returns the machines, the free resources, and the runs with a living training actor."""
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
        """Returns the most GPUs of any single node that a client's pins allow; 0 without a node."""
        allowed = [node["Resources"] for node in living_nodes() if _allows(resources, node)]
        return max((has.get("GPU", 0) for has in allowed), default=0)

    def metrics_urls(self) -> list[str]:
        """Returns the URL of the Prometheus metrics of each living node."""
        nodes = living_nodes()
        return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes]

    def start_training(
        self, resources: ResourceConfig, others: Callable[[], set[str]], **arguments: Any
    ) -> Any:
        """Starts a training actor, and returns it when a node has placed it.

        Args:
            others: returns the ids of the other runs of this tenant, which an error may name.

        Raises:
            PlacementError: the cluster is too small, or has no room within `placement_timeout_s`.
            InvalidRequestError: the cluster has several machines now, and Ray's TLS is off.
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
            # Also after Ctrl-C: a waiting actor would take the next free resources.
            if not placed:
                kill(actor)
        if not placed:
            raise PlacementError(
                f"no node had {num_cpus:g} CPUs and {num_gpus:g} GPUs{_pins(resources)} free within"
                f" {self.placement_timeout_s:g} s. Yours: {self._holders(others())}. Close a client"
                " or request less in ResourceConfig",
                details={"num_cpus": num_cpus, "num_gpus": num_gpus},
            )
        return actor

    def await_possible(self, resources: ResourceConfig) -> None:
        """Waits until a node of the cluster could hold a run that was placed before.

        The node of a lost actor may return within this time.

        Raises:
            PlacementError: no living node could hold the run within `placement_timeout_s`.
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
        """Checks that a single node has all the resources, so that waiting can succeed.

        Raises:
            PlacementError: no living node has all the resources and labels.
        """
        labels = resources.node_labels
        nodes = [n["Resources"] for n in living_nodes() if labels.items() <= n["Labels"].items()]
        if not nodes:
            raise PlacementError(
                f"no living node has the labels {labels}: start a node with `ray start --labels`,"
                " or change node_labels in ResourceConfig",
                details={"node_labels": labels},
            )
        wanted = {"CPU": resources.num_cpus or 0, "GPU": resources.num_gpus or 0}
        wanted |= resources.custom_resources
        for name, amount in wanted.items():
            if amount > (most := max(has.get(name, 0) for has in nodes)):
                raise PlacementError(
                    f"the client wants {amount:g} {name}s, but no node{_pins(resources)} has more"
                    f" than {most:g}: request less in ResourceConfig or add a larger node",
                    details={"resource": name, "wanted": amount, "most": most},
                )
        if not any(all(has.get(name, 0) >= wanted[name] for name in wanted) for has in nodes):
            raise PlacementError(
                f"no node has all of {wanted} together: request less in ResourceConfig or add a"
                " node that has all of them",
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
        """Returns whether this process would see the actor of a run if the run has an actor.

        Embedded clusters of several processes may share one home and see only their own actors.
        """
        return not self.embedded or run_id in Cluster._started

    def find_training(self, run_id: str, epoch: int) -> Any | None:
        """Returns the living actor of a run's epoch, or None.

        An actor that does not answer within `silent_s` counts as lost. Another actor may then take
        over its run, after which the silent actor cannot publish or charge even if it wakes up.
        """
        deadline = time.monotonic() + self.silent_s
        while True:
            try:
                actor = named_actor(self.namespace, f"{run_id}@{epoch}")
                ask(actor.ready, timeout=max(0.0, deadline - time.monotonic()))
                return actor
            except (ActorLostError, FutureTimeoutError):
                return None
            except ClusterUnavailableError:  # a network fault, or the actor has just died
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.2)

    def sampler(self, key: bytes, **arguments: Any) -> SamplerLink:
        """Returns the sampling application of a base model, and deploys it if it does not run."""
        where = {"namespace": self.namespace, "embedded": self.embedded, **arguments}
        with translated():
            self._samplers.append(SamplerLink(serve_backend().connect(**where), key))
        return self._samplers[-1]

    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None:
        """Deploys the sampling application of a base model at an HTTP address."""
        place = {"namespace": self.namespace, **where}
        Cluster._serves_http = self.embedded
        with translated():
            serve_backend().serve_http(host, port, replicas, place, **options)

    def kill_training(self, run_id: str, epoch: int) -> None:
        """Ends the actor of a run's epoch if it exists."""
        with contextlib.suppress(ActorLostError, ClusterUnavailableError):
            kill(named_actor(self.namespace, f"{run_id}@{epoch}"))


class SamplerLink:
    """The connection of a client to a sampling application; requests and replies are sealed."""

    def __init__(self, application: Any, key: bytes) -> None:
        self._application = application
        self._key = key

    def sample(self, request: SampleRequest) -> Any:
        """Returns all completions; Ctrl-C frees the slots of the request."""
        with translated():
            sealed = self._application.sample(seal_payload(self._key, request))
        return open_payload(self._key, sealed).unwrap()

    def close(self) -> None:
        """Closes the connection in any state of the cluster; ignores errors."""
        with contextlib.suppress(Exception):
            self._application.close()

    def stream(self, request: SampleRequest) -> Iterator[Any]:
        """Yields the chunks as they are generated; leaving the loop early frees their slots."""
        with translated():
            for sealed in self._application.stream(seal_payload(self._key, request)):
                yield open_payload(self._key, sealed).unwrap()


def _upgrade(file: Path) -> None:
    """Upgrades the registry of an embedded home to this release, after a backup.

    The operator of a cluster upgrades the registry of the cluster.

    Raises:
        StorageError: a cluster that `tg-tinker up` started may still use the registry.
    """
    found = revision_on_record(file)
    if found in (None, REVISION):
        return
    if read(file.parent) is not None:
        raise StorageError(
            f"the registry {file} is of an older release, and a cluster of `tg-tinker up` on its"
            " home may still use it: run `tg-tinker down`, then `tg-tinker registry upgrade`"
        )
    backup = file.with_name(
        f"{file.stem}-{found}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.db"
    )
    before, after = actors_backend().upgrade_registry(sqlite_url(file), backup)
    if before != after:
        _log.warning(
            "upgraded the registry %s from revision %s to %s; the previous state is in %s",
            file, before, after, backup,
        )  # fmt: skip


def _allows(resources: ResourceConfig, node: Any) -> bool:
    has, pins = node["Resources"], resources.custom_resources.items()
    labeled = resources.node_labels.items() <= node["Labels"].items()
    return labeled and all(amount <= has.get(name, 0) for name, amount in pins)


def _pins(resources: ResourceConfig) -> str:
    pins = resources.custom_resources | resources.node_labels
    return f" with {pins}" if pins else ""
