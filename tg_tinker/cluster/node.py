"""Starts and ends a Ray node with the settings of TG-Tinker, for `tg-tinker up` and `down`.

Ray runs as a separate program that outlives this process. Only this program is ended: `ray stop`
would also end the other clusters of this machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tg_tinker.cluster.authentication import check_authenticated
from tg_tinker.cluster.other_users import read_own
from tg_tinker.cluster.ray_folder import private_ray_folder
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError
from tg_tinker.hosts import is_loopback

_RAY = (sys.executable, "-m", "ray.scripts.scripts")

LOOPBACK = "127.0.0.1"
STARTS_WITHIN_S, ENDS_WITHIN_S = 90.0, 30.0
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_metric_cardinality_level": "low",  # no run ids in metrics
    "no_grpc_proxy": "0.0.0.0/0,::/0",  # no token to the proxy that http_proxy names
    # The default waits 30 seconds for training actors to end by themselves.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
_TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


@dataclass(frozen=True)
class Node:
    """A node that was started from this home.

    Attributes:
        address: the ``host:port`` of the cluster.
        dashboard: the URL for `ray job submit`; empty on a machine that joined a cluster.
        pid: the id of the process whose end ends the node.
        begun: the start time of this process in the kernel's ticks. It identifies the process,
            because the system may have given `pid` to another program since.
    """

    address: str
    dashboard: str
    pid: int
    begun: int

    @property
    def alive(self) -> bool:
        return self.begun != 0 and _begun(self.pid) == self.begun


def read(home: Path) -> Node | None:
    """Returns the node that `start` left running; None if no node runs."""
    try:
        found = Node(**json.loads(read_own(home / "node.json") or ""))
    except (ValueError, TypeError):
        return None
    return found if found.alive else None


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Holds a lock of the home during `start`.

    Two simultaneous starts would share a log, and each would mistake the other's Ray for its own.

    Raises:
        InvalidRequestError: another program is starting a node of this home.
    """
    folder = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequestError(
                "another `tg-tinker up` of this home is starting a node: wait until it has finished"
            ) from None
        yield
    finally:
        os.close(folder)


