"""Deploys the sampling application on Ray Serve, and connects to it.

Except for `http`, `deploy` and `replica.metrics`, no other module uses Serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray._private.state import available_resources_per_node
from ray.serve.api import RunTarget, run_many
from ray.serve.config import BackpressureConfig, HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from actors.process import SPIN
from actors.sampling.requests import SLOTS
from serve_app.http.access import HttpOptions
from serve_app.http.listening import listen
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
from tg_tinker.hosts import is_loopback

MOST_ONGOING = 64 * SLOTS
"""The maximum number of calls in a replica; calls beyond its slots wait in its engine."""

MOST_QUEUED = 256
"""The maximum number of calls of one client process that wait for a replica."""

START_S = 600.0
"""Seconds that a sampler may take to start: a large model is converted once, and then loaded."""

ROOM_S = 60.0
"""Seconds to wait for the resources of a sampler."""

_QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


@dataclass(frozen=True)
class Place:
    """The base model of a sampler, and the resources that the sampler occupies.

    Attributes:
        model_ref, dtype: the base model, as in `TrainingConfig`. With the namespace, they determine
            the name of the application.
        home, store: the locations of converted models and of artifacts.
        resources, labels: the custom resources and node labels, as in `ResourceConfig`. A client
            that is pinned to nodes has its own sampler.
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
    """A connection of a client to a sampler; it sends and receives sealed bytes."""

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
        """Yields sealed replies. If the caller leaves early, the call is canceled."""
        with _translated():
            answers = self._handle.options(stream=True).stream.remote(sealed)
            try:
                yield from answers
            finally:
                # A generator that the program abandoned may end after the cluster has ended.
                with contextlib.suppress(RayServeException, ray.exceptions.RayError):
                    answers.cancel()

    def close(self) -> None:
        """Ends the threads of Serve in this process, which would outlive the cluster."""
        self._handle.shutdown()


def connect(embedded: bool, **where: Any) -> Sampler:
    """Returns a connection to the application of a base model, and deploys it if it does not run.

    Args:
        embedded: whether to start Serve without its HTTP proxy.
        where: the fields of `Place`.

    Raises:
        PlacementError: the cluster has no room for the application.
        ClusterUnavailableError: the application does not start.
    """
    place = Place(**where)
    _start(ProxyLocation.Disabled if embedded else ProxyLocation.HeadOnly)
    if not _running(place.name):
        _run(place, HttpOptions(), route=None)
    return Sampler(serve.get_app_handle(place.name))


def serve_http(host: str, port: int, replicas: int, where: dict[str, Any], **options: Any) -> None:
    """Deploys the application of a base model at an address, and returns when it answers.

    Args:
        where, options: the fields of `Place` and `HttpOptions`.

    Raises:
        InvalidRequestError: the server would be open on an address that other machines reach.
        ClusterUnavailableError: the port is taken, Serve answers at another address for other
            applications, its proxy does not seal bodies, or the application does not start.
        PlacementError: the cluster has no room for the application.
    """
    allowed = HttpOptions(**options)
    found = [str(address[0]) for _, address in addresses(host, port)]
    if allowed.open and not all(map(is_loopback, found)):
        raise InvalidRequestError(
            f"other machines can reach {host}: make an API key first (`tg-tinker api-keys create`),"
            " or serve on 127.0.0.1"
        )
    if _get_global_client(raise_if_no_controller_running=False) is None:
        check_port(host, port)
        _start(ProxyLocation.HeadOnly, HTTPOptions(host=host, port=port))
    # Serve keeps the address of its first start, perhaps one that other machines reach.
    listen(host, port)
    place = Place(**where)
    _run(place, allowed, route="/", replicas=replicas)
    try:
        check_proxy(host, port)
    except ClusterUnavailableError:
        serve.delete(place.name)
        raise


def end_http(within_s: float) -> None:
    """Ends all of our applications in good order, for a cluster that ends then.

    Answers that have begun have `within_s` seconds to end; new requests get status 503.
    """
    deadline = time.monotonic() + within_s
    for name in _ours():
        serve.delete(name, _blocking=False)
    while _ours() and time.monotonic() < deadline:
        time.sleep(0.1)


