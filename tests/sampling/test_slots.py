"""Tests the sampling engine with several requests: no request's tokens depend on the others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors.engine import slots
from actors.engine.model import Base
from actors.sampling import engine as generation
from actors.sampling.engine import SlotEngine
from actors.sampling.requests import TokenRequest
from support.helpers import session
from support.models import make_model
from support.sampling import Reader, alone, finish
from tg_tinker import InvalidRequestError
from tg_tinker.errors import InternalError, NonFiniteError, QueueFullError
from tg_tinker.sampling import SamplingParams

DRAWN = {
    "greedy": SamplingParams(max_tokens=9, temperature=0),
    "plain": SamplingParams(max_tokens=12, seed=3),
    "cut": SamplingParams(max_tokens=7, temperature=1.4, top_k=20, top_p=0.9, seed=4),
    "nucleus": SamplingParams(max_tokens=10, temperature=2, top_p=0.8, seed=5),
    "penalties": SamplingParams(
        max_tokens=11, seed=6, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "several": SamplingParams(max_tokens=8, seed=7, num_completions=3),
}
PROMPTS = [[65, 66, 67], [70], [71] * 40, [*range(80, 95)], [100, 101], [*range(110, 180)]]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.load(str(tiny_model), cache=tmp_path_factory.mktemp("cache"))


def is_empty(engine: SlotEngine) -> bool:
    """Returns whether all slots are free and hold zeros."""
    zero = all(not t.any() for pair in engine._slots._layers.values() for t in pair)
    return sorted(engine._free) == list(range(engine._slots.count)) and zero


@pytest.mark.parametrize("slots", [3, 5, 16])
def test_a_seeded_request_gets_its_tokens_whatever_runs_beside_it(base: Base, slots: int) -> None:
    engine, readers = SlotEngine(base, slots), []
    for round_ in range(2):  # the second arrives while the first runs, in another order
        wanted = list(zip(PROMPTS, DRAWN.values(), strict=True))
        random.Random(round_).shuffle(wanted)
        for prompt, params in wanted:
            readers.append(Reader(prompt, params))
            engine.submit(readers[-1].request)
            engine.step()
    finish(engine)
    for reader in readers:
        request = reader.request
        expected = alone(base, request.prompt, request.params)
        for index in range(request.params.num_completions):
            assert reader.ids(index) == expected.ids(index)
    assert is_empty(engine)


def test_without_a_seed_draws_differ(base: Base) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5)
    assert alone(base, [65], params).ids() != alone(base, [65], params).ids()


def test_completions_of_one_prompt_differ_and_read_it_once(base: Base) -> None:
    engine = SlotEngine(base)
    reader = Reader([*range(60, 80)], SamplingParams(max_tokens=6, seed=1, num_completions=8))
    engine.submit(reader.request)
    assert finish(engine) == 6
    assert len({tuple(reader.ids(i)) for i in range(8)}) == 8
    one = SamplingParams(max_tokens=6, seed=1)
    assert reader.ids(0) == alone(base, [*range(60, 80)], one).ids()


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_a_prompt_read_in_pieces_says_the_same(
    base: Base, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, params = [*range(60, 110)], SamplingParams(max_tokens=8, temperature=0)
    whole = alone(base, prompt, params)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", size)
    monkeypatch.setattr(generation, "PROMPT_TOKENS_ALONE", size)
    cut = alone(base, prompt, params)
    assert cut.ids() == whole.ids()
    close = [token.logprob for token in whole.tokens]
    assert [token.logprob for token in cut.tokens] == pytest.approx(close, abs=1e-4)


def test_a_long_prompt_does_not_stop_the_others(base: Base) -> None:
    engine = SlotEngine(base)
    first = Reader([65], SamplingParams(max_tokens=100, temperature=0, stop_token_ids=()))
    engine.submit(first.request)
    engine.step()
    engine.submit(Reader([66] * 100, SamplingParams(max_tokens=5)).request)
    before = len(first.tokens)
    engine.step()  # reads 64 of the 100
    engine.step()
    assert len(first.tokens) == before + 2


def test_logprobs_of_alternatives_and_of_the_prompt_are_the_models_own(base: Base) -> None:
    prompt = [*range(60, 75)]
    params = SamplingParams(
        max_tokens=4, temperature=0.8, top_logprobs=5, prompt_logprobs=True, num_completions=2
    )
    reader = alone(base, prompt, params)
    for index in range(2):
        tokens = [t for t in reader.tokens if t.index == index]
        whole = torch.tensor([prompt + reader.ids(index)])
        with torch.no_grad():
            mask = torch.ones_like(whole)
            rows = base.model(input_ids=whole, attention_mask=mask).logits[0].log_softmax(-1)
        scored = rows[: len(prompt) - 1].gather(1, whole[0, 1 : len(prompt), None])[:, 0]
        assert tokens[0].prompt is not None
        assert tokens[0].prompt[1:] == pytest.approx(scored.tolist(), abs=1e-4)
        assert tokens[1].prompt is None
        for token, row in zip(tokens, rows[len(prompt) - 1 :], strict=False):
            best = row.topk(5)
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)


def test_a_stop_token_ends_its_completion_and_is_its_last(base: Base) -> None:
    ids = alone(base, [65], DRAWN["greedy"]).ids()
    params = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=(ids[4],))
    reader = alone(base, [65], params)
    assert reader.ids() == ids[: ids.index(ids[4]) + 1]
    assert reader.ends == ["stop"]


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([65] * 120, SamplingParams(max_tokens=9)),
        ([], SamplingParams()),
        ([65, 259], SamplingParams(max_tokens=4)),
        ([-1], SamplingParams(max_tokens=4)),
        ([65], SamplingParams(max_tokens=4, num_completions=9)),
    ],
)
def test_what_can_never_run_is_refused_before_it_waits(
    base: Base, prompt: list[int], params: SamplingParams
) -> None:
    engine = SlotEngine(base)
    with pytest.raises(InvalidRequestError):
        engine.submit(Reader(prompt, params).request)
    assert not engine.step()


def test_cancelled_requests_and_completions_leave_at_once(base: Base) -> None:
    engine = SlotEngine(base, 4)
    readers = [Reader([65, 66], SamplingParams(max_tokens=50, num_completions=2)) for _ in range(3)]
    for reader in readers:
        engine.submit(reader.request)
    engine.step()
    engine.cancel(readers[2].request)  # still waiting
    engine.cancel(readers[0].request, 1)
    engine.cancel(readers[1].request)
    counts = [len(reader.tokens) for reader in readers]
    engine.step()
    assert [len(r.tokens) for r in readers] == [counts[0] + 1, counts[1], 0]
    assert len(engine._free) == 3
    engine.cancel(readers[0].request)
    engine.cancel(readers[0].request)
    assert not engine.step()
    assert is_empty(engine)


class Broken:
    """A fault that makes the outputs of one slot's sequence NaN, or a whole forward pass fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, token: int | None = None) -> None:
        real = generation.next_token_logits

        def logits(base: Base, tokens: list[int], layout: Any, wanted: list[int]) -> torch.Tensor:
            found = real(base, tokens, layout, wanted)
            if token is None:
                raise RuntimeError("secret words")
            for row, place in enumerate(wanted):
                if tokens[place] == token:
                    found[row] = torch.nan
            return found

        monkeypatch.setattr(generation, "next_token_logits", logits)


