"""Tests the engine where each sequence has forward passes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine.caches import Caches, Way
from actors.engine.model import Base
from actors.sampling import engine as generation
from actors.sampling.adapters import Adapter
from actors.sampling.engine import SlotEngine
from support.helpers import session
from support.models import make_model
from support.sampling import Reader, alone, finish
from tg_tinker import InternalError, LoRAConfig, NonFiniteError
from tg_tinker.errors import InvalidRequestError
from tg_tinker.sampling import SamplingParams

ALONE = [Way.CACHE, Way.PROMPTS, Way.WHOLE]
GREEDY = SamplingParams(max_tokens=8, temperature=0, stop_token_ids=())
REQUESTS = {
    "greedy": ([65, 66, 67], GREEDY),
    "drawn": ([*range(60, 90)], SamplingParams(max_tokens=9, temperature=1.2, seed=3)),
    "several": ([70], SamplingParams(max_tokens=7, seed=5, num_completions=3)),
    "scored": (
        [*range(90, 70, -1)],
        SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=True, top_logprobs=3),
    ),
}


@pytest.fixture(scope="module")
def slots(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.load(str(tiny_model), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=ALONE)
def base(request: pytest.FixtureRequest, slots: Base) -> Iterator[Base]:
    """Returns the same model, as if it could only be sampled in this way."""
    slots.sampling = request.param
    yield slots
    slots.sampling = Way.SLOTS


def is_empty(engine: SlotEngine) -> bool:
    room = engine._slots
    assert isinstance(room, Caches)
    return engine.idle and not (room._tokens or room._caches) and len(engine._free) == room.count


def expected(base: Base, prompt: list[int], params: SamplingParams) -> Reader:
    before, base.sampling = base.sampling, Way.SLOTS
    try:
        return alone(base, prompt, params)
    finally:
        base.sampling = before


def test_requests_side_by_side_are_as_in_slots(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: expected(base, *request) for name, request in REQUESTS.items()}
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 3)
    monkeypatch.setattr(generation, "PROMPT_TOKENS_ALONE", 7)
    engine = SlotEngine(base)
    readers = {name: Reader(*request) for name, request in REQUESTS.items()}
    for reader in readers.values():
        engine.submit(reader.request)
        engine.step()
    finish(engine)
    for name, reader in readers.items():
        for index in range(reader.request.params.num_completions):
            found = [t for t in reader.tokens if t.index == index]
            should = [t for t in wanted[name].tokens if t.index == index]
            assert [t.token_id for t in found] == [t.token_id for t in should]
            close = [t.logprob for t in should]
            assert [t.logprob for t in found] == pytest.approx(close, abs=1e-4)
            assert [[i for i, _ in t.top] for t in found] == [[i for i, _ in t.top] for t in should]
    scored, should_be = readers["scored"].tokens[0].prompt, wanted["scored"].tokens[0].prompt
    assert scored is not None
    assert should_be is not None
    assert scored[1:] == pytest.approx(should_be[1:], abs=1e-4)
    assert is_empty(engine)


def test_a_prompt_is_read_at_once_only_where_it_must_be(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PROMPT_TOKENS_ALONE", 10)
    engine = SlotEngine(base)
    reader = Reader([*range(60, 90)], GREEDY)
    engine.submit(reader.request)
    engine.step()
    assert bool(reader.tokens) == (base.sampling is not Way.CACHE)


def test_one_prompt_at_once_holds_up_the_others_by_one_step(slots: Base) -> None:
    slots.sampling = Way.PROMPTS
    try:
        engine = SlotEngine(slots)
        readers = [Reader([65 + i] * 70, GREEDY) for i in range(9)]
        for reader in readers:
            engine.submit(reader.request)
        engine.step()
        assert [len(reader.tokens) for reader in readers] == [1] * 8 + [0]  # 8 x 70 > 512
        engine.step()
        assert len(readers[0].tokens) == 2
    finally:
        slots.sampling = Way.SLOTS


def test_a_prompt_that_must_be_read_at_once_is_bounded(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "WHOLE_PROMPT", 10)
    engine = SlotEngine(base)
    engine.submit(Reader([65] * 10, GREEDY).request)
    long = Reader([65] * 11, GREEDY).request
    if base.sampling is Way.CACHE:
        engine.submit(long)
    else:
        with pytest.raises(InvalidRequestError, match="in one pass, of at most 10 tokens"):
            engine.submit(long)


def test_cancelled_requests_and_completions_leave_nothing(base: Base) -> None:
    engine = SlotEngine(base)
    params = SamplingParams(max_tokens=30, temperature=0, num_completions=2)
    readers = [Reader([65, 66 + i], params) for i in range(3)]
    for reader in readers:
        engine.submit(reader.request)
    engine.step()
    engine.cancel(readers[0].request, 1)
    engine.cancel(readers[1].request)
    counts = [len(reader.tokens) for reader in readers]
    engine.step()
    assert [len(r.tokens) for r in readers] == [counts[0] + 1, counts[1], counts[2] + 2]
    for reader in readers:
        engine.cancel(reader.request)
    assert is_empty(engine)


def test_the_cache_of_a_sequence_is_overwritten_when_it_ends(slots: Base) -> None:
    slots.sampling = Way.CACHE
    try:
        engine = SlotEngine(slots)
        reader = Reader([65, 66], SamplingParams(max_tokens=9, num_completions=2, seed=1))
        engine.submit(reader.request)
        engine.step()
        room = engine._slots
        assert isinstance(room, Caches)
        held = [layer.keys for cache in room._caches.values() for layer in cache.layers]
        held += [layer.values for cache in room._caches.values() for layer in cache.layers]
        assert len(held) == 8
        assert all(bool(tensor.any()) for tensor in held)
        engine.cancel(reader.request)
        assert not any(bool(tensor.any()) for tensor in held)
        assert is_empty(engine)
    finally:
        slots.sampling = Way.SLOTS


def test_each_sequence_uses_its_own_adapter(base: Base, tiny_model: Path) -> None:
    engine, sessions = SlotEngine(base), {}
    for seed, name in enumerate("ab"):
        targets: Any = "all-linear" if seed else ("v_proj", "down_proj")
        s = session(tiny_model, lora_config=LoRAConfig(rank=2 + seed, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in s._parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        sessions[name] = s
        state = s.state(include_optimizer=False)
        engine.adapters.add(Adapter(name, state.adapter_config or {}, state.weights))
    readers = []
    for name in ("a", None, "b", "b", None):
        reader = Reader([65, 66, 67, 68 + len(readers)], GREEDY)
        reader.request.adapter = name
        readers.append(reader)
        engine.submit(reader.request)
        engine.step()
    finish(engine)
    for reader in readers:
        name = reader.request.adapter
        model = base if name is None else sessions[name].base
        should = expected(model, reader.request.prompt, GREEDY)
        assert reader.ids() == should.ids(), name
        close = [token.logprob for token in should.tokens]
        assert [token.logprob for token in reader.tokens] == pytest.approx(close, abs=1e-3)
    assert not engine.adapters.route.runs


def test_a_pass_that_fails_ends_what_runs_and_the_engine_goes_on(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reader = SlotEngine(base), Reader([65, 66], GREEDY)
    engine.submit(reader.request)
    engine.step()
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> None:
            raise RuntimeError("secret words")

        patch.setattr(Caches, "logits", fails)
        finish(engine)
    assert isinstance(reader.tokens[-1].error, InternalError)
    assert "secret" not in str(reader.tokens[-1].error)
    assert is_empty(engine)
    again = Reader([65, 66], GREEDY)
    engine.submit(again.request)
    finish(engine)
    assert again.ids() == expected(base, [65, 66], GREEDY).ids()


def test_outputs_that_are_no_numbers_end_their_request_only(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Caches.logits

    def logits(room: Caches, model: Any, slot: int, tokens: Any, wanted: Any) -> torch.Tensor:
        found = real(room, model, slot, tokens, wanted)
        return found * torch.nan if room._tokens[slot][0] == 10 else found

    monkeypatch.setattr(Caches, "logits", logits)
    engine, good, bad = SlotEngine(base), Reader([65, 66], GREEDY), Reader([10, 66], GREEDY)
    for reader in (bad, good):
        engine.submit(reader.request)
    finish(engine)
    assert isinstance(bad.tokens[-1].error, NonFiniteError)
    assert good.ids() == expected(base, [65, 66], GREEDY).ids()
    assert is_empty(engine)


@pytest.mark.parametrize("size", [5, 20])
def test_rotations_that_change_with_the_length_are_those_of_the_whole_text(
    tmp_path: Path, size: int
) -> None:
    """Above 16 tokens, all positions of a text are rotated by other factors."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 8.0,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 9.0],
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = make_model(tmp_path / "rope", rope_parameters=rope)
    base = Base.load(str(model), cache=tmp_path)
    assert base.sampling is Way.PROMPTS
    base.eos_ids = frozenset()
    params = SamplingParams(max_tokens=20, temperature=0, prompt_logprobs=True)
    reader = alone(base, [*range(40, 40 + size)], params)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    ids = [*range(40, 40 + size)]
    for token in reader.tokens:
        with torch.no_grad():
            row = plain(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        assert token.token_id == int(row.argmax())
        assert token.logprob == pytest.approx(float(row.max()), abs=1e-4)
        ids.append(token.token_id)
