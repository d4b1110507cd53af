"""Measures the overhead of Ray Serve on a request, and how fast new weights answer.

Overhead is the time that the caller waits beyond the time of the replica. A swap is the time from
an optimizer step's result to the first token of its weights. It includes the snapshot, its transfer
through the object store, and one forward pass over the prompt.
"""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from ray import serve

from actors.sampling.engine import SlotEngine
from actors.sampling.requests import Token
from actors.sampling.text import Completions
from actors.storage.home import MODELS
from bench.measure import Bench, Run, Sheet, shown_progress
from serve_app.replica.engines import EngineThread, loader
from tg_tinker import LoRAConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.sampling import SamplingParams
from tg_tinker.storage.home import home_directory

ROW = {"input_ids": [[*range(1000, 1016)]]}
PROMPT = "The capital of France is"
PORT = 8765
STREAMS = 2


def quantiles(milliseconds: list[float]) -> str:
    ordered = sorted(milliseconds)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return f"p50 {statistics.median(ordered):.1f} ms, p95 {p95:.1f} ms"


def by_handle(tc: TrainingClient, repeats: int) -> tuple[list[float], list[float]]:
    """Returns, for calls of one token, the wait beyond the replica's time, and the replica's time.

    Both are in milliseconds.
    """
    extra, inside = [], []
    for _ in shown_progress(repeats, "calls through a handle"):
        started = time.perf_counter()
        found = tc.sample(PROMPT, max_tokens=1, temperature=0)
        inside.append(found.latency_ms)
        extra.append(1e3 * (time.perf_counter() - started) - found.latency_ms)
    return extra, inside


def by_http(
    url: str, tokens: int, repeats: int, shown: bool = True
) -> tuple[list[float], list[float]]:
    """Returns the milliseconds to the first event of each stream, and between later events."""
    first, gaps = [], []
    body = {"model": "base", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0,
            "stream": True}  # fmt: skip
    for _ in shown_progress(repeats, "streams over HTTP") if shown else range(repeats):
        request = urllib.request.Request(
            f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        last = time.perf_counter()
        taken = []
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    taken.append(1e3 * (now - last))
                    last = now
        first.append(taken[0])
        gaps += taken[1:]
    return first, gaps


def by_engine(engine: EngineThread, tokenizer: Any, tokens: int) -> list[float]:
    """Returns the milliseconds between chunks of the same answer from an engine in this process."""
    arrived: list[float] = []
    done = threading.Event()
    params = SamplingParams(max_tokens=tokens, temperature=0)
    call = Completions(
        tokenizer, [PROMPT], params, notify=lambda: arrived.append(time.perf_counter())
    )
    (request,) = call.requests
    deliver = request.deliver

    def delivered(token: Token) -> None:
        deliver(token)
        if token.finish_reason:
            done.set()

    request.deliver = delivered
    engine.do(lambda e: e.submit(request)).result()
    done.wait()
    return [1e3 * (b - a) for a, b in pairwise(arrived)]


def freed(url: str, application: str, repeats: int) -> list[float]:
    """Returns the milliseconds from the end of a connection to free slots.

    Each connection asks for eight completions, and all eight slots must be free.
    """
    handle = serve.get_app_handle(application)
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "n": 8,
            "stream": True}  # fmt: skip
    host = url.removeprefix("http://").removesuffix("/v1")
    taken = []
    for _ in shown_progress(repeats, "connections that are closed"):
        connection = http.client.HTTPConnection(host)
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        connection.getresponse().read(100)
        connection.close()
        started = time.perf_counter()
        while handle.load.remote().result().running:
            pass
        taken.append(1e3 * (time.perf_counter() - started))
    return taken


@contextmanager
def streams(url: str, count: int) -> Iterator[list[str]]:
    """Runs clients that request one answer after the other; yields the names of their errors."""
    failed: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                by_http(url, 24, 1, shown=False)
            except Exception as error:
                failed.append(type(error).__name__)

    clients = [threading.Thread(target=ask) for _ in range(count)]
    for client in clients:
        client.start()
    yield failed
    stop.set()
    for client in clients:
        client.join()


def swaps(tc: TrainingClient, repeats: int) -> tuple[list[float], int]:
    """Returns the milliseconds from each step's result to the first token of its weights.

    Also returns the number of answers from older weights.
    """
    taken, stale = [], 0
    for _ in shown_progress(repeats, "swaps"):
        tc.forward_backward(ROW)
        step = tc.optim_step().result().step
        started = time.perf_counter()
        chunk = next(tc.sample_stream(PROMPT, max_tokens=1, temperature=0))
        taken.append(1e3 * (time.perf_counter() - started))
        stale += chunk.weights_version != f"{tc.id}@{step}"
    return taken, stale


def run(bench: Run) -> None:
    repeats = bench.times(30)
    swapped = 7 * repeats
    base = loader(bench.model, "float32", home_directory() / MODELS)()
    engine = EngineThread(SlotEngine(base))
    config = TrainingConfig(model_ref=bench.model, lora_config=LoRAConfig(rank=16))
    rows: dict[str, str] = {}
    with ServiceClient(address="local") as service:
        url = service.serve_http(bench.model, port=PORT)
        with service.create_training_client(config) as tc:
            tc.sample(PROMPT, max_tokens=1)
            extra, inside = by_handle(tc, repeats)
            rows["one token, inside the replica"] = quantiles(inside)
            rows["one token, added by handle, Serve and snapshot"] = quantiles(extra)
            by_engine(engine, tc.tokenizer, 4)
            first, gaps, direct = [], [], []
            # In turn, because the speed of a machine varies.
            for _ in range(max(3, repeats // 5)):
                direct += by_engine(engine, tc.tokenizer, 24)
                found = by_http(url, 24, 1)
                first += found[0]
                gaps += found[1]
            rows["HTTP stream, first event"] = quantiles(first)
            rows["between chunks, engine in this process"] = quantiles(direct)
            rows["between events, HTTP"] = quantiles(gaps)
            (application,) = serve.status().applications
            rows["from a closed connection to free slots"] = quantiles(freed(url, application, 10))
            taken, stale = swaps(tc, swapped)
            rows[f"{swapped} swaps, from step to first token"] = quantiles(taken)
            rows["stale answers"] = str(stale)
            with streams(url, STREAMS) as failed:
                taken, stale = swaps(tc, swapped)
            rows[f"{swapped} swaps during {STREAMS} streams"] = quantiles(taken)
            rows["stale answers, failed requests"] = f"{stale}, {len(failed)}"
    title = "SmolLM2-135M, rank 16, one token after a context of 6"
    bench.sheets.append(Sheet(title, ("what", "time"), [*rows.items()]))


BENCH = Bench(
    "serving", "the overhead of Ray Serve on a request; the time until new weights answer", 3, run
)
