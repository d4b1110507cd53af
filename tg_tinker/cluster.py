"""The SDK's only door to Ray: finding or starting a cluster, reaching actors, awaiting refs.

Ray's own exceptions end here: what leaves this module is a value or a `TGTinkerError`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, cast

from tg_tinker.config import ResourceConfig
from tg_tinker.envelope import open_payload, seal_payload
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    InvalidRequestError,
    PlacementError,
)
from tg_tinker.interrupts import ctrl_c_held_back
from tg_tinker.node import tls_is_on
from tg_tinker.types import ClusterStatus
from tg_tinker.wire import Reply, SampleRequest, SnapshotRef

# Before Ray is first imported, which is why the other packages import this module first.
# No telemetry leaves.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A handle asked after its service closed must fail, not start a cluster of Ray's own choice.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# Else Ray's own series name each actor, and with it each run, to whoever reaches their port.
os.environ.setdefault("RAY_metric_cardinality_level", "low")
# Serve brings gRPC along, whose fork handlers meddle with the start of the next embedded cluster.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

REGISTRY_NAME = "tg_tinker.registry"
ENTRY_POINTS = "tg_tinker.cluster"
WITHOUT_TLS = "TG_TINKER_WITHOUT_TLS"

_STARTED_BY_RAY_START = Path("/tmp/ray/ray_current_cluster")  # noqa: S108
_ANSWER_S = 120.0
"""How long a training actor may take to copy its weights, which waits for the end of a step."""
_RESTART_S = 30.0
"""How long a call waits for a registry that restarts."""
_RESTARTING = "actor_restarting"
_OBJECT_STORE_BYTES = 512 * 2**20
_log = logging.getLogger("tg_tinker")


@dataclass(frozen=True)
class ActorInfo:
    """What a training actor's control group answers at any time."""

    epoch: int
    step: int
    status: str


def provided(name: str) -> Callable[..., Any]:
    """What an upper package offers under an entry point of this name."""
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return cast("Callable[..., Any]", entry.load())
    raise ClusterUnavailableError(
        f"no installed package offers {name!r}: reinstall tg-tinker (pip install -e . in a clone)"
    )


# --- one cluster ------------------------------------------------------------------------------


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
            if _ray().is_initialized():
                _refuse_another(address)
                self.embedded = Cluster._embedded_users > 0
                check_encrypted()
            else:
                self.embedded = _connect(address)
            Cluster._embedded_users += self.embedded
        self._open = True
        self._samplers: list[SamplerLink] = []

    @property
    def connected(self) -> bool:
        return self._open and bool(_ray().is_initialized())

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
                _ray().shutdown()

    def registry(self, database: str, keyring: str, audit_keys: str) -> RemoteRegistry:
        """The one registry of the namespace; on a cluster it shares its database with none."""
        sole = not self.embedded
        with _translated():
            actor = provided("registry")(self.namespace, database, keyring, audit_keys, sole)
            return RemoteRegistry(actor)

    def status(self) -> ClusterStatus:
        """Machines, what of them is free, and who trains there."""
        nodes = _living_nodes()
        with _translated():
            free = dict(_ray().available_resources())
            address = _ray().get_runtime_context().gcs_address
        machines = {node["NodeManagerAddress"]: dict(node["Resources"]) for node in nodes}
        living = living_actors(self.namespace)
        runs = sorted(name.partition("@")[0] for name in living if name.startswith("tc-"))
        return ClusterStatus(address, machines, free, tuple(runs), tls_is_on())

    def resources(self) -> dict[str, float]:
        with _translated():
            return dict(_ray().cluster_resources())

    def most_gpus(self, resources: ResourceConfig) -> float:
        """Of one node that a client's pins allow."""
        allowed = [node["Resources"] for node in _living_nodes() if _allows(resources, node)]
        return max((has.get("GPU", 0) for has in allowed), default=0)

    def metrics_urls(self) -> list[str]:
        """Where Prometheus finds the metrics of each living node."""
        nodes = _living_nodes()
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
        with _translated():
            actor = provided("training")(self.namespace, resources=resources, **arguments)
        placed = False
        try:
            with _translated():
                ready = [actor.ready.remote()]
                placed = bool(_ray().wait(ready, timeout=self.placement_timeout_s)[0])
        finally:
            if not placed:  # also after Ctrl-C: a waiting actor would take the next free place
                kill(actor)
        if not placed:
            raise PlacementError(
                f"no node had {num_cpus:g} CPUs and {num_gpus:g} GPUs free{_pins(resources)} within"
                f" {self.placement_timeout_s:g} s. Yours: {self._holders(others())}. Close a client"
                " or ask for less in ResourceConfig",
                details={"num_cpus": num_cpus, "num_gpus": num_gpus},
            )
        return actor

    def _refuse_impossible(self, resources: ResourceConfig) -> None:
        """What no waiting would help."""
        wanted = {"CPU": resources.num_cpus or 0, "GPU": resources.num_gpus or 0}
        totals = self.resources()
        for name, amount in (wanted | resources.custom_resources).items():
            if amount > (total := totals.get(name, 0)):
                raise PlacementError(
                    f"the client wants {amount:g} {name}s, the whole cluster has {total:g}: ask"
                    " for less in ResourceConfig or add nodes",
                    details={"resource": name, "wanted": amount, "total": total},
                )
        labels = resources.node_labels
        if not any(labels.items() <= node["Labels"].items() for node in _living_nodes()):
            raise PlacementError(
                f"no node has the labels {labels}: start one with `ray start --labels`, or change"
                " node_labels in ResourceConfig",
                details={"node_labels": labels},
            )

    def _holders(self, own: set[str]) -> str:
        with _translated():
            free = _ray().available_resources()
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
        with _translated():
            self._samplers.append(SamplerLink(provided("sampler")(**where), key))
        return self._samplers[-1]

    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None:
        """The same at an HTTP address."""
        place = {"namespace": self.namespace, **where}
        with _translated():
            provided("serve_http")(host, port, replicas, place, **options)

    def kill_training(self, run_id: str, epoch: int) -> None:
        """Ends the actor of a run's epoch, where there is one."""
        with contextlib.suppress(ActorLostError, ClusterUnavailableError):
            kill(named_actor(self.namespace, f"{run_id}@{epoch}"))


