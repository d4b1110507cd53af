"""Kills a process at each step of a change to files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

_KILLED = 9


def killed_at_every_step(change: Callable[[], object]) -> Iterator[int]:
    """Runs a change in a forked process that dies at its first call of the disk, then in one that
    dies at its second, and so on. Yields after each death; the last process finishes the change."""
    for step in count(1):
        process = os.fork()
        if not process:
            _run(change, step)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, _KILLED)
        yield step
        if not status:
            return


def _run(change: Callable[[], object], dies_at: int) -> None:
    """Never returns."""
    left = dies_at

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os._exit(_KILLED)
            return call(*arguments, **options)

        return wrapper

    os.fsync, os.open = counted(os.fsync), counted(os.open)
    Path.replace, Path.hardlink_to = counted(Path.replace), counted(Path.hardlink_to)  # type: ignore[method-assign]
    try:
        change()
        os._exit(0)
    finally:
        os._exit(1)
