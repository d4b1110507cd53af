"""Tests sampling beside training: a real cluster, a real Serve application, several runs on one
base model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.engine.model import Base
from actors.sampling.engine import SlotEngine
from actors.sampling.snapshots import opened, take
from serve_app.replica import engines as serve_engines
from serve_app.replica.engines import Engines, EngineThread
from serve_app.replica.replica import Replica
from support.families import make_family
from support.helpers import examples, session
from support.models import make_tokenizer
from support.sampling import Reader, alone
from tg_tinker import (
    InternalError,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    OptimizerConfig,
    QueueFullError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
    WindowSpoiledError,
)
from tg_tinker.cluster.messages import SnapshotRef
from tg_tinker.sampling import SamplingParams

FAST = OptimizerConfig(learning_rate=0.3)
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
ROWS = {"input_ids": [[65, 66, 67, 68, 69], [70, 71, 72]]}


# --- the engines of one base model ---------------------------------------------------------------


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Base:
    return Base.load(str(tiny_model), cache=tmp_path)


def trained(model: Path, **values: Any) -> Any:
    s = session(model, optimizer=FAST, **values)
    s.forward_backward(examples())
    s.optim_step()
    return s


def test_a_thread_serves_and_cancels_from_outside(base: Base) -> None:
    thread, arrived = EngineThread(SlotEngine(base)), threading.Event()
    reader = Reader([65, 66], SamplingParams(max_tokens=100, temperature=0))
    reader.request.deliver = lambda token: (reader.tokens.append(token), arrived.set())  # type: ignore[func-returns-value]
    base.eos_ids = frozenset()
    thread.do(lambda engine: engine.submit(reader.request)).result(10)
    assert arrived.wait(10)
    thread.cancel(reader.request)
    assert thread.do(lambda engine: len(engine._free)).result(10) == 8
    assert not reader.ends
    thread.close()
    thread._thread.join(10)
    assert not thread.alive


def test_whoever_leaves_before_the_work_is_done_ends_nothing(base: Base) -> None:
    thread, entered, go = EngineThread(SlotEngine(base)), threading.Event(), threading.Event()

    def slow(engine: SlotEngine) -> None:
        entered.set()
        go.wait(10)

    slow_one, dropped = thread.do(slow), thread.do(lambda engine: 1)
    assert entered.wait(10)
    assert dropped.cancel()
    go.set()
    slow_one.result(10)
    assert thread.do(lambda engine: 5).result(10) == 5
    assert thread.alive
    thread.close()


def test_an_error_of_the_work_reaches_its_caller_and_the_thread_goes_on(base: Base) -> None:
    thread = EngineThread(SlotEngine(base))
    bad = Reader([65] * 200, SamplingParams(max_tokens=4))
    with pytest.raises(InvalidRequestError):
        thread.do(lambda engine: engine.submit(bad.request)).result(10)
    assert thread.do(lambda engine: 5).result(10) == 5
    thread.close()


@pytest.mark.parametrize(
    "lora",
    [LoRAConfig(rank=3), LoRAConfig(rank=3, bias="all"), None],
    ids=["shared", "biases", "whole"],
)
def test_a_snapshot_draws_what_its_session_would(
    tiny_model: Path, base: Base, lora: LoRAConfig | None
) -> None:
    s = trained(tiny_model, lora_config=lora)
    reference = SnapshotRef("r@1.1.1", "r@1", "r@1", lora is not None and lora.bias == "none")
    engines = Engines(lambda: base)
    snapshot = opened(take(s, reference))
    assert snapshot.shared == reference.shared
    if not snapshot.shared:
        engines = Engines(lambda: Base.load(str(tiny_model), cache=tiny_model))
    assert not engines.has(reference.name, reference.shared)
    engines.add(snapshot).result(10)
    assert engines.has(reference.name, reference.shared)
    params, done = SamplingParams(max_tokens=10, temperature=0), threading.Event()
    reader = Reader([65, 66], params)
    reader.request.adapter = reference.name if reference.shared else None
    deliver = reader.request.deliver

    def delivered(token: Any) -> None:
        deliver(token)
        if token.finish_reason:
            done.set()

    reader.request.deliver = delivered
    engine = engines.of(reference.name, reference.shared)
    engine.do(lambda e: e.submit(reader.request)).result(10)
    assert done.wait(20)
    assert reader.ids() == alone(s.base, [65, 66], params).ids()


def test_a_third_whole_model_takes_the_place_of_the_one_used_longest_ago(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = trained(tiny_model, lora_config=None)
    engines = Engines(lambda: Base.load(str(tiny_model), cache=tiny_model))
    for name in ("a", "b", "a", "c"):
        if not engines.has(name, shared=False):
            engines.add(opened(take(s, SnapshotRef(name, name, name, False))))
        engines.of(name, shared=False)
    assert [engines.has(name, False) for name in "abc"] == [True, False, True]
    assert engines.alive
    busy = [Reader([65], SamplingParams(max_tokens=10**6, temperature=0)) for _ in "ac"]
    for name, reader in zip("ac", busy, strict=True):
        engine = engines.of(name, shared=False)
        engine._engine._base.context_length = 10**7
        engine._engine._base.eos_ids = frozenset()
        engine.do(lambda e, r=reader: e.submit(r.request)).result(10)  # type: ignore[misc]
    monkeypatch.setattr(serve_engines, "ROOM_S", 0.3)
    with pytest.raises(QueueFullError):  # nobody loses an answer that is being drawn
        engines.add(opened(take(s, SnapshotRef("d", "d", "d", False))))
    for name, reader in zip("ac", busy, strict=True):
        engines.of(name, shared=False).close()
        engines.of(name, shared=False)._thread.join(20)
        assert isinstance(reader.tokens[-1].error, InternalError)  # told, not left waiting


def test_what_is_on_its_way_in_is_not_idle(base: Base) -> None:
    thread, entered, go = EngineThread(SlotEngine(base)), threading.Event(), threading.Event()

    def slow(engine: SlotEngine) -> None:
        entered.set()
        go.wait(10)

    assert thread.idle
    working = thread.do(slow)
    assert entered.wait(10)
    assert not thread.idle  # taken out of the inbox, and not in the engine yet
    go.set()
    working.result(10)
    thread.close()
    with pytest.raises(NotFoundError):  # to be fetched again
        thread.do(lambda engine: None)


def test_whoever_waits_is_told_when_the_device_is_dead(base: Base) -> None:
    engine = SlotEngine(base)

    def dead(*_: Any) -> None:
        raise RuntimeError("device")

    readers = [Reader([65, 66], SamplingParams(max_tokens=5)) for _ in range(12)]
    thread = EngineThread(engine)
    engine._advance = engine._slots.clear = engine._slots.reserve = dead  # type: ignore[assignment,method-assign]
    thread.do(lambda e: e.submit_all([reader.request for reader in readers])).result(10)
    deadline = time.monotonic() + 10
    while not all(reader.tokens and reader.tokens[-1].error for reader in readers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.close()


class Gone:
    """A `Sources` of which these artifacts are deleted."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def gone(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self._names]