ONCE = frozenset({
    "accept_heads", "book_missing", "create_api_key", "create_run", "delete_artifact", "retire_key",
    "revoke_api_key", "rotate_key",
})  # fmt: skip
"""What a registry must not do twice. All its other methods may be called again."""


class RemoteRegistry:
    """The methods of `actors.registry.Registry`, called in its actor; payloads are sealed.

    A registry that was killed comes back with its database and its transport key. A call that was
    under way is then made again; one of `ONCE` fails and says that nobody knows whether it was
    done.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        reply: Reply = ask_again(actor.transport_key)
        self.key: bytes = reply.unwrap()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="registry")

    @property
    def typed(self) -> Any:
        """This object where a `Registry` is expected."""
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                sealed = self._asked(name, self.sealed((name, arguments)))
            except ActorLostError:
                raise ClusterUnavailableError(
                    "the registry's actor is gone: close this ServiceClient and open a new one;"
                    " runs and artifacts are in its database, not in the actor"
                ) from None
            return open_payload(self.key, sealed).unwrap()

        return call

    def notify(self, name: str, *arguments: Any) -> Future[Any]:
        """Calls beside the caller, in the order of these calls; the future learns the outcome."""
        return self._sender.submit(getattr(self, name), *arguments)

    def sealed(self, value: Any) -> bytes:
        """For whoever has the transport key."""
        return seal_payload(self.key, value)

    def _asked(self, name: str, sealed: bytes) -> Any:
        if name not in ONCE:
            return ask_again(self.actor.call, sealed)
        ask_again(self.actor.transport_key)  # it is there: what fails now is rare, and not known
        try:
            return ask(self.actor.call, sealed)
        except ClusterUnavailableError as error:
            if not restarting(error):
                raise
            raise ClusterUnavailableError(
                f"the registry was lost during {name} and comes back: whether it was done is not"
                " known. Look first, then repeat the call if it was not"
            ) from None


class SamplerLink:
    """The sampling application of a base model as a client reaches it: sealed both ways."""

    def __init__(self, application: Any, key: bytes) -> None:
        self._application = application
        self._key = key

    def sample(self, request: SampleRequest) -> Any:
        """All completions; Ctrl-C frees their slots."""
        with _translated():
            sealed = self._application.sample(seal_payload(self._key, request))
        return open_payload(self._key, sealed).unwrap()

    def close(self) -> None:
        """Whatever state the cluster is in."""
        with contextlib.suppress(Exception):
            self._application.close()

    def stream(self, request: SampleRequest) -> Iterator[Any]:
        """Chunks as they grow; leaving the loop early frees their slots."""
        with _translated():
            for sealed in self._application.stream(seal_payload(self._key, request)):
                yield open_payload(self._key, sealed).unwrap()


# --- inside the cluster ------------------------------------------------------------------------


def keep_to_reserved_gpus() -> None:
    """Shows an actor that has reserved no GPU none: Ray leaves it those of others.

    Before torch first looks for one; that it was imported does no harm.
    """
    if not _ray().get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def find_registry(namespace: str) -> Any:
    """The registry's actor."""
    with _translated():
        return _ray().get_actor(REGISTRY_NAME, namespace=namespace)


