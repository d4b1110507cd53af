"""Tests a cluster that `tg-tinker up` starts: real Ray, found by programs and jobs, under TLS,
and ended alone.

Its second machine is another address of this one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from support.machines import ROOT, TRAIN, Machine, certificates, machine, up
from support.processes import free_port
from tg_tinker import InvalidRequestError
from tg_tinker.cluster import connection, node
from tg_tinker.cluster.connection import WITHOUT_TLS

BEFORE_OTHERS_JOIN = """
import sys
from tg_tinker import InvalidRequestError, ServiceClient, TrainingConfig

model = sys.argv[1]
service = ServiceClient()  # before Ray is loaded: it sets how Ray proves itself
from serve_app.deploy import Settings, app
print("connected", flush=True)
input()
for work in (
    lambda: service.create_training_client(TrainingConfig(model_ref=model)),
    lambda: ServiceClient(),  # of a program that is connected, as by its own ray.init
    lambda: app(Settings(model_ref=model)),
):
    try:
        work()
        print("went on")
    except InvalidRequestError as error:
        print("refused:", error.message.partition(" and ")[0])
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """Yields a folder with a short path: Ray's sockets are below it, and their paths have at
    most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="tg", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def ended(short: Path) -> Iterator[list[Machine]]:
    """Yields a list for machines. What still runs there at the end is ended by its process."""
    machines: list[Machine] = []
    yield machines
    for one in machines:
        node.stop(one.home)


def of_cluster(port: int) -> list[str]:
    """Returns the programs that name the cluster's port, as those of Ray do."""
    found = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True)
    return [line for line in found.stdout.splitlines() if f":{port}" in line]


# --- a cluster -----------------------------------------------------------------------------------


