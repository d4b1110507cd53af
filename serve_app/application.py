"""The door to Ray Serve (with `http`): deploys the sampling application and reaches it."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray import serve
from ray._private.state import available_resources_per_node
from ray.serve.api import RunTarget, run_many
from ray.serve.config import BackpressureConfig, HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from actors.process import SPIN
from actors.sampling.engine import SLOTS
from serve_app.http.access import HttpOptions
from serve_app.http.routes import HttpReplica
from serve_app.http.sealed import APPLICATIONS, check_proxy
from tg_tinker.cluster.ports import addresses, check_port
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    InvalidRequestError,
    PlacementError,
    QueueFullError,
)

MOST_ONGOING = 64 * SLOTS
"""Calls that a replica takes; those beyond its slots wait in its engine."""

MOST_QUEUED = 256
"""Calls of one client process that wait for a replica."""

START_S = 600.0
"""How long a sampler may take to start: a large model is converted once and loaded."""

ROOM_S = 60.0
"""How long to wait for the resources of a sampler."""

_QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


@dataclass(frozen=True)
class Place:
    """What a sampler samples from, and what it occupies.

    Attributes:
        model_ref, dtype: of the base model, as `TrainingConfig` has them; with the namespace they
            name its application.
        home, store: where converted models and artifacts lie.
        resources, labels: of its nodes, as `ResourceConfig` has them; a pinned client has a sampler
            of its own.
    """

    namespace: str
    model_ref: str
    dtype: str
    home: str
    store: str
    num_cpus: float
    num_gpus: float
    threads: int | None
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        pins = {**self.resources, **self.labels}
        known = f"{self.model_ref} {self.dtype}{f' {sorted(pins.items())}' if pins else ''}"
        model = hashlib.sha256(known.encode()).hexdigest()[:12]
        return f"{APPLICATIONS}{self.namespace}-{model}"


class Sampler:
    """What a client calls: sealed bytes in and out."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def sample(self, sealed: bytes) -> bytes:
        with _translated():
            response = self._handle.sample.remote(sealed)
            try:
                answer: bytes = response.result()
            except BaseException:
                response.cancel()
                raise
            return answer

    def stream(self, sealed: bytes) -> Iterator[bytes]:
        """Leaving it early cancels the call."""
        with _translated():
            answers = self._handle.options(stream=True).stream.remote(sealed)
            try:
                yield from answers
            finally:
                # A generator that the program left behind ends after the cluster has.
                with contextlib.suppress(RayServeException, ray.exceptions.RayError):
                    answers.cancel()

    def close(self) -> None:
        """Ends what Serve runs in this process for it: threads that would outlive the cluster."""
        self._handle.shutdown()


def connect(embedded: bool, **where: Any) -> Sampler:
    """The application of a base model; deployed here where it does not run yet.

    Args:
        embedded: start Serve without its HTTP proxy.
        where: the fields of `Place`.

    Raises:
        PlacementError: the cluster has no room for it.
        ClusterUnavailableError: it does not start.
    """
    place = Place(**where)
    _start(ProxyLocation.Disabled if embedded else ProxyLocation.HeadOnly)
    if not _running(place.name):
        _run(place, HttpOptions(), route=None)
    return Sampler(serve.get_app_handle(place.name))


def serve_http(host: str, port: int, replicas: int, where: dict[str, Any], **options: Any) -> None:
    """Deploys the application of a base model at an address; returns when it answers.

    Args:
        where, options: the fields of `Place` and `HttpOptions`.

    Raises:
        InvalidRequestError: open to everyone on an address that others reach.
        ClusterUnavailableError: the port is taken, Serve runs here at another address, its proxy
            does not seal what it hands on, or it does not start.
        PlacementError: the cluster has no room for it.
    """
    allowed = HttpOptions(**options)
    found = [ipaddress.ip_address(address[0]) for _, address in addresses(host, port)]
    if allowed.open and not all(address.is_loopback for address in found):
        raise InvalidRequestError(
            f"{host} can be reached by others: make an API key first (`tg-tinker api-keys create`),"
            " or serve on 127.0.0.1"
        )
    if _get_global_client(raise_if_no_controller_running=False) is None:
        check_port(host, port)
    _start(ProxyLocation.HeadOnly, HTTPOptions(host=host, port=port))
    # Serve keeps the address of its first start, and only says so in a log: it could be one that
    # others reach.
    http = cast("Any", _get_global_client()).http_config
    none = "NoServer" in str(http.location)
    if none or (http.host, http.port) != (host, port):
        raise ClusterUnavailableError(
            f"Ray Serve runs on this cluster already, not at {host}:{port} (a sampler of the SDK"
            " starts it without HTTP): serve first, or `serve shutdown` and serve again"
        )
    place = Place(**where)
    _run(place, allowed, route="/", replicas=replicas)
    try:
        check_proxy(host, port)
    except ClusterUnavailableError:
        serve.delete(place.name)
        raise


