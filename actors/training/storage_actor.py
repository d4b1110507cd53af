"""Carries artifacts from training actors into the store: one actor for a namespace.

It pulls sealed parts out of the actor that seals them. So they pass through Ray's object store as
ciphertext, this actor owns them there, and no more of them wait than the store can take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray

from actors.process import forget_keyrings, harden, reply_of
from actors.storage.store import ArtifactStore
from actors.training.warm_process import COLD
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.ray_calls import ask
from tg_tinker.errors import ActorLostError, ClusterUnavailableError, StorageError

if TYPE_CHECKING:
    from actors.artifacts.publish import Draft  # which loads SQLAlchemy: this actor starts without

NAME = "tg_tinker.storage"
_AHEAD = 4
"""Objects of a file that are sealed and not written yet."""


class _Pulled:
    """A sealed file of a draft in another actor; sealed anew whenever it is read anew."""

    def __init__(self, source: Any, artifact_id: str, name: str) -> None:
        self._source, self._arguments = source, (artifact_id, name)

    def __iter__(self) -> Iterator[bytes]:
        method = self._source.sealed_file.options(_generator_backpressure_num_objects=_AHEAD)
        for ref in method.remote(*self._arguments):
            yield ray.get(ref)


@ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=8
)
class StorageActor:
    """Knows no key. What it writes is at rest when it answers."""

    def __init__(self) -> None:
        harden()
        forget_keyrings()

    def write(
        self,
        root: str,
        tenant: str,
        artifact_id: str,
        names: Sequence[str],
        key: bytes,
        source: Any,
    ) -> Reply:
        """Files, wrapped key and manifest of a draft that `source` holds."""
        files = {name: _Pulled(source, artifact_id, name) for name in names}
        return reply_of(
            lambda: ArtifactStore(root).write_artifact(
                tenant, artifact_id, files, key,
                lambda: ray.get(source.manifest.remote(artifact_id)),
            )
        )  # fmt: skip


def writer(namespace: str, root: str) -> Any:
    """`artifacts.Write` by the storage actor, for the training actor that calls this."""
    actor = StorageActor.options(  # type: ignore[attr-defined]
        name=NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        runtime_env=COLD,
    ).remote()
    myself = ray.get_runtime_context().current_actor

    def write(store: ArtifactStore, draft: Draft) -> None:
        arguments = root, draft.tenant, draft.artifact_id, draft.names, draft.wrapped_key, myself
        try:
            written: Reply = ask(actor.write, *arguments)
        except (ActorLostError, ClusterUnavailableError):  # neither is what this run's caller lost
            raise StorageError(
                "the storage actor was lost while it wrote, or is on its way back: nothing was"
                " saved; save again"
            ) from None
        written.unwrap()

    return write
