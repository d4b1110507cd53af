"""Tests how many CPUs count, by the files of the kernel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from actors.engine import model
from actors.engine.cpus import usable_cpus


def kernel(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(path: str, **quotas: str) -> dict[str, str]:
    """Returns the files of a process at a path, and of the groups with a quota."""
    groups = {f"sys/fs/cgroup/{at.replace('__', '/')}/cpu.max": q for at, q in quotas.items()}
    return {"proc/self/cgroup": f"0::{path}\n", **groups}


V1 = {"proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/docker/abc\n0::/\n"}
GROUP = "sys/fs/cgroup/cpu,cpuacct/docker/abc"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        (v2("/"), 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (v2("/a", a="max 100000\n"), 8),
        (v2("/a", a="150000 100000\n"), 2),
        (v2("/a", a="10000 100000\n"), 1),
        (v2("/a", a="1600000 100000\n"), 8),
        (v2("/a/b", a="300000 100000\n", a__b="max 100000\n"), 3),
        (v2("/a/b", a="300000 100000\n", a__b="100000 50000\n"), 2),
        (v2("/not/seen/here"), 8),
        (v2("/a", a="damaged"), 8),
        (V1, 8),
        ({**V1, f"{GROUP}/cpu.cfs_quota_us": "-1\n", f"{GROUP}/cpu.cfs_period_us": "100000\n"}, 8),
        ({**V1, f"{GROUP}/cpu.cfs_quota_us": "250000", f"{GROUP}/cpu.cfs_period_us": "100000"}, 3),
        ({"proc/self/cgroup": "1:cpu:/docker/seen/by/host\n",
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)  # fmt: skip
def test_the_smallest_quota_above_a_process_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(kernel(tmp_path, files)) == expected


def test_threads_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(model, "usable_cpus", lambda: 3)
    model.use_threads(None)
    model.use_threads(5)
    assert set_to == [3, 5]
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))
