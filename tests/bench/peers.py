"""Compares ours with other open services, each through its own SDK, on the same model and rows.

A peer is installed in its own environment below `.venv-peers`. Its server and our cluster both run
while the sides take turns. The table lists each peer that could not be run, with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actors.engine.model import Base
from bench.loops import LEARNING_RATE, LoopSpec, Rows, uniform
from bench.measure import SCREEN, Bench, Goal, Row, Run, Sheet, Spread, ratios, shown_progress
from bench.sides import Side, SideError, command, opened
from bench.workloads import OUTPUT, SAME_LOSS
from support.processes import free_port
from tg_tinker.client.home import init_home

ENVIRONMENTS = Path(".venv-peers")
RANK = 16
START_S, INSTALL_S = 300, 1800
OPENRL = "it is on no package registry: its server must be checked out as source"


class NotRunError(Exception):
    """A peer could not be run, for the reason in the message."""


@dataclass(frozen=True)
class PeerWorkload:
    name: str
    what: str
    rows: Callable[[], Rows]
    goal: Goal
    repeats: int


WORKLOADS = (
    PeerWorkload("uniform-sdk", "uniform 8x128, through the SDK", uniform, Goal(3.0), 5),
    PeerWorkload(
        "row32-sdk", "one row of 32 tokens, forward_backward + optim_step awaited",
        partial(uniform, 1, 32), Goal(8.0), 15,
    ),
)  # fmt: skip


# --- SkyRL -----------------------------------------------------------------------------------

SKYRL_NAME = "SkyRL 0.3.0, JAX on CPU"
SKYRL = ("skyrl[tinker,jax]==0.3.0", "torch==2.13.0", "tinker==0.22.4")
UV = """#!/bin/sh
# Stands in for uv, which SkyRL's server insists on as its parent and starts its engine with.
while [ "$1" != "-m" ]; do shift; done
case "$2" in *.api) python "$@";; *) exec python "$@";; esac
"""


def skyrl_environment() -> Path:
    """Returns the bin folder of the environment, which the first call creates in ten minutes.

    Raises:
        NotRunError: if pip could not install the packages.
    """
    folder = (ENVIRONMENTS / "skyrl").absolute()
    done = folder / "ready"
    if done.exists():
        return folder / "bin"
    SCREEN.print("installing SkyRL 0.3.0 into .venv-peers/skyrl (2 GB, about ten minutes)")
    install(folder, SKYRL)
    types = next(folder.glob("lib/python*/site-packages/skyrl/tinker/types.py"))
    text = types.read_text()  # pydantic refuses typing.TypedDict before Python 3.12
    types.write_text(
        text.replace(
            ", Literal, TypedDict\n", ", Literal\nfrom typing_extensions import TypedDict\n"
        )
    )
    (folder / "shim").mkdir(exist_ok=True)
    (folder / "shim" / "uv").write_text(UV)
    (folder / "shim" / "uv").chmod(0o755)
    done.touch()
    return folder / "bin"


def install(folder: Path, packages: tuple[str, ...]) -> None:
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages],
            check=True, capture_output=True, text=True, timeout=INSTALL_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotRunError(f"pip took more than {INSTALL_S} s") from None
    except subprocess.CalledProcessError as error:
        told = (error.stderr or "").strip().splitlines()[-1:] or ["pip failed"]
        raise NotRunError(f"pip could not install it: {told[0]}") from None


@contextmanager
def skyrl_server(binaries: Path, model: Path) -> Iterator[str]:
    """Runs SkyRL's API and engine on a free port of the loopback, and yields the URL.

    All its processes end with the block.
    """
    folder = OUTPUT / "skyrl"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tinker.db").unlink(missing_ok=True)
    port = free_port()
    backend = {"max_lora_adapters": 2, "max_lora_rank": RANK, "train_micro_batch_size": 8}
    arguments = [
        "uv", "run", "-m", "skyrl.tinker.api", "--host", "127.0.0.1", "--port", str(port),
        "--base-model", str(model), "--backend", "jax", "--backend-config", json.dumps(backend),
        "--database-url", f"sqlite:///{folder.absolute()}/tinker.db",
        "--checkpoints-base", str(folder.absolute() / "checkpoints"),
    ]  # fmt: skip
    path = f"{binaries.parent / 'shim'}:{binaries}:{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | offline | {"PATH": path, "PYTHONPATH": ""}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            arguments, env=environment, stdout=log, stderr=log, start_new_session=True,
            executable=str(binaries.parent / "shim" / "uv"),
        )  # fmt: skip
        try:
            yield answering(f"http://127.0.0.1:{port}", server)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def answering(url: str, server: subprocess.Popen[bytes]) -> str:
    """Waits for a server's first healthy answer; returns its URL."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5):
                return url
        except OSError:
            time.sleep(0.5)
    raise NotRunError("the server did not start: see bench-output/skyrl/server.log")


