"""Checks whether the machines of a running cluster fit this program.

The checks compare versions and clocks, whether the machines talk in plaintext, and whether they
share a store.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.operations.findings import OF_NODES, OK, PROBLEM, WARNING, Finding
from tg_tinker.cluster.cluster import Cluster
from tg_tinker.cluster.connection import WITHOUT_TLS
from tg_tinker.cluster.node import tls_is_on
from tg_tinker.cluster.ray_calls import ask
from tg_tinker.errors import TGTinkerError
from tg_tinker.storage.stores import parse

SKEW_S = 5.0
"""Seconds between two clocks above which the check warns.

Times in the audit log and the expiry of artifacts are only as accurate as the clocks.
"""

ANSWER_S = 60.0
_PACKAGES = ("tg-tinker", "ray", "torch", "transformers", "cryptography")


class Told(NamedTuple):
    """The answer of a machine, and the local times at which it was asked and answered."""

    machine: str
    versions: dict[str, str]
    clock: float
    asked: float
    answered: float

    @property
    def skew(self) -> float:
        """The seconds that the clock is off at least; the travel of the answer may be the rest."""
        return max(self.asked - self.clock, self.clock - self.answered, 0.0)


def examine(address: str, store: str) -> Iterator[Finding]:
    """Yields the findings about each machine.

    This joins the cluster for a moment, as any program does, and runs a task on each machine.
    """
    joined = not ray.is_initialized()
    try:
        Cluster(address, "tg_tinker")
        told = [_told(node) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    except TGTinkerError as error:
        for name in OF_NODES:
            yield Finding(name, WARNING, f"not compared: {error.message}")
        return
    finally:
        # Otherwise the program would stay connected to this cluster until it ends.
        if joined:
            ray.shutdown()
    yield _versions(told)
    yield _clocks(told)
    machines = {one.machine for one in told}
    yield _machines(machines)
    yield _shared_store(machines, store)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that must be the same on all machines.

    With different versions, the machines may not understand each other's weights, seals and calls.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _describe() -> tuple[dict[str, str], float]:
    return versions(), time.time()


def _told(node: dict[str, Any]) -> Told:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    describe = _describe.options(scheduling_strategy=there)
    # The first call starts the process that answers.
    ask(describe, timeout=ANSWER_S)
    asked = time.time()
    found, clock = ask(describe, timeout=ANSWER_S)
    return Told(node["NodeManagerAddress"], found, clock, asked, time.time())


def _versions(told: list[Told]) -> Finding:
    mine = versions()
    other = {
        f"{name} {one.versions.get(name, 'none')} on {one.machine} (here {mine[name]})"
        for one in told
        for name in mine
        if one.versions.get(name) != mine[name]
    }
    if other:
        message = f"{', '.join(sorted(other))}: install the same versions on every machine"
        return Finding("versions", PROBLEM, message)
    return Finding("versions", OK, f"the same on all {len(told)} nodes: {_listed(mine)}")


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _clocks(told: list[Told]) -> Finding:
    off = {one.machine: one.skew for one in told if one.skew > SKEW_S}
    if off:
        said = ", ".join(f"{machine} by {skew:.0f} s" for machine, skew in sorted(off.items()))
        message = f"{said} off this machine's clock: set them by NTP (`timedatectl set-ntp true`)"
        return Finding("clocks", WARNING, message)
    return Finding("clocks", OK, f"less than {SKEW_S:g} s apart")


def _machines(machines: set[str]) -> Finding:
    if len(machines) == 1 or tls_is_on():
        kind = "one" if len(machines) == 1 else f"{len(machines)}, under TLS"
        return Finding("machines", OK, kind)
    message = (
        f"{len(machines)} talk in clear, because {WITHOUT_TLS} allows it: whoever listens between"
        " them reads keys and batches. Set up TLS as in docs/deployment.md"
    )
    return Finding("machines", WARNING, message)


def _shared_store(machines: set[str], store: str) -> Finding:
    """Checks whether all machines use the same store.

    The same path is a different disk on each machine, unless one folder is mounted on all of them.
    """
    folder = False
    with suppress(TGTinkerError):  # The check of the store reports why.
        folder = isinstance(parse(store), Path)
    if len(machines) == 1 or not folder:
        return Finding("shared store", OK, "one machine, or a store that all machines reach")
    message = (
        f"{store} is a folder, and training actors run on {len(machines)} machines: others find"
        " what one machine saves only if the folder is mounted on all of them. Otherwise give"
        " ServiceClient a store such as s3://bucket/prefix"
    )
    return Finding("shared store", WARNING, message)
