"""Tests the text of tokens: what they continue, single tokens as bytes, and stops that are tokens.

`tests/sampling/test_text.py` tests streams and stop sequences.
"""

from __future__ import annotations

import pytest

from support.chat_models import KINDS, tokenizer
from tg_tinker.data.decoding import TextStream, split_stops, token_bytes
from tg_tinker.data.text import (
    ChatPrompt,
    encode_prompt,
    load_tokenizer,
    plain_tokens,
    tokens_after,
)
from tg_tinker.errors import InvalidRequestError

every_kind = pytest.mark.parametrize("kind", [*KINDS, "slow"])
LOSSLESS = ["byte-level BPE", "SentencePiece BPE", "slow"]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", ["The key is behind the boiler", "a  b", "naïve 🦦\n\n    x"])
def test_a_prompt_and_its_continuation_are_the_whole_text(kind: str, text: str) -> None:
    tok = tokenizer(kind, "zephyr")
    whole = encode_prompt(tok, text)
    for cut in range(1, len(whole)):
        stream = TextStream(tok, (), whole[:cut])
        rest = "".join(stream.push(i) for i in whole[cut:]) + stream.flush()
        before = tok.decode(whole[:cut], skip_special_tokens=True)
        if "\ufffd" not in before:
            assert before + rest == text


def test_a_stream_without_a_text_before_begins_without_a_space() -> None:
    tok = tokenizer("SentencePiece BPE", "llama 2")
    (first, *_) = tok("The key", add_special_tokens=False)["input_ids"]
    assert TextStream(tok).push(first).startswith("T")


@pytest.mark.parametrize("kind", LOSSLESS[:2])
def test_the_bytes_of_tokens_are_the_text(kind: str) -> None:
    tok, text = tokenizer(kind, "zephyr"), "Sure 🦦! naïve 語\n    return</s>"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tok, i) for i in ids).decode().lstrip(" ") == text


@every_kind
def test_the_bytes_of_a_word_keep_its_space(kind: str) -> None:
    tok = tokenizer(kind, "zephyr")
    ids = tok("Where is the key", add_special_tokens=False)["input_ids"]
    said = b"".join(token_bytes(tok, i) for i in ids).decode()
    assert said.strip() == "Where is the key"


@every_kind
def test_a_special_token_has_the_bytes_of_its_name(kind: str) -> None:
    tok = tokenizer(kind, "zephyr")
    assert token_bytes(tok, tok.convert_tokens_to_ids("</s>")) == b"</s>"


def test_a_token_outside_the_vocabulary_has_no_bytes() -> None:
    assert token_bytes(tokenizer("byte-level BPE", "zephyr"), 10**6) == b""


@every_kind
def test_a_stop_that_is_a_special_token_is_a_token(kind: str) -> None:
    tok = tokenizer(kind, "chatml with another eos")
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert split_stops(tok, ["x", "<|im_end|>", "y"]) == (("x", "y"), (end,))
    assert split_stops(tok, []) == ((), ())


@pytest.mark.parametrize("stop", ["<|im_end|>\n", " <|im_end|>", "<|im_end|><|im_start|>"])
def test_a_stop_that_contains_a_special_token_is_refused(stop: str) -> None:
    tok = tokenizer("byte-level BPE", "chatml with another eos")
    with pytest.raises(InvalidRequestError, match="special token"):
        split_stops(tok, [stop])


def test_a_stop_may_look_like_a_special_token() -> None:
    tok = tokenizer("byte-level BPE", "chatml")
    assert split_stops(tok, ["<|im_", "|>"]) == (("<|im_", "|>"), ())


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("rest", ["ey is", " is", "\n\nHere", "  x", ".", "a🦦", "1 2"])
def test_a_text_that_continues_another_gets_no_space_of_its_own(kind: str, rest: str) -> None:
    tok = tokenizer(kind, "zephyr")
    assert tok.decode([*plain_tokens(tok, "The k"), *tokens_after(tok, rest)]) == f"The k{rest}"


# --- prompts ------------------------------------------------------------------------------------


def test_what_a_tokenizer_adds_after_a_text_is_no_part_of_a_prompt() -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = tokenizer("byte-level BPE", "zephyr").backend_tokenizer
    ids = {text: core.token_to_id(text) for text in ("<s>", "</s>")}
    tok = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[*ids.items()]
    )
    plain = tok("key", add_special_tokens=False)["input_ids"]
    assert tok("key")["input_ids"] == [ids["<s>"], *plain, ids["</s>"]]
    assert encode_prompt(tok, "key") == [ids["<s>"], *plain]
    assert encode_prompt(tok, "<s>key") == [ids["<s>"], *plain]
    assert encode_prompt(tok, "") == [ids["<s>"]]


def test_two_tokens_before_every_text_come_once() -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = tokenizer("byte-level BPE", "glm 4").backend_tokenizer
    ids = {text: core.token_to_id(text) for text in ("[gMASK]", "<sop>")}
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[*ids.items()]
    )
    assert encode_prompt(tok, "key") == encode_prompt(tok, "[gMASK]<sop>key")
    assert encode_prompt(tok, "key")[:2] == [*ids.values()]


def test_a_chat_prompt_travels_with_its_tokens() -> None:
    import pickle

    prompt = ChatPrompt("a chat", [5, 6, 7])
    again = pickle.loads(pickle.dumps(prompt))  # noqa: S301
    assert (again, again.token_ids, type(again)) == ("a chat", (5, 6, 7), ChatPrompt)
    assert encode_prompt(tokenizer("byte-level BPE", "zephyr"), again) == [5, 6, 7]


def test_a_tokenizer_that_cannot_be_loaded_is_a_typed_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot be loaded .*save_pretrained") as caught:
        load_tokenizer({"tokenizer.json": b"{", "config.json": b"{}"})
    assert caught.value.__cause__ is None
