"""Lists every bench by name. To add a bench, add the name of its module to `ROOMS`."""

from __future__ import annotations

import importlib

from bench.measure import Bench

ROOMS = (
    "training", "size", "sdk", "start", "privacy", "sampling", "serving", "audit", "registry",
    "sealing",
    "storage", "utility", "peers",
)  # fmt: skip


def benches() -> dict[str, Bench]:
    """Returns all benches by name, in the order in which they run."""
    found = [importlib.import_module(f"bench.{name}").BENCH for name in ROOMS]
    return {bench.name: bench for bench in found}


def selected(
    known: dict[str, Bench], only: list[str], everything: bool
) -> dict[str, frozenset[str]]:
    """Returns the benches to run, each with the workloads to run; empty means all workloads.

    Raises:
        KeyError: if a name is neither a bench nor a workload.
    """
    if not only:
        return {
            n: frozenset() for n, b in known.items() if b.usual or (everything and n != "peers")
        }
    names = {n for b in known.values() for n in (b.name, *b.workloads)}
    for unknown in set(only) - names:
        raise KeyError(unknown)
    wanted = {}
    for name, bench in known.items():
        single = frozenset(only) & frozenset(bench.workloads)
        if name in only or single:
            wanted[name] = frozenset() if name in only else single
    return wanted
