"""A Ray node with the settings that TG-Tinker asks for: `tg-tinker up` starts it, `down` ends it.

Ray itself is started as a program of its own and outlives this process. It ends by its process
alone: other clusters of this machine stay, which `ray stop` would end, too.
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

from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError, StorageError

_RAY = (sys.executable, "-m", "ray.scripts.scripts")

LOOPBACK = "127.0.0.1"
STARTS_WITHIN_S, ENDS_WITHIN_S = 90.0, 30.0
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_metric_cardinality_level": "low",  # no names of runs in metrics
    # Else the end waits half a minute for training actors to end by themselves.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
_TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


@dataclass(frozen=True)
class Node:
    """A node that was started from this home.

    Attributes:
        address: of the cluster, ``host:port``.
        dashboard: where `ray job submit` reaches it; empty on a machine that joined.
        pid, begun: the program that ends the node when it ends, and when it began, in the kernel's
            ticks: a number may be another program's by now.
    """

    address: str
    dashboard: str
    pid: int
    begun: int

    @property
    def alive(self) -> bool:
        return self.begun != 0 and _begun(self.pid) == self.begun


def read(home: Path) -> Node | None:
    """The node that `start` left running, if it still runs."""
    try:
        found = Node(**json.loads((home / "node.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.alive else None


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Around `start`: two at once of a home write one log, and each takes the other's Ray for its.

    Raises:
        InvalidRequestError: another program is at it.
    """
    folder = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequestError(
                "another `tg-tinker up` of this home starts a node just now: wait for it to end"
            ) from None
        yield
    finally:
        os.close(folder)


def start(
    home: Path, *, host: str = LOOPBACK, port: int = 6379, dashboard_port: int = 8265,
    join: str | None = None, num_cpus: int | None = None, num_gpus: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Node:  # fmt: skip
    """Starts the head of a cluster, or joins one, and returns once it answers.

    Args:
        host: address of this machine, by which the others reach it.
        join: ``host:port`` of a running head; `port` and `dashboard_port` are not used then.
        environment: of the programs to be started; the token of `ray get-auth-token` in it.

    Raises:
        InvalidRequestError: a node of this home runs already.
        ClusterUnavailableError: a port is taken, no head answers, or Ray did not start; then it
            says where its log is.
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
            f"no cluster answers at {join}: see `tg-tinker status` on its head, and the firewall"
        )
    head = {"--port": port, "--dashboard-host": LOOPBACK, "--dashboard-port": dashboard_port}
    options = {
        **({"--address": join} if join else head),
        "--node-ip-address": host,
        # A second cluster on this machine would find the agent's usual port taken, and run no job.
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
        note = home / "node.json"
        note.touch(mode=0o600)
        note.write_text(json.dumps(asdict(node)))
    except BaseException:
        end(node)
        raise
    return node


def answers(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def stop(home: Path) -> Node | None:
    """Ends the node that `start` began, with all of its processes; None where none runs."""
    node = read(home)
    if node is not None:
        end(node)
    (home / "node.json").unlink(missing_ok=True)
    return node


def end(node: Node) -> None:
    """By a signal that its programs obey, after a while by one that they must."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    with suppress(ProcessLookupError):
        os.kill(node.pid, signal.SIGTERM)
        while node.alive and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(node.pid, os.WNOHANG)  # ours, where it did not get far
            time.sleep(0.1)
        if node.alive:
            os.killpg(node.pid, signal.SIGKILL)


def tls_is_on(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Ray encrypts its own connections in programs with this environment."""
    return environment.get("RAY_USE_TLS") == "1"


def tls_files(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Where Ray looks for this machine's certificate, its key, and the authority."""
    return tuple(environment.get(name, "") for name in _TLS_FILES)


def check_encrypted(host: str, environment: Mapping[str, str] = os.environ) -> None:
    """Between machines Ray sends in clear what we do not seal ourselves, and the token with it.

    Raises:
        InvalidRequestError: other machines reach `host`, and Ray's TLS is off or lacks a file.
    """
    if host.startswith("127.") or host in ("localhost", "::1"):
        return
    on = tls_is_on(environment)
    lacking = [name for name in _TLS_FILES if not Path(environment.get(name) or "/").is_file()]
    if not on or lacking:
        wrong = f"{', '.join(lacking)} name no file" if on else "RAY_USE_TLS is not 1"
        raise InvalidRequestError(
            f"{host} is reached by other machines, and Ray's TLS is off ({wrong}): set it up as"
            " docs/deployment.md says, or use --without-tls on a network that nobody else shares"
        )


def check_token(environment: Mapping[str, str] = os.environ) -> None:
    """A machine that joins has to have its head's token.

    Raises:
        InvalidRequestError: there is none.
    """
    given = environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")
    if not given and not (token := _token_file()).is_file():
        raise InvalidRequestError(
            f"there is no token at {token}: copy the one of the head there, as docs/deployment.md"
            " says"
        )


def make_token(environment: Mapping[str, str] = os.environ) -> None:
    """The token that keeps strangers from running code on the cluster, where there is none yet.

    Ray writes its file readable by all; whoever reads it may run code.
    """
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    done = subprocess.run(
        [*_RAY, "get-auth-token", "--generate"], env={**environment, **_ENVIRONMENT},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, umask=0o077, check=False,
    )  # fmt: skip
    token = _token_file()
    if done.returncode or not token.is_file():
        raise StorageError(f"Ray could not make its token in {token}: is the folder yours?")
    token.chmod(0o600)


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _check_free(option: str, host: str, port: int) -> None:
    """With its own port taken Ray tries for long; with that of the dashboard it starts without one
    and says nothing, so that jobs would go to whoever has it."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray does
            probe.bind((host, port))
    except OSError as error:
        raise ClusterUnavailableError(
            f"cannot listen on port {port} ({error.strerror}): end the cluster or program that has"
            f" it, or take another {option}"
        ) from None


def _launched(
    arguments: list[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C in this terminal is not for it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [*_RAY, *arguments, "--log-style", "record"], env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True, umask=0o077,
        )  # fmt: skip


def _await_start(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that Ray took for this machine: it replaces one of the loopback."""
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
    """When a process began, in ticks since the boot (proc(5)); 0 where there is none."""
    with suppress(OSError, IndexError, ValueError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return 0 if state == "Z" else int(rest[18])
    return 0