@pytest.mark.program
def test_a_cluster_outlives_programs_takes_jobs_and_ends_alone(
    short: Path, tiny_model: Path, ended: list[Machine]
) -> None:
    head, port = machine(short, "a"), free_port()
    ended.append(head)
    said = up(head, port=port)
    assert "no_proxy=127.0.0.1 RAY_AUTH_MODE=token ray job submit" in said
    assert "runs already" in head.run("up", code=1)
    token = short / "user/.ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert (head.home / "node.json").stat().st_mode & 0o077 == 0
    run, step = head.train(str(tiny_model))
    assert step == "1"
    assert f"trains: {run}, active, step 1" in head.run("status")
    assert head.train(str(tiny_model), run) == [run, "2"]  # the same actor, not a new one
    running = node.read(head.home)
    assert running is not None
    (short / "job.py").write_text(TRAIN)
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
         running.dashboard, "--", sys.executable, str(short / "job.py"), str(tiny_model)],
        env={**head.environment, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tc-" in done.stdout
    stranger = replace(head, environment={**head.environment, "RAY_AUTH_TOKEN": "0" * 64})
    assert "RAY_AUTH_TOKEN_PATH" in stranger.run("status", code=1)
    assert head.run("down", code=1, answer="n\n").startswith("End 2 training clients")
    head.run("down", "--yes")
    deadline = time.monotonic() + 20
    while of_cluster(port) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert of_cluster(port) == []
    assert "tg-tinker up" in head.run("status", code=1)
    assert "ray stop" in head.run("down", code=1)


@pytest.mark.program
def test_two_machines_train_under_tls_and_are_refused_without(
    short: Path, tiny_model: Path, ended: list[Machine]
) -> None:
    files = certificates(short)
    head, port = machine(short, "a", **files), free_port()
    second = machine(short, "b", **files)
    ended += [second, head]
    up(head, port=port)
    running = node.read(head.home)
    assert running is not None
    second.run("up", "--join", running.address, "--host", "127.0.0.2")
    said = head.run("status")
    assert "under TLS" in said
    assert "127.0.0.2" in said
    assert head.train(str(tiny_model))[1] == "1"


@pytest.mark.program
def test_two_machines_without_tls_are_refused_unless_overridden(
    short: Path, tiny_model: Path, ended: list[Machine]
) -> None:
    head, second, port = machine(short, "a"), machine(short, "b"), free_port()
    ended += [second, head]
    up(head, port=port)
    running = node.read(head.home)
    assert running is not None
    program = subprocess.Popen(
        [sys.executable, "-c", BEFORE_OTHERS_JOIN, str(tiny_model)], env=head.environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "connected\n"
    join = ("up", "--join", running.address, "--host", "127.0.0.2")
    if not running.address.startswith("127."):
        assert "without-tls" in second.run(*join, code=1)
    second.run(*join, "--without-tls")
    said = program.communicate("\n", timeout=100)[0]
    assert said.splitlines() == ["refused: this cluster has 2 machines"] * 3
    assert "Ray's TLS is off" in head.run("status", code=1)
    said = replace(head, environment={**head.environment, WITHOUT_TLS: "1"}).run("status")
    assert "127.0.0.2" in said


# --- what needs no cluster -----------------------------------------------------------------------


def test_the_process_of_another_program_is_never_taken_for_the_node(tmp_path: Path) -> None:
    """After a restart of the machine, any program may have its number."""
    mine = node.Node("h:1", "", os.getpid(), node._begun(os.getpid()))
    note = tmp_path / "node.json"
    note.write_text(json.dumps(vars(mine)))
    assert node.read(tmp_path) == mine
    note.write_text(json.dumps(vars(mine) | {"begun": mine.begun + 1}))
    assert node.read(tmp_path) is None
    assert node.stop(tmp_path) is None  # and this test goes on
    assert not note.exists()
    for damaged in ("", "{}", "[]", '{"pid": 1}'):
        note.write_text(damaged)
        assert node.read(tmp_path) is None


def test_what_does_not_start_leaves_nothing_and_says_where_to_look(
    short: Path, ended: list[Machine]
) -> None:
    one = machine(short, "a")
    ended.append(one)
    site = short / "site"
    site.mkdir()
    stops = "import sys\nif 'start' in sys.orig_argv:\n    raise SystemExit('Ray stops here')\n"
    (site / "sitecustomize.py").write_text(stops)
    path = f"{site}{os.pathsep}{one.environment.get('PYTHONPATH', '')}"
    broken = replace(one, environment={**one.environment, "PYTHONPATH": path})
    said = up(broken, port=free_port(), code=1)
    assert "node.log" in said
    assert "Ray stops here" in (one.home / "node.log").read_text()
    assert not (one.home / "node.json").exists()


def test_a_folder_that_is_too_long_for_ray_is_told_before_it_starts(
    short: Path, ended: list[Machine]
) -> None:
    one = machine(short, "a" * 90)
    ended.append(one)
    assert "RAY_TMPDIR" in up(one, port=free_port(), code=1)
    assert not (one.home / "node.json").exists()
    assert not (one.home / "node.log").exists()


def test_a_machine_joins_an_address_with_the_token_of_its_head(
    short: Path, ended: list[Machine]
) -> None:
    one = machine(short, "a")
    ended.append(one)
    for wrong in ("nonsense", "10.0.0.1", "10.0.0.1:", ":6379"):
        for more in ((), ("--without-tls",)):
            assert "HOST:PORT" in one.run("up", "--join", wrong, *more, code=1)
    nowhere = ("up", "--join", f"127.0.0.1:{free_port()}")
    assert "copy the token of the head" in one.run(*nowhere, code=1).replace("\n", " ")
    mine = replace(one, environment={**one.environment, "RAY_AUTH_TOKEN": "0" * 64})
    assert "no cluster answers" in mine.run(*nowhere, code=1)


@pytest.mark.parametrize("option", ["--port", "--dashboard-port"])
def test_a_port_that_is_taken_is_told_before_ray_starts(
    short: Path, ended: list[Machine], option: str
) -> None:
    """Otherwise jobs would go to another cluster whose dashboard has the port."""
    one = machine(short, "a")
    ended.append(one)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"--port": free_port(), "--dashboard-port": free_port()}
        ports[option] = taken.getsockname()[1]
        said = one.run("up", *(str(word) for pair in ports.items() for word in pair), code=1)
    assert f"another {option}" in said.replace("\n", " ")
    assert not (one.home / "node.log").exists()


def test_a_token_that_cannot_be_read_is_told_as_ours(short: Path) -> None:
    one = machine(
        short, "a", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(short / "none"),
        RAY_ADDRESS="local",
    )  # fmt: skip
    one.run("init")
    said = one.run("runs", code=1)
    assert said.startswith("error: Ray did not start, or refused this process (Authentication")
    assert "Traceback" not in said


def test_two_do_not_start_a_node_of_one_home_at_once(tmp_path: Path) -> None:
    for _ in range(2):  # the first has ended
        with node.alone(tmp_path):  # noqa: SIM117
            with pytest.raises(InvalidRequestError, match="is starting"), node.alone(tmp_path):
                pytest.fail("both are at it")
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_others_reach_wants_tls(tmp_path: Path) -> None:
    for here in ("127.0.0.1", "localhost", "::1"):
        node.check_encrypted(here, {})
    for elsewhere in ("127.example.org", "0.0.0.0"):
        with pytest.raises(InvalidRequestError, match="without-tls"):
            node.check_encrypted(elsewhere, {})
    files = {name: str(tmp_path / name) for name in node._TLS_FILES}
    for environment in ({}, {"RAY_USE_TLS": "1"}, {"RAY_USE_TLS": "1"} | files, files):
        with pytest.raises(InvalidRequestError, match="without-tls"):
            node.check_encrypted("10.0.0.1", environment)
    for path in files.values():
        Path(path).touch()
    node.check_encrypted("10.0.0.1", {"RAY_USE_TLS": "1"} | files)


def test_several_machines_without_tls_are_refused_and_several_nodes_on_one_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.delenv(WITHOUT_TLS, raising=False)
    connection._refuse_unencrypted({"10.0.0.1"})
    with pytest.raises(InvalidRequestError, match="2 machines"):
        connection._refuse_unencrypted({"10.0.0.1", "10.0.0.2"})
    for name in ("RAY_USE_TLS", WITHOUT_TLS):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            connection._refuse_unencrypted({"10.0.0.1", "10.0.0.2"})


def test_the_cluster_file_passes_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    for command in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        assert {
            "RAY_AUTH_MODE=token",
            "RAY_TMPDIR=~/.ray",
            "RAY_USE_TLS=1",
            "RAY_USAGE_STATS_ENABLED=0",
            "RAY_metric_cardinality_level=low",
            "no_grpc_proxy=0.0.0.0/0,::/0",
        } <= {*command.split()}
        guide = (ROOT / "docs/deployment.md").read_text()
        files = [word for word in command.split() if word.startswith("RAY_TLS_")]
        assert len(files) == 3
        assert all(word in guide for word in files), "each machine's own, where the guide puts them"
    assert "chmod 700 ~/.ray" in config["setup_commands"][1]
    assert [*config["file_mounts"]] == ["~/.ray/auth_token"], "one certificate does not fit all"
