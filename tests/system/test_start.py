"""Tests the start of a client: where it may run, whether it fits, what it shares, and what it
reports."""

from __future__ import annotations

import gc
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from support.helpers import RAGGED, examples, session
from support.models import make_model
from support.two_nodes import asked, config_of, connected, create
from support.two_nodes import cluster_of_two as cluster_of_two  # a fixture
from tg_tinker import (
    DPConfig,
    LoRAConfig,
    OptimizerConfig,
    PlacementError,
    ServiceClient,
)

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
    assert clipped.gradients == 3 * found.gradients
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
    with pytest.raises(PlacementError, match="converting the model needs"):
        Base.load(str(tiny_model), cache=tmp_path / "cache", dtype="bfloat16")
    assert not (tmp_path / "cache").exists()


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    """Where the machine has less, that counts.

    Cached files may be dropped, other memory may not.
    """
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
    """This also holds after a step: a client's own memory holds its adapter, never the base
    model."""
    model = make_model(tmp_path, hidden_size=256, intermediate_size=1024)
    of = session(model)
    of.forward_backward(examples(RAGGED))
    of.optim_step()
    weights = sum(p.nbytes for p in of.base.model.parameters() if not p.requires_grad)
    mapped, copied = pages_of(model / "model.safetensors")
    assert mapped >= 0.9 * weights
    assert copied == 0


def pages_of(file: Path) -> tuple[int, int]:
    """Returns the bytes of a file that this process holds, and the part of them that it has
    copied."""
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
def two(cluster_of_two: str, home: Path) -> Iterator[ServiceClient]:
    with connected(cluster_of_two, home) as service:
        yield service


@pytest.mark.program
def test_libraries_are_imported_without_a_look_at_gpus_and_without_a_collection() -> None:
    """A process is kept warm before it is known which GPUs it may see."""
    code = """
import gc, torch
def looked(*_): raise SystemExit("looked at GPUs")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = looked
import actors.training.warm_process
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
actors.training.warm_process._import()
assert len(collections) <= 2 and gc.isenabled()  # one at the end, start and stop
import serve_app.replica.replica
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.program
def test_a_start_tells_every_stage_in_order(two: ServiceClient, tiny_model: Path) -> None:
    said: list[str] = []
    config = config_of(tiny_model, LoRAConfig(rank=2), dtype="bfloat16")
    with two.create_training_client(config, progress=said.append):
        pass
    begun = ("waiting", "importing", "hashing", "converting", "loading", "preparing", "ready")
    assert [remark.split()[0] for remark in said] == [*begun]


@pytest.mark.program
def test_the_next_client_gets_a_process_that_has_its_libraries_from_whatever_program(
    two: ServiceClient, cluster_of_two: str, tiny_model: Path
) -> None:
    pin = {"node_labels": {"zone": "north"}}
    with create(two, tiny_model, **pin) as first:
        pid, raylet = asked(first, lambda self: (os.getpid(), os.getppid()))
        assert pid not in spares(raylet)
        waited = time.monotonic()
        while not (waiting := spares(raylet)) and time.monotonic() - waited < 60:
            time.sleep(0.2)
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


@pytest.mark.program
def test_actors_that_carry_artifacts_import_no_libraries_of_training(
    two: ServiceClient, tiny_model: Path
) -> None:
    import ray

    with create(two, tiny_model):
        storage = ray.get_actor(NAME, namespace="tg_tinker")
        assert not ray.get(storage.__ray_call__.remote(lambda self: "torch" in sys.modules))


@pytest.mark.program
def test_no_collection_goes_through_the_modules_of_an_actor_that_answers(
    two: ServiceClient, tiny_model: Path
) -> None:
    import ray

    with create(two, tiny_model) as client:
        assert asked(client, lambda self: gc.get_freeze_count()) > 100_000  # torch and all
        registry = two._registry.actor  # type: ignore[attr-defined]
        assert ray.get(registry.__ray_call__.remote(lambda self: gc.get_freeze_count())) > 30_000


def spares(raylet: int) -> set[int]:
    """Returns the idle processes of a node that were started for training actors."""
    found = set()
    for process in psutil.Process(raylet).children():
        try:
            kept = "ray::IDLE" in " ".join(process.cmdline())
            if kept and "actors.training.warm_process.warm" in process.environ().values():
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.program
def test_memory_that_a_step_has_freed_goes_back(two: ServiceClient, tiny_model: Path) -> None:
    def hold_and_free(self: Any) -> None:
        """Frees pieces below the allocator's threshold, which then stay in its heap."""
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
