"""Actors of a cluster by their names, as other actors and the sampler reach them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tg_tinker.cluster.messages import SnapshotRef
from tg_tinker.cluster.ray_calls import ask, lazy_ray, translated
from tg_tinker.errors import ActorLostError
from tg_tinker.storage.envelope import open_payload

REGISTRY_NAME = "tg_tinker.registry"

_ANSWER_S = 120.0
"""How long a training actor may take to copy its weights, which waits for the end of a step."""


@dataclass(frozen=True)
class ActorInfo:
    """What a training actor's control group answers at any time."""

    epoch: int
    step: int
    status: str


def keep_to_reserved_gpus() -> None:
    """Shows an actor that has reserved no GPU none: Ray leaves it those of others.

    Before torch first looks for one; that it was imported does no harm.
    """
    if not lazy_ray().get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def find_registry(namespace: str) -> Any:
    """The registry's actor."""
    with translated():
        return lazy_ray().get_actor(REGISTRY_NAME, namespace=namespace)


def living_actors(namespace: str) -> set[str]:
    """Names of the actors that are up, `run@epoch` among them."""
    with translated():
        named = lazy_ray().util.list_named_actors(all_namespaces=True)
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
    with translated():
        try:
            return lazy_ray().get_actor(name, namespace=namespace)
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
