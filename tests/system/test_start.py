"""The start of a client: where it may run, whether it fits, what it shares, and what it says."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from actors.engine import memory
from actors.engine.memory import adapter_values, check_room, estimate, stored_shapes
from actors.engine.model import Base
from actors.training import warm_process
from actors.training.storage_actor import NAME
from serve_app import application
from support.helpers import RAGGED, examples, session
from support.models import make_model
from tg_tinker import (
    DPConfig,
    InvalidRequestError,
    LoRAConfig,
    OptimizerConfig,
    PlacementError,
    ResourceConfig,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.client.home import init_home

SECOND_PROGRAM = """
import os, sys, ray
from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig

with ServiceClient(address=sys.argv[1]) as service:
    pin = {"node_labels": {"zone": "north"}}
    config = TrainingConfig(model_ref=sys.argv[2], lora_config=LoRAConfig(rank=2), resources=pin)
    with service.create_training_client(config) as tc:
        print(ray.get(tc._calls.link.actor.__ray_call__.remote(lambda self: os.getpid())))
"""


# --- memory ----------------------------------------------------------------------------------


def config_of(model: Path, lora: LoRAConfig | None, **more: Any) -> TrainingConfig:
    return TrainingConfig(model_ref=str(model), lora_config=lora, **more)


def sizes(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    "lora", [LoRAConfig(rank=4), LoRAConfig(rank=3, target_modules="all-linear"), None]
)
def test_an_estimate_knows_what_a_session_trains(tiny_model: Path, lora: LoRAConfig | None) -> None:
    real = session(tiny_model, lora_config=lora)
    shapes = stored_shapes(tiny_model)
    if lora is not None:
        assert adapter_values(shapes, lora) == real.num_trainable
    found = estimate(shapes, sizes(tiny_model), torch.float32, config_of(tiny_model, lora))
    (file,) = tiny_model.glob("*.safetensors")
    assert found.weights == file.stat().st_size - header_size(file)
    assert found.gradients == 2 * 4 * real.num_trainable
    private = config_of(tiny_model, lora, batch_size=8, dp_config=DPConfig(noise_multiplier=1.0))
    clipped = estimate(shapes, sizes(tiny_model), torch.float32, private)
    assert clipped.gradients == 2 * found.gradients
    assert found.optimizer == 2 * 4 * real.num_trainable
    assert found.trained == (0 if lora is None else 4 * real.num_trainable)
    assert found.activations > 0


def header_size(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def test_optimizers_without_moments_need_less(tiny_model: Path) -> None:
    def moments(**settings: Any) -> int:
        config = config_of(tiny_model, None, optimizer=OptimizerConfig(**settings))
        found = estimate(stored_shapes(tiny_model), sizes(tiny_model), torch.float32, config)
        return found.optimizer

    adam, momentum = moments(name="adam"), moments(name="sgd", momentum=0.9)
    assert (moments(name="sgd"), moments(name="adafactor"), 2 * momentum) == (0, 0, adam)


def test_what_fits_to_the_byte_is_taken_and_what_does_not_is_refused_with_the_numbers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_model, LoRAConfig(rank=4))
    wanted = estimate(stored_shapes(tiny_model), sizes(tiny_model), torch.float32, config)
    monkeypatch.setattr(memory, "host_memory", lambda: wanted.total)
    check_room(config, tiny_model, torch.float32)
    monkeypatch.setattr(memory, "host_memory", lambda: wanted.total - 1)
    with pytest.raises(PlacementError, match=r"weights 0\.000") as refused:
        check_room(config, tiny_model, torch.float32)
    details = refused.value.details
    assert (details["needed"], details["available"]) == (wanted.total, wanted.total - 1)
    parts = ("weights", "trained", "gradients", "optimizer", "activations")
    assert sum(details[part] for part in parts) == wanted.total


def test_a_model_too_large_to_convert_is_refused_before_it_is_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    with pytest.raises(PlacementError, match="to be converted"):
        Base.load(str(tiny_model), cache=tmp_path / "cache", dtype="bfloat16")
    assert not (tmp_path / "cache").exists()


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    """Where the machine has less, that counts. Cached files may be dropped, other memory not."""
    group, mib = tmp_path / "sys/fs/cgroup", 2**20
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()

    def left(limit: str, machine: int = 800) -> float:
        (tmp_path / "proc/meminfo").write_text(
            f"MemTotal: {1000 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {machine * 1024} kB\n"
        )
        (group / "memory.max").write_text(limit)
        return memory.host_memory(tmp_path) / mib

    assert left("max") == 750  # no limit yet: 5 % of the machine stay free
    (group / "memory.current").write_text(f"{300 * mib}\n")
    (group / "memory.stat").write_text(
        f"anon {250 * mib}\nactive_file {20 * mib}\ninactive_file {30 * mib}\n"
    )
    assert left("max") == 750
    assert left(f"{400 * mib}\n") == 400 - 300 + 20 + 30 - 20
    assert left(f"{400 * mib}\n", machine=100) == 100 - 20
    assert left(f"{2000 * mib}\n") == 750


@pytest.mark.parametrize(("share", "left"), [(0.5, 500), (0.9, 700), (1, 700), (2, 700), (0, 700)])
def test_a_fraction_of_a_gpu_has_that_fraction_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, share: float, left: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (700, 1000))
    assert memory.device_memory(share) == left


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 0 < memory.host_memory() < psutil.virtual_memory().total


def test_weights_are_pages_of_their_file_and_no_copies(tmp_path: Path) -> None:
    """Also after a step: a client's own memory holds its adapter, never the base model."""
    model = make_model(tmp_path, hidden_size=256, intermediate_size=1024)
    of = session(model)
    of.forward_backward(examples(RAGGED))
    of.optim_step()
    weights = sum(p.nbytes for p in of.base.model.parameters() if not p.requires_grad)
    mapped, copied = pages_of(model / "model.safetensors")
    assert mapped >= 0.9 * weights
    assert copied == 0


