"""Tests text over tokens: streams yield exactly the decoded whole, and stops never leak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.sampling import cut
from tg_tinker.data.decoding import TextStream
from tg_tinker.data.text import encode_prompt, load_tokenizer, read_tokenizer
from tg_tinker.errors import InvalidRequestError

BROKEN = "\ufffd"
EOS = 258

words = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("ab 語漢é"),
        st.sampled_from(["\u0301", "\u200d", "\ufe0f", "👍", "🏽", "👩", "\U000e0001", BROKEN]),
    ),
    max_size=12,
)
quick = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """Returns a byte-level tokenizer: a character outside ASCII is two to four tokens."""
    return load_tokenizer(read_tokenizer(tiny_model))


class Pieces:
    """A tokenizer whose token i is the i-th of these texts, for any cut of a text into tokens."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    def decode(self, ids: list[int], **options: bool) -> str:
        return "".join(self._pieces[i] for i in ids)


def streamed(tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = ()) -> Iterator[str]:
    """Yields all pieces of a stream; the flushed piece is the last."""
    stream = TextStream(tokenizer, stops)
    for token_id in ids:
        yield stream.push(token_id)
    yield stream.flush()


def whole(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


# --- whole characters ------------------------------------------------------------------------


@quick
@given(text=words)
@example(text="naïve 語 👩🏽‍🚀 e\u0301 \u202eabc")
@example(text=BROKEN + "a" + BROKEN)
def test_a_stream_says_the_text_in_whole_characters(tokenizer: Any, text: str) -> None:
    pieces = list(streamed(tokenizer, tokenizer(text)["input_ids"]))
    assert "".join(pieces) == text
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in pieces)


@quick
@given(ids=st.lists(st.integers(0, 258), max_size=16))
@example(ids=[*range(120, 135)])
@example(ids=[0xE2] * 3)
def test_any_tokens_stream_as_they_decode_together(tokenizer: Any, ids: list[int]) -> None:
    """This includes bytes that are not UTF-8, and special tokens between them."""
    assert "".join(streamed(tokenizer, ids)) == whole(tokenizer, ids)


def test_a_character_comes_with_its_last_token_and_not_before(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer("a👍b")["input_ids"]
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "👍", "b"]
    assert stream.flush() == ""


def test_a_character_cut_off_by_the_token_limit_ends_as_it_decodes(tokenizer: Any) -> None:
    ids = tokenizer("a👍")["input_ids"][:-1]
    assert list(streamed(tokenizer, ids)) == ["a", "", "", "", BROKEN]


# In the alphabet of the tokenizer: the four bytes of one character, a letter, a special token.
F0, X9F, X98, X80, A = 172, 253, 246, 222, 64


