"""Tests a cluster of three nodes on this machine, of which one part after the other is killed.

The nodes share one address, so messages between machines are not tested here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.operations import doctor_cluster, doctor_nodes
from actors.operations.findings import OK, PROBLEM, WARNING
from support.machines import here
from support.runs import config, fingerprints, lost, train
from tg_tinker import PlacementError, ResourceConfig, ServiceClient, TrainingClient
from tg_tinker.client.home import init_home

pytestmark = pytest.mark.program

BACK_WITHIN_S = 60.0
"""From the loss of a node to the next step."""

STEPS = 12

DRIVER = """
import sys
from support.machines import here
from support.runs import train
from tg_tinker import ServiceClient

service = ServiceClient(address=sys.argv[1])
tc = service.create_training_client(here(sys.argv[2]))
train(tc, 1, 2)
print(tc.id, flush=True)
train(tc, *range(3, 500))
"""


class Nodes:
    """A head that trains nothing, and two nodes with room for one client each."""

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster()
        self.head = self._cluster.add_node(num_cpus=0, temp_dir=str(folder))
        self.address = str(self._cluster.address)
        for _ in range(2):
            self.add()

    def add(self, num_cpus: int = 1, **resources: float) -> Any:
        return self._cluster.add_node(num_cpus=num_cpus, resources=resources)

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node)

    def lose(self, node_id: str) -> None:
        """Kills a raylet by kill -9, as the end of its machine would; another node takes its
        place."""
        (node,) = [one for one in self._cluster.worker_nodes if one.node_id == node_id]
        (raylet,) = node.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        self.add()

    def restart_gcs(self, after_s: float) -> None:
        """Restarts the GCS in the main thread, because a process that another thread starts ends
        with that thread."""
        self.head.kill_gcs_server()
        time.sleep(after_s)
        self.head.start_gcs_server()

    def end(self) -> None:
        """Ends all nodes at once, after this program has left."""
        for node in self._cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Yields a folder with a short path: Ray's sockets are below it, and their paths have at
    most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="tg", ignore_cleanup_errors=True) as short:
        yield Path(short)


@pytest.fixture(scope="module")
def around(forking: None, home: Path, folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Sets the environment of the nodes of this module."""
    from ray._private.authentication import authentication_token_setup as tokens

    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RAY_AUTH_MODE", raising=False)  # else this process would not read it
        patched.setenv("PYTHONPATH", os.pathsep.join(["tests", *sys.path]))
        # Programs of this machine that name no cluster would take ours.
        patched.setattr(ray._private.utils, "write_ray_address", lambda *_: None)
        tokens.enable_token_auth_by_default()
        tokens.ensure_token_if_auth_enabled()
        init_home(home)
        yield patched


@pytest.fixture(scope="module")
def nodes(around: pytest.MonkeyPatch, folder: Path) -> Iterator[Nodes]:
    # With it a GCS may be started again: without it its end is that of the cluster.
    around.setenv("RAY_gcs_storage", "rocksdb")
    around.setenv("RAY_gcs_storage_path", str(folder / "gcs"))
    started = Nodes(folder)
    yield started
    ray.shutdown()
    started.end()


@pytest.fixture(scope="module")
def service(nodes: Nodes) -> Iterator[ServiceClient]:
    with ServiceClient(address=nodes.address) as service:
        yield service


@pytest.fixture(scope="module")
def clean(service: ServiceClient, tiny_model: Path) -> list[Any]:
    """Returns the answers to the calls of a run that lost nothing, two for each step."""
    with service.create_training_client(here(tiny_model)) as tc:
        return fingerprints(train(tc, *range(1, STEPS + 1)))


def node_of(tc: TrainingClient) -> str:
    ask = tc._calls.link.actor.__ray_call__.remote
    return str(ray.get(ask(lambda self: ray.get_runtime_context().get_node_id())))


# --- what is killed ------------------------------------------------------------------------------


def test_a_run_whose_node_is_lost_goes_on_on_another(
    nodes: Nodes, service: ServiceClient, tiny_model: Path, clean: list[Any]
) -> None:
    with service.create_training_client(here(tiny_model)) as tc:
        found = fingerprints(train(tc, 1, 2))
        tc.save_state()
        train(tc, 3)
        before = node_of(tc)
        tc.forward_backward({"input_ids": [[7] * 128] * 200})
        begun = time.monotonic()
        nodes.lose(before)
        error = lost(tc)
        told = {"resume_step": 2, "lost_steps": 1, "epoch": 1, "reason": "its node was lost"}
        assert error.details == told
        found += fingerprints(train(tc, 3))
        assert time.monotonic() - begun < BACK_WITHIN_S
        assert tc.info().epoch == 2
        assert node_of(tc) != before
        saved = tc.save_state()  # the storage actor may have been there, too
        assert found + fingerprints(train(tc, 4)) == clean[:8]
        assert service.get_artifact(saved.artifact_id).step == 3


def test_a_run_whose_node_is_gone_waits_for_it_and_a_new_client_is_refused_at_once(
    nodes: Nodes, service: ServiceClient, tiny_model: Path, clean: list[Any]
) -> None:
    pinned = ResourceConfig(num_cpus=0, num_threads=1, custom_resources={"team": 1})
    node = nodes.add(num_cpus=0, team=1)
    with service.create_training_client(config(tiny_model, resources=pinned)) as tc:
        found = fingerprints(train(tc, 1))
        tc.save_state()
        nodes.remove(node)
        assert lost(tc).details["resume_step"] == 1
        with pytest.raises(PlacementError, match="wants 1 teams"):
            service.create_training_client(config(tiny_model, resources=pinned))
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(train, tc, 2)
            time.sleep(3)
            assert not later.done()
            node = nodes.add(num_cpus=0, team=1)
            assert found + fingerprints(later.result(100)) == clean[:4]
    nodes.remove(node)


