"""Programs beside a test: ports for them, and which processes they have left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from tg_tinker import TrainingClient

SOAK = bool(os.environ.get("TG_TINKER_SOAK"))
"""Whether `make soak` runs: faults for longer."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that were free a moment ago, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def descendants(session: int) -> list[str]:
    """Processes of a session (in the sense of setsid), and those that Ray gave their own."""
    out = subprocess.run(
        ["ps", "-wweo", "pid,sid,args"], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in out.splitlines()[1:]]
    return [row[2] for row in rows if int(row[1]) == session and "defunct" not in row[2]]


def assert_all_end(session: int, within_s: float) -> None:
    """Waits until a session has no process left."""
    deadline = time.monotonic() + within_s
    while descendants(session) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert descendants(session) == []


def pid_of(tc: TrainingClient) -> int:
    import ray

    return ray.get(tc._calls.link.actor.__ray_call__.remote(lambda self: os.getpid()))


def pid() -> int:
    """Of this program's registry, once it is there."""
    for _ in range(600):
        out = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout
        rows = [line.split(None, 1) for line in out.splitlines()[1:]]
        found = [int(p) for p, name in rows if "ray::Registry" in name and _ours(int(p))]
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("no registry came back")


def _ours(pid: int) -> bool:
    """Other clusters of this machine have registries of their own."""
    home = f"TG_TINKER_HOME={os.environ['TG_TINKER_HOME']}".encode()
    try:
        return home in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
