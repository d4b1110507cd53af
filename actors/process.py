"""What each actor process of ours does: keep files to itself, and answer failures as values."""

from __future__ import annotations

import gc
import logging
import os
import resource
import traceback
from collections.abc import Callable
from typing import Any

from tg_tinker.cluster.messages import Reply
from tg_tinker.errors import InternalError, TGTinkerError
from tg_tinker.storage.keyrings import is_keyring

SPIN = {"GOMP_SPINCOUNT": "1000"}
"""Read when torch loads its OpenMP: a waiting thread spins for some microseconds, then sleeps.
Asleep at once, a step takes a fifth longer; spinning for long, two clients on two cores made it ten
times slower. At 1,000 spins two share the cores without loss."""


def harden() -> None:
    """No core file (it would hold keys and texts), private new files, threads that soon sleep."""
    os.umask(0o077)
    spin_briefly()
    no_core_files()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def spin_briefly() -> None:
    """Sets `SPIN` where the user has not; without effect once torch is loaded."""
    for name, value in SPIN.items():
        os.environ.setdefault(name, value)


def settle_heap() -> None:
    """What is there now stays: later collections pass it over. To go through the objects of torch's
    or SQLAlchemy's modules stops every thread for some hundredths of a second, time and again."""
    gc.collect()
    gc.freeze()


def no_core_files() -> None:
    """For good: a process that once held a key or weights in clear writes none when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forget_keyrings() -> None:
    """Takes keyrings out of the environment of a process that needs none, and of its children.

    Every process of a cluster inherits what the cluster was started with. The system still shows
    that in /proc/PID/environ, to the same user and to root.
    """
    for name in [name for name, value in os.environ.items() if is_keyring(value)]:
        del os.environ[name]


def reply_of(work: Callable[[], Any], request_id: str = "") -> Reply:
    """The outcome of `work` as a reply; nothing is raised, nothing is logged.

    An error that is not ours is reported by its type and place only: its text could hold data.
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
