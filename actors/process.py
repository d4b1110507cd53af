"""Hardens each actor process, and returns failures as values."""

from __future__ import annotations

import gc
import logging
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tg_tinker.cluster.messages import Reply
from tg_tinker.errors import InternalError, TGTinkerError
from tg_tinker.storage.keyrings import is_keyring

SPIN = {"GOMP_SPINCOUNT": "1000"}
"""Environment variables that OpenMP reads when torch loads it.

A waiting thread spins for some microseconds and then sleeps. If threads slept at once, a step would
take a fifth longer. If they spun for long, two clients on two cores would be ten times slower. With
1,000 spins, two clients share the cores without loss.
"""


def harden() -> None:
    """Makes new files private, forbids core files and limits how long idle threads spin.

    A core file would hold keys and texts.
    """
    os.umask(0o077)
    spin_briefly()
    no_core_files()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def spin_briefly() -> None:
    """Sets the variables of `SPIN` that the user has not set; no effect once torch is loaded."""
    for name, value in SPIN.items():
        os.environ.setdefault(name, value)


def settle_heap() -> None:
    """Excludes all present objects from later garbage collections.

    Each scan of the objects of torch or SQLAlchemy would stop every thread for some hundredths of a
    second.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def collections_paused() -> Iterator[None]:
    """Pauses garbage collection around imports, which shortens those of torch by a quarter.

    What an import creates stays, so the collector would scan a growing heap and free nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def no_core_files() -> None:
    """Forbids core files permanently, so that a crash writes no key and no plaintext weights."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forget_keyrings() -> None:
    """Removes keyrings from the environment of this process and of its later children.

    Every process of a cluster inherits the environment that the cluster was started with. The
    kernel still shows the original environment in /proc/PID/environ, to the same user and to root.
    """
    for name in [name for name, value in os.environ.items() if is_keyring(value)]:
        del os.environ[name]


def reply_of(work: Callable[[], Any], request_id: str = "") -> Reply:
    """Runs `work` and returns its outcome as a reply. Raises no `Exception` and logs nothing.

    For an error that is not a `TGTinkerError`, the reply has only its type and location, because
    its text could hold data.
    """
    try:
        return Reply(value=work())
    except TGTinkerError as error:
        return Reply(error=error.to_wire())
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(
            f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames)
        )
        internal = InternalError(
            f"{type(error).__name__} in the service at {where}"
            f"{f' (request {request_id})' if request_id else ''}: please report it",
            details={"type": type(error).__name__, "where": where, "request_id": request_id},
        )
        return Reply(error=internal.to_wire())
