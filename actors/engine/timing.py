"""Times the parts of a step on request. No part lies within another, so the times add up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

import torch


class Stage(StrEnum):
    FORWARD = "forward"
    HEAD = "head and loss"
    BACKWARD = "backward"
    CLIP = "clip"
    HASH = "hash"
    CHARGE = "charge"
    NOISE = "noise"
    OPTIMIZER = "optimizer"


_seconds: ContextVar[Counter[Stage] | None] = ContextVar("seconds", default=None)


@contextmanager
def measured() -> Iterator[Counter[Stage]]:
    """Yields the seconds of each stage that this thread goes through in the block."""
    seconds: Counter[Stage] = Counter()
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


@contextmanager
def stage(part: Stage) -> Iterator[None]:
    """Marks a part of the step. The cost is negligible if nothing is measured."""
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    started = _now()
    yield
    seconds[part] += _now() - started  # type: ignore[assignment]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # so that a kernel's time counts for the part that started it
    return time.perf_counter()
