"""Describes the machine on which the figures were measured, without a host name or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "ray", "opacus")
QUIET = 1.0
"""The load up to which ratios are reliable."""


def described() -> dict[str, str]:
    return {
        "CPU": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "threads": "all cores in each process, unless a row says otherwise",
        "Python": platform.python_version(),
        "packages": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES),
        "commit": commit(),
        "load before": load(),
    }


def load() -> str:
    """Returns the load of the last minute, with a warning if it is too high.

    Waiting threads of the plain loop spin, and ours sleep, so other work slows the plain loop more.
    """
    before = os.getloadavg()[0]
    told = f"{before:.1f} processes in the last minute"
    return told if before <= QUIET else f"{told}: not quiet, so ratios favor ours"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit of the source tree, with a mark if files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"
