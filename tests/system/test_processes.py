"""What outlives a process, and what must not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import assert_all_end, descendants

pytestmark = pytest.mark.slow

STEPS = """
import json, sys
from pathlib import Path
from tg_tinker import *
model, action, target = sys.argv[1:4]
rows = [[(7 * i + j) % 250 for j in range(5 + 3 * i)] for i in range(6)]
config = TrainingConfig(
    model_ref=model, seed=5, max_steps=10, lora_config=LoRAConfig(rank=4, dropout=0.3),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=1),
)
with ServiceClient(address="local") as service:
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
    folder = Path(target) if action == "straight" else Path(sys.argv[4])
    service.export_adapter(saved.artifact_id, folder)
    print(json.dumps({"artifact": saved.artifact_id, "run": tc.id, "hashes": hashes}))
"""


def run(code: str, *arguments: object, home: Path) -> dict:
    """A program in a process, and so in an embedded cluster, of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env=os.environ | {"TG_TINKER_HOME": str(home)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_reach_the_bits_of_one(tiny_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    straight = run(STEPS, tiny_model, "straight", tmp_path / "straight", home=home)
    first = run(STEPS, tiny_model, "first", "-", tmp_path / "first", home=home)
    resumed = run(STEPS, tiny_model, "resume", first["artifact"], tmp_path / "resumed", home=home)
    returned = run(STEPS, tiny_model, "return", first["run"], tmp_path / "returned", home=home)
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


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_script_leaves_no_process(tiny_model: Path, tmp_path: Path, how: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WAITING, str(tiny_model)],
        env=os.environ | {"TG_TINKER_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert len(descendants(process.pid)) > 5
    process.send_signal(how)
    process.wait(timeout=60)
    # After SIGKILL Ray's own processes notice by timeouts of theirs, about 80 s.
    assert_all_end(process.pid, within_s=200 if how == signal.SIGKILL else 120)


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