@pytest.mark.parametrize("lora", [LoRAConfig(rank=3), None], ids=["shared", "whole"])
def test_what_was_deleted_leaves_once_nobody_uses_it_and_nothing_else_does(
    tiny_model: Path, lora: LoRAConfig | None
) -> None:
    s = trained(tiny_model, lora_config=lora)
    engines = Engines(lambda: Base.load(str(tiny_model), cache=tiny_model))
    shared = lora is not None
    for name in ("art-1", "r@1.1.1"):
        engines.add(opened(take(s, SnapshotRef(name, name, "r@1", shared)))).result(10)
    assert engines.names() == ["art-1", "r@1.1.1"]
    engine = engines.of("art-1", shared)
    engine._engine._base.context_length = 10**7
    engine._engine._base.eos_ids = frozenset()
    busy = Reader([65, 66], SamplingParams(max_tokens=10**6, temperature=0))
    busy.request.adapter = "art-1" if shared else None
    engine.do(lambda e: e.submit(busy.request)).result(10)
    replica: Any = SimpleNamespace(engines=engines, sources=Gone("art-1", "art-2"))
    Replica.forget_gone(replica)
    assert engines.has("art-1", shared)  # an answer that is being drawn is not cut
    engine.cancel(busy.request)
    engine.do(lambda e: None).result(10)
    while not engine.idle:  # the step that was under way
        time.sleep(0.01)
    Replica.forget_gone(replica)
    assert engines.names() == ["r@1.1.1"]
    if shared:
        for layer in engines._shared._engine.adapters._layers.values():
            assert not layer._down[1].any()
            assert not layer._up[1].any()
        assert layer._down[2].any()


