"""The Ray shell of one training client: it owns the client's CPUs and GPUs for as long as it lives.

Training calls run one at a time in the order they were sent. The control group answers beside
them at once: counters, the journal, the list of cancelled calls. What waits for a step to end has
a group of its own, copies of the weights among it: an actor whose control group is taken is silent.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.process import forget_keyrings, harden, reply_of, settle_heap
from actors.registry.registry import as_registry
from actors.training import warm_process
from actors.training.call_journal import CallJournal
from actors.training.step_notes import StepNotes
from tg_tinker.cluster.messages import Reply, Request, Saving
from tg_tinker.cluster.named_actors import ActorInfo, keep_to_reserved_gpus
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.config import ResourceConfig, TrainingConfig
from tg_tinker.errors import ActorLostError, ServiceError, StorageError, TGTinkerError
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.types import PARKED

if TYPE_CHECKING:
    from actors.training.worker import Worker

PIECE = 8 * 2**20
"""Bytes of an object of a sealed file: to hand over smaller ones costs more than to seal them."""

SETTLE_S = 30.0
"""How long a client that closes waits for the registry to hear of its last step, and for the store
to take the ledger's head."""

IDLE_S = 10.0
"""Without a call for so long, memory is handed back; the next step takes a tenth more. Longer than
most loops take to prepare a batch."""

_control = ray.method(concurrency_group="control")
_weights = ray.method(concurrency_group="weights")
_sealing = ray.method(concurrency_group="sealing")


