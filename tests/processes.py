"""Which processes a program has left behind, as the system sees it."""

from __future__ import annotations

import subprocess
import time


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