def not_run() -> list[Row]:
    """Returns rows for the goals that a run without peers does not measure."""
    return [
        Row(one.name, one.what, SKYRL_NAME, None, one.goal, remark="make bench-peers")
        for one in WORKLOADS
    ]


# --- the comparison --------------------------------------------------------------------------


def run(bench: Run) -> None:
    """Compares SkyRL with ours, and lists the peers that were not run, with their reasons."""
    wanted = [one for one in WORKLOADS if not bench.only or one.name in bench.only]
    base = Base.load(bench.model, cache=init_home() / "models")
    directory = base.directory
    del base
    try:
        binaries = skyrl_environment()
        with skyrl_server(binaries, directory) as url:
            compared(bench, wanted, binaries, directory, url)
    except (NotRunError, SideError) as error:
        done = {row.name for row in bench.rows}
        left = [one for one in wanted if one.name not in done]
        bench.rows += [
            Row(w.name, w.what, SKYRL_NAME, None, w.goal, remark=str(error)) for w in left
        ]
    bench.sheets.append(
        Sheet(
            "peers that were not run",
            ("peer", "why"),
            [
                ("OpenRL", OPENRL),
                ("TuFT 0.2.2", "its training actor needs a GPU and CUDA's memory counters"),
                ("twinkle 0.5.1", "on CPU it runs a mock without a model"),
                ("hatchery 0.3.0", "it needs Python 3.12 and a GPU worker"),
            ],
        )
    )


def compared(
    bench: Run, wanted: list[PeerWorkload], binaries: Path, directory: Path, url: str
) -> None:
    client = Path(__file__).with_name("tinker_client.py")
    peer = [str(binaries / "python"), str(client), url, str(directory), str(RANK)]
    commands = {
        "ours": command(LoopSpec("sdk", bench.model)),
        "ours, private": command(LoopSpec("sdk", bench.model, private=True)),
        "SkyRL": [*peer, str(LEARNING_RATE)],
    }
    with opened(commands, OUTPUT / "logs" / "peers") as sides:
        first_losses = {one.name: evaluated(one, sides) for one in wanted}  # before any training
        for one in wanted:
            measured(bench, one, sides, first_losses[one.name])


def evaluated(one: PeerWorkload, sides: dict[str, Side]) -> dict[str, float]:
    return {name: side.ask("evaluate", one.rows())["loss"] for name, side in sides.items()}


def measured(
    bench: Run, one: PeerWorkload, sides: dict[str, Side], losses: dict[str, float]
) -> None:
    """Times the first step of each side alone, because it compiles. Another step precedes turns."""
    rows = one.rows()
    first = {name: side.ask("train", rows)["seconds"] for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.ask("train", rows)
    for _ in shown_progress(bench.times(one.repeats), one.name):
        for name, side in sides.items():
            answer = side.ask("train", rows)
            times[name].append(answer["seconds"])
            losses[f"{name}, last"] = answer["loss"]
    theirs = Spread.of(times["SkyRL"]).shown(" s")
    equal = apart(losses) <= SAME_LOSS
    for name in ("ours", "ours, private"):
        private = name != "ours"
        bench.rows.append(
            Row(
                f"{one.name}{'-private' if private else ''}",
                f"{one.what}{', private' if private else ''}", SKYRL_NAME,
                ratios(times["SkyRL"], times[name]) if equal else None,
                None if private else one.goal, Spread.of(times[name]).shown(" s"), theirs,
                remark="" if equal else "the sides do not compute the same loss",
            )
        )  # fmt: skip
    bench.sheets.append(parity(one, losses, first))


def apart(losses: dict[str, float]) -> float:
    """Returns the relative difference of the losses before any training.

    Later losses differ more, because each side has initialized its own adapter.
    """
    return abs(losses["SkyRL"] / losses["ours"] - 1)


def parity(one: PeerWorkload, losses: dict[str, float], first: dict[str, float]) -> Sheet:
    """Returns the losses of all sides, on the same rows, rank, layers and learning rate.

    Servers differ in whether they report a mean or a sum, so losses are per labeled token.
    """
    verdict = "equal" if apart(losses) <= SAME_LOSS else "DIFFERENT"
    return Sheet(
        f"{one.name}: the first losses are {verdict} (relative difference {apart(losses):.1e})",
        ("side", "loss before training", "loss in the last step", "first step, with compilation"),
        [
            (name, f"{losses[name]:.4f}", f"{losses[f'{name}, last']:.4f}", f"{first[name]:.1f} s")
            for name in first
        ],
    )


BENCH = Bench(
    "peers",
    "ours against SkyRL's server, both through their SDKs (installs 2 GB)",
    12,
    run,
    workloads=tuple(one.name for one in WORKLOADS),
)
