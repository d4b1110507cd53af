"""Programs beside a test: ports for them, and which processes they have left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import time

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