def test_a_row_that_is_not_a_number_ends_its_request_only(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    expected = alone(base, [65, 66], params).ids()
    with monkeypatch.context() as patch:
        Broken(patch, token=200)
        engine = SlotEngine(base)
        good = Reader([65, 66], params)
        bad = Reader([10, 200], SamplingParams(max_tokens=6, num_completions=2))
        for reader in (bad, good):
            engine.submit(reader.request)
        finish(engine)
    assert good.ids() == expected
    assert [type(token.error) for token in bad.tokens] == [NonFiniteError]
    assert is_empty(engine)


def test_parameters_that_leave_nothing_to_draw_end_their_request_only(base: Base) -> None:
    engine, params = SlotEngine(base), SamplingParams(max_tokens=6, temperature=0)
    good = Reader([65, 66], params)
    bad = Reader([65, 66], SamplingParams(max_tokens=6, top_p=0.5, repetition_penalty=1.5))
    object.__setattr__(bad.request.params, "repetition_penalty", 1e-39)  # as if it were allowed
    for reader in (bad, good):
        engine.submit(reader.request)
    finish(engine)
    assert good.ids() == alone(base, [65, 66], params).ids()
    assert isinstance(bad.tokens[-1].error, NonFiniteError)


def test_a_sequence_without_memory_is_refused_alone(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later sequences run too, because the slots keep their length."""
    engine, params = SlotEngine(base), SamplingParams(max_tokens=6, temperature=0)
    engine._slots._length = 16
    first = Reader([65, 66], params)
    engine.submit(first.request)
    finish(engine)

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(slots, "pad", no_memory)
    good, large = Reader([65, 66], params), Reader([65], SamplingParams(max_tokens=100))
    for reader in (large, good):
        engine.submit(reader.request)
    finish(engine)
    later = Reader([65, 66], params)
    engine.submit(later.request)
    finish(engine)
    assert isinstance(large.tokens[-1].error, QueueFullError)
    assert good.ids() == later.ids() == alone(base, [65, 66], params).ids()


def test_owners_get_slots_by_turns(base: Base) -> None:
    """An owner with many requests waits behind an owner with few, not the other way round."""
    engine, order = SlotEngine(base, 2), []
    params = SamplingParams(max_tokens=3, temperature=0)
    for number, owner in enumerate(["much"] * 5 + ["other", "third"]):
        name = f"{owner}{number}"
        request = TokenRequest([65], params, lambda token, n=name: order.append(n))  # type: ignore[misc]
        request.owner = owner
        engine.submit(request)
    finish(engine)
    begun = list(dict.fromkeys(order))
    assert begun[:4] == ["much0", "other5", "third6", "much1"]
    assert begun[4:] == ["much2", "much3", "much4"]


def test_a_request_that_waits_is_cancelled_out_of_its_owners_turn(base: Base) -> None:
    engine = SlotEngine(base, 1)
    readers = [Reader([65], SamplingParams(max_tokens=2, temperature=0)) for _ in range(3)]
    for reader, owner in zip(readers, "aab", strict=True):
        reader.request.owner = owner
        engine.submit(reader.request)
    for reader in readers[:2]:
        engine.cancel(reader.request)
        engine.cancel(reader.request)
    finish(engine)
    assert [len(reader.tokens) for reader in readers] == [0, 0, 2]
    assert is_empty(engine)


def test_requests_are_queued_all_or_none(base: Base) -> None:
    engine = SlotEngine(base)
    good, bad = Reader([65], DRAWN["greedy"]), Reader([65] * 200, DRAWN["greedy"])
    with pytest.raises(InvalidRequestError):
        engine.submit_all([good.request, bad.request])
    assert engine.idle


def test_nan_left_in_a_slot_does_not_reach_its_next_user(base: Base) -> None:
    engine, params = SlotEngine(base, 1), SamplingParams(max_tokens=6, temperature=0)
    first = Reader([65] * 30, params)
    engine.submit(first.request)
    engine.step()
    for pair in engine._slots._layers.values():
        for tensor in pair:
            with torch.inference_mode():
                tensor[:, :, :30] = torch.nan
    finish(engine)
    assert isinstance(first.tokens[-1].error, NonFiniteError)
    second = Reader([65, 66], params)
    engine.submit(second.request)
    finish(engine)
    assert second.ids() == alone(base, [65, 66], params).ids()


def test_a_forward_that_fails_ends_what_runs_and_the_engine_goes_on(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, params = SlotEngine(base), SamplingParams(max_tokens=6, temperature=0)
    reader = Reader([65, 66], params)
    engine.submit(reader.request)
    with monkeypatch.context() as patch:
        Broken(patch)
        finish(engine)
    assert isinstance(reader.tokens[-1].error, InternalError)
    assert "secret" not in str(reader.tokens[-1].error)
    assert is_empty(engine)
    again = Reader([65, 66], params)
    engine.submit(again.request)
    finish(engine)
    assert again.ids() == alone(base, [65, 66], params).ids()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.sampled_from(range(6)), st.sampled_from([*DRAWN])),
            st.tuples(st.just("cancel"), st.integers(0, 20), st.sampled_from([None, 0, 2])),
            st.tuples(st.just("step"), st.integers(1, 4), st.none()),
        ),
        max_size=25,
    )
)
@settings(deadline=None, max_examples=25)
def test_any_order_of_requests_cancels_and_steps_ends_right(
    base: Base, actions: list[tuple[str, int, Any]]
) -> None:
    engine, readers, cancelled = SlotEngine(base, 4), [], set()
    for what, number, detail in actions:
        if what == "submit":
            readers.append(Reader(PROMPTS[number], DRAWN[detail]))
            engine.submit(readers[-1].request)
        elif what == "cancel" and readers:
            reader = readers[number % len(readers)]
            engine.cancel(reader.request, detail)
            cancelled.add(reader)
        elif what == "step":
            for _ in range(number):
                engine.step()
    finish(engine)
    assert is_empty(engine)
    for reader in readers:
        params = reader.request.params
        if reader not in cancelled:
            assert len(reader.ends) == params.num_completions
        expected = alone(base, reader.request.prompt, params)
        for index in range(params.num_completions):
            found = reader.ids(index)
            assert found == expected.ids(index)[: len(found)]


@pytest.mark.parametrize(
    "kind", ["window", "absolute positions", "tied, one kv head"],
)  # fmt: skip
def test_other_attentions_equal_generate(tmp_path: Path, kind: str) -> None:
    if kind == "window":
        from transformers import MistralConfig, MistralForCausalLM

        sizes: dict[str, Any] = {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.3, "sliding_window": 8,
        }  # fmt: skip
        torch.manual_seed(0)
        MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(tmp_path)
    elif kind == "absolute positions":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
    else:
        make_model(tmp_path, num_key_value_heads=1, tie_word_embeddings=True)
    loaded = Base.load(str(tmp_path), cache=tmp_path / "cache")
    loaded.eos_ids = frozenset()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    engine, params = SlotEngine(loaded), SamplingParams(max_tokens=20, temperature=0)
    readers = [Reader(prompt, params) for prompt in ([5, 6, 7], [9], [*range(20, 50)])]
    for reader in readers:
        engine.submit(reader.request)
    finish(engine)
    for reader in readers:
        expected = plain.generate(
            torch.tensor([reader.request.prompt]), max_new_tokens=20, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert reader.ids() == expected[0, len(reader.request.prompt) :].tolist()


def test_longer_sequences_make_the_slots_grow(tmp_path: Path) -> None:
    model = make_model(tmp_path, max_position_embeddings=600)
    base = session(model).base
    base.eos_ids = frozenset()
    engine = SlotEngine(base, 2)
    short = Reader([65, 66], SamplingParams(max_tokens=30, temperature=0))
    long = Reader([67] * 200, SamplingParams(max_tokens=100, temperature=0))
    engine.submit(short.request)
    engine.step()
    engine.submit(long.request)
    finish(engine)
    for reader in (short, long):
        size = len(reader.request.prompt)
        expected = base.model.generate(
            torch.tensor([reader.request.prompt]), do_sample=False, pad_token_id=0,
            max_new_tokens=reader.request.params.max_tokens, eos_token_id=None,
        )  # fmt: skip
        assert reader.ids() == expected[0, size:].tolist()