def living_actors(namespace: str) -> set[str]:
    """Names of the actors that are up, `run@epoch` among them."""
    with _translated():
        named = _ray().util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["namespace"] == namespace}


def fetch_snapshot(namespace: str, actor: str, name: str) -> bytes:
    """Sealed weights that a training actor keeps.

    Raises:
        ActorLostError: it is gone.
        FutureTimeoutError: it does not answer.
    """
    sealed: bytes = ask(named_actor(namespace, actor).snapshot, name, timeout=_ANSWER_S)
    return sealed


def current_step(namespace: str, actor: str) -> int:
    """Of a living training actor; raises as `fetch_snapshot`."""
    info: ActorInfo = ask(named_actor(namespace, actor).info, timeout=_ANSWER_S)
    return info.step


def named_actor(namespace: str, name: str) -> Any:
    """The actor of this name; raises ActorLostError where there is none."""
    with _translated():
        try:
            return _ray().get_actor(name, namespace=namespace)
        except ValueError:
            raise ActorLostError(
                "the actor that trained these weights is gone: sample from an artifact, or bring"
                " the run back with service.get_training_client"
            ) from None


def latest_snapshot(namespace: str, actor: str, key: bytes) -> SnapshotRef:
    """Of a living training actor; raises as `fetch_snapshot`."""
    sealed = ask(named_actor(namespace, actor).latest, timeout=_ANSWER_S)
    reference: SnapshotRef = open_payload(key, sealed).unwrap()
    return reference


# --- Ray's functions and exceptions ------------------------------------------------------------


