"""Runs one training client in a Ray actor, which owns its CPUs and GPUs while it lives.

Training calls run one at a time, in the order in which they were sent. Meanwhile the control group
answers at once: counters, the journal, the list of canceled calls. Methods that wait for a step to
end, such as copies of the weights, have groups of their own: an actor whose control group is busy
does not answer.
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
"""Bytes per object of a sealed file: the transfer of smaller objects costs more than sealing."""

SETTLE_S = 30.0
"""Seconds that a closing client waits for the registry to record its last step.

It waits as long again for the store to take the head of the ledger.
"""

IDLE_S = 10.0
"""Seconds without a call after which the actor releases memory; the next step takes 10 % longer.

This is longer than most loops take to prepare a batch.
"""

_control = ray.method(concurrency_group="control")
_weights = ray.method(concurrency_group="weights")
_sealing = ray.method(concurrency_group="sealing")


@ray.remote(  # type: ignore[call-overload]
    max_restarts=0,
    max_task_retries=0,
    concurrency_groups={"control": 4, "answers": 4, "weights": 4, "sealing": 4, "saved": 16},
)
class TrainingActor:
    """The Ray actor of one run; see the module. Until `load` returns, operations are refused."""

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
        """Loads the model, and the artifact that a lost run is restored from.

        Returns a sealed reply with a `ModelInfo`.
        """
        self._loading = reply_of(self._load)
        return seal_payload(self._key, self._loading)

    def call(self, sealed: bytes) -> bytes:
        """Runs one sealed `Request` and returns a sealed `Reply`."""
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
        """Returns the messages about loading, without the first `heard` messages."""
        return self._said[heard:]

    @_control
    def description(self) -> bytes | None:
        """Returns the reply of `load`, for a second client of the same run; None while loading."""
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
        """Returns the sealed weights that the operation `snapshot` kept, for a sampler."""
        self._used = time.monotonic()
        return self._answered(reply_of(lambda: self._ready_worker().taken(name)))

    @_weights
    def latest(self) -> bytes:
        """Returns a sealed `SnapshotRef` of the weights after the last completed step."""
        self._used = time.monotonic()
        return self._answered(reply_of(lambda: self._ready_worker().latest()))

    @_sealing
    def sealed_file(self, artifact_id: str, name: str) -> Iterator[bytes]:
        """Yields a file that is being saved, sealed and in pieces, for the storage actor."""
        joined = bytearray()
        for part in self._ready_worker().saver.drafts[artifact_id].parts(name):
            joined += part
            if len(joined) >= PIECE:
                yield bytes(joined)
                joined.clear()
        yield bytes(joined)

    @_sealing
    def manifest(self, artifact_id: str) -> bytes:
        """Returns the manifest of a draft. All files of the draft must have been read before."""
        return self._ready_worker().saver.drafts[artifact_id].manifest()

    @ray.method(concurrency_group="saved")
    def saved(self, request_id: str) -> bytes:
        """Waits until a call of `save_state` is durable; returns a sealed `SaveStateResult`."""
        begun = self._calls.wait(request_id)
        return self._answered(reply_of(lambda: self._saved(begun)))

    @_weights
    def settle(self) -> bool:
        """Waits until the registry has the last completed step and the store the ledger's head.

        Returns False if the registry has not recorded the step in time.
        """
        told = self._notes.settle(SETTLE_S)
        if self._worker is not None and self._worker.heads is not None:
            # A run can end without a head in the store.
            with suppress(TGTinkerError, TimeoutError):
                self._worker.heads.keep(SETTLE_S)
        return told

    @_control
    def cancel(self, request_id: str) -> bool:
        return self._calls.cancel(request_id)

    @ray.method(concurrency_group="answers")
    def stored(self, request_id: str) -> bytes | None:
        """Returns the stored reply to a call whose answer was lost.

        Returns None if there is no stored reply, or if the save that the call started is not done.
        """
        reply = self._calls.stored(request_id)
        if reply is not None and isinstance(reply.value, Saving):
            begun = reply
            reply = reply_of(lambda: self._saved(begun, wait=False))
            if reply == Reply():  # The save is not done.
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
                "the registry has not recorded the last steps, so the run is not parked: its actor"
                " would end before they are recorded. Check that the registry's database accepts"
                " changes, then park again"
            )
        try:
            return worker.run(request, check_cancelled)
        finally:
            if request.operation in ("optim_step", "load_state"):
                # Before the reply is sent: `ask` would make the step known to the registry, and a
                # known step gets no row.
                self._record()

    def _answered(self, reply: Reply) -> bytes:
        """Returns the reply, sealed, or a refusal if another actor has taken over the run.

        This actor may have been frozen since the reply was made, or before.
        """
        refusal = reply_of(self._refuse_replaced)
        return seal_payload(self._key, reply if refusal.error is None else refusal)

    def _refuse_replaced(self) -> None:
        # The replies of a run that parked itself stay valid.
        if self._worker is None or self._worker.parked:
            return
        self._notes.ask()
        if self._notes.replaced:
            raise ActorLostError(
                f"this actor (epoch {self._epoch}) was replaced by a newer one: get a new client"
                " with service.get_training_client"
            )

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
            info = replace(info, warnings=(*info.warnings, *loaded.warnings))
        # A restored run may be behind the last step that the registry knows.
        if self._epoch > 1:
            self._notes.note(worker.session.step, worker.status)
        # Set after the artifact is loaded, so that nobody samples from the initial weights.
        self._worker = worker
        if parsed.resources.park_after_minutes is not None:
            after_s = 60 * parsed.resources.park_after_minutes
            self._used = time.monotonic()
            threading.Thread(target=self._park_when_idle, args=(after_s,), daemon=True).start()
        settle_heap()
        self._set_progress("ready")
        threading.Thread(target=self._while_idle, daemon=True).start()
        return info

    def _while_idle(self) -> None:
        """Returns freed memory to the system for other clients, and sends refused notes again."""
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
        """Sends `park` to this actor, in order with the calls of clients; retries if refused."""
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
            raise ServiceError(
                "the model is not loaded: wait until the client is created, or create it again if"
                " the creation failed"
            )
        return self._worker

    def _with_head(self, reply: Reply) -> Reply:
        """Returns the reply with the newest head of the ledger, for the client to keep."""
        if self._worker is None or self._worker.heads is None:
            return reply
        return replace(reply, ledger_head=self._worker.heads.newest)

    def _record(self) -> None:
        """Reports the progress of the run to the registry, without waiting for the registry."""
        worker = self._ready_worker()
        self._notes.note(worker.session.step, worker.status, worker.take_step())


def start(
    namespace: str, tenant: str, run_id: str, epoch: int, config: str, store: str, home: str,
    registry: Any, capability: bytes, resume: str | None, resources: ResourceConfig,
) -> Any:  # fmt: skip
    """Starts and returns a training actor under the name and epoch of the run.

    Args:
        capability: the capability, sealed because Ray keeps arguments in plaintext.
        resume: the artifact to restore from; None starts the run from the beginning.
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