def test_a_run_outlives_the_kill_of_its_program(
    nodes: Nodes, service: ServiceClient, tiny_model: Path, clean: list[Any]
) -> None:
    """Whichever of the calls on their way had arrived were run in order, once."""
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", DRIVER, nodes.address, str(tiny_model)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert program.stdout is not None
        run = program.stdout.readline().strip()
    finally:
        program.kill()
        program.wait()
    tc = service.get_training_client(run)
    tc.load_state(tc.save_state().artifact_id)  # after what arrived; drops half a step
    step = tc.step
    assert (tc.info().epoch, tc.info().reason) == (1, "")
    assert step >= 2
    with service.create_training_client(here(tiny_model)) as other:
        expected = fingerprints(train(other, *range(1, step + 2)))
    assert expected[: len(clean)] == clean[: len(expected)]
    assert fingerprints(train(tc, step + 1)) == expected[-2:]
    tc.close()


def test_a_gcs_that_restarts_under_load_loses_no_call(
    nodes: Nodes, service: ServiceClient, tiny_model: Path, clean: list[Any]
) -> None:
    back = threading.Event()

    def work(tc: TrainingClient) -> list[Any]:
        found = []
        for step in range(1, STEPS + 1):
            found += fingerprints(train(tc, step))
            while step == STEPS // 2 and not back.is_set():
                tc.forward_backward({"input_ids": [[9] * 32] * 8}).result(timeout=60)
                tc.load_state(tc.save_state().artifact_id)  # drops that again
        return found

    with service.create_training_client(here(tiny_model)) as tc, ThreadPoolExecutor(1) as pool:
        working = pool.submit(work, tc)
        try:
            nodes.restart_gcs(after_s=3.0)
        finally:
            back.set()
        assert working.result(timeout=100) == clean
        assert tc.info().epoch == 1
        saved = tc.save_state().artifact_id
    with service.create_training_client(here(tiny_model)) as new:  # and new clients come
        assert new.load_state(saved).step == STEPS
    assert service.verify_audit_log()


# --- the doctor ----------------------------------------------------------------------------------


def test_doctor_compares_the_versions_and_clocks_of_all_nodes(
    nodes: Nodes, service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, clocks, machines, store = doctor_nodes.examine(nodes.address, "/store")
    assert {one.status for one in (versions, clocks, machines, store)} == {OK}
    assert f"ray {ray.__version__}" in versions.message
    mine = doctor_nodes.versions()
    monkeypatch.setattr(doctor_nodes, "versions", lambda: mine | {"torch": "0.1"})
    versions, *_ = doctor_nodes.examine(nodes.address, "/store")
    assert versions.status == PROBLEM
    assert f"torch {mine['torch']} on" in versions.message
    assert "(here 0.1)" in versions.message


def test_doctor_sees_what_of_ray_listens_and_how_it_was_started(nodes: Nodes) -> None:
    """This tests the parts of `exposure`, because other clusters may run on this machine."""
    outside = doctor_cluster._outside(Path("/proc"))
    for kind, name in (("gcs_server", "GCS"), ("raylet", "raylet"), ("dashboard", "dashboard")):
        (started,) = nodes.head.all_processes[kind]
        process = Path("/proc") / str(started.process.pid)
        assert doctor_cluster._server(process) == name
        assert doctor_cluster._variable(process, "RAY_AUTH_MODE") == "token"
        # At the address that Ray took for its own; of the dashboard's ports only some, some time.
        if name != "dashboard" and not nodes.address.startswith("127."):
            assert doctor_cluster._sockets(process) & outside


def test_a_clock_that_is_off_is_told_and_a_slow_answer_is_not() -> None:
    def told(clock: float) -> doctor_nodes.Told:
        return doctor_nodes.Told("10.0.0.2", {}, clock, asked=100.0, answered=130.0)

    for clock in (100.0, 115.0, 130.0, 134.0, 96.0):
        assert doctor_nodes._clocks([told(clock)]).status == OK
    for clock in (136.0, 94.0):
        finding = doctor_nodes._clocks([told(115.0), told(clock)])
        assert finding.status == WARNING
        assert "10.0.0.2 by 6 s" in finding.message


# --- all at once: the last test ------------------------------------------------------------------


def test_after_the_loss_of_the_head_a_fresh_cluster_brings_runs_back(
    nodes: Nodes, service: ServiceClient, around: pytest.MonkeyPatch, tiny_model: Path,
    clean: list[Any],
) -> None:  # fmt: skip
    tc = service.create_training_client(here(tiny_model))
    found = fingerprints(train(tc, 1, 2))
    tc.save_state()
    train(tc, 3)
    ray.shutdown()  # a program that stays would be ended by Ray
    nodes.end()
    with tempfile.TemporaryDirectory(prefix="tg", ignore_cleanup_errors=True) as short:
        around.setenv("RAY_gcs_storage_path", f"{short}/gcs")
        fresh = Nodes(Path(short))
        try:
            again = ServiceClient(address=fresh.address)
            (info,) = [r for r in again.list_training_clients() if r.training_client_id == tc.id]
            assert info.status == "failed"
            with pytest.warns(UserWarning, match="steps lost after the last artifact: 1"):
                back = again.get_training_client(tc.id)
            assert (back.info().epoch, back.step) == (2, 2)
            assert found + fingerprints(train(back, 3, 4)) == clean[:8]
            again.verify_audit_log()
        finally:
            ray.shutdown()
            fresh.end()
