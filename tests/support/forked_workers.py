"""Forks Ray workers from a process that has their libraries loaded.

A worker that loads torch, transformers and PEFT takes three seconds of processor time, and the
tests start hundreds. Ray starts the workers of a job by the `py_executable` of its runtime
environment. Here this file is that program, the launcher. It hands its arguments, environment and
standard streams to the server, and waits for the end of the child that the server forks. The child
runs Ray's own worker program. The server loads third-party libraries and starts no thread; each
worker imports Ray and our code itself.

A forked worker has a session of its own, but the server's parent, limits and `/proc/PID/environ`,
and torch is loaded before our code runs. Tests of these start their clusters the ordinary way, as
do all programs that tests start outside `clusters.forking`.

    python forked_workers.py serve SOCKET               # the server; ends with its standard input
    python forked_workers.py SOCKET WORKER ARGUMENTS    # the launcher
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = (
    "torch", "transformers.masking_utils", "transformers.models.llama.modeling_llama", "peft",
    "safetensors.torch", "sqlalchemy", "cryptography.x509", "pydantic", "pyarrow.fs", "numpy",
)  # fmt: skip


def start() -> tuple[int, str]:
    """Starts the server, and returns its process and the job configuration that uses it.

    The server may still be loading then, and ends with this program.
    """
    folder = tempfile.mkdtemp(prefix="tg-fork-")
    place = Path(folder) / "socket"
    command = [sys.executable, __file__, "serve", str(place)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    launcher = f"{sys.executable} -I -S {__file__} {place}"
    return server.pid, json.dumps({"runtime_env": {"py_executable": launcher}})


def serve(place: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(64)
        for name in LIBRARIES:
            __import__(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children are nobody's to wait for
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                os._exit(0)
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                os.setsid()  # Ray ends the process group of a worker, which is not to be ours
                become(connection)
            connection.close()


def become(connection: socket.socket) -> None:
    """Runs a worker program in this process; its end closes the connection."""
    code = 1
    try:
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        text = b""
        while len(text) < int.from_bytes(length, "big"):
            text += connection.recv(1 << 16)
        arguments, environment, folder = json.loads(text)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(code)


def launch(place: str, arguments: list[str]) -> None:
    text = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        socket.send_fds(connection, [len(text).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(text)
        connection.recv(1)  # until the child's end


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        launch(sys.argv[1], sys.argv[2:])
