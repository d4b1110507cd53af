"""Tests that SIGTERM and SIGHUP end a program as Ctrl-C does: saved, with the status of shells."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import clusters
from support.processes import assert_all_end
from tg_tinker.cluster.interrupts import (
    Stopped,
    exit_status,
    stop_noted,
    stops_held_back,
    stops_raise,
    stops_raised,
)

STOPS = pytest.mark.parametrize(
    ("stop", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["INT", "TERM", "HUP"],
)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Starts with the default actions, and leaves the handlers as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- the one mechanism ---------------------------------------------------------------------------


@STOPS
def test_what_handles_ctrl_c_handles_every_stop(stop: signal.Signals, status: int) -> None:
    with stops_raised(), pytest.raises(KeyboardInterrupt) as stopped:
        signal.raise_signal(stop)
    assert exit_status(stopped.value) == status
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_what_a_program_handles_or_ignores_stays_so() -> None:
    """As nohup ignores SIGHUP, and a web server handles SIGTERM."""
    came: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    stops_raise()
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGTERM)
    with stops_held_back():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
    assert came == [signal.SIGTERM] * 2


@STOPS
@pytest.mark.parametrize("fails", [False, True])
def test_a_stop_that_is_held_back_takes_effect_after_the_block(
    stop: signal.Signals, status: int, fails: bool
) -> None:
    reached: list[str] = []

    def stopped_inside() -> None:
        with stops_held_back():
            signal.raise_signal(stop)
            signal.raise_signal(stop)
            reached.append("end of block")
            if fails:
                raise ValueError

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        stopped_inside()
    assert (reached, exit_status(stopped.value)) == (["end of block"], status)
    assert signal.getsignal(signal.SIGINT) is handler


@STOPS
def test_a_noted_stop_lets_the_block_save_and_a_second_one_does_not(
    stop: signal.Signals, status: int
) -> None:
    saved: list[bool] = []

    def train(number_of_stops: int) -> None:
        with stop_noted() as noted:
            assert not noted.is_set()
            for _ in range(number_of_stops):
                signal.raise_signal(stop)
            saved.append(noted.is_set())

    for count in (1, 2):
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(count)
        assert exit_status(stopped.value) == status
        assert saved == [True]
    train(0)
    assert saved == [True, False]


def test_another_thread_leaves_signals_alone() -> None:
    def work() -> None:
        with stops_raised(), stops_held_back(), stop_noted() as noted:
            assert not noted.is_set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forked_child_ends_as_whoever_forked_it_expects() -> None:
    stops_raise()
    if (child := os.fork()) == 0:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@STOPS
def test_what_nothing_handles_ends_python_with_the_status_of_shells(
    stop: signal.Signals, status: int
) -> None:
    code = f"""
import signal
from tg_tinker.cluster.interrupts import stops_raise
stops_raise()
try:
    signal.raise_signal({int(stop)})
finally:
    print("saved")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = status if stop != signal.SIGINT else -signal.SIGINT
    assert (done.returncode, done.stdout) == (expected, "saved\n")
    assert stop == signal.SIGINT or done.stderr == ""


def test_a_stop_is_told_apart_from_a_programs_own_exit() -> None:
    assert issubclass(Stopped, SystemExit)
    with pytest.raises(SystemExit) as stopped, stops_raised():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143


# --- a lost terminal -----------------------------------------------------------------------------

IN_A_TERMINAL = """
import signal, sys
from pathlib import Path
from rich.console import Console
from support.fakes import FakeService
from tg_tinker.cluster.interrupts import stops_raised
from tg_tinker.demo.options import DemoOptions
from tg_tinker.demo.run import run_demo
note, data = map(Path, sys.argv[1:])
service = FakeService()

def wait(operation, step):
    if (operation, step) == ("forward_backward", 3):
        service.before_call = lambda *_: None
        print("STEP THREE", flush=True)
        signal.pause()

service.before_call = wait
signal.alarm(60)
options = DemoOptions("m", data, no_privacy=True, steps=9, batch_size=2, output=note.parent)
with stops_raised():
    status = run_demo(options, connect=lambda: service)
note.write_text(f"{status} {[saved.step for saved in service.list_artifacts()]} {service.closed}")
sys.exit(status)
"""


def test_a_lost_terminal_saves_although_nothing_can_be_printed(tmp_path: Path) -> None:
    note, data = tmp_path / "note", tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    child, terminal = pty.fork()
    if child == 0:
        words = [sys.executable, "-c", IN_A_TERMINAL, str(note), str(data)]
        path = os.pathsep.join(filter(None, sys.path))
        os.execve(sys.executable, words, os.environ | {"PYTHONPATH": path})  # noqa: S606
    shown = b""
    while b"STEP THREE" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (status, note.read_text()) == (129, "129 [3] True")


# --- whole programs ------------------------------------------------------------------------------

DEMO = [sys.executable, "-c", "from tg_tinker.cli.main import main; main()", "demo"]


def demo(model: Path, folder: Path) -> list[str]:
    data = folder / "rows.jsonl"
    rows = (f'{{"prompt": "What is {i} plus {i}?", "completion": "{2 * i}."}}' for i in range(30))
    data.write_text("\n".join(rows))
    return [*DEMO, "--model", str(model), "--rank", "4", "--max-length", "100", "--data", str(data),
            "--output", str(folder / "out"), "--steps", "100000"]  # fmt: skip


def started(command: list[str], home: Path) -> subprocess.Popen[str]:
    with clusters.forking():
        environment = os.environ | {"TG_TINKER_HOME": str(home), "RAY_ADDRESS": "local"}
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def to_program(process: subprocess.Popen[str], stop: signal.Signals) -> None:
    """As `docker stop` does."""
    process.send_signal(stop)


def to_group(process: subprocess.Popen[str], stop: signal.Signals) -> None:
    """As `timeout` and a terminal do."""
    os.killpg(process.pid, stop)


@pytest.mark.program
@pytest.mark.parametrize(
    ("send", "stop", "status"),
    [(to_program, signal.SIGTERM, 143), (to_group, signal.SIGHUP, 129)],
)
def test_a_signal_leaves_a_checkpoint_and_no_process(
    tiny_model: Path,
    tmp_path: Path,
    send: Callable[[subprocess.Popen[str], signal.Signals], None],
    stop: signal.Signals,
    status: int,
) -> None:
    process = started(demo(tiny_model, tmp_path), tmp_path / "home")
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step "):
            break
    send(process, stop)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == status, rest
    assert len(set(re.findall(r"Checkpoint: (art-\w+)", rest))) == 1, rest
    assert "***" not in rest  # the stack frames of Ray's own handler
    assert "Traceback" not in rest
    assert_all_end(process.pid, within_s=120)