def pages_of(file: Path) -> tuple[int, int]:
    """Bytes of a file that this process holds, and those of them that it has copied."""
    found, inside = {"Rss:": 0, "Anonymous:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = rest[-1:] == [str(file)]
        elif inside and name in found:
            found[name] += 1024 * int(rest[0])
    return found["Rss:"], found["Anonymous:"]


# --- on a cluster of two nodes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster_of_two() -> Iterator[str]:
    """A head with two GPUs, and a node with a resource and a label of its own; its address."""
    from ray.cluster_utils import Cluster

    # Not where `ray start` leaves its address: other programs here would find this cluster.
    folder = tempfile.mkdtemp(prefix="tg-", dir="/tmp")
    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}  # GPUs on paper
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(num_cpus=4, resources={"team-a": 1}, labels={"zone": "north"})
    found.wait_for_nodes()
    yield found.address
    found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def two(cluster_of_two: str, home: Path) -> Iterator[ServiceClient]:
    import ray

    init_home(home)
    with ServiceClient(address=cluster_of_two) as service:
        yield service
    ray.shutdown()


def create(service: ServiceClient, model: Path, **resources: Any) -> TrainingClient:
    config = config_of(model, LoRAConfig(rank=2), resources=ResourceConfig(**resources))
    return service.create_training_client(config)


def asked(tc: TrainingClient, work: Any) -> Any:
    import ray

    return ray.get(tc._calls.link.actor.__ray_call__.remote(work))


def node_of(tc: TrainingClient) -> dict[str, Any]:
    import ray

    here = asked(tc, lambda self: ray.get_runtime_context().get_node_id())
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return dict(node)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pin", [{"custom_resources": {"team-a": 0.499}}, {"node_labels": {"zone": "north"}}]
)
def test_a_pinned_client_and_its_sampler_run_on_the_node_that_fits(
    two: ServiceClient, tiny_model: Path, pin: dict[str, Any]
) -> None:
    import ray
    from ray._private.state import actors

    with create(two, tiny_model, **pin) as tc, create(two, tiny_model, **pin) as again:
        nodes = [node_of(tc), node_of(again)]
        assert [node["Labels"].get("zone") for node in nodes] == ["north", "north"]
        tc.sample("ab", max_tokens=2)
    samplers = [
        actor for actor in actors().values()
        if actor["ActorClassName"].startswith("ServeReplica") and actor["State"] == "ALIVE"
    ]  # fmt: skip
    assert {actor["Address"]["NodeID"] for actor in samplers} == {nodes[0]["NodeID"]}
    for actor in samplers:
        replica = ray.get_actor(actor["Name"], namespace="serve")
        look = replica.__ray_call__.remote(lambda self: os.environ.get("CUDA_VISIBLE_DEVICES"))
        assert ray.get(look) == "", "it reserved no GPU"