def _ours() -> list[str]:
    return [name for name in serve.status().applications if name.startswith(APPLICATIONS)]


def bound(place: Place, options: HttpOptions, replicas: int = 1) -> serve.Application:
    """Returns the application, ready to be deployed.

    Args:
        replicas: the maximum number of replicas. If it is above 1, their number follows the load.
    """
    deployment = serve.deployment(
        name="sampler",
        max_ongoing_requests=MOST_ONGOING,
        max_queued_requests=MOST_QUEUED,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        **_scaling(replicas),
        graceful_shutdown_timeout_s=options.deadline_s,
        graceful_shutdown_wait_loop_s=0.1,  # An idle replica ends at once.
        ray_actor_options={
            "num_cpus": place.num_cpus,
            "num_gpus": place.num_gpus,
            **({"resources": dict(place.resources)} if place.resources else {}),
            **({"label_selector": dict(place.labels)} if place.labels else {}),
            "runtime_env": {"env_vars": SPIN},  # Set before the process loads torch.
        },
        logging_config=_QUIET,
    )(HttpReplica)  # fmt: skip
    return deployment.bind(
        options, place.namespace, place.model_ref, place.dtype, place.home, place.store,
        place.threads,
    )  # fmt: skip


def _running(name: str) -> bool:
    """Returns whether an application runs, after it has started or recovered.

    The function waits for that, because a second deployment would replace the first one.

    Raises:
        ClusterUnavailableError: the application does not start in time.
    """
    deadline = time.monotonic() + START_S
    while (found := serve.status().applications.get(name)) is not None:
        if found.status in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOY_FAILED):
            return found.status == ApplicationStatus.RUNNING
        if time.monotonic() > deadline:
            raise ClusterUnavailableError(
                f"the sampler of this model has not started within {START_S:g} s: run"
                " `serve status` on the head node to see why"
            )
        time.sleep(0.1)
    return False


def _start(location: ProxyLocation, http: HTTPOptions | None = None) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # In this process.
    serve.start(proxy_location=location, http_options=http, logging_config=_QUIET)


def _run(place: Place, options: HttpOptions, route: str | None, replicas: int = 1) -> None:
    # An application that is deployed already gives its resources to the new deployment.
    if place.name not in serve.status().applications:
        _await_room(place)
    target = RunTarget(bound(place, options, replicas), place.name, route, _QUIET)
    run_many([target], wait_for_applications_running=False)
    if not _running(place.name):
        failed = serve.status().applications[place.name].deployments.values()
        why = "; ".join(filter(None, (_reason(deployment.message) for deployment in failed)))
        raise ClusterUnavailableError(
            f"the sampler of this model cannot start: {why}" if why else
            "the sampler of this model cannot start: run `serve status` on the head node to see why"
        )  # fmt: skip


def _reason(message: str) -> str:
    """Returns the message in the last line of a traceback, if it is a `TGTinkerError`.

    Returns an empty text otherwise, because other errors may quote anything.
    """
    last = re.search(r"^tg_tinker\.errors\.\w+: (.+)\Z", message.rstrip(), re.MULTILINE)
    return last[1] if last else ""


def _await_room(place: Place) -> None:
    """Waits until a node has the free resources. Serve itself would wait forever.

    Raises:
        PlacementError: no node has the resources within `ROOM_S` seconds.
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
                f" {said or 'none'} for {ROOM_S:g} s now: close a client, or give clients fewer"
                " resources, such as ResourceConfig(num_gpus=0.5)"
            )
        time.sleep(0.5)


def _free_where_it_may_run(place: Place) -> list[dict[str, float]]:
    """Returns the free resources of each living node that has the labels."""
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
    """Turns exceptions of Serve into `TGTinkerError`s without their texts."""
    try:
        yield
    except BackPressureError:
        raise QueueFullError(
            f"{MOST_QUEUED} calls of this process are waiting for a sampler already: take the"
            " results of earlier calls first"
        ) from None
    except (RayServeException, ray.exceptions.RayError) as error:
        raise ActorLostError(
            f"the sampler is gone ({type(error).__name__}) and restarts by itself: sample again"
        ) from None