def start(
    home: Path, *, host: str = LOOPBACK, port: int = 6379, dashboard_port: int = 8265,
    join: str | None = None, num_cpus: int | None = None, num_gpus: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Node:  # fmt: skip
    """Starts the head of a cluster, or joins a cluster; returns the node once it answers.

    Args:
        home: the home directory, which stores the log and the file ``node.json``.
        host: the address by which other machines reach this machine.
        port, dashboard_port: the ports of a new head.
        join: the ``host:port`` of a running head to join; the two ports are then not used.
        num_cpus, num_gpus: the CPUs and GPUs that the node offers; None means all of them.
        environment: the environment of the started programs, which provides the token of
            `ray get-auth-token`.

    Raises:
        InvalidRequestError: a node of this home is already running, or see `check_ray_folder` and
            `check_authenticated`.
        ClusterUnavailableError: a port is taken, no head answers, or Ray did not start; the message
            then names the log.
    """
    if (running := read(home)) is not None:
        raise InvalidRequestError(
            f"a node of this home runs already, in the cluster at {running.address}: use it, or"
            " end it with `tg-tinker down`"
        )
    if join is None:
        _check_free("--port", "", port)
        _check_free("--dashboard-port", LOOPBACK, dashboard_port)
    elif not answers(join):
        raise ClusterUnavailableError(
            f"no cluster answers at {join}: check `tg-tinker status` on its head, and the firewall"
        )
    else:
        check_authenticated(join, environment)
    head = {"--port": port, "--dashboard-host": LOOPBACK, "--dashboard-port": dashboard_port}
    options = {
        **({"--address": join} if join else head),
        "--temp-dir": private_ray_folder(environment),
        "--node-ip-address": host,
        # With the default port taken, a second cluster on this machine could not run jobs.
        "--dashboard-agent-listen-port": _free_port(),
        "--num-cpus": num_cpus,
        "--num-gpus": num_gpus,
    }
    given = [text for name, n in options.items() if n is not None for text in (name, str(n))]
    log = home / "node.log"
    process = _launched(
        ["start", *([] if join else ["--head"]), "--block", *given], log,
        {**environment, **_ENVIRONMENT},
    )  # fmt: skip
    dashboard = "" if join else f"http://{LOOPBACK}:{dashboard_port}"
    node = Node(join or "", dashboard, process.pid, _begun(process.pid))
    try:
        own = _await_start(process, log)
        node = replace(node, address=join or f"{own}:{port}")
        check_authenticated(node.address, environment)
        note = home / "node.json"
        note.touch(mode=0o600)
        note.write_text(json.dumps(asdict(node)))
    except BaseException:
        end(node)
        raise
    return node


def answers(address: str) -> bool:
    """Returns whether a program listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def stop(home: Path) -> Node | None:
    """Ends the node that `start` left running, with all its processes.

    Returns the node that was ended; None if no node was running.
    """
    node = read(home)
    if node is not None:
        end(node)
    (home / "node.json").unlink(missing_ok=True)
    return node


def end(node: Node) -> None:
    """Ends a node by SIGTERM, and after `ENDS_WITHIN_S` seconds by SIGKILL to its process group."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    with suppress(ProcessLookupError):
        os.kill(node.pid, signal.SIGTERM)
        while node.alive and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(node.pid, os.WNOHANG)  # our own child if its start failed
            time.sleep(0.1)
        if node.alive:
            os.killpg(node.pid, signal.SIGKILL)


def tls_is_on(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether Ray encrypts its own connections in programs with this environment."""
    return environment.get("RAY_USE_TLS") == "1"


def tls_files(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Returns the paths of this machine's certificate, its key and the CA; empty where not set."""
    return tuple(environment.get(name, "") for name in _TLS_FILES)


def check_encrypted(host: str, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that Ray uses TLS if other machines reach this host.

    Without TLS, Ray sends all data that TG-Tinker does not seal in clear between machines. This
    includes the token.

    Raises:
        InvalidRequestError: other machines reach `host`, and Ray's TLS is off or a file is missing.
    """
    if is_loopback(host):
        return
    on = tls_is_on(environment)
    lacking = [name for name in _TLS_FILES if not Path(environment.get(name) or "/").is_file()]
    if not on or lacking:
        wrong = f"{', '.join(lacking)} name no file" if on else "RAY_USE_TLS is not 1"
        raise InvalidRequestError(
            f"other machines can reach {host}, and Ray's TLS is off or incomplete ({wrong}): set it"
            " up (docs/deployment.md), or use --without-tls on a network that nobody else shares"
        )


def _check_free(option: str, host: str, port: int) -> None:
    """Checks that a port is free before Ray starts.

    If its own port is taken, Ray retries for a long time. If the port of the dashboard is taken,
    Ray silently starts without a dashboard, and jobs would go to the program that uses the port.

    Raises:
        ClusterUnavailableError: the port is taken.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray does
            probe.bind((host, port))
    except OSError as error:
        raise ClusterUnavailableError(
            f"cannot listen on port {port} ({error.strerror}): end the cluster or program that uses"
            f" it, or choose another {option}"
        ) from None


def _launched(
    arguments: list[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts Ray in a separate session, so that Ctrl-C in this terminal does not reach it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [*_RAY, *arguments, "--log-style", "record"], env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True, umask=0o077,
        )  # fmt: skip


def _await_start(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until Ray runs; returns the address that Ray uses for this machine.

    Ray replaces a loopback address by an address of this machine.

    Raises:
        ClusterUnavailableError: Ray did not start within `STARTS_WITHIN_S` seconds.
    """
    deadline = time.monotonic() + STARTS_WITHIN_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()
            raise ClusterUnavailableError(
                f"Ray did not start ({said[-1] if said else 'it said nothing'}): see {log}, and"
                " `ray status` for another cluster at this port"
            )
        time.sleep(0.1)
    found = re.search(r"Local node IP: (\S+)", log.read_text(errors="replace"))
    return found[1] if found else LOOPBACK


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _begun(pid: int) -> int:
    """Returns the start time of a process in ticks since boot (proc(5)); 0 if it has ended."""
    with suppress(OSError, IndexError, ValueError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return 0 if state == "Z" else int(rest[18])
    return 0