def bound(place: Place, options: HttpOptions, replicas: int = 1) -> serve.Application:
    """The application, ready to be run.

    Args:
        replicas: copies of the model at most; with more than one they come and go with the load.
    """
    deployment = serve.deployment(
        name="sampler",
        max_ongoing_requests=MOST_ONGOING,
        max_queued_requests=MOST_QUEUED,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        **_scaling(replicas),
        graceful_shutdown_timeout_s=options.deadline_s,
        ray_actor_options={
            "num_cpus": place.num_cpus,
            "num_gpus": place.num_gpus,
            **({"resources": dict(place.resources)} if place.resources else {}),
            **({"label_selector": dict(place.labels)} if place.labels else {}),
            "runtime_env": {"env_vars": SPIN},  # before the process loads torch
        },
        logging_config=_QUIET,
    )(HttpReplica)  # fmt: skip
    return deployment.bind(
        options, place.namespace, place.model_ref, place.dtype, place.home, place.store,
        place.threads,
    )  # fmt: skip


def _running(name: str) -> bool:
    """Waits while it starts or mends itself: a second deployment would take its place.

    Raises:
        ClusterUnavailableError: it takes too long.
    """
    deadline = time.monotonic() + START_S
    while (found := serve.status().applications.get(name)) is not None:
        if found.status in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOY_FAILED):
            return found.status == ApplicationStatus.RUNNING
        if time.monotonic() > deadline:
            raise ClusterUnavailableError(
                f"the sampler of this model has not started within {START_S:g} s: `serve status` on"
                " the head node says why"
            )
        time.sleep(0.1)
    return False


def _start(location: ProxyLocation, http: HTTPOptions | None = None) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
    serve.start(proxy_location=location, http_options=http, logging_config=_QUIET)


def _run(place: Place, options: HttpOptions, route: str | None, replicas: int = 1) -> None:
    if place.name not in serve.status().applications:  # else it gives its own place to the new one
        _await_room(place)
    target = RunTarget(bound(place, options, replicas), place.name, route, _QUIET)
    run_many([target], wait_for_applications_running=False)
    if not _running(place.name):
        failed = serve.status().applications[place.name].deployments.values()
        why = "; ".join(filter(None, (_reason(deployment.message) for deployment in failed)))
        raise ClusterUnavailableError(
            f"the sampler of this model cannot start: {why}" if why else
            "the sampler of this model cannot start: `serve status` on the head node says why"
        )  # fmt: skip


def _reason(message: str) -> str:
    """The last line of a traceback, if it is an error of ours: others may quote anything."""
    last = re.search(r"^tg_tinker\.errors\.\w+: (.+)\Z", message.rstrip(), re.MULTILINE)
    return last[1] if last else ""


def _await_room(place: Place) -> None:
    """Serve itself would wait for ever.

    Raises:
        PlacementError: what it needs is not free within the deadline.
    """
    wanted = {"CPU": place.num_cpus, "GPU": place.num_gpus, **place.resources}
    deadline = time.monotonic() + ROOM_S
    while True:
        free = _free_where_it_may_run(place)
        if any(all(has.get(name, 0) >= n for name, n in wanted.items()) for has in free):
            return
        if time.monotonic() > deadline:
            said = "; ".join(_listed({name: has.get(name, 0) for name in wanted}) for has in free)
            raise PlacementError(
                f"the sampler wants {_listed(wanted)} on one node"
                f"{f' with the labels {dict(place.labels)}' if place.labels else ''}, free are"
                f" {said or 'none'} for {ROOM_S:g} s now: close a client, or give clients less,"
                " such as ResourceConfig(num_gpus=0.5)"
            )
        time.sleep(0.5)


def _free_where_it_may_run(place: Place) -> list[dict[str, float]]:
    """Of each living node with its labels."""
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        free.get(node["NodeID"], {})
        for node in nodes
        if node["Alive"] and place.labels.items() <= node["Labels"].items()
    ]


def _listed(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}s" for name, amount in amounts.items())


def _scaling(most: int) -> dict[str, Any]:
    if most == 1:
        return {"num_replicas": 1}
    return {
        "autoscaling_config": {
            "min_replicas": 1, "max_replicas": most, "target_ongoing_requests": 2 * SLOTS,
        }
    }  # fmt: skip


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Serve's exceptions as ours, without their texts."""
    try:
        yield
    except BackPressureError:
        raise QueueFullError(
            f"{MOST_QUEUED} calls of this process wait for a sampler already: take the results of"
            " earlier ones first"
        ) from None
    except (RayServeException, ray.exceptions.RayError) as error:
        raise ActorLostError(
            f"the sampler is gone ({type(error).__name__}): sample again, it comes back by itself"
        ) from None
