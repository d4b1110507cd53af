"""Tests requests and replies that Ray loses on purpose: each call is run once, and in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clusters import FORKING
from support.machines import Machine, machine, up
from support.processes import SOAK, free_port
from tg_tinker.cluster import node

pytestmark = pytest.mark.program

BATCHES = 100 if SOAK else 24
PUSH = "CoreWorkerService.grpc_client.PushTask"
"""Carries each call of an actor, in the program that calls."""

INJECTED = b"Inject RPC "

KINDS = {
    "any": dict.fromkeys(
        ("req_failure_prob", "resp_failure_prob", "in_flight_failure_prob"), 4 if SOAK else 8
    ),  # in a short run as well some are lost for sure
    "requests": {"req_failure_prob": 10},
    "replies": {"resp_failure_prob": 10},
    "in flight": {"in_flight_failure_prob": 10},
}
SHORT = ("any",)

PROGRAM = """
import json, random, sys, time, warnings
from tg_tinker import *

warnings.simplefilter("ignore")
model, run, batches, spare = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def until_it_works(work):
    for attempt in range(60):
        try:
            return work()
        except ServiceError as error:
            last = error
            time.sleep(0.2)
    raise last

def new(dataset=None):
    dp = DPConfig(sampling="worst_case", noise_multiplier=2.0, target_epsilon=None)
    return service.create_training_client(TrainingConfig(
        model_ref=model, lora_config=LoRAConfig(rank=2), dp_config=dp if dataset else None,
        batch_size=2, seed=7, resources=ResourceConfig(num_cpus=0, num_threads=1),
        dataset_id=dataset,
    ))

service = until_it_works(ServiceClient)
spares = [new().id for _ in range(spare)] + [new("lost").id for _ in range(spare > 1)]
tc = new() if run == "new" else until_it_works(lambda: service.get_training_client(run))
draw, sent, told, steps, saves = random.Random(3), 0, [], 0, []
while sent < batches:  # bursts that are queued ahead, answered in any order or never looked at
    burst = []
    for _ in range(draw.randint(1, 6)):
        sent += 1
        rows = [[(7 * sent + j) % 250 for j in range(6)], [sent % 250, 3, 9]]
        burst.append(tc.forward_backward({"input_ids": rows}))
        if draw.random() < 0.4:
            burst.append(tc.optim_step())
            steps += 1
        if draw.random() < 0.1:
            saves.append(tc.save_state_async())
    draw.shuffle(burst)
    for handle in burst[: draw.randint(1, len(burst))]:
        error = handle.exception(timeout=100)
        result = None if error else handle.result()
        value = getattr(result, "gradient_hash", None) or getattr(result, "step", None)
        told.append([handle.operation, type(error).__name__, value])
tc.forward_backward({"input_ids": [[8, 7, 6, 5]]})
last = tc.optim_step().result()
tc.eval()
probe = tc.forward_backward({"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}).result().loss
saved = {handle.result(timeout=100).artifact_id for handle in saves}
private = until_it_works(lambda: tc.privacy)
print(json.dumps({
    "spares": spares, "sent_steps": steps + 1, "step": last.step, "norm": last.grad_norm,
    "told": told, "probe": probe, "saves": len(saved), "used": private and private.used,
    "saved": len(until_it_works(lambda: service.list_artifacts(run=tc.id))),
}))
"""


def history(one: Machine, *words: object, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, words)],
        env={**one.environment, FORKING: os.environ[FORKING], **environment},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def faulty(one: Machine, model: Path, run: str, kind: str) -> dict[str, Any]:
    faults = json.dumps({PUSH: {"num_failures": -1, **KINDS[kind]}})
    before = injected(one)
    found = history(one, model, run, BATCHES, 0, RAY_testing_rpc_failure=faults)
    assert injected(one) > before, "Ray lost nothing: are its flag and method still called so?"
    return found


def injected(one: Machine) -> int:
    """Returns the number of faults that Ray has written into the logs of programs."""
    logs = one.home.parent.glob("**/logs/python-core-driver-*.log")
    return sum(log.read_bytes().count(INJECTED) for log in logs)


@pytest.fixture(scope="module")
def cluster(forking: None) -> Iterator[Machine]:
    # Ray holds back what was sent behind a lost request, half a minute unless it is told.
    quick = {"RAY_actor_scheduling_queue_max_reorder_wait_seconds": "1"}
    with tempfile.TemporaryDirectory(prefix="tg", ignore_cleanup_errors=True) as short:
        one = machine(Path(short), "h", **quick)
        try:
            up(one, port=free_port())
            yield one
        finally:
            node.stop(one.home)


@pytest.fixture(scope="module")
def clean(cluster: Machine, tiny_model: Path) -> dict[str, Any]:
    """Returns the answers to the same calls with nothing lost, and runs for the calls that lose
    something."""
    return history(cluster, tiny_model, "new", BATCHES, len(KINDS) if SOAK else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(600)
def test_each_call_is_run_once_and_in_order(
    cluster: Machine, tiny_model: Path, clean: dict[str, Any], kind: str
) -> None:
    """Norms, hashes and losses equal those of a clean run of the same calls, to the bit."""
    if kind not in SHORT and not SOAK:
        pytest.skip("make soak")
    found = faulty(cluster, tiny_model, clean["spares"][[*KINDS].index(kind)], kind)
    assert found["told"] == clean["told"]
    for name in ("step", "norm", "probe", "saves", "saved"):
        assert found[name] == clean[name], name
    assert found["step"] == found["sent_steps"]
    assert found["saved"] == found["saves"]


@pytest.mark.timeout(600)
def test_a_private_step_whose_messages_are_lost_is_charged_once(
    cluster: Machine, tiny_model: Path, clean: dict[str, Any]
) -> None:
    if not SOAK:
        pytest.skip("make soak")
    found = faulty(cluster, tiny_model, clean["spares"][-1], "any")
    assert found["used"] == found["step"] == found["sent_steps"]
