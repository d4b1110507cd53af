"""Finds the actors of a cluster by name, for other actors and for the sampler."""

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
"""The time limit for a copy of the weights in seconds; the copy waits for the end of a step."""


@dataclass(frozen=True)
class ActorInfo:
    """The state of a training actor, which its control group reports at any time."""

    epoch: int
    step: int
    status: str


def keep_to_reserved_gpus() -> None:
    """Hides all GPUs from an actor that has reserved no GPU: Ray would show it the GPUs of others.

    Call this function before torch first looks for a GPU; torch may already be imported.
    """
    if not lazy_ray().get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def find_registry(namespace: str) -> Any:
    """Returns the actor of the registry."""
    with translated():
        return lazy_ray().get_actor(REGISTRY_NAME, namespace=namespace)


def living_actors(namespace: str) -> set[str]:
    """Returns the names of all living actors; a training actor is named `run@epoch`."""
    with translated():
        named = lazy_ray().util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["namespace"] == namespace}


def fetch_snapshot(namespace: str, actor: str, name: str) -> bytes:
    """Returns the sealed weights of a snapshot that a training actor keeps.

    Raises:
        ActorLostError: the actor is gone.
        FutureTimeoutError: the actor does not answer within `_ANSWER_S`.
    """
    sealed: bytes = ask(named_actor(namespace, actor).snapshot, name, timeout=_ANSWER_S)
    return sealed


def current_step(namespace: str, actor: str) -> int:
    """Returns the last completed step of a training actor; raises as `fetch_snapshot`."""
    info: ActorInfo = ask(named_actor(namespace, actor).info, timeout=_ANSWER_S)
    return info.step


def named_actor(namespace: str, name: str) -> Any:
    """Returns the actor of this name, or raises ActorLostError."""
    with translated():
        try:
            return lazy_ray().get_actor(name, namespace=namespace)
        except ValueError:
            raise ActorLostError(
                "the actor that trained these weights is gone: sample from an artifact, or recover"
                " the run with service.get_training_client"
            ) from None


def latest_snapshot(namespace: str, actor: str, key: bytes) -> SnapshotRef:
    """Returns a reference to the latest weights of a training actor; raises as `fetch_snapshot`."""
    sealed = ask(named_actor(namespace, actor).latest, timeout=_ANSWER_S)
    reference: SnapshotRef = open_payload(key, sealed).unwrap()
    return reference
