"""Keeps a process warm, so that the next training actor of a node finds its libraries imported.

An actor that has loaded its model asks its node for one more worker process, with the same
environment. This spare process imports what training needs, and waits. Ray gives it to the next
actor of this environment, from whatever program. Ray has no public call for this. Where the
internal call is missing or fails, the next actor imports the libraries itself, as the first one
does.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from actors.process import SPIN, collections_paused, forget_keyrings, harden

KEEP_S = 600
"""Seconds that a spare process is kept in any case; after that, it is kept while CPUs are free."""

LEAST_BYTES = 2 * 2**30
"""Free bytes of memory that a spare process requires. The process itself holds about 0.3 GB."""

ENVIRONMENT: dict[str, Any] = {
    "env_vars": {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.warm", **SPIN}
}
"""The runtime environment of every training actor."""

COLD: dict[str, Any] = {"env_vars": {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: ""}}
"""The runtime environment of actors that a training actor starts.

Without it, they would inherit the environment of the training actor.
"""

_imports: threading.Thread | None = None


def warm() -> None:
    """Imports the libraries in the background; Ray calls this function when a process starts."""
    global _imports
    # First, because torch reads its environment once.
    harden()
    forget_keyrings()
    _imports = threading.Thread(target=_import, name="imports", daemon=True)
    _imports.start()


def imported() -> None:
    """Returns once the libraries are imported."""
    if _imports is not None:
        _imports.join()
    _import()
    with suppress(Exception):
        _mark().unlink(missing_ok=True)  # This process may have been the spare one.


def _import() -> None:
    with collections_paused():
        import actors.training.worker  # noqa: F401


def leave_spare() -> None:
    """Asks this node for a spare process, unless one waits or is starting already.

    A failure has no effect on the caller.
    """
    # Imported here because it loads torch, and programs import this file too.
    from actors.engine.memory import host_memory

    if host_memory() > LEAST_BYTES:
        with suppress(Exception):
            if _first_to_ask(_mark()):
                _ask_for_spare()


def _mark() -> Path:
    """Returns this node's marker file, which exists while a spare process waits or is starting."""
    node: Any = ray._private.worker.global_worker.node
    here = ray.get_runtime_context().get_node_id()
    return Path(node.get_session_dir_path()) / f"tg_tinker_spare_{here}"


def _first_to_ask(mark: Path) -> bool:
    """Returns whether no spare process was requested yet, and marks the request.

    Without the mark, clients that load at the same time would leave one process each, with 0.3 GB
    for ten minutes.
    """
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        if time.time() - mark.stat().st_mtime < KEEP_S:
            return False
        mark.touch()  # Ray has ended that process since.
    return True


def _ask_for_spare() -> None:
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    messages: Any = node_manager_pb2
    services: Any = node_manager_pb2_grpc
    here: Any = ray.get_runtime_context()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (node,) = (one for one in nodes if one["NodeID"] == here.get_node_id())
    request = messages.PrestartWorkersRequest(num_workers=1, keep_alive_duration_secs=KEEP_S)
    # The exact text, because Ray compares it when it looks for a process for an actor.
    request.runtime_env_info.serialized_runtime_env = here.get_runtime_env_string()
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address) as channel:
        services.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
