"""Finds ports for programs beside a test, and the processes that they have left behind."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tg_tinker import TrainingClient

SOAK = bool(os.environ.get("TG_TINKER_SOAK"))
"""Whether `make soak` runs: faults for longer."""


RAY_WORKERS_END = 20_000
"""`ray start` gives its workers the ports from 10002 to 19999."""


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback that were free a moment ago, all different.

    They lie below the ports that the system gives to whoever asks for any port: Ray asks for
    dozens while it starts, and could take a port before the program that it was found for.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(RAY_WORKERS_END, max(lowest, RAY_WORKERS_END + 2000))
    found: list[int] = []
    for port in random.SystemRandom().sample(ports, 2000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} of {count} ports are free in {ports}")


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def descendants(session: int) -> list[str]:
    """Returns the command lines of a session's processes (in the sense of setsid) that have not
    ended."""
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