@pytest.mark.slow
def test_gpus_are_reserved_as_asked_and_none_is_seen_without(
    two: ServiceClient, tiny_model: Path
) -> None:
    def seen(tc: TrainingClient) -> tuple[list[str], str]:
        import ray

        return asked(  # type: ignore[no-any-return]
            tc,
            lambda self: (
                sorted(ray.get_runtime_context().get_accelerator_ids()["GPU"]),
                os.environ["CUDA_VISIBLE_DEVICES"],
            ),
        )

    with (
        create(two, tiny_model, num_gpus=0) as none,
        create(two, tiny_model, num_gpus=0.5, num_cpus=0) as half,
        create(two, tiny_model, num_gpus=0.5, num_cpus=0) as other,
        create(two, tiny_model, num_cpus=0) as one,
    ):
        assert seen(none) == ([], "")
        assert seen(half) == seen(other)
        (its,), (ones,) = seen(half)[0], seen(one)[0]
        assert (seen(half)[1], seen(one)[1]) == (its, ones)
        assert {its, ones} == {"0", "1"}
    with create(two, tiny_model, num_gpus=2, num_cpus=0) as both:
        assert seen(both) == (["0", "1"], "0,1")


def test_libraries_are_imported_without_a_look_at_gpus() -> None:
    """For a process is kept warm before it is known which of them it may see."""
    code = """
import torch
def looked(*_): raise SystemExit("looked at GPUs")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = looked
import actors.training.worker, serve_app.replica.replica
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"num_cpus": 5}, "wants 5 CPUs, no node has more than 4"),
        ({"custom_resources": {"team-a": 1.5}}, "wants 1.5 team-as, no node .* more than 1"),
        ({"custom_resources": {"team-b": 1}}, "wants 1 team-bs, no node .* more than 0"),
        ({"num_gpus": 1, "custom_resources": {"team-a": 1}}, "no node has all of .*GPU.*team-a"),
        ({"num_gpus": 1, "node_labels": {"zone": "north"}}, "no node with .*north.* more than 0"),
        ({"node_labels": {"zone": "south"}}, "no living node has the labels .*south"),
    ],
)
def test_a_pin_that_no_node_fits_is_refused_at_once(
    two: ServiceClient, tiny_model: Path, pin: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        create(two, tiny_model, **pin)


@pytest.mark.slow
def test_a_sampler_without_room_on_the_nodes_that_its_pins_allow_is_refused(
    two: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve would wait for ever. The head has GPUs, and the other node the pins."""
    monkeypatch.setattr(application, "ROOM_S", 0.5)
    of = partial(application.Place, "tg_tinker", "m", "auto", "", "", 1, threads=None)
    application._await_room(of(num_gpus=1))
    application._await_room(of(num_gpus=0, resources={"team-a": 0.001}))
    for pinned in (
        of(num_gpus=0, resources={"team-a": 1.5}), of(num_gpus=1, resources={"team-a": 0.001}),
        of(num_gpus=1, labels={"zone": "north"}), of(num_gpus=0, labels={"zone": "south"}),
    ):  # fmt: skip
        with pytest.raises(PlacementError, match="on one node"):
            application._await_room(pinned)


@pytest.mark.slow
def test_a_model_beyond_all_memory_is_refused_with_the_numbers(
    two: ServiceClient, tiny_model: Path, tmp_path: Path
) -> None:
    """Four terabytes on paper: a file with a hole."""
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    size = 4 * 2**40
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, size]}}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(
        PlacementError, match=r"needs at least 4.* GB \(weights 4.4e\+03"
    ) as refused:
        create(two, tmp_path)
    assert refused.value.details["weights"] == size
    assert refused.value.details["available"] < psutil.virtual_memory().total


@pytest.mark.slow
def test_a_start_tells_every_stage_in_order(two: ServiceClient, tiny_model: Path) -> None:
    said: list[str] = []
    config = config_of(tiny_model, LoRAConfig(rank=2), dtype="bfloat16")
    with two.create_training_client(config, progress=said.append):
        pass
    begun = ("waiting", "importing", "hashing", "converting", "loading", "preparing", "ready")
    assert [remark.split()[0] for remark in said] == [*begun]