@ray.remote(  # type: ignore[call-overload]
    max_restarts=0,
    max_task_retries=0,
    concurrency_groups={"control": 4, "answers": 4, "weights": 4, "sealing": 4, "saved": 16},
)
class TrainingActor:
    """See the module. `load` comes first; everything else is refused until it has returned."""

    def __init__(
        self, namespace: str, tenant: str, run_id: str, epoch: int, config: str, store: str,
        home: str, registry: Any, capability: bytes, resume: str | None,
    ) -> None:  # fmt: skip
        harden()
        forget_keyrings()
        keep_to_reserved_gpus()
        remote = RemoteRegistry(registry)
        self._key, self._registry = remote.key, as_registry(remote)
        self._run_id, self._epoch = run_id, epoch
        self._arguments = (namespace, tenant, config, store, home)
        self._resume = resume
        self._capability = open_payload(self._key, capability)
        self._calls = CallJournal(epoch)
        self._worker: Worker | None = None
        self._said: list[str] = []
        self._loading: Reply | None = None
        self._notes = StepNotes(partial(self._registry.runs.record, run_id, epoch))
        self._used = time.monotonic()

    # --- training, in order ------------------------------------------------------------------

    def load(self) -> bytes:
        """Loads the model, and the artifact that a lost run comes back from; the reply is a
        `ModelInfo`."""
        self._loading = reply_of(self._load)
        return seal_payload(self._key, self._loading)

    def call(self, sealed: bytes) -> bytes:
        """One sealed `Request` in, one sealed `Reply` out."""
        request: Request = open_payload(self._key, sealed)
        self._used = time.monotonic()
        reply = self._calls.run(request, self._run)
        self._used = time.monotonic()
        if self._worker is not None and self._worker.broken:
            ray.actor.exit_actor()  # type: ignore[no-untyped-call]
        return self._answered(self._with_head(reply))

    # --- control, beside training ------------------------------------------------------------

    @_control
    def ready(self) -> bool:
        return True

    @_control
    def progress(self, heard: int) -> list[str]:
        """What was said of loading after the first `heard` remarks."""
        return self._said[heard:]

    @_control
    def description(self) -> bytes | None:
        """What `load` answered, for a second client of the same run; None while loading."""
        self._used = time.monotonic()
        return None if self._loading is None else seal_payload(self._key, self._loading)

    @_control
    def info(self) -> ActorInfo:
        worker = self._worker
        if worker is None:
            return ActorInfo(self._epoch, 0, "active")
        return ActorInfo(self._epoch, worker.session.step, worker.status)

    @_control
    def tokenizer(self) -> bytes:
        files = reply_of(lambda: self._ready_worker().tokenizer_files())
        return seal_payload(self._key, files)

    @_weights
    def snapshot(self, name: str) -> bytes:
        """Weights that the operation `snapshot` kept, for a sampler: into the object store."""
        self._used = time.monotonic()
        return self._answered(reply_of(lambda: self._ready_worker().taken(name)))

    @_weights
    def latest(self) -> bytes:
        """A `SnapshotRef` of the weights after the last completed step."""
        self._used = time.monotonic()
        return self._answered(reply_of(lambda: self._ready_worker().latest()))

    @_sealing
    def sealed_file(self, artifact_id: str, name: str) -> Iterator[bytes]:
        """A file that is being saved, sealed, for the storage actor."""
        joined = bytearray()
        for part in self._ready_worker().saver.drafts[artifact_id].parts(name):
            joined += part
            if len(joined) >= PIECE:
                yield bytes(joined)
                joined.clear()
        yield bytes(joined)

    @_sealing
    def manifest(self, artifact_id: str) -> bytes:
        """Of a draft whose files were all read."""
        return self._ready_worker().saver.drafts[artifact_id].manifest()

    @ray.method(concurrency_group="saved")
    def saved(self, request_id: str) -> bytes:
        """Waits until a call of `save_state` is durable; the reply is a `SaveStateResult`."""
        begun = self._calls.wait(request_id)
        return self._answered(reply_of(lambda: self._saved(begun)))

    @_weights
    def settle(self) -> bool:
        """Returns once the registry has heard of the last completed step, and the store has the
        ledger's head; false where the registry has not."""
        told = self._notes.settle(SETTLE_S)
        if self._worker is not None and self._worker.heads is not None:
            with suppress(TGTinkerError, TimeoutError):  # the run ends well without
                self._worker.heads.keep(SETTLE_S)
        return told

    @_control
    def cancel(self, request_id: str) -> bool:
        return self._calls.cancel(request_id)

    @ray.method(concurrency_group="answers")
    def stored(self, request_id: str) -> bytes | None:
        """The reply to a call whose answer was lost on the way, if it is still remembered."""
        reply = self._calls.stored(request_id)
        if reply is not None and isinstance(reply.value, Saving):
            begun = reply
            reply = reply_of(lambda: self._saved(begun, wait=False))
            if reply == Reply():  # it goes on
                return None
        return None if reply is None else self._answered(reply)

    # --- inside ------------------------------------------------------------------------------

    def _run(self, request: Request, check_cancelled: Callable[[], None]) -> Any:
        worker = self._ready_worker()
        if worker.parked:
            raise ActorLostError("the run is parked: repeat the call", details={"reason": PARKED})
        self._refuse_replaced()
        if request.operation == "park" and not self._notes.settle(SETTLE_S):
            raise StorageError(
                "the registry could not be told of the last steps, so the run is not parked: the"
                " notes of them would end with its actor. See that its database takes changes"
            )
        try:
            return worker.run(request, check_cancelled)
        finally:
            if request.operation in ("optim_step", "load_state"):
                self._record()  # before it asks: a step that is known already gets no row

    def _answered(self, reply: Reply) -> bytes:
        """A reply that was just made or found, sealed; once another actor has the run, none of this
        one: it may have been frozen meanwhile, or ever since."""
        refusal = reply_of(self._refuse_replaced)
        return seal_payload(self._key, reply if refusal.error is None else refusal)

    def _refuse_replaced(self) -> None:
        if self._worker is None or self._worker.parked:  # what it gave up by itself stays true
            return
        self._notes.ask()
        if self._notes.replaced:
            raise ActorLostError(f"this actor (epoch {self._epoch}) was replaced by a newer one")

    def _load(self) -> Any:
        self._set_progress("importing torch and transformers")
        warm_process.imported()
        from actors.storage.home import MODELS
        from actors.training.place import Place
        from actors.training.storage_actor import writer
        from actors.training.worker import Worker

        namespace, tenant, config, store, home = self._arguments
        cache = Path(home) / MODELS
        place = Place(tenant, self._run_id, self._epoch, store, cache, self._capability)
        parsed = TrainingConfig.model_validate_json(config)
        carry = writer(namespace, store)
        worker = Worker(place, parsed, self._registry, self._set_progress, carry)
        info = worker.model_info()
        if self._resume is not None:
            self._set_progress(f"loading artifact {self._resume}")
            loaded = worker.load_state(lambda: None, self._resume)
            info = replace(info, warnings=loaded.warnings)
        if self._epoch > 1:  # it may be behind the last one
            self._notes.note(worker.session.step, worker.status)
        self._worker = worker  # now, so that nobody samples from the beginning meanwhile
        if parsed.resources.park_after_minutes is not None:
            after_s = 60 * parsed.resources.park_after_minutes
            self._used = time.monotonic()
            threading.Thread(target=self._park_when_idle, args=(after_s,), daemon=True).start()
        settle_heap()
        self._set_progress("ready")
        threading.Thread(target=self._while_idle, daemon=True).start()
        return info

    def _while_idle(self) -> None:
        """Hands memory that the last calls have freed back to the system, for other clients. Tells
        the registry again what it has refused."""
        from actors.engine.memory import give_back

        warm_process.leave_spare()
        given_back = 0.0
        while True:
            time.sleep(IDLE_S)
            self._notes.send()
            used = self._used
            if used != given_back and time.monotonic() - used > IDLE_S:
                give_back()
                given_back = used

    def _park_when_idle(self, after_s: float) -> None:
        """Sends `park` to itself, in line with the calls of others; refused, it tries later."""
        myself = ray.get_runtime_context().current_actor
        for number in itertools.count():
            while (left := self._used + after_s - time.monotonic()) > 0:
                time.sleep(left)
            request = Request(f"idle-{number}", "park", self._epoch, "idle", number)
            ray.get(myself.call.remote(seal_payload(self._key, request)))
            if self._worker is not None and self._worker.parked:
                ray.kill(myself)

    def _saved(self, begun: Reply, wait: bool = True) -> Any:
        return self._ready_worker().saver.outcome(begun.unwrap(), wait)

    def _set_progress(self, message: str) -> None:
        self._said.append(message)

    def _ready_worker(self) -> Worker:
        if self._worker is None:
            raise ServiceError("the model is not loaded: the client's creation failed or goes on")
        return self._worker

    def _with_head(self, reply: Reply) -> Reply:
        """The reply, with the head of the ledger for the client to keep."""
        if self._worker is None or self._worker.heads is None:
            return reply
        return replace(reply, ledger_head=self._worker.heads.newest)

    def _record(self) -> None:
        """Tells the registry how far the run is, without waiting for it."""
        worker = self._ready_worker()
        self._notes.note(worker.session.step, worker.status, worker.take_step())


def start(
    namespace: str, tenant: str, run_id: str, epoch: int, config: str, store: str, home: str,
    registry: Any, capability: bytes, resume: str | None, resources: ResourceConfig,
) -> Any:  # fmt: skip
    """A new training actor under the run's name and epoch.

    Args:
        capability: sealed: Ray keeps arguments in clear.
        resume: the artifact to come back from; None is the beginning of the run.
    """
    return TrainingActor.options(  # type: ignore[attr-defined]
        name=f"{run_id}@{epoch}",
        namespace=namespace,
        lifetime="detached",
        num_cpus=resources.num_cpus or 0,
        num_gpus=resources.num_gpus or 0,
        resources=resources.custom_resources,
        label_selector=resources.node_labels,
        runtime_env=warm_process.ENVIRONMENT,
    ).remote(namespace, tenant, run_id, epoch, config, store, home, registry, capability, resume)