@quick
@given(ids=st.lists(st.sampled_from([F0, X9F, X98, X80, A, EOS]), max_size=60))
@example(ids=[F0] * 30 + [X9F, X98, X80])
@example(ids=[X80] * 7 + [F0, X9F, X98, X80])
@example(ids=[A, *[EOS] * 30, F0, *[EOS] * 30, X9F, *[EOS] * 30, X98, X80])
def test_long_runs_without_a_character_stream_as_they_decode(
    tokenizer: Any, ids: list[int]
) -> None:
    assert tokenizer.decode([F0, X9F, X98, X80, A]) == "\N{GRINNING FACE}a"
    assert "".join(streamed(tokenizer, ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("piece", [BROKEN, ""], ids=["broken", "no text"])
def test_tokens_without_a_character_cost_no_more_the_more_there_are(piece: str) -> None:
    decoded = 0

    class Counted(Pieces):
        def decode(self, ids: list[int], **options: bool) -> str:
            nonlocal decoded
            decoded += len(ids)
            return super().decode(ids)

    count = 3000
    assert "".join(streamed(Counted([piece]), [0] * count)) == piece * count
    assert decoded < 100 * count


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    a, b = tokenizer("ab")["input_ids"]
    assert list(streamed(tokenizer, [a, EOS, b, EOS])) == ["a", "", "b", "", ""]


def test_an_empty_stream_is_empty(tokenizer: Any) -> None:
    assert list(streamed(tokenizer, [])) == [""]


def test_spaces_that_depend_on_the_tokens_before_are_kept() -> None:
    """The decoder drops the space before the first word, as those of SentencePiece models do."""

    class Spaced(Pieces):
        def decode(self, ids: list[int], **options: bool) -> str:
            return super().decode(ids).removeprefix(" ")

    pieces = Spaced([" the", " cat", "s", "", "", " sat"])
    assert list(streamed(pieces, range(6))) == ["the", " cat", "s", "", "", " sat", ""]


# --- stop sequences --------------------------------------------------------------------------


def cut_into(text: str, borders: set[int]) -> Pieces:
    edges = [0, *sorted(b for b in borders if 0 < b < len(text)), len(text)]
    return Pieces([text[a:b] for a, b in pairwise(edges)])


@quick
@given(
    st.text("abc", max_size=14),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.sets(st.integers(1, 13)),
)
@example("aaaab", ["aab"], {1, 2, 3, 4})
@example("abcd", ["abcd", "bc"], set())
@example("abcd", ["abcd", "bc"], {1, 2, 3})
@example("ababc", ["abc"], {2, 4})
def test_a_stream_ends_before_the_first_complete_stop_however_the_text_is_cut(
    text: str, stops: list[str], borders: set[int]
) -> None:
    tokenizer = cut_into(text, borders)
    count = len(tokenizer._pieces)
    assert "".join(streamed(tokenizer, range(count), stops)) == cut(text, stops)


@quick
@given(
    st.text("abc", max_size=14),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.sets(st.integers(1, 13)),
)
def test_what_is_out_is_never_part_of_a_stop_that_comes(
    text: str, stops: list[str], borders: set[int]
) -> None:
    """After every token, the text sent so far is certain, and nothing certain is held back."""
    tokenizer = cut_into(text, borders)
    stream, sent, read = TextStream(tokenizer, stops), "", ""
    for i, piece in enumerate(tokenizer._pieces):
        sent += stream.push(i)
        read += piece
        assert cut(text, stops).startswith(sent)
        if cut(read, stops) == read:  # no stop yet: held is what a stop may begin with
            held = read.removeprefix(sent)
            assert held == max(
                (read[at:] for at in range(len(read)) for s in stops if s.startswith(read[at:])),
                key=len, default="",
            )  # fmt: skip


@quick
@given(before=words, stop=words, after=words)
def test_a_stop_of_any_characters_is_found_across_their_tokens(
    tokenizer: Any, before: str, stop: str, after: str
) -> None:
    if not stop:
        return
    text = before + stop + after
    pieces = list(streamed(tokenizer, tokenizer(text)["input_ids"], [stop]))
    assert "".join(pieces) == text[: text.find(stop)]


def push_all(text: str, stops: Sequence[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(Pieces(text), stops)
    return [stream.push(i) for i in range(len(text))], stream


def test_overlapping_beginnings_of_a_stop_are_let_go_one_by_one() -> None:
    pieces, stream = push_all("aaaab", ["aab"])
    assert pieces == ["", "", "a", "a", ""]
    assert stream.stopped


def test_a_stop_at_the_very_end_is_cut() -> None:
    pieces, stream = push_all("answer.###", ["###"])
    assert "".join(pieces) == "answer."
    assert stream.stopped
    assert stream.flush() == ""


def test_a_stop_as_the_first_text_leaves_nothing() -> None:
    pieces, stream = push_all("###", ["###"])
    assert pieces == ["", "", ""]
    assert stream.stopped


def test_an_unfinished_stop_is_flushed() -> None:
    pieces, stream = push_all("answer.##", ["###"])
    assert "".join(pieces) == "answer."
    assert not stream.stopped
    assert stream.flush() == "##"


def test_a_stop_that_does_not_come_after_all_is_given_back() -> None:
    pieces, stream = push_all("a##b", ["###"])
    assert pieces == ["a", "", "", "##b"]
    assert not stream.stopped


def test_after_a_stop_nothing_more_is_said() -> None:
    pieces, stream = push_all("a.b.c", ["."])
    assert pieces == ["a", "", "", "", ""]
    assert stream.flush() == ""


def test_a_stop_that_only_the_flush_completes_is_cut(tokenizer: Any) -> None:
    """The last character is incomplete until the stream ends, and it is the stop."""
    ids = tokenizer("a👍")["input_ids"][:-1]
    stream = TextStream(tokenizer, [BROKEN])
    assert [stream.push(i) for i in ids] == ["a", "", "", ""]
    assert stream.flush() == ""
    assert stream.stopped


# --- prompts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starting(tiny_model: Path) -> Any:
    """Returns the same tokenizer, which puts the start token first by itself, as those of most
    models do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(read_tokenizer(tiny_model))
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def test_the_start_token_comes_once(starting: Any) -> None:
    bos, text = starting.bos_token_id, "hello"
    bare = encode_prompt(starting, text)
    assert bare == encode_prompt(starting, starting.bos_token + text)
    assert bare.count(bos) == 1
    assert bare[0] == bos


def test_a_chat_template_that_writes_the_start_token_does_not_double_it(starting: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = starting.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(starting.bos_token)
    bos = starting.bos_token_id
    assert starting(prompt)["input_ids"][:2] == [bos, bos], "the plain call doubles it"
    assert encode_prompt(starting, prompt) == starting(prompt)["input_ids"][1:]


def test_a_tokenizer_without_a_start_rule_adds_none(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "ab") == tokenizer("ab")["input_ids"]


def test_an_empty_prompt_is_the_start_token(tokenizer: Any, starting: Any) -> None:
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    assert encode_prompt(starting, "") == [starting.bos_token_id]


def test_an_empty_prompt_without_any_start_token_is_refused(tiny_model: Path) -> None:
    bare = load_tokenizer(read_tokenizer(tiny_model))
    bare.bos_token = None
    assert encode_prompt(bare, "a") == [*bare("a")["input_ids"]]
    with pytest.raises(InvalidRequestError, match="no tokens"):
        encode_prompt(bare, "")


# --- the files of a tokenizer ----------------------------------------------------------------


def test_a_tokenizer_travels_as_its_files_and_no_weights(tiny_model: Path, tokenizer: Any) -> None:
    files = read_tokenizer(tiny_model)
    assert "tokenizer.json" in files
    assert not any(name.endswith(".safetensors") for name in files)
    text = "naïve 👍"
    again = load_tokenizer(files)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    assert again.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
