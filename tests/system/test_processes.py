"""Tests what outlives a process, and what must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import clusters
from support.processes import assert_all_end, descendants

pytestmark = pytest.mark.program

STEPS = """
import json, sys
from pathlib import Path
from tg_tinker import *
model, *runs = sys.argv[1:]
rows = [[(7 * i + j) % 250 for j in range(5 + 3 * i)] for i in range(6)]
config = TrainingConfig(
    model_ref=model, seed=5, max_steps=10, lora_config=LoRAConfig(rank=4, dropout=0.3),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=1),
)
found = {}
with ServiceClient(address="local") as service:
    for action, target, folder in zip(runs[::3], runs[1::3], runs[2::3]):
        if action == "resume":
            tc = service.create_training_client(config)
            result = tc.load_state(target)
            assert (result.step, result.warnings) == (2, ()), result
        elif action == "return":
            tc = service.get_training_client(target)
            assert tc.step == 2
        else:
            tc = service.create_training_client(config)
        hashes = []
        for step in range(4 if action == "straight" else 2):
            handles = [tc.forward_backward({"input_ids": rows[i : i + 2]}) for i in (0, 2, 4)]
            tc.optim_step().result()
            hashes += [handle.result().gradient_hash for handle in handles]
        saved = tc.save_state()
        service.export_adapter(saved.artifact_id, Path(folder))
        found[action] = {"artifact": saved.artifact_id, "run": tc.id, "hashes": hashes}
print(json.dumps(found))
"""
"""Trains one run for each ACTION TARGET FOLDER of the arguments."""


def run(code: str, *arguments: object, home: Path) -> dict:
    """Runs a program in a process of its own, and so in an embedded cluster of its own."""
    with clusters.forking():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
            env=os.environ | {"TG_TINKER_HOME": str(home)},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_reach_the_bits_of_one(killed: int, tiny_model: Path, tmp_path: Path) -> None:
    """Takes `killed` so that the program is killed before the last test of this file waits."""
    home = tmp_path / "home"
    one = ["straight", "-", tmp_path / "straight"]
    begun = run(STEPS, tiny_model, *one, "first", "-", tmp_path / "first", home=home)
    straight, first = begun["straight"], begun["first"]
    loaded = ["resume", first["artifact"], tmp_path / "resumed"]
    back = ["return", first["run"], tmp_path / "returned"]
    gone_on = run(STEPS, tiny_model, *loaded, *back, home=home)
    resumed, returned = gone_on["resume"], gone_on["return"]
    assert resumed["run"] != first["run"] == returned["run"]
    for second in (resumed, returned):
        assert first["hashes"] + second["hashes"] == straight["hashes"]
    name = "adapter_model.safetensors"
    folders = ("straight", "first", "resumed", "returned")
    weights = {folder: (tmp_path / folder / name).read_bytes() for folder in folders}
    assert weights["resumed"] == weights["returned"] == weights["straight"]
    assert weights["first"] != weights["straight"]


# --- nothing left running ---------------------------------------------------------------------

WAITING = """
import sys, time
from tg_tinker import *
service = ServiceClient(address="local")
tc = service.create_training_client(TrainingConfig(model_ref=sys.argv[1], lora_config=LoRAConfig()))
tc.forward_backward({"input_ids": [[7] * 128] * 4000})
print("ready", flush=True)
time.sleep(600)
"""


def waiting(model: Path, home: Path) -> subprocess.Popen[str]:
    """Starts the program, and returns once it computes."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WAITING, str(model)],
        env=os.environ | {"TG_TINKER_HOME": str(home)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert len(descendants(process.pid)) > 5
    return process


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Returns the session of a program that was killed before the tests of this file.

    Some of Ray's processes notice its end by a timeout, about 70 s later.
    """
    process = waiting(tiny_model, tmp_path_factory.mktemp("killed") / "home")
    process.kill()
    process.wait(timeout=60)
    return process.pid


def test_a_terminated_script_leaves_no_process(tiny_model: Path, tmp_path: Path) -> None:
    process = waiting(tiny_model, tmp_path / "home")
    process.terminate()
    process.wait(timeout=60)
    assert_all_end(process.pid, within_s=120)


# --- a cluster that is gone -------------------------------------------------------------------

LEFT = """
import json, sys
from tg_tinker import *
import ray
service = ServiceClient(address="local")
tc = service.create_training_client(
    TrainingConfig(model_ref=sys.argv[1], lora_config=LoRAConfig(rank=4))
)
batch = {"input_ids": [[1, 2, 3]]}
seen, unseen = tc.forward_backward(batch), tc.forward_backward(batch)
assert seen.result().num_tokens == 3
service.close()
calls = [
    lambda: tc.step, lambda: tc.status, lambda: tc.forward_backward(batch), unseen.result,
    lambda: tc.sample("a"), lambda: tc.save_state(), service.list_artifacts,
    lambda: service.create_training_client(tc.config), lambda: next(tc.sample_stream("a")),
]
errors = []
for call in calls:
    try:
        call()
    except TGTinkerError as error:
        errors.append(type(error).__name__)
repr(unseen), repr(tc), tc.close(), service.close()
assert seen.result().num_tokens == 3
assert not ray.is_initialized()  # no cluster of Ray's own choice was started
print(json.dumps({"errors": errors, "calls": len(calls)}))
"""


def test_after_its_service_closed_a_client_answers_typed(tiny_model: Path, tmp_path: Path) -> None:
    found = run(LEFT, tiny_model, home=tmp_path / "home")
    assert found["errors"] == ["ClusterUnavailableError"] * found["calls"]


KILLED = """
import json, os, signal, subprocess, sys, time
from tg_tinker import *
service = ServiceClient(address="local")
tc = service.create_training_client(
    TrainingConfig(model_ref=sys.argv[1], lora_config=LoRAConfig(rank=4))
)
tree = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True).stdout
mine = [line.split(None, 2) for line in tree.splitlines() if "raylet/raylet --" in line]
(raylet,) = [int(pid) for pid, parent, _ in mine if int(parent) == os.getpid()]
os.kill(raylet, signal.SIGKILL)
errors = []
calls = [
    lambda: tc.forward_backward({"input_ids": [[1, 2, 3]]}).result(timeout=5),
    service.list_artifacts,
    lambda: tc.sample("a"),
    lambda: service.create_training_client(tc.config),
]
for call in calls:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # it takes Ray seconds to notice
        try:
            call()
            time.sleep(0.2)
        except TGTinkerError as error:
            errors.append([isinstance(error, ServiceError), "has died" in str(error)])
            break
service.close()
print(json.dumps({"errors": errors, "calls": len(calls)}))
"""


def test_a_dead_cluster_is_a_typed_error(tiny_model: Path, tmp_path: Path) -> None:
    found = run(KILLED, tiny_model, home=tmp_path / "home")
    assert found["errors"] == [[True, True]] * found["calls"]


def test_a_killed_script_leaves_no_process(killed: int) -> None:
    """Comes last, because it waits for the end of what `killed` has left."""
    assert_all_end(killed, within_s=200)
