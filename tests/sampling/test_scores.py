"""Tests the scores of prompts: log-probabilities and alternatives at every place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.model import Base
from actors.sampling.engine import SlotEngine
from actors.sampling.text import Completions
from support.sampling import Reader, alone, finish
from tg_tinker import InvalidRequestError, NonFiniteError
from tg_tinker.data.text import load_tokenizer
from tg_tinker.sampling import SamplingParams

SCORES = SamplingParams(max_tokens=0, prompt_logprobs=True, top_logprobs=3)


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Base:
    return Base.load(str(tiny_model), cache=tmp_path)


def expected(base: Base, prompt: list[int]) -> torch.Tensor:
    """Returns log-probabilities at every place but the last, by a pass of the model: [T-1, V]."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return torch.log_softmax(logits, -1)[:-1]


def check(base: Base, reader: Reader, prompt: list[int]) -> None:
    token = reader.tokens[0]
    assert token.prompt is not None
    assert token.prompt_top is not None
    assert math.isnan(token.prompt[0])
    assert token.prompt_top[0] == ()
    rows = expected(base, prompt)
    said = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert list(token.prompt[1:]) == pytest.approx(said.tolist(), abs=1e-4)
    assert [top[0][0] for top in token.prompt_top[1:]] == rows.argmax(-1).tolist()
    for here, score, top in zip(prompt[1:], token.prompt[1:], token.prompt_top[1:], strict=True):
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert dict(top).get(here, score) == score  # to the bit
        assert score <= top[0][1]


@pytest.mark.parametrize("length", [2, 7, 100, 128])
@pytest.mark.parametrize("beside", [False, True])
def test_every_place_of_a_prompt_has_its_score_and_alternatives(
    base: Base, length: int, beside: bool
) -> None:
    """Beside a running sequence the engine reads a prompt in pieces of 64 tokens."""
    base.eos_ids = frozenset()
    engine, prompt = SlotEngine(base), [(7 * i) % 250 for i in range(length)]
    other = Reader([1, 2, 3], SamplingParams(max_tokens=60, temperature=0))
    if beside:
        engine.submit(other.request)
        engine.step()
    reader = Reader(prompt, SCORES)
    engine.submit(reader.request)
    finish(engine)
    check(base, reader, prompt)
    assert reader.ends == ["length"]
    assert [token.token_id for token in reader.tokens] == [-1]
    assert engine.load.free == 8
    if beside:
        assert other.ids() == alone(base, [1, 2, 3], other.request.params).ids()


def test_scores_come_with_the_first_draw_and_are_the_same(base: Base) -> None:
    prompt = [65, 66, 67, 68]
    drawn = alone(base, prompt, SamplingParams(4, 0.0, prompt_logprobs=True, top_logprobs=3))
    check(base, drawn, prompt)
    (scored,) = alone(base, prompt, SCORES).tokens
    assert scored.prompt_top == drawn.tokens[0].prompt_top
    assert all(token.prompt is token.prompt_top is None for token in drawn.tokens[1:])
    plain = alone(base, prompt, SamplingParams(4, 0.0))
    assert plain.ids() == drawn.ids()
    assert plain.tokens[0].prompt is plain.tokens[0].prompt_top is None
    (few,) = alone(base, prompt, SamplingParams(max_tokens=0, prompt_logprobs=True)).tokens
    assert few.prompt is not None
    assert few.prompt_top is None


def test_a_prompt_of_one_token_has_no_score(base: Base) -> None:
    (token,) = alone(base, [65], SCORES).tokens
    assert token.prompt is not None
    assert math.isnan(*token.prompt)
    assert token.prompt_top == ((),)


def test_every_completion_that_is_not_drawn_ends_and_frees_its_slot(base: Base) -> None:
    engine = SlotEngine(base)
    reader = Reader([65, 66], SamplingParams(0, num_completions=3, prompt_logprobs=True))
    engine.submit(reader.request)
    finish(engine)
    assert [(t.index, t.finish_reason) for t in reader.tokens] == [(i, "length") for i in range(3)]
    assert engine.idle
    assert engine.load.free == 8
    for keys, values in engine._slots._layers.values():
        assert not keys.any()
        assert not values.any()


def test_a_prompt_beyond_the_context_is_refused(base: Base) -> None:
    with pytest.raises(InvalidRequestError, match="129 tokens and max_tokens=0 exceed"):
        alone(base, [65] * 129, SCORES)


def test_scores_that_are_not_numbers_are_an_error(base: Base) -> None:
    with torch.no_grad():
        base.model.get_output_embeddings().weight[5] = float("nan")
    engine = SlotEngine(base)
    reader = Reader([65, 66, 67], SCORES)
    engine.submit(reader.request)
    finish(engine)
    assert [type(token.error) for token in reader.tokens] == [NonFiniteError]
    assert engine.idle
    assert engine.load.free == 8


def test_a_call_without_draws_is_one_empty_chunk_of_each_completion(base: Base) -> None:
    tokenizer, engine = load_tokenizer(base.tokenizer_files()), SlotEngine(base)
    call = Completions(tokenizer, ["abc", "xy"], SamplingParams(0, prompt_logprobs=True))
    engine.submit_all(call.requests)

    def chunks() -> Iterator[Any]:
        while call.open:
            engine.step()
            yield from call.take()

    found = [(c.index, c.text, c.token_ids, c.logprobs, c.finish_reason) for c in chunks()]
    assert sorted(found) == [(0, "", [], [], "length"), (1, "", [], [], "length")]
