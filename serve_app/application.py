"""The door to Ray Serve: deploys the sampling application and reaches it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from actors.generation import SLOTS
from actors.process import harden
from serve_app.replica import Replica
from tg_tinker.errors import ActorLostError, QueueFullError

MOST_ONGOING = 8 * SLOTS
"""Calls that a replica takes; those beyond its slots wait in its engine."""

MOST_QUEUED = 256
"""Calls of one client process that wait for a replica."""

_QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


class HardenedReplica(Replica):
    """In a process of ours, which writes no core file."""

    def __init__(self, *arguments: Any) -> None:
        harden()
        super().__init__(*arguments)


class Sampler:
    """What a client calls: sealed bytes in and out."""

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
        """Leaving it early cancels the call."""
        with _translated():
            answers = self._handle.options(stream=True).stream.remote(sealed)
            try:
                yield from answers
            finally:
                answers.cancel()


def connect(
    namespace: str, model_ref: str, dtype: str, digest: str, home: str,
    num_cpus: float, num_gpus: float, threads: int | None,
) -> Sampler:  # fmt: skip
    """The application of a base model; deployed here where it does not run yet.

    Its HTTP proxy stays off: calls come through handles, inside the cluster.
    """
    name = f"tg-tinker-{namespace}-{digest.removeprefix('sha256:')[:12]}-{dtype}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_QUIET)
    running = serve.status().applications.get(name)
    if running is None or running.status != ApplicationStatus.RUNNING:
        deployment = serve.deployment(
            name="sampler",
            max_ongoing_requests=MOST_ONGOING,
            max_queued_requests=MOST_QUEUED,
            ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
            logging_config=_QUIET,
        )(HardenedReplica)
        application = deployment.bind(namespace, model_ref, dtype, home, threads)
        serve.run(application, name=name, route_prefix=None, logging_config=_QUIET)
    return Sampler(serve.get_app_handle(name))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Serve's exceptions as ours, without their texts."""
    try:
        yield
    except BackPressureError:
        raise QueueFullError(
            f"{MOST_QUEUED} calls of this process wait for a sampler already: take the results of"
            " earlier ones first"
        ) from None
    except (RayServeException, ray.exceptions.RayError) as error:
        raise ActorLostError(
            f"the sampler is gone ({type(error).__name__}): sample again, it comes back by itself"
        ) from None