@pytest.mark.slow
def test_the_next_client_gets_a_process_that_has_its_libraries_from_whatever_program(
    two: ServiceClient, cluster_of_two: str, tiny_model: Path
) -> None:
    pin = {"node_labels": {"zone": "north"}}
    with create(two, tiny_model, **pin) as first:
        assert asked(first, lambda self: os.getpid()) not in spares()
        waited = time.monotonic()
        while not spares() and time.monotonic() - waited < 60:
            time.sleep(0.2)
        waiting = spares()
        assert waiting
        done = subprocess.run(
            [sys.executable, "-c", SECOND_PROGRAM, cluster_of_two, str(tiny_model)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in waiting


def test_clients_that_load_at_once_leave_one_spare_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[None] = []
    mark = tmp_path / "mark"
    monkeypatch.setattr(warm_process, "_mark", lambda: mark)
    monkeypatch.setattr(warm_process, "_ask_for_spare", lambda: asked_for.append(None))
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda _: warm_process.leave_spare(), range(8))]
    assert len(asked_for) == 1
    warm_process.imported()  # by whoever took it
    warm_process.leave_spare()
    assert len(asked_for) == 2
    ended = time.time() - warm_process.KEEP_S - 1
    os.utime(mark, (ended, ended))
    for _ in range(2):
        warm_process.leave_spare()
    assert len(asked_for) == 3


@pytest.mark.slow
def test_actors_that_carry_artifacts_import_no_libraries_of_training(
    two: ServiceClient, tiny_model: Path
) -> None:
    import ray

    with create(two, tiny_model):
        storage = ray.get_actor(NAME, namespace="tg_tinker")
        assert not ray.get(storage.__ray_call__.remote(lambda self: "torch" in sys.modules))


@pytest.mark.slow
def test_no_collection_goes_through_the_modules_of_an_actor_that_answers(
    two: ServiceClient, tiny_model: Path
) -> None:
    import ray

    with create(two, tiny_model) as client:
        assert asked(client, lambda self: gc.get_freeze_count()) > 100_000  # torch and all
        registry = two._registry.actor  # type: ignore[attr-defined]
        assert ray.get(registry.__ray_call__.remote(lambda self: gc.get_freeze_count())) > 30_000


def spares() -> set[int]:
    """Idle processes of this cluster that were started for training actors."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            kept = "ray::IDLE" in " ".join(process.cmdline())
            if kept and "actors.training.warm_process.warm" in process.environ().values():
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_memory_that_a_step_has_freed_goes_back(two: ServiceClient, tiny_model: Path) -> None:
    def hold_and_free(self: Any) -> None:
        """Pieces below the allocator's threshold: freed, they stay in its heap."""
        pieces = [bytearray(b"1") * 100_000 for _ in range(3000)]
        self.kept = bytearray(b"1") * 100_000  # above them
        del pieces

    def resident(self: Any) -> int:
        return psutil.Process().memory_info().rss

    with create(two, tiny_model) as tc:
        tc.forward_backward({"input_ids": [[7] * 8]}).result()
        asked(tc, hold_and_free)
        before, until = asked(tc, resident), time.monotonic() + 60
        while (now := asked(tc, resident)) > before - 200e6 and time.monotonic() < until:
            time.sleep(0.5)
    assert now <= before - 200e6


# --- the configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"num_gpus": 1.5}, {"custom_resources": {"GPU": 1}}, {"custom_resources": {"a": 0}},
        {"custom_resources": {"": 1}}, {"node_labels": {"zone": "!north"}},
        {"node_labels": {"zone": "in(a,b)"}}, {"node_labels": {"": "x"}},
    ],
)  # fmt: skip
def test_what_ray_cannot_reserve_is_refused_on_the_spot(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        ResourceConfig(**values)


@pytest.mark.slow
def test_the_deadline_names_the_pin(
    two: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = {"custom_resources": {"team-a": 0.6}}  # a sampler may hold a little of it
    with create(two, tiny_model, **most) as holder:
        monkeypatch.setattr(two._cluster, "placement_timeout_s", 2.0)
        with pytest.raises(PlacementError, match=rf"team-a.*{holder.id}"):
            create(two, tiny_model, **most)
