"""Keeps one embedded cluster for all modules of a test process; each module finds it empty.

A cluster takes four seconds of processor time to start, and the first training client on it another
four. What a module leaves in it (registry, training actors, Serve) is ended after the module, so
that the next one begins with its own home, as on a cluster of its own.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from support import forked_workers
from tg_tinker import ServiceClient
from tg_tinker.cluster.cluster import Cluster

FORKING = RAY_JOB_CONFIG_JSON_ENV_VAR
"""The variable by which a program that connects to Ray gets forked workers; see `forking`."""

_kept: list[Cluster] = []


@cache
def _forking() -> tuple[int, str]:
    """Returns the process that workers are forked from, and the job configuration for Ray."""
    return forked_workers.start()


def keep() -> None:
    """Starts the cluster of this process, unless it runs."""
    import ray

    if not ray.is_initialized():
        _kept.clear()  # a test has ended it
    if not _kept:
        with forking():
            _kept.append(Cluster("local", "tests"))


@contextmanager
def forking() -> Iterator[None]:
    """Lets the jobs of clusters and programs that start inside the block fork their workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORKING, _forking()[1])
        yield


def end() -> None:
    """Ends the cluster, for modules that connect this process to another one."""
    while _kept:
        _kept.pop().close()


def clear() -> None:
    """Ends every actor of the cluster, and returns once their names are free."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    if any(actor["namespace"] == "serve" for actor in _named()):
        serve.shutdown()
    for actor in _named():
        try:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
        except ValueError:  # it has ended since
            continue
    deadline = time.monotonic() + 60
    while _named():
        assert time.monotonic() < deadline, f"still there: {_named()}"
        time.sleep(0.05)


@contextmanager
def service(**options: Any) -> Iterator[ServiceClient]:
    """Yields a service whose actors end with the block, as those of a cluster of its own would."""
    keep()
    try:
        with ServiceClient(address="local", **options) as client:
            yield client
    finally:
        clear()


def _named() -> list[dict[str, str]]:
    from ray.util import list_named_actors

    return list(list_named_actors(all_namespaces=True))


def registry_pid() -> int:
    """Returns the process of the registry once it is there; other clusters have their own."""
    for _ in range(600):
        out = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True)
        rows = [line.split(None, 2) for line in out.stdout.splitlines()[1:]]
        found = [
            int(pid)
            for pid, parent, name in rows
            if "ray::Registry" in name and int(parent) == _forking()[0]
        ]
        if len(found) == 1:  # two while an ended one is still there
            return found[0]
        time.sleep(0.05)
    raise AssertionError("no registry came back")
