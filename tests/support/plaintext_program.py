# ruff: noqa: T201
"""Does everything a user does, with a secret in every place that takes one; `test_plaintext`
runs it.

    python plaintext_program.py MODEL FOLDER

FOLDER gets what the test must know and is not searched. After each part, the program prints the
part's name and waits for a line. The test then searches everything while all of it still runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util import metrics

from support.privacy_helpers import private_session, sums
from support.processes import free_port
from tg_tinker import (
    DPConfig,
    LoRAConfig,
    ResourceConfig,
    ServiceClient,
    TGTinkerError,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.cluster import connection
from tg_tinker.data.batch import normalize

TEXT = "The patient Zebulon Quillfeather was admitted on a foggy Thursday."
EXAMPLE_ID = "ward-7-Ottoline-Brackenbury"
METADATA = "approved by Doctor Peregrine Mossgrove"
WRONG_KEY = "tgt-made-up-by-Cornelius-Underhill"
STORE_SECRET = "wJalrXUtnFEMI-K7MDENG-secret"
BATCH_HASH = "batch of Thaddeus Wintergreen"

STORES = (f"s3://AKIA:{STORE_SECRET}@bucket/x", f"s3://bucket/x?secret_key={STORE_SECRET}")

STORE_BYTES = 200 * 2**20
CONTROL = "a control in the clear"
LONG = TEXT * 3000
"""Twice what Ray keeps inline."""
STOP = TEXT * 60
"""Nearly as long as stop sequences may be."""

LORA = {"lora_config": LoRAConfig(rank=4), "resources": ResourceConfig(num_threads=1)}


def config(model: Path, **more: Any) -> TrainingConfig:
    return TrainingConfig(model_ref=str(model), **LORA, **more)


def refused(call: Callable[[], Any]) -> None:
    """Checks that a call is refused, and prints the error to stderr, which is searched."""
    try:
        call()
    except TGTinkerError as error:
        print(repr(error), error.details, file=sys.stderr)
        return
    raise AssertionError("not refused")


def ids_of(tc: TrainingClient, text: str) -> list[int]:
    row: list[int] = tc.tokenizer(text)["input_ids"]
    return row


# --- the parts, in their order -------------------------------------------------------------------


def training(service: ServiceClient, model: Path, folder: Path) -> Iterator[str]:
    private = service.create_training_client(
        config(
            model,
            batch_size=2,
            dataset_id="ward",
            dp_config=DPConfig(noise_multiplier=1.0, unit="id"),
        )
    )
    row = ids_of(private, TEXT)
    large = {"input_ids": [[*row, i % 250, i // 250] for i in range(400)],
             "example_ids": [f"{EXAMPLE_ID}-{i}" for i in range(400)]}  # fmt: skip
    first = private.forward_backward(large, batch_hash=BATCH_HASH).result()
    gradient = clipped_sum(model, large, first.gradient_hash)
    private.optim_step().result()
    waiting = [private.forward_backward(large, batch_hash=BATCH_HASH) for _ in range(8)]
    (folder / "gradient").write_bytes(gradient)
    yield "training"
    for handle in waiting:
        handle.exception()
    refused(
        lambda: private.forward_backward({"input_ids": [row], "example_ids": [EXAMPLE_ID, TEXT]})
    )
    private.close()


def clipped_sum(model: Path, batch: dict[str, Any], expected: str | None) -> bytes:
    """Returns part of a clipped sum as it was in the actor, before noise: the equal hash
    confirms that."""
    torch.set_num_threads(1)
    more = {"batch_size": 2, "dataset_id": "ward", "dp": {"unit": "id"}}
    same = private_session(model, **LORA, **more)
    assert same.forward_backward(normalize(batch)).gradient_hash == expected
    largest = max(sums(same).values(), key=lambda tensor: float(tensor.abs().sum()))
    return largest.numpy().tobytes()[:64]


def saving(service: ServiceClient, tc: TrainingClient, folder: Path) -> Iterator[str]:
    tc.forward_backward({"input_ids": [ids_of(tc, TEXT)] * 400}).result()
    tc.optim_step().result()
    saved = tc.save_state(metadata={"note": METADATA})
    tc.load_state(saved.artifact_id)
    adapter = service.export_adapter(saved.artifact_id, folder / "adapter")
    (folder / "weights").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[-64:])
    yield "saving"
    refused(lambda: tc.load_state("art-0"))
    refused(lambda: tc.forward_backward({"input_ids": [[10**6, *ids_of(tc, TEXT)]]}))
    refused(lambda: tc.forward_backward({"input_ids": [TEXT]}))
    defective = tc._calls.submit  # inside the actor
    refused(lambda: defective("save_state", metadata=TEXT).result())
    yield "errors of training"


def sampling(tc: TrainingClient) -> Iterator[str]:
    tc.sample([TEXT * 20] * 150, max_tokens=2, stop_sequences=[STOP])  # as long as LONG
    yield "sampling"
    list(tc.sample_stream(TEXT * 20, max_tokens=4, stop_sequences=[STOP]))
    refused(lambda: tc.sample(LONG))
    refused(lambda: tc._sampler.sample(TEXT))  # a defect inside the sampler
    yield "streams and errors of sampling"


def over_http(url: str, key: str, run: str) -> Iterator[str]:
    """Sends requests and checks their answers.

    `user` takes a long text, and with `echo` an answer repeats the prompt for each completion.
    """
    for stream in (False, True):
        asked = {"model": run, "max_tokens": 2, "stream": stream}
        chat = asked | {"messages": [{"role": "user", "content": TEXT}]}
        for more in ({}, {"user": LONG}):
            assert post(url, key, chat | more)[0] == 200
            assert post(url, key, asked | {"prompt": TEXT} | more)[0] == 200
        yield f"requests, stream={stream}"
        status, answer = post(url, key, asked | {"prompt": TEXT * 20, "n": 100, "echo": True})
        assert status == 200
        assert answer.count(TEXT) == 2000
        yield f"large answers, stream={stream}"


def post(url: str, key: str, body: Any, path: str = "") -> tuple[int, str]:
    """Returns status and text."""
    path = path or ("chat/completions" if "messages" in body else "completions")
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(f"{url}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def errors_over_http(url: str, key: str, run: str) -> Iterator[str]:
    good = {"model": run, "prompt": TEXT, "max_tokens": 1}
    tries: list[tuple[int, str, Any, str]] = [
        (401, WRONG_KEY, good, "completions"),
        (400, key, json.dumps(good).encode()[:-9] + b"\xff" + TEXT.encode(), "completions"),
        (400, key, good | {"max_tokens": TEXT}, "completions"),
        (400, key, good | {"prompt": LONG}, "completions"),
        (400, key, good | {"unknown": TEXT}, "completions"),
        (404, key, good | {"model": EXAMPLE_ID}, "completions"),
        (404, key, good, f"{EXAMPLE_ID}?{WRONG_KEY}"),
        (413, key, good | {"prompt": TEXT * 40_000}, "completions"),
    ]
    for wanted, with_key, body, path in tries:
        status, answer = post(url, with_key, body, path)
        assert status == wanted, (wanted, status, answer)
    yield "errors over HTTP"


def main(model: Path, folder: Path) -> None:
    warnings.simplefilter("ignore")
    connection._OBJECT_STORE_BYTES = STORE_BYTES
    for uri in STORES:
        refused(lambda uri=uri: ServiceClient(address="local", store=uri))
    with ServiceClient(address="local") as service:
        key, _ = service.create_api_key("clinic")
        url = service.serve_http(str(model), port=free_port())
        told = {"api": key, "transport": service._registry.key.hex(),
                "session": ray._private.worker._global_node.get_session_dir_path(),
                "metrics": service.metrics_urls()}  # fmt: skip
        (folder / "secrets.json").write_text(json.dumps(told))
        for part in parts(service, model, folder, url, key):
            print(part, flush=True)
            sys.stdin.readline()


def parts(service: ServiceClient, model: Path, folder: Path, url: str, key: str) -> Iterator[str]:
    yield "start"
    yield from training(service, model, folder)
    with service.create_training_client(config(model)) as tc:
        yield from saving(service, tc, folder)
        yield from sampling(tc)
        yield from over_http(url, key, tc.id)
        yield from errors_over_http(url, key, tc.id)
    yield from in_the_clear(service)


def say(text: str) -> None:
    print(text, flush=True)


def in_the_clear(service: ServiceClient) -> Iterator[str]:
    """Puts text where the search must find it; without a find the search would prove nothing."""
    controls = [ray.put(f"control {TEXT}".encode() * 20_000) for _ in range(8)]
    ray.get(ray.remote(num_cpus=0)(say).remote(TEXT))  # into the log of a worker
    service.create_api_key(TEXT)  # a label, which the registry does not seal
    (Path(service._store) / "control").write_text(TEXT)
    print(TEXT, file=sys.stderr)
    gauge = metrics.Gauge("control", TEXT)
    gauge.set(1)
    process = subprocess.Popen(["sleep", "600"], env=os.environ | {"CONTROL": TEXT})
    yield CONTROL
    process.kill()
    del controls


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
