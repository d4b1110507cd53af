"""A process kept warm: the next training actor of a node finds its libraries imported.

An actor that has loaded its model asks its node for one worker process more, with the environment
that its own has. That process imports what training needs and waits, and Ray gives it to the next
actor of this environment, from whatever program. Ray has no public call for it: where its inner
one is missing or fails, the next actor imports by itself, as the first one does.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from actors.process import SPIN, forget_keyrings, harden

KEEP_S = 600
"""For so long a spare process stays in any case; afterwards while Ray has CPUs free."""

LEAST_BYTES = 2 * 2**30
"""Of free memory, else there is no spare: it holds about 0.3 GB."""

ENVIRONMENT: dict[str, Any] = {
    "env_vars": {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.warm", **SPIN}
}
"""Of every training actor."""

COLD: dict[str, Any] = {"env_vars": {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: ""}}
"""Of actors that a training actor starts, which would inherit its environment."""

_imports: threading.Thread | None = None


def warm() -> None:
    """Runs when a process starts, before anyone has a use for it: imports in the background."""
    global _imports
    harden()  # torch reads its environment once
    forget_keyrings()
    _imports = threading.Thread(target=_import, name="imports", daemon=True)
    _imports.start()


def imported() -> None:
    """Returns once the libraries are there."""
    if _imports is not None:
        _imports.join()
    _import()
    with suppress(Exception):
        _mark().unlink(missing_ok=True)  # this process may be the spare one


def _import() -> None:
    import actors.training.worker  # noqa: F401


def leave_spare() -> None:
    """Asks this node for a spare process, unless one was asked for that nobody has taken yet.
    Whether one comes does not matter to the caller."""
    from actors.engine.memory import host_memory  # which loads torch: programs import this file too

    if host_memory() > LEAST_BYTES:
        with suppress(Exception):
            if _first_to_ask(_mark()):
                _ask_for_spare()


def _mark() -> Path:
    """Of this node: there while a spare process waits, or is on its way."""
    node: Any = ray._private.worker.global_worker.node
    here = ray.get_runtime_context().get_node_id()
    return Path(node.get_session_dir_path()) / f"tg_tinker_spare_{here}"


def _first_to_ask(mark: Path) -> bool:
    """Clients that load at once would leave one each, 0.3 GB for ten minutes."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        if time.time() - mark.stat().st_mtime < KEEP_S:
            return False
        mark.touch()  # Ray has ended it since
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
    # The very text: Ray compares it when it looks for a process for an actor.
    request.runtime_env_info.serialized_runtime_env = here.get_runtime_env_string()
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address) as channel:
        services.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
