"""Carries artifacts from training actors into the store, with one actor for each namespace.

The storage actor pulls sealed parts from the training actor that seals them. So the parts pass
through Ray's object store as ciphertext, the storage actor owns them there, and only a few parts of
a file wait to be written.
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
    # For types only: it loads SQLAlchemy, which this actor does not need.
    from actors.artifacts.publish import Draft

NAME = "tg_tinker.storage"
_AHEAD = 4
"""The maximum number of sealed objects of a file that wait to be written."""


class _Pulled:
    """A sealed file of a draft in another actor. Each iteration seals the file again."""

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
    """An actor that writes artifacts and has no key. A write is durable when the actor replies."""

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
        """Writes the files, the wrapped key and the manifest of a draft in the actor `source`."""
        files = {name: _Pulled(source, artifact_id, name) for name in names}
        return reply_of(
            lambda: ArtifactStore(root).write_artifact(
                tenant, artifact_id, files, key,
                lambda: ray.get(source.manifest.remote(artifact_id)),
            )
        )  # fmt: skip


def writer(namespace: str, root: str) -> Any:
    """Returns an `actors.artifacts.publish.Write` for the training actor that calls this function.

    The storage actor does the writing.
    """
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
        # To the caller of this run, either error would mean that the training actor was lost.
        except (ActorLostError, ClusterUnavailableError):
            raise StorageError(
                "the storage actor was lost while it wrote, or is restarting, so nothing was"
                " saved: save again"
            ) from None
        written.unwrap()

    return write