def test_one_name_is_loaded_once_however_many_ask(tiny_model: Path) -> None:
    s = trained(tiny_model, lora_config=None)
    loads = []

    def load() -> Base:
        loads.append(1)
        time.sleep(0.2)
        return Base.load(str(tiny_model), cache=tiny_model)

    engines = Engines(load)
    snapshot = opened(take(s, SnapshotRef("a", "a", "a", False)))
    with ThreadPoolExecutor(4) as pool:
        assert [f.result(10) for f in pool.map(engines.add, [snapshot] * 4)] == [None] * 4
    assert len(loads) == 2  # the base model, and this one


def test_a_defect_of_the_thread_leaves_nobody_waiting(base: Base) -> None:
    thread = EngineThread(SlotEngine(base))
    reader = Reader([65, 66], SamplingParams(max_tokens=50, temperature=0))
    thread._engine.step = lambda: 1 / 0  # type: ignore[assignment,method-assign]
    thread.do(lambda engine: engine.submit(reader.request)).result(10)
    thread._thread.join(10)
    assert not thread.alive
    assert isinstance(reader.tokens[-1].error, InternalError)
    with pytest.raises(InternalError):
        thread.do(lambda engine: None)
    thread.cancel(reader.request)


# --- through Ray Serve ---------------------------------------------------------------------------


def create(service: ServiceClient, model: Path, **values: Any) -> TrainingClient:
    defaults: dict[str, Any] = {"lora_config": LoRAConfig(rank=4), "optimizer": FAST}
    return service.create_training_client(
        TrainingConfig(model_ref=str(model), **(defaults | values))
    )


def step(tc: TrainingClient, rows: dict[str, Any] = ROWS) -> None:
    tc.forward_backward(rows)
    tc.optim_step()


def completion(tc: TrainingClient) -> list[int]:
    return tc.sample("abc", **GREEDY).samples[0].token_ids


@pytest.mark.slow
def test_runs_on_one_base_model_share_a_sampler_and_keep_their_weights(
    service: ServiceClient, tiny_model: Path
) -> None:
    from ray import serve

    kinds: list[dict[str, Any]] = [
        {}, {"lora_config": LoRAConfig(rank=2, target_modules="all-linear")}, {"lora_config": None},
    ]  # fmt: skip
    runs = [create(service, tiny_model, **kind) for kind in kinds]
    untrained = completion(runs[0])
    for number, tc in enumerate(runs):
        step(tc, {"input_ids": [[number + 65] * 6]})
    each = [completion(tc) for tc in runs]
    with ThreadPoolExecutor(9) as pool:  # all at once, three calls of each
        together = list(pool.map(completion, runs * 3))
    assert together == each * 3
    assert len({tuple(ids) for ids in (untrained, *each)}) == 4
    assert len(serve.status().applications) == 1
    for tc in runs:
        tc.close()


@pytest.mark.slow
def test_every_sample_sees_the_steps_before_it_and_no_later_one(
    service: ServiceClient, tiny_model: Path
) -> None:
    with create(service, tiny_model) as tc:
        streams = []
        for _ in range(4):
            streams.append(tc.sample_stream("abc", **GREEDY))
            step(tc)
        versions = [{chunk.weights_version for chunk in stream} for stream in streams]
        assert versions == [{f"{tc.id}@{number}"} for number in range(4)]
        saved = tc.save_state().artifact_id
        before = completion(tc)
        for _ in range(3):
            step(tc, {"input_ids": [[99, 98, 97, 96, 95, 94]]})
        assert completion(tc) != before
        tc.load_state(saved)  # the same step number again, other weights than a moment ago
        assert completion(tc) == before


