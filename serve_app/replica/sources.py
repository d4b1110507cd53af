"""Finds the weights that a request names.

base            the base model itself
RUN             the weights of a living run after its last completed step
RUN@7           the same weights, if that step is step 7
RUN@>=7         the same weights, once that step is step 7 or later
ARTIFACT        a saved artifact
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from actors.artifacts.fetch import fetch
from actors.artifacts.publish import ARTIFACT_PREFIX
from actors.registry.registry import Registry
from actors.sampling.snapshots import Snapshot, of_state, opened, shares_base
from actors.storage.store import ArtifactStore
from tg_tinker.cluster.messages import SnapshotRef
from tg_tinker.cluster.named_actors import (
    current_step,
    fetch_snapshot,
    latest_snapshot,
    living_actors,
)
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import InvalidRequestError, NotFoundError, VersionGoneError
from tg_tinker.storage.envelope import open_payload
from tg_tinker.types import TrainingClientInfo

BASE = "base"
"""The name of the base model itself."""


@dataclass(frozen=True, repr=False)
class Source:
    """Weights that are in memory or can be fetched.

    Attributes:
        name: the unique name of these weights; None is the base model.
        version: the version that responses show.
        shared: whether these weights can share a base model with others.
        fetch: gets the weights.
    """

    name: str | None
    version: str
    shared: bool
    fetch: Callable[[], Snapshot]


class Sources:
    """The weights of one base model that requests can name. All methods block."""

    def __init__(
        self, registry: Registry, key: bytes, namespace: str, store: str, model_ref: str
    ) -> None:
        self._registry, self._key, self._namespace = registry, key, namespace
        self.store, self._model_ref = store, model_ref

    def of_snapshot(self, reference: SnapshotRef) -> Source:
        """Returns the source of a snapshot that a training client has taken."""

        def get() -> Snapshot:
            sealed = fetch_snapshot(self._namespace, reference.actor, reference.name)
            return opened(open_payload(self._key, sealed).unwrap())

        return Source(reference.name, reference.version, reference.shared, get)

    def find(self, tenant: str, allowed: tuple[str, ...], model: str, who: str) -> Source:
        """Returns the source of the weights that a request names.

        Args:
            allowed: the models that the key may use; empty means all models.
            who: the caller, for the audit log.

        Raises:
            NotFoundError: this tenant and key have no weights of this name, or the weights are of
                another base model. The error does not reveal which of these is the case.
            VersionGoneError: the run is at another step; `details["later"]` is true if waiting may
                help.
            ActorLostError: the run has no living actor.
        """
        if model == BASE:
            return BASE_SOURCE
        name, _, wanted = model.partition("@")
        if model.isascii() and not (allowed and name not in allowed):
            with contextlib.suppress(NotFoundError):
                return self._live(tenant, name, wanted)
            if not wanted:
                with contextlib.suppress(NotFoundError):
                    return self._saved(tenant, name, who)
        raise no_model(model)

    def names(self, tenant: str, allowed: tuple[str, ...]) -> list[str]:
        """Returns all names that `find` finds: the base model, living runs and artifacts."""
        living = living_actors(self._namespace)
        runs = {run.training_client_id: run for run in self._registry.runs.of(tenant)
                if run.model_ref == self._model_ref}  # fmt: skip
        found = [name for name, run in runs.items() if f"{name}@{run.epoch}" in living]
        found += [artifact.artifact_id for artifact in self._registry.catalogue.find(tenant)
                  if artifact.training_client_id in runs and not artifact.expired]  # fmt: skip
        return [BASE, *(name for name in found if not allowed or name in allowed)]

    def gone(self, names: Iterable[str]) -> list[str]:
        """Returns those of the names that belong to artifacts which nobody may open any longer."""
        saved = [name for name in names if name.startswith(ARTIFACT_PREFIX)]
        return self._registry.catalogue.gone(saved) if saved else []

    # --- inside ------------------------------------------------------------------------------

    def _run(self, tenant: str, run_id: str) -> tuple[TrainingClientInfo, str]:
        info, stored = self._registry.runs.get(tenant, run_id)
        if info.model_ref != self._model_ref:
            raise NotFoundError("a run on another base model")
        return info, stored

    def _live(self, tenant: str, run_id: str, wanted: str) -> Source:
        info, _ = self._run(tenant, run_id)
        if not wanted:
            return self._latest(tenant, info)
        least, exact = wanted.removeprefix(">="), wanted[:2] != ">="
        if not (least.isdecimal() and len(least) < 12):
            raise InvalidRequestError(
                "the text after @ is not a step: write RUN@STEP or RUN@>=STEP with a whole number"
            )
        step = current_step(self._namespace, _actor(info))
        if step >= int(least) and (not exact or step == int(least)):
            found = self._latest(tenant, info)
            # The run may have made another step meanwhile.
            if not exact or found.version == f"{run_id}@{int(least)}":
                return found
        raise VersionGoneError(
            f"{run_id} is at step {step}, not {wanted}: name the run without a step for its latest"
            " weights, or save an artifact at the step you want",
            details={"step": step, "later": not exact},
        )

    def _latest(self, tenant: str, info: TrainingClientInfo) -> Source:
        reference = latest_snapshot(self._namespace, _actor(info), self._key)
        # Whoever writes the database can give a run to another tenant, but not its actor.
        if reference.tenant != tenant:
            raise NotFoundError("a run of another tenant")
        return self.of_snapshot(reference)

    def _saved(self, tenant: str, artifact_id: str, who: str) -> Source:
        info = self._registry.catalogue.openable(tenant, artifact_id)
        _, stored = self._run(tenant, info.training_client_id)
        lora = TrainingConfig.model_validate_json(stored).lora_config

        def get() -> Snapshot:
            from actors.engine.checkpoint import from_files

            store = ArtifactStore(self.store)
            reader = self._registry.data_keys.reader(tenant, who)
            files = fetch(self._registry, store, reader, artifact_id)
            return of_state(artifact_id, from_files(files).state, lora)

        return Source(artifact_id, artifact_id, shares_base(lora), get)


def no_model(name: str) -> NotFoundError:
    """Returns the error for a name that this caller has no model of, whatever the reason is."""
    return NotFoundError(f"there is no model {name!r}: GET /v1/models lists the models")


def _actor(info: TrainingClientInfo) -> str:
    return f"{info.training_client_id}@{info.epoch}"


def _nothing() -> Snapshot:
    raise AssertionError("the base model is always here")


BASE_SOURCE = Source(None, BASE, True, _nothing)
