"""Tests what answers say of single tokens: names, bytes, places in the text."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.sampling.requests import Token
from actors.sampling.text import Completions
from serve_app.http.openai import Answer, ChatBody, CompletionBody
from serve_app.http.tokens import Offsets, of
from support.models import make_pieces
from tg_tinker.data.decoding import token_bytes
from tg_tinker.data.text import load_tokenizer, read_tokenizer
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import StreamChunk

END = 258
quick = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """Returns a tokenizer of bytes: a character outside ASCII is two to four tokens."""
    return load_tokenizer(read_tokenizer(tiny_model))


@pytest.fixture(scope="module")
def pieces() -> Any:
    return make_pieces()


def chunks_of(
    tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = (), end: str = "length"
) -> list[StreamChunk]:
    """Returns the chunks in which these tokens reach a client; each token has two alternatives."""
    call = Completions(tokenizer, [[0]], SamplingParams(stop_sequences=tuple(stops)))
    found = []
    for place, token in enumerate(ids):
        top = ((token, -1.0), ((token + 1) % 256, -2.0))
        reason = end if place == len(ids) - 1 else None
        call.requests[0].deliver(Token(0, token, -1.0, top, finish_reason=reason))
        found += call.take()
    return found


def chat(tokenizer: Any, chunks: list[StreamChunk]) -> tuple[str, list[dict[str, Any]]]:
    messages: Any = [{"role": "user", "content": "x"}]
    body = ChatBody(model="base", messages=messages, logprobs=True, top_logprobs=2)
    (choice,) = Answer(body, tokenizer, [""], "v").whole([chunks], {})["choices"]
    return choice["message"]["content"], choice["logprobs"]["content"]


def completion(tokenizer: Any, chunks: list[StreamChunk], echo: str = "") -> dict[str, Any]:
    body = CompletionBody(model="base", prompt="x", logprobs=2)
    (choice,) = Answer(body, tokenizer, [echo], "v").whole([chunks], {})["choices"]
    return dict(choice)


# --- bytes and names -----------------------------------------------------------------------------


def test_the_bytes_of_the_tokens_of_a_character_join_to_it(tokenizer: Any) -> None:
    text = "Sure \N{OTTER}!"
    said, content = chat(tokenizer, chunks_of(tokenizer, tokenizer(text)["input_ids"]))
    assert said == text
    assert bytes(byte for one in content for byte in one["bytes"]) == text.encode()
    assert [one["token"] for one in content[-3:]] == ["bytes:\\xa6", "bytes:\\xa6", "!"]


@quick
@given(ids=st.lists(st.integers(0, END), min_size=1, max_size=16))
def test_joined_bytes_are_the_text_whatever_is_drawn(tokenizer: Any, ids: list[int]) -> None:
    said, content = chat(tokenizer, chunks_of(tokenizer, ids))
    joined = b"".join(bytes(one["bytes"] or ()) for one in content)
    assert joined.decode("utf-8", "replace") == said
    assert [one["bytes"] is None for one in content] == [token > 255 for token in ids]


def test_the_end_of_a_text_has_a_name_and_no_bytes(tokenizer: Any) -> None:
    said, content = chat(tokenizer, chunks_of(tokenizer, [65, END], end="eos"))
    assert len(said) == 1
    assert (content[1]["token"], content[1]["bytes"]) == ("<|im_end|>", None)


def test_alternatives_that_are_parts_of_characters_keep_apart(tokenizer: Any) -> None:
    ids = tokenizer("\N{OTTER}\N{GRINNING FACE}")["input_ids"]
    top = tuple((token, -1.0 - place) for place, token in enumerate(dict.fromkeys(ids)))
    chunk = StreamChunk(
        text="", token_ids=[ids[0]], logprobs=[-1.0], top_logprobs=[top], finish_reason="length"
    )
    found = completion(tokenizer, [chunk])["logprobs"]["top_logprobs"][0]
    assert [*found.values()] == [value for _, value in top]
    assert {*found} == {f"bytes:\\x{token_bytes(tokenizer, token).hex()}" for token, _ in top}


def test_tokens_of_one_text_go_by_their_numbers(pieces: Any) -> None:
    """`a` is also a byte token, and one id is beyond the tokenizer, as models are padded."""
    letter, byte, beyond = 4, 7 + ord("a"), 263
    found = of(pieces).by_name([(letter, -1.0), (byte, -2.0), (beyond, -3.0)])
    assert found == {"a": -1.0, f"token_id:{byte}": -2.0, f"token_id:{beyond}": -3.0}


def test_a_drawn_token_is_among_its_alternatives(tokenizer: Any) -> None:
    top = ((66, -0.1), (67, -3.0))
    chunk = StreamChunk(
        text="", token_ids=[65, 66], logprobs=[-9.0, -0.1], top_logprobs=[top, top],
        finish_reason="length",
    )  # fmt: skip
    names = [of(tokenizer).name_of(token) for token in (66, 67, 65)]
    first, second = completion(tokenizer, [chunk])["logprobs"]["top_logprobs"]
    assert first == dict(zip(names, (-0.1, -3.0, -9.0), strict=True))
    assert second == dict(zip(names[:2], (-0.1, -3.0), strict=True))


@pytest.mark.parametrize("text", ["a b", " a", "a \N{OTTER} b", "aa  a"])
def test_sentencepiece_tokens_keep_their_spaces(pieces: Any, text: str) -> None:
    ids = pieces(text, add_special_tokens=False)["input_ids"]
    joined = b"".join(token_bytes(pieces, token) for token in ids)
    assert joined.decode() == f" {text}"
    assert of(pieces).name_of(6) == " a"


# --- places --------------------------------------------------------------------------------------


def starts(parts: Sequence[bytes]) -> list[int]:
    """Returns where each part begins, by the obvious way: how many characters end before it."""
    broken: dict[int, int] = {}

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        broken[error.start] = error.end
        return "\ufffd", error.end

    codecs.register_error("note", note)
    ends, at = [], 0
    for char in b"".join(parts).decode("utf-8", "note"):
        at = broken[at] if at in broken else at + len(char.encode())
        ends.append(at)
    begins = [sum(map(len, parts[:place])) for place in range(len(parts))]
    return [sum(end <= begin for end in ends) for begin in begins]


@quick
@given(parts=st.lists(st.binary(min_size=1, max_size=3), max_size=12))
@example(parts=[b"\xed", b"\xa0"])
@example(parts=[b"\xed\xa0", b"\x80", b"a"])
@example(parts=[b"\xf4", b"\x90\x80", b"\x80"])
def test_places_are_counted_in_characters(parts: list[bytes]) -> None:
    offsets = Offsets()
    assert [offsets.push(part) for part in parts] == starts(parts)


@quick
@given(
    text=st.text(st.sampled_from("ab \u00e9\u8a9e\N{OTTER}#"), min_size=1, max_size=12),
    stop=st.sampled_from(["", "#", "##", "a#b"]),
)
def test_a_place_is_where_the_token_is_in_the_text(tokenizer: Any, text: str, stop: str) -> None:
    ids = tokenizer(text)["input_ids"]
    chunks = chunks_of(tokenizer, ids, [stop] if stop else [])
    choice = completion(tokenizer, chunks, echo="said: ")
    said, found = choice["text"], choice["logprobs"]
    assert said == "said: " + (text[: text.find(stop)] if stop and stop in text else text)
    assert (
        len(found["text_offset"]) == len(found["tokens"]) == sum(len(c.token_ids) for c in chunks)
    )
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert 6 <= place <= len(said)
        if place < len(said) and not token.startswith("bytes:"):
            assert said[place:].startswith(token)


def test_a_stream_says_the_same_of_its_tokens_as_the_whole_answer(tokenizer: Any) -> None:
    ids = [*tokenizer("a\N{OTTER} ##b")["input_ids"], END]
    body = CompletionBody(model="base", prompt="x", logprobs=2, echo=True)
    chunks = chunks_of(tokenizer, ids, ["###"], end="eos")
    assert len(chunks) > 4
    (whole,) = Answer(body, tokenizer, ["x"], "v").whole([chunks], {})["choices"]
    answer = Answer(body, tokenizer, ["x"], "v")
    events = [answer.event(chunk)["choices"][0] for chunk in chunks]
    for name, values in whole["logprobs"].items():
        assert [v for event in events for v in event["logprobs"][name]] == values
    assert "".join(event["text"] for event in events) == whole["text"]
    assert whole["logprobs"]["text_offset"] == [1, 2, 2, 2, 2, 3, 4, 5, 6, 7]
    json.dumps(whole)
