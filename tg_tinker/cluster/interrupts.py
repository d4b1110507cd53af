"""Gives a program one way to stop: SIGTERM and SIGHUP take the way of Ctrl-C.

    stops_raise()               # SIGTERM and SIGHUP now raise `Stopped`, a KeyboardInterrupt
    with stops_held_back():     # a stop takes effect after the block
        ...
    with stop_noted() as stop:  # also; the block may look at `stop`, and a second stop is at once
        ...

Containers, batch systems and service managers end a program by SIGTERM, a lost terminal by SIGHUP.
By default Python runs no `finally` and no `with` then.
"""

from __future__ import annotations

import errno
import os
import signal
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STOPS = (signal.SIGTERM, signal.SIGHUP)

_CTRL_C = 130
"""The exit status after Ctrl-C, the same as in shells."""


class Stopped(SystemExit, KeyboardInterrupt):
    """SIGTERM or SIGHUP has come.

    Whatever handles Ctrl-C handles this too. If nothing does, Python exits with `code`, which is
    143 or 129 as in shells, and prints no traceback.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def exit_status(stop: KeyboardInterrupt) -> int:
    """Returns the exit status of a program that a signal has stopped."""
    return int(stop.code or 0) if isinstance(stop, Stopped) else _CTRL_C


def stops_raise() -> None:
    """Makes SIGTERM and SIGHUP raise `Stopped` in the main thread.

    A signal that the program handles or ignores is left alone: under nohup, SIGHUP stays ignored.
    Outside of the main thread this changes nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _stop)


@contextmanager
def stops_raised() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise `Stopped` within the block."""
    stops_raise()
    try:
        yield
    finally:
        _default_again()


@contextmanager
def stops_held_back() -> Iterator[None]:
    """Delays Ctrl-C, SIGTERM and SIGHUP until the end of the block, so that it runs completely.

    Outside of the main thread the block runs without a change.
    """
    with _held(threading.Event(), most=None):
        yield


@contextmanager
def stop_noted() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C, SIGTERM or SIGHUP sets; the stop takes effect after the block.

        with stop_noted() as stop:
            for batch in batches:
                if stop.is_set():
                    break
                train(batch)
            tc.save_state()
        # A stop raises KeyboardInterrupt here; SIGTERM and SIGHUP raise it as SystemExit too.

    A second stop takes effect at once.
    """
    noted = threading.Event()
    with _held(noted, most=1):
        yield noted


@contextmanager
def _held(noted: threading.Event, most: int | None) -> Iterator[None]:
    """Holds back at most so many stops; all of them if None."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops_raise()
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_STOPS)}
    # A handler that was not set from Python cannot be put back.
    held = {number: was for number, was in before.items() if was not in (signal.SIG_IGN, None)}

    def put_back() -> None:
        for number, was in held.items():
            signal.signal(number, was)

    def hold(number: int, _: object) -> None:
        came.append(number)
        noted.set()
        if most is not None and len(came) > most:
            came.clear()
            put_back()
            signal.raise_signal(number)

    for number in held:
        signal.signal(number, hold)
    try:
        yield
    finally:
        put_back()
        if came:
            signal.raise_signal(came[0])


def _stop(number: int, _: object) -> None:
    if number == signal.SIGHUP:
        _leave_lost_terminal()
    raise Stopped(number)


def _leave_lost_terminal() -> None:
    """Sends the output to nowhere if its terminal is gone: each further line would be an error."""
    for descriptor in (0, 1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _default_again() -> None:
    """Gives the signals that raise `Stopped` their default action again."""
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            if signal.getsignal(number) is _stop:
                signal.signal(number, signal.SIG_DFL)


# Who forks decides how the child ends: multiprocessing ends its workers by SIGTERM.
os.register_at_fork(after_in_child=_default_again)
