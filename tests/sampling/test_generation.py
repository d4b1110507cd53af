"""Tests drawing tokens and turning them into text, without Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.engine.session import Session
from actors.sampling.drawing import draw, penalized, uniform
from actors.sampling.engine import SlotEngine
from actors.sampling.grammar import Grammars
from actors.sampling.requests import Token, TokenRequest
from actors.sampling.text import Completions, join
from support import chat_models
from support.fakes import make_tokenizer
from support.helpers import examples, session
from support.sampling import cut
from tg_tinker import InvalidRequestError, OptimizerConfig
from tg_tinker.data.chat import render_prompt
from tg_tinker.data.text import encode_prompt, load_tokenizer
from tg_tinker.sampling import SamplingParams, check_prompts
from tg_tinker.types import Sample, StreamChunk

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


@pytest.fixture(scope="module")
def trained(tiny_model: Path) -> Session:
    s = session(tiny_model, optimizer=OptimizerConfig(learning_rate=0.05))
    for _ in range(3):
        s.forward_backward(examples())
        s.optim_step()
    return s


@pytest.fixture(scope="module")
def tokenizer(trained: Session) -> Any:
    return load_tokenizer(trained.base.tokenizer_files())


def run(engine: SlotEngine, prompts: list[list[int]], params: SamplingParams) -> list[list[Token]]:
    """Returns the tokens of each completion of each prompt, prompt by prompt."""
    count = params.num_completions
    found: list[list[Token]] = [[] for _ in range(count * len(prompts))]
    for i, prompt in enumerate(prompts):
        engine.submit(
            TokenRequest(
                prompt, params, lambda token, i=i: found[count * i + token.index].append(token), i
            )
        )
    while engine.step():
        pass
    return found


def stream_chunks(
    engine: Any, tokenizer: Any, prompts: list[str], params: SamplingParams, version: str = ""
) -> Iterator[StreamChunk]:
    """Yields the chunks as the replica does, in one thread."""
    call = Completions(tokenizer, prompts, params, version)
    engine.submit_all(call.requests)
    while call.open:
        engine.step()
        yield from call.take()
        for stopped in call.stopped():
            engine.cancel(*stopped)


def sample(engine: Any, tokenizer: Any, prompts: list[str], params: SamplingParams) -> list[Sample]:
    chunks = stream_chunks(engine, tokenizer, prompts, params)
    return join(prompts, params.num_completions, [(chunk, 0.0) for chunk in chunks])


def ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def generated(of: Session, prompts: list[list[int]], params: SamplingParams) -> list[list[Token]]:
    return run(SlotEngine(of.base), prompts, params)


def test_greedy_equals_generate_token_for_token(trained: Session) -> None:
    prompts = [[65, 66, 67], [70], [80, 81, 82, 83, 84, 85]]
    ours = generated(trained, prompts, GREEDY)
    for prompt, row in zip(prompts, ours, strict=True):
        expected = trained.base.model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=256
        )
        assert ids(row) == expected[0, len(prompt) :].tolist()


def test_logprobs_are_the_models_own(trained: Session) -> None:
    prompt = [65, 66, 67]
    params = SamplingParams(max_tokens=6, temperature=0.7, top_k=5, repetition_penalty=1.3)
    (row,) = generated(trained, [prompt], params)
    whole = torch.tensor([prompt + ids(row)])
    with torch.no_grad():
        mask = torch.ones_like(whole)
        logits = trained.base.model(input_ids=whole, attention_mask=mask).logits
    expected = torch.log_softmax(logits[0, 2:-1], -1).gather(1, whole[0, 3:, None])[:, 0]
    assert [token.logprob for token in row] == pytest.approx(expected.tolist(), abs=1e-4)


def test_completions_of_one_prompt_differ_and_come_in_order(
    trained: Session, tokenizer: Any
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, num_completions=3)
    samples = sample(SlotEngine(trained.base), tokenizer, ["ab", "xy"], params)
    assert [s.prompt for s in samples] == ["ab"] * 3 + ["xy"] * 3
    assert len({tuple(s.token_ids) for s in samples}) == 6


def test_more_completions_than_slots_are_cut_into_requests(
    trained: Session, tokenizer: Any
) -> None:
    params = SamplingParams(max_tokens=5, temperature=1.5, num_completions=19, seed=2)
    samples = sample(SlotEngine(trained.base), tokenizer, ["ab"], params)
    assert len({tuple(s.token_ids) for s in samples}) > 15
    few = SamplingParams(max_tokens=5, temperature=1.5, num_completions=2, seed=2)
    again = sample(SlotEngine(trained.base), tokenizer, ["ab"], few)
    assert [s.token_ids for s in again] == [s.token_ids for s in samples[:2]]


def test_top_k_1_and_tiny_top_p_are_greedy(trained: Session) -> None:
    (greedy,) = generated(trained, [[65, 66]], GREEDY)
    for params in (
        SamplingParams(max_tokens=20, temperature=2.0, top_k=1),
        SamplingParams(max_tokens=20, temperature=1.0, top_p=1e-6),
    ):
        assert ids(generated(trained, [[65, 66]], params)[0]) == ids(greedy)


def draws(logits: list[float], params: SamplingParams, count: int = 5_000) -> torch.Tensor:
    """Returns the frequencies of tokens over many draws."""
    scores = torch.tensor(logits)
    drawn = [draw(scores, params, uniform(0, 0, 0, step)) for step in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_draws_follow_softmax_at_the_temperature() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(torch.tensor(logits) / temperature, -1)
        found = draws(logits, SamplingParams(temperature=temperature))
        assert torch.allclose(found, expected, atol=0.03)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        found = draws(logits, SamplingParams(top_p=top_p))
        assert int((found > 0).sum()) == kept, top_p


def test_top_k_keeps_k_tokens() -> None:
    found = draws([1.0, 3.0, 2.0, 0.0], SamplingParams(top_k=2))
    assert (found > 0).tolist() == [False, True, True, False]
    ties = draws([1.0, 1.0, 1.0], SamplingParams(top_k=1))
    assert int((ties > 0).sum()) == 1


def test_the_smallest_temperature_is_greedy_not_nan() -> None:
    found = draws([1.0, 3.0, 2.0], SamplingParams(temperature=1e-45), count=10)
    assert found.tolist() == [0, 1, 0]


def test_top_p_is_applied_to_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    found = draws(logits, SamplingParams(top_k=2, top_p=0.55))  # 0.4 / 0.7 = 0.57
    assert (found > 0).tolist() == [True, False, False, False]


def test_min_p_keeps_the_tokens_near_the_most_probable_one() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    for min_p, kept in ((0, 4), (0.09, 4), (0.11, 3), (0.29, 3), (0.31, 2), (0.61, 1), (1, 1)):
        for others in ({}, {"top_k": 4}, {"top_p": 0.9999}, {"top_k": 3, "top_p": 0.9999}):
            most = min(kept, others.get("top_k", 4))  # type: ignore[call-overload]
            params = SamplingParams(min_p=min_p, **others)  # type: ignore[arg-type]
            found = draws(logits, params, count=500)
            assert int((found > 0).sum()) == most, (min_p, others)
    cold = draws(logits, SamplingParams(min_p=0.3, temperature=0.5))  # 0.09 to 0.25 is 0.36
    assert (cold > 0).tolist() == [False, True, False, True]


def test_a_logit_bias_is_added_before_everything_else() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    params = SamplingParams(logit_bias={1: 3, 2: -0.5}, repetition_penalty=2.0)
    found = penalized(logits, [1], [2], params)
    assert found.tolist() == pytest.approx([2.0, 0.5, 0.25, 0.5])
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5]


def test_a_logit_bias_forces_and_bans_tokens_and_leaves_logprobs_alone(trained: Session) -> None:
    (plain,) = generated(trained, [[65, 66]], GREEDY)
    forced = SamplingParams(max_tokens=4, temperature=0.0, logit_bias={90: 100})
    (row,) = generated(trained, [[65, 66]], forced)
    assert ids(row) == [90] * 4
    assert row[0].logprob < plain[0].logprob
    first = ids(plain)[0]
    without = SamplingParams(max_tokens=20, temperature=1.0, logit_bias={first: -100}, seed=1)
    assert first not in ids(generated(trained, [[65, 66]], without)[0])
    (again,) = generated(trained, [[65, 66]], GREEDY)
    assert ids(again) == ids(plain)


def test_a_logit_bias_outside_the_vocabulary_is_refused(trained: Session) -> None:
    with pytest.raises(InvalidRequestError, match=r"logit_bias has a token outside \[0, 259\)"):
        generated(trained, [[65]], SamplingParams(8, logit_bias={1: 1, 259: 1}))


def test_without_the_library_a_schema_is_refused_with_what_to_install(
    trained: Session, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(tokenizer, trained.base.vocab_size, trained.base.eos_ids)
    with pytest.raises(InvalidRequestError, match=r"install 'tg-tinker\[structured\]'"):
        grammars.compiled({"type": "object"})


def test_draws_with_a_seed_are_those_of_the_first_release(trained: Session) -> None:
    """Users have kept the seeds of their results."""
    scores = torch.arange(50).float().mul(0.7).sin().mul(3)
    for values, expected in (
        ({}, [12, 39, 27, 29, 29, 38, 37, 47, 12, 48]),
        ({"temperature": 0.7, "top_p": 0.9}, [20, 30, 2, 2, 3, 21, 21, 46, 20, 19]),
        ({"top_k": 9}, [29, 3, 20, 11, 11, 2, 2, 12, 29, 21]),
        ({"top_k": 9, "top_p": 0.6, "temperature": 1.3}, [38, 20, 29, 29, 29, 20, 20, 11, 38, 11]),
    ):
        params = SamplingParams(**values)  # type: ignore[arg-type]
        found = [draw(scores, params, uniform(7, 0, 0, step)) for step in range(10)]
        assert found == expected


def test_penalties_are_those_of_their_definitions() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = penalized(logits, [0, 1], [2, 2, 3], params)
    assert found.tolist() == pytest.approx([2.0, -2.0, 1 - 0.5 - 0.5, 0.5 - 0.75, 0.0])
    params = SamplingParams(repetition_penalty=2.0)
    found = penalized(logits, [0, 1], [2, 2, 3], params)
    assert found.tolist() == pytest.approx([1.0, -4.0, 0.5, 0.25, 0.0])
    assert logits[0] == 2.0


def test_repetition_penalty_equals_transformers(trained: Session) -> None:
    prompt = [65, 66, 65, 66]
    params = SamplingParams(max_tokens=15, temperature=0.0, repetition_penalty=1.5)
    expected = trained.base.model.generate(
        torch.tensor([prompt]), max_new_tokens=15, do_sample=False, pad_token_id=256,
        repetition_penalty=1.5,
    )  # fmt: skip
    assert ids(generated(trained, [prompt], params)[0]) == expected[0, 4:].tolist()


class Script(SlotEngine):
    """An engine that returns given tokens, one per step for every request."""

    def __init__(self, *texts: list[int], eos: int | None = None) -> None:
        self.texts = texts
        self.eos = eos
        self.steps = 0
        self.open: list[TokenRequest] = []

    def submit_all(self, requests: Sequence[TokenRequest]) -> None:
        self.open = [*requests]

    def step(self) -> bool:
        for request in [*self.open]:
            script = self.texts[request.number]
            token, size = script[self.steps], min(request.params.max_tokens, len(script))
            end = {self.eos: "eos"}.get(token, "length" if self.steps + 1 == size else None)
            if end is not None:
                self.open.remove(request)
            request.deliver(Token(0, token, -1.0, finish_reason=end))
        self.steps += 1
        return bool(self.open)

    def cancel(self, request: TokenRequest, index: int | None = None) -> None:
        if request in self.open:
            self.open.remove(request)


def test_stop_sequence_over_tokens_ends_one_row_and_is_not_emitted(tokenizer: Any) -> None:
    script = Script(tokenizer("Ende: STOP und mehr")["input_ids"], tokenizer("kurz")["input_ids"])
    params = SamplingParams(stop_sequences=("STOP", "nie"))
    chunks = list(stream_chunks(script, tokenizer, ["a", "b"], params))
    texts = ["".join(c.text for c in chunks if c.index == i) for i in (0, 1)]
    assert texts == ["Ende: ", "kurz"]
    ends = {c.index: c.finish_reason for c in chunks if c.finish_reason}
    assert ends == {0: "stop", 1: "length"}
    assert script.steps == len("Ende: STOP")
    assert not any("S" in c.text for c in chunks)


def test_stop_sequences_are_bounded_together() -> None:
    assert SamplingParams(stop_sequences=("a" * 2048, "b" * 2048))
    with pytest.raises(InvalidRequestError, match="more than 4096 characters"):
        SamplingParams(stop_sequences=("a" * 2048, "b" * 2049))


def test_an_unfinished_stop_sequence_is_text(tokenizer: Any) -> None:
    script = Script(tokenizer("am Ende STO")["input_ids"])
    (one,) = sample(script, tokenizer, ["a"], SamplingParams(stop_sequences=("STOP",)))
    assert one.completion == "am Ende STO"
    assert one.finish_reason == "length"


def test_chunks_hold_whole_characters(tokenizer: Any) -> None:
    text = "Grüße 🙂 日本"
    script = Script(tokenizer(text)["input_ids"])
    chunks = list(stream_chunks(script, tokenizer, ["a"], SamplingParams()))
    assert "".join(c.text for c in chunks) == text
    assert not any("\ufffd" in c.text for c in chunks)
    assert [t for c in chunks for t in c.token_ids] == tokenizer(text)["input_ids"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.lists(st.integers(0, 258), min_size=1, max_size=24), min_size=1, max_size=3),
    st.lists(st.text("ab\u00e9\u65e5\U0001f642 ", min_size=1, max_size=3), max_size=2),
    st.data(),
)
def test_the_streaming_law(
    tokenizer: Any, scripts: list[list[int]], stops: list[str], data: st.DataObject
) -> None:
    """The joined chunks equal the answer without streaming, and equal all tokens decoded and cut
    at the first stop.

    This holds for any bytes, whole characters or not, for special tokens, and for stops taken from
    the text itself.
    """
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in scripts]
    if texts[0]:
        start = data.draw(st.integers(0, len(texts[0]) - 1))
        stops = [*stops, texts[0][start : start + data.draw(st.integers(1, 4))]]
    params = SamplingParams(stop_sequences=tuple(stops))
    prompts = ["a"] * len(scripts)
    chunks = [*stream_chunks(Script(*scripts), tokenizer, prompts, params)]
    whole = sample(Script(*scripts), tokenizer, prompts, params)
    for i, text in enumerate(texts):
        expected = cut(text, stops)
        ends = any(stop in text for stop in stops)
        mine = [chunk for chunk in chunks if chunk.index == i]
        assert "".join(chunk.text for chunk in mine) == whole[i].completion == expected
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop" if ends else "length"]
        drawn = [token for chunk in mine for token in chunk.token_ids]
        assert drawn == scripts[i][: len(drawn)]


def test_eos_is_a_token_but_not_text(tokenizer: Any) -> None:
    script = Script([*tokenizer("ja")["input_ids"], 258, 65], eos=258)
    (one,) = sample(script, tokenizer, ["a"], SamplingParams())
    assert (one.completion, one.finish_reason, one.num_tokens) == ("ja", "eos", 3)


def test_the_token_that_ends_an_answer_is_no_text_where_the_tokenizer_shows_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end>"])  # An added token that is not special, as in some models.
    end = tokenizer.convert_tokens_to_ids("<end>")
    script = Script([*tokenizer("ja")["input_ids"], end], eos=end)
    (one,) = sample(script, tokenizer, ["a"], SamplingParams())
    assert (one.completion, one.finish_reason, one.num_tokens) == ("ja", "eos", 3)


def test_a_stop_that_is_a_special_token_becomes_a_stop_token(tokenizer: Any) -> None:
    stops = SamplingParams(stop_sequences=("<|im_start|>", "x"), stop_token_ids=(65,))
    (request,) = Completions(tokenizer, ["a"], stops).requests
    assert request.params.stop_token_ids == (65, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    with pytest.raises(InvalidRequestError, match="special token"):
        Completions(tokenizer, ["a"], SamplingParams(stop_sequences=("<|im_start|>x",)))


def test_a_completion_continues_the_text_of_its_prompt_but_not_of_a_chat() -> None:
    tokenizer = chat_models.tokenizer("SentencePiece BPE", "llama 2")
    ids = tokenizer("The key is", add_special_tokens=False)["input_ids"]
    (one,) = sample(Script(ids), tokenizer, ["Where?"], SamplingParams())
    assert one.completion == " The key is"
    prompt = render_prompt(tokenizer, "Where?")
    (one,) = sample(Script(ids), tokenizer, [prompt], SamplingParams())
    assert one.completion == "The key is"


def test_real_engine_reports_eos(trained: Session) -> None:
    (row,) = generated(trained, [[65, 66]], SamplingParams(max_tokens=10, temperature=0.0))
    engine = SlotEngine(trained.base)
    ends = trained.base.eos_ids
    trained.base.eos_ids = frozenset([ids(row)[2]])
    try:
        (again,) = run(engine, [[65, 66]], GREEDY)
    finally:
        trained.base.eos_ids = ends
    first = ids(row).index(ids(row)[2])
    assert again[-1].finish_reason == "eos"
    assert ids(again) == ids(row)[: first + 1]


def test_a_prompt_past_the_context_is_refused_with_the_room_left(
    trained: Session, tokenizer: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="at most 118 max_tokens"):
        sample(SlotEngine(trained.base), tokenizer, ["x" * 10], SamplingParams(max_tokens=119))


def test_sampling_draws_anew_each_time(trained: Session, tokenizer: Any) -> None:
    torch.manual_seed(0)
    first = sample(SlotEngine(trained.base), tokenizer, ["a"], SamplingParams(max_tokens=20))
    torch.manual_seed(0)
    second = sample(SlotEngine(trained.base), tokenizer, ["a"], SamplingParams(max_tokens=20))
    assert first[0].token_ids != second[0].token_ids


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"max_tokens": -1, "prompt_logprobs": True},
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0},
        {"top_p": 1.1}, {"top_k": 0}, {"num_completions": 0}, {"repetition_penalty": 0},
        {"presence_penalty": 2.5}, {"frequency_penalty": -2.5}, {"stop_sequences": ("",)},
        {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": float("nan")}, {"logit_bias": [5]},
        {"logit_bias": {5: 101}}, {"logit_bias": {5: float("nan")}}, {"logit_bias": {-1: 1}},
        {"logit_bias": {"5": 1}}, {"logit_bias": {5: "1"}}, {"logit_bias": {True: 1}},
        {"logit_bias": dict.fromkeys(range(1025), 1)},
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("prompts", [[], [1], 5, [["a"]]])
def test_prompts_that_are_no_text_are_refused(prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompts"):
        check_prompts(prompts)


def test_a_prompt_that_starts_with_the_start_token_gets_no_second(tokenizer: Any) -> None:
    start = tokenizer.bos_token_id
    assert encode_prompt(tokenizer, "<|im_start|>a").count(start) == 1
    assert encode_prompt(tokenizer, "") == [start]
