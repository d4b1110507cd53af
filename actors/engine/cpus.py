"""Tells how many CPUs this process may use: its affinity, and the quota of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def usable_cpus(root: Path = Path("/")) -> int:
    """Returns the number of CPUs that threads of this process can keep busy, at least 1.

    A quota limits processor time and hides no CPU: threads for all CPUs would use the time up early
    in each period, and all stand still for the rest of it. A part of a CPU counts as one.

    Args:
        root: the directory that holds the kernel's `proc` and `sys`.
    """
    quotas = (math.ceil(quota) for quota in _quotas(root))
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _quotas(root: Path) -> Iterator[float]:
    """Yields the CPUs that each cgroup above this process grants (cgroups(7)), version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for group in _above(root / "sys/fs/cgroup", path):
                with suppress(OSError, ValueError):  # "max" is no number
                    quota, period = (group / "cpu.max").read_text().split()
                    yield int(quota) / int(period)
        elif "cpu" in controllers.split(","):
            for group in _above(root / "sys/fs/cgroup" / controllers, path):
                with suppress(OSError):
                    granted = int((group / "cpu.cfs_quota_us").read_text())
                    if granted > 0:
                        yield granted / int((group / "cpu.cfs_period_us").read_text())


def _above(mounted: Path, path: str) -> Iterator[Path]:
    """Yields the folder of a cgroup and of those above it; a container may see only the topmost."""
    inside = PurePosixPath(path.lstrip("/"))
    for part in (inside, *inside.parents):
        yield mounted / part