def ask(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Calls an actor's method and waits for what it returns."""
    return fetch(send(method, *arguments), timeout)


def send(method: Any, *arguments: Any) -> Any:
    """Calls an actor's method; a ref to what it will return."""
    with _translated():
        return method.remote(*arguments)


def fetch(ref: Any, timeout: float | None = None) -> Any:
    """Waits for what a ref stands for.

    Raises:
        FutureTimeoutError: nothing within `timeout` seconds.
        ActorLostError: its actor is gone; `details["reason"]` says how.
        ClusterUnavailableError: the answer was lost on the way; the actor may live.
    """
    with _translated():
        return _ray().get(ref, timeout=timeout)


def _living_nodes() -> list[Any]:
    with _translated():
        return [node for node in _ray().nodes() if node["Alive"]]


def _allows(resources: ResourceConfig, node: Any) -> bool:
    has, pins = node["Resources"], resources.custom_resources.items()
    labelled = resources.node_labels.items() <= node["Labels"].items()
    return labelled and all(amount <= has.get(name, 0) for name, amount in pins)


def _pins(resources: ResourceConfig) -> str:
    pins = resources.custom_resources | resources.node_labels
    return f" and {pins}" if pins else ""


def kill(actor: Any) -> None:
    """Ends an actor and frees what it holds."""
    with contextlib.suppress(Exception):
        _ray().kill(actor)


def split(refs: list[Any], wait_s: float | None = 0) -> tuple[list[Any], list[Any]]:
    """Those refs that have answered, however, and those that have not; waits for all of them at
    most `wait_s` seconds, None for ever."""
    if not refs:
        return [], []
    with _translated():
        done, pending = _ray().wait(refs, num_returns=len(refs), timeout=wait_s)
        return list(done), list(pending)


def when_done(ref: Any, work: Callable[[], object]) -> None:
    """Runs `work` on the dispatcher thread once a ref has answered."""
    with _translated():
        ref.future().add_done_callback(lambda _: _dispatcher().put(work))


def ask_again(method: Any, *arguments: Any) -> Any:
    """`ask` of an actor that Ray restarts, until it is back: for what may be done twice."""
    deadline = time.monotonic() + _RESTART_S
    while True:
        try:
            return ask(method, *arguments)
        except ClusterUnavailableError as error:
            if not restarting(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def restarting(error: ClusterUnavailableError) -> bool:
    """Whether Ray said that the actor may answer again; the call was done or not."""
    return error.code == _RESTARTING


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's exceptions as ours, without their texts: those may quote arguments."""
    if not _ray().is_initialized():
        raise ClusterUnavailableError(
            "this process has left its Ray cluster: open a new ServiceClient, and reach the run"
            " again with get_training_client"
        )
    errors = _ray().exceptions
    try:
        yield
    except errors.GetTimeoutError:
        raise FutureTimeoutError(
            "no answer within the timeout: the call goes on, ask for its result again or cancel it"
        ) from None
    except errors.ActorUnavailableError:
        raise ClusterUnavailableError(
            "a call to an actor, or its answer, was lost on the way, or Ray restarts it: ask again",
            code=_RESTARTING,
        ) from None
    except errors.RayActorError as error:
        reason = _how_it_ended(error)
        raise ActorLostError(
            f"the actor of this client is gone ({reason}): service.get_training_client(id) brings"
            " the run back from its last artifact",
            details={"reason": reason},
        ) from None
    except (errors.RayError, ConnectionError) as error:
        raise ClusterUnavailableError(
            f"the Ray cluster does not answer ({type(error).__name__}): check `ray status`, then"
            " open a new ServiceClient"
        ) from None


def _how_it_ended(error: Any) -> str:
    """One of our own phrases: Ray's text may quote arguments."""
    text = str(error).lower()
    if "node_out_of_memory" in text or "low on memory" in text:
        return "out of memory"
    if error.preempted or "its node has died" in text or "node was terminated" in text:
        return "its node was lost"
    return "ended by us" if "ray.kill" in text else "its process ended"


def _ray() -> Any:
    import ray

    return ray


def _refuse_another(address: str | None) -> None:
    """A process has one Ray connection: a service elsewhere would silently use this one."""
    current = _ray().get_runtime_context().gcs_address
    if address not in (None, "auto", "local", current):
        raise InvalidRequestError(
            f"this process is connected to the Ray cluster at {current} already: leave out"
            f" address={address!r}, or use a process of its own"
        )


def _connect(address: str | None) -> bool:
    """Connects this process; true if it had to start an embedded cluster."""
    target = address or os.environ.get("RAY_ADDRESS") or running_cluster()
    quiet = {"configure_logging": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if target is None or target == "local":
        provided("seal_http")()
        with _quiet_stderr(), _starting():
            _ray().init(
                address="local", include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES, **quiet,
            )  # fmt: skip
        _close_token_file()
        return True
    if "://" in target:
        raise InvalidRequestError(
            f"address {target!r}: run on the head node, by `ray job submit`, or use HTTP; Ray"
            " Client connections are not supported"
        )
    if target != "auto" and not _answers(target):
        raise ClusterUnavailableError(
            f"no Ray cluster answers at {target}: start one with `ray start --head`, correct"
            " RAY_ADDRESS or `address`, or pass address='local' for an embedded one"
        )
    with _starting():
        _ray().init(address=target, **quiet)
    try:
        check_encrypted()
    except InvalidRequestError:
        _ray().shutdown()
        raise
    return False


def check_encrypted() -> None:
    """Between machines Ray sends in clear what is not sealed here, the transport key among it.

    Raises:
        InvalidRequestError: the cluster has several, Ray's TLS is off, and nobody has allowed it.
    """
    _refuse_unencrypted({node["NodeManagerAddress"] for node in _living_nodes()})


def _refuse_unencrypted(machines: set[str]) -> None:
    if len(machines) < 2 or tls_is_on() or os.environ.get(WITHOUT_TLS) == "1":
        return
    raise InvalidRequestError(
        f"this cluster has {len(machines)} machines and Ray's TLS is off: who listens between them"
        " reads keys and batches. Set RAY_USE_TLS=1 and its certificates on every machine"
        f" (docs/deployment.md), or {WITHOUT_TLS}=1 on a network that nobody else shares"
    )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Around `ray.init`: cut in two by Ctrl-C, it leaves a process that crashes at its end."""
    try:
        with ctrl_c_held_back():
            yield
    except KeyboardInterrupt:
        _ray().shutdown()
        raise
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterUnavailableError(
            f"Ray did not start, or refused this process ({type(error).__name__}): check"
            " `ray status` and RAY_ADDRESS, that RAY_AUTH_MODE is as the cluster was started with,"
            " and that RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token holds its token"
        ) from None


def running_cluster() -> str | None:
    """The cluster that `ray start` left running on this machine. Embedded ones write no file."""
    try:
        # Anyone may write into the shared temporary directory: trust this user's file only.
        if _STARTED_BY_RAY_START.stat().st_uid != os.getuid():
            return None
        address = _STARTED_BY_RAY_START.read_text().strip()
    except OSError:
        return None
    return address if _answers(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def _close_token_file() -> None:
    """Ray writes its cluster token readable by all; whoever reads it may run code."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        token.chmod(0o600)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops Ray's start-up notices; its errors come as exceptions."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


# --- the dispatcher ----------------------------------------------------------------------------

_work: queue.SimpleQueue[Callable[[], object]] | None = None
_work_lock = threading.Lock()


def _dispatcher() -> queue.SimpleQueue[Callable[[], object]]:
    """The queue of the thread that runs callbacks: not Ray's, so they may call the client."""
    global _work
    with _work_lock:
        if _work is None:
            _work = queue.SimpleQueue()
            threading.Thread(target=_dispatch, args=(_work,), daemon=True).start()
        return _work


def _dispatch(work: queue.SimpleQueue[Callable[[], object]]) -> None:
    while True:
        try:
            work.get()()
        except Exception as error:
            _log.error("a callback of a FutureHandle raised %s", type(error).__name__)
