"""Acts as another user of this machine, which takes root; elsewhere tests skip."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65_534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as a second user, which takes root")


def open_to_others(path: Path) -> None:
    """Lets other users enter and read a folder, and enter the closed folders above it."""
    closed = [above for above in path.parents if not above.stat().st_mode & 0o001]
    for folder in (path, *closed):
        folder.chmod(0o755)


def as_nobody(work: Callable[[], Any]) -> Any:
    """Returns what a function returns, or the name of its OSError, in a process of another user."""
    reading, writing = os.pipe()
    child = _forked(work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        text = said.read()
    os.waitpid(child, 0)
    return json.loads(text)


@contextmanager
def nobody_at_it(work: Callable[[], Any]) -> Iterator[None]:
    """Lets another user repeat a function, whatever comes of it, until the end of the block."""

    def repeat() -> None:
        while True:
            try:
                work()
            except OSError:
                continue

    child = _forked(repeat, os.open(os.devnull, os.O_WRONLY))
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextmanager
def nobody_listens() -> Iterator[str]:
    """Yields the address at which a program of another user listens."""
    import socket

    reading, writing = os.pipe()

    def listen() -> None:
        server = socket.create_server(("127.0.0.1", 0))
        os.write(writing, str(server.getsockname()[1]).encode())
        signal.pause()

    child = _forked(listen, writing)
    try:
        yield f"127.0.0.1:{os.read(reading, 100).decode()}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def _forked(work: Callable[[], Any], writing: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            said = work()
        except OSError as error:
            said = type(error).__name__
        os.write(writing, json.dumps(said, default=str).encode())
    finally:
        os._exit(0)
