"""What outlives a process, what must not, and what may never be readable on disk."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import assert_all_end, descendants

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


# --- nothing readable at rest -----------------------------------------------------------------

CANARY = "The patient Zebulon Quillfeather was admitted on a foggy Thursday."

LEAKY = """
import sys
from tg_tinker import *
model, canary = sys.argv[1:3]
with ServiceClient(address="local") as service:
    tc = service.create_training_client(
        TrainingConfig(model_ref=model, lora_config=LoRAConfig(rank=4))
    )
    row = tc.tokenizer(canary)["input_ids"]
    batch = {"input_ids": [row] * 400}  # some 400 kB: it goes through the object store
    for _ in range(2):
        tc.forward_backward(batch)
        tc.optim_step().result()
    tc.forward_backward({"input_ids": [row]}, batch_hash=canary).result()
    tc.sample([canary] * 40, max_tokens=4, temperature=0, stop_sequences=[canary])
    list(tc.sample_stream(canary, max_tokens=4))
    too_long = {"input_ids": [row * 9]}
    for wrong in (lambda: tc.sample(canary * 3), lambda: tc.forward_backward(too_long)):
        try:
            wrong()
        except InvalidRequestError as error:
            assert canary[:12] not in str(error)
    tc._submit("save_state", metadata=canary).exception()  # a defect inside the actor
    try:
        tc._sampler.sample(canary)  # and inside the sampler
    except TGTinkerError as error:
        assert canary[:12] not in str(error)
    tc.save_state(metadata={"note": canary})
    import ray
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.readline()
"""


def forms(text: str) -> list[bytes]:
    """How the sentence could lie in a file: text, escaped, or its ids packed or printed."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [alphabet.index(c) for c in byte_level.pre_tokenize_str(text)[0][0]][4:20]
    core = text[4:24]
    packed = [struct.pack(f"{order}{len(ids)}{kind}", *ids) for order in "<>" for kind in "qih"]
    printed = [sep.join(map(str, ids)).encode() for sep in (", ", ",", " ")]
    return [
        core.encode(),
        core.encode("utf-16-le"),
        core.encode().hex().encode(),
        *packed,
        *printed,
    ]


def leaks(folders: list[Path]) -> Iterator[str]:
    wanted = forms(CANARY)
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                content = file.read_bytes()
                yield from (f"{file}: form {i}" for i, form in enumerate(wanted) if form in content)


def test_a_training_sentence_is_readable_in_no_file(tiny_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LEAKY, str(tiny_model), CANARY],
        env=os.environ | {"TG_TINKER_HOME": str(home)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout
        session = Path(process.stdout.readline().strip())
        places = [home, session, tmp_path]
        assert session.name.startswith("session_")
        assert len(list(home.rglob("*.enc"))) == 3
        assert list(leaks(places)) == []
    finally:
        process.communicate("\n", timeout=120)
    assert process.returncode == 0
    assert list(leaks(places)) == []
    for index, form in enumerate(forms(CANARY)):  # the scanner would have found each
        control = session / "logs" / "control.log"
        control.write_bytes(b"some log line " + form + b" and more")
        assert f"{control}: form {index}" in list(leaks([session]))
        control.unlink()


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
            errors.append(isinstance(error, ServiceError))
            break
service.close()
print(json.dumps({"errors": errors, "calls": len(calls)}))
"""


def test_a_dead_cluster_is_a_typed_error(tiny_model: Path, tmp_path: Path) -> None:
    found = run(KILLED, tiny_model, home=tmp_path / "home")
    assert found["errors"] == [True] * found["calls"]


# --- what Ray spills --------------------------------------------------------------------------

SPILLING = """
import sys
from tg_tinker import *
from tg_tinker import cluster
cluster._OBJECT_STORE_BYTES = 80 * 2**20  # Ray's smallest: what waits must go to disk
model, canary = sys.argv[1:3]
with ServiceClient(address="local") as service:
    tc = service.create_training_client(
        TrainingConfig(model_ref=model, lora_config=LoRAConfig(rank=4))
    )
    row = tc.tokenizer(canary)["input_ids"]
    tc.eval()
    waiting = [tc.forward_backward({"input_ids": [row] * 15_000}) for _ in range(12)]
    import ray
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.readline()
    for handle in reversed(waiting):
        handle.cancel()
"""


def test_what_ray_spills_to_disk_is_sealed(tiny_model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SPILLING, str(tiny_model), CANARY],
        env=os.environ | {"TG_TINKER_HOME": str(tmp_path / "home")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout
        session = Path(process.stdout.readline().strip())
        deadline = time.monotonic() + 60
        while not spilled_bytes(session) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert spilled_bytes(session) > 5e6  # one batch: the test would prove nothing otherwise
        assert list(leaks([session])) == []
    finally:
        process.communicate("\n", timeout=120)


def spilled_bytes(session: Path) -> int:
    return sum(
        file.stat().st_size for file in session.glob("ray_spilled_objects*/*") if file.is_file()
    )
