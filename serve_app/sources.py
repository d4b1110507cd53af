"""Which weights a request means, and where to get them.

base            the base model itself
RUN             the weights of a living run after its last completed step
RUN@7           the same, if that step is the seventh
RUN@>=7         the same, once it is the seventh or a later one
ARTIFACT        a saved artifact
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from actors.artifacts import fetch
from actors.registry import Registry
from actors.snapshots import Snapshot, of_state, opened, shares_base
from actors.state import from_files
from actors.store import ArtifactStore
from tg_tinker.cluster import fetch_snapshot, latest_snapshot
from tg_tinker.config import TrainingConfig
from tg_tinker.envelope import open_payload
from tg_tinker.errors import InvalidRequestError, NotFoundError, VersionGoneError
from tg_tinker.wire import SnapshotRef

BASE = "base"
"""Name of the base model itself."""

WAIT_S = 10.0
"""How long `RUN@>=STEP` waits for its step."""


@dataclass(frozen=True, repr=False)
class Source:
    """Weights that are here or can be fetched.

    Attributes:
        name: unique for these weights; None is the base model.
        version: what answers carry.
        shared: they can share a base model with others.
    """

    name: str | None
    version: str
    shared: bool
    fetch: Callable[[], Snapshot]


class Sources:
    """Weights of one base model, as a tenant may name them. Its calls block."""

    def __init__(
        self, registry: Registry, key: bytes, namespace: str, store: str, model_ref: str
    ) -> None:
        self._registry, self._key, self._namespace = registry, key, namespace
        self._store, self._model_ref = store, model_ref

    def of_snapshot(self, reference: SnapshotRef) -> Source:
        """What a training client has taken."""

        def get() -> Snapshot:
            sealed = fetch_snapshot(self._namespace, reference.actor, reference.name)
            return opened(open_payload(self._key, sealed).unwrap())

        return Source(reference.name, reference.version, reference.shared, get)

    def find(self, tenant: str, allowed: tuple[str, ...], model: str) -> Source:
        """What a request names.

        Raises:
            NotFoundError: there is no such thing for this tenant and key, or it is of another
                base model; which of them is not told.
            VersionGoneError: the run is at another step.
            ActorLostError: the run has no living actor.
        """
        if model == BASE:
            return Source(None, BASE, True, _nothing)
        name, _, wanted = model.partition("@")
        if not (allowed and name not in allowed):
            for run_id in self._runs(tenant):
                if run_id == name:
                    return self._live(tenant, name, wanted)
            if not wanted and any(name == artifact for artifact in self._artifacts(tenant)):
                return self._saved(tenant, name)
        raise NotFoundError(f"there is no model {model!r}: GET /v1/models names those there are")

    def names(self, tenant: str, allowed: tuple[str, ...]) -> list[str]:
        """All that `find` finds."""
        known = [*self._runs(tenant), *self._artifacts(tenant)]
        return [BASE, *(name for name in known if not allowed or name in allowed)]

    # --- inside ------------------------------------------------------------------------------

    def _runs(self, tenant: str) -> Iterator[str]:
        for info in self._registry.runs(tenant):
            if info.model_ref == self._model_ref:
                yield info.training_client_id

    def _artifacts(self, tenant: str) -> Iterator[str]:
        runs = set(self._runs(tenant))
        for artifact in self._registry.artifacts(tenant):
            if artifact.training_client_id in runs:
                yield artifact.artifact_id

    def _live(self, tenant: str, run_id: str, wanted: str) -> Source:
        least, exact = wanted.removeprefix(">="), wanted[:2] != ">="
        if wanted and not (least.isdecimal() and len(least) < 12):
            raise InvalidRequestError("after @ comes a step, or >= and a step")
        deadline = time.monotonic() + WAIT_S
        while True:
            info, _ = self._registry.run(tenant, run_id)
            actor = f"{run_id}@{info.epoch}"
            reference = latest_snapshot(self._namespace, actor, self._key)
            step = int(reference.version.partition("@")[2])
            if not wanted or step == int(least) or (not exact and step > int(least)):
                return self.of_snapshot(reference)
            if exact or time.monotonic() > deadline:
                raise VersionGoneError(
                    f"{run_id} is at step {step}, not {wanted}: name the run for the latest,"
                    " or save an artifact of the step you want",
                    details={"step": step},
                )
            time.sleep(0.02)

    def _saved(self, tenant: str, artifact_id: str) -> Source:
        info = self._registry.artifact(tenant, artifact_id)
        _, stored = self._registry.run(tenant, info.training_client_id)
        lora = TrainingConfig.model_validate_json(stored).lora_config

        def get() -> Snapshot:
            files = fetch(self._registry, ArtifactStore(self._store), tenant, artifact_id)
            return of_state(artifact_id, from_files(files).state, lora)

        return Source(artifact_id, artifact_id, shares_base(lora), get)


def _nothing() -> Snapshot:
    raise AssertionError("the base model is always here")