@pytest.mark.slow
def test_training_goes_on_while_a_completion_is_drawn(
    service: ServiceClient, tiny_model: Path
) -> None:
    with create(service, tiny_model) as tc:
        stream = tc.sample_stream("abc", max_tokens=100, temperature=1.0, stop_sequences=[])
        first = next(stream)
        step(tc)
        assert tc.optim_step().exception() is not None  # nothing collected: after the step
        assert tc.step == 1
        assert {chunk.weights_version for chunk in stream} <= {first.weights_version}


@pytest.mark.slow
def test_a_failed_step_is_told_once_to_the_sample_that_was_to_see_it(
    service: ServiceClient, tiny_model: Path
) -> None:
    with create(service, tiny_model) as tc:
        tc.forward_backward({"input_ids": [[7] * 128] * 400})
        cancelled = tc.forward_backward(ROWS)
        assert cancelled.cancel()
        tc.optim_step()
        with pytest.raises(WindowSpoiledError):
            tc.sample("abc", **GREEDY)
        assert tc.sample("abc", **GREEDY).weights_version == f"{tc.id}@0"


@pytest.mark.slow
def test_many_streams_cancels_and_bad_requests_do_not_disturb_each_other(
    service: ServiceClient, tiny_model: Path
) -> None:
    with create(service, tiny_model) as tc:
        step(tc)
        expected = completion(tc)

        def good(_: int) -> bool:
            return completion(tc) == expected

        def left(_: int) -> bool:
            return next(tc.sample_stream("xyz", max_tokens=100)) is not None

        def bad(_: int) -> bool:
            with pytest.raises(InvalidRequestError):
                tc.sample("a" * 100, max_tokens=100)
            return True

        work = [(good, left, bad)[i % 3] for i in range(64)]
        with ThreadPoolExecutor(64) as pool:
            assert all(pool.map(lambda job: job(0), work))


def with_tokenizer(family: str, folder: Path) -> Path:
    model = make_family(family, folder / family)
    make_tokenizer(model)
    return model


@pytest.mark.slow
def test_a_model_that_cannot_be_sampled_says_so_when_the_client_is_created(
    service: ServiceClient, tmp_path: Path
) -> None:
    model = with_tokenizer("bert", tmp_path)
    with pytest.warns(UserWarning, match="trained but not sampled") as warned:
        tc = create(service, model, lora_config=LoRAConfig(target_modules=("query",)))
    assert {w.filename for w in warned if "not sampled" in str(w.message)} == {__file__}
    with tc:
        with pytest.raises(InvalidRequestError, match="trained but not sampled"):
            tc.sample("abc", **GREEDY)
        with pytest.raises(InvalidRequestError, match="trained but not sampled"):
            tc.sample_stream("abc")
        step(tc)
        assert torch.isfinite(torch.tensor(tc.forward_backward(ROWS).result().loss))


@pytest.mark.slow
def test_a_model_without_streams_is_sampled_with_its_adapter(
    service: ServiceClient, tmp_path: Path
) -> None:
    model = with_tokenizer("bloom", tmp_path)
    lora = LoRAConfig(rank=8, target_modules="all-linear")
    with create(service, model, lora_config=lora) as tc:
        first = tc.sample(["abc", "de"], num_completions=2, **GREEDY).samples
        step(tc)
        later = tc.sample(["abc", "de"], num_completions=2, **GREEDY).samples
        assert [s.token_ids for s in first] != [s.token_ids for s in later]
        assert first[0].token_ids == first[1].token_ids
        saved = tc.save_state().artifact_id
    service.export_adapter(saved, str(tmp_path / "adapter"))
    plain, tokenizer = (
        kind.from_pretrained(model) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    for sample in later[::2]:
        prompt = tokenizer(sample.prompt)["input_ids"]
        ids = torch.tensor([prompt])
        found = peft.generate(ids, max_new_tokens=GREEDY["max_tokens"], do_sample=False)
        assert sample.token_ids == found[0, len(prompt) :].tolist()
