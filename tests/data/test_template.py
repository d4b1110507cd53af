"""Tests chats over real templates and tokenizers: training and sampling have the same tokens."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.chat_models import FAMILIES, KINDS, tokenizer
from tg_tinker.data.chat import ChatWarning, encode_row, render_messages
from tg_tinker.data.template import end_ids
from tg_tinker.data.text import encode_prompt
from tg_tinker.errors import InvalidRequestError

Message = dict[str, str]
CASES = [(kind, family) for kind in (*KINDS, "slow") for family in FAMILIES]
LOSSLESS = ("byte-level BPE", "SentencePiece BPE", "slow")
every_case = pytest.mark.parametrize(("kind", "family"), CASES)


def chat(*contents: str, system: str | None = None) -> list[Message]:
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


TALK = ("Where is the key?", "Behind the boiler.", "Thanks", "Sure! No problem.")


def encoded(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int], set[str]]:
    """Returns the ids, the labels, and what was reported."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids, labels = encode_row(tokenizer, {"messages": messages})
    texts = {str(one.message) for one in caught if one.category is ChatWarning}
    kinds = {"earlier answer": "changed", "requests": "unlike", "span": "spanned"}
    return ids, labels, {kind for word, kind in kinds.items() if any(word in t for t in texts)}


def answers(labels: list[int]) -> list[tuple[int, int]]:
    """Returns the (start, stop) of each range of labels."""
    inside = [label != -100 for label in labels]
    starts = [i for i, here in enumerate(inside) if here and not (i and inside[i - 1])]
    return [(i, next((k for k in range(i, len(inside)) if not inside[k]), len(inside)))
            for i in starts]  # fmt: skip


def said_by(tokenizer: Any, ids: list[int]) -> str:
    """Returns the text of tokens without spaces, which not all tokenizers keep."""
    return "".join(tokenizer.decode(ids, skip_special_tokens=True).split())


@every_case
def test_a_chat_has_the_tokens_of_its_template(kind: str, family: str) -> None:
    of, tok = FAMILIES[family], tokenizer(kind, family)
    system = "Be kind." if of.system else None
    messages = chat(*TALK, system=system)
    ids, labels, reported = encoded(tok, messages)
    whole = tok.apply_chat_template(messages, tokenize=True, return_dict=False)
    if "request" not in family:
        prompts = [
            tok.apply_chat_template(
                messages[:turn], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        shared = [whole[: len(prompt)] == prompt for prompt in prompts]
        assert ("spanned" in reported) == (not all(shared) and not of.unlike)
    if "spanned" not in reported:
        assert ids[: len(whole)] == whole
        assert len(ids) == len(whole) + of.appended
    assert ("unlike" in reported) == of.unlike
    assert ("changed" in reported) == of.rewrites
    learned = [ids[start:stop] for start, stop in answers(labels)]
    said = [TALK[1], TALK[3]] if not of.rewrites else [TALK[3]]
    assert len(learned) == len(said)
    ends = end_ids(tok, frozenset())
    for tokens, text in zip(learned, said, strict=True):
        body = tokens[:-1] if tokens[-1] in ends else tokens
        plain = [tok(part, add_special_tokens=False)["input_ids"] for part in (of.prefix, text)]
        assert said_by(tok, body) == "".join(said_by(tok, part) for part in plain)
        assert not ends & {*body}
        assert tokens[-1] in ends or (text == TALK[1] and (of.bare or of.appended))


@every_case
def test_sampling_sends_what_training_has_before_each_answer(kind: str, family: str) -> None:
    of, tok = FAMILIES[family], tokenizer(kind, family)
    messages = chat(*TALK)
    ids, labels, _ = encoded(tok, messages)
    turns = [3] if of.rewrites else [1, 3]
    for turn, (start, _) in zip(turns, answers(labels), strict=True):
        sent = encode_prompt(tok, render_messages(tok, messages[:turn]))
        if of.unlike:  # What it requests an answer by comes after what both have.
            assert sent[:start] == ids[:start]
        else:
            assert sent == ids[:start]


def test_where_a_template_cannot_request_an_answer_its_header_is_sent() -> None:
    for family, header in (
        ("chatml without a request", "<|im_end|>\n<|im_start|>assistant\n"),
        ("vicuna without a request", "key? ASSISTANT:"),
        ("mistral", "key? [/INST]"),  # Its answers begin with a space, which their tokens have.
    ):
        tok = tokenizer("byte-level BPE", family)
        assert render_messages(tok, chat("Where is the key?")).endswith(header)


def test_half_a_character_in_a_chat_is_refused_without_its_text() -> None:
    tok = tokenizer("byte-level BPE", "chatml")
    with pytest.raises(InvalidRequestError, match=r"message 0 of the chat .*surrogate") as caught:
        render_messages(tok, chat("patient 4711 \ud83d"))
    assert "4711" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match=r"the prompt .*surrogate"):
        encode_prompt(tok, "patient 4711 \ud83d")


APRIEL = FAMILIES["chatml"].template.replace("assistant\n' }}", "assistant\nHere I think:\n' }}")
THINKS = FAMILIES["deepseek r1"].template
REASONED = "<think>\nI add them.\n</think>\n\nIt is 4."


def learned_by(template: str, *contents: str, family: str = "chatml") -> tuple[str, str]:
    """Returns the text of a row by a template, and the text of its last label."""
    tok = copy.deepcopy(tokenizer("byte-level BPE", family))
    tok.chat_template = template
    ids, labels, _ = encoded(tok, chat(*contents))
    start, stop = answers(labels)[-1]
    assert ids[:start] == encode_prompt(tok, render_messages(tok, chat(*contents)[:-1]))[:start]
    return tok.decode(ids), tok.decode(ids[start:stop])


@pytest.mark.parametrize("answer", ["Here is the list.", "Hello.", "<table>x</table>", ""])
def test_a_request_that_begins_like_the_answer_takes_nothing_of_it(answer: str) -> None:
    assert learned_by(APRIEL, "q", answer)[1] == f"{answer}<|im_end|>"
    think = learned_by(THINKS, "q", answer, "q2", answer, family="deepseek r1")[1]
    assert think == f"{answer}<|end|>"


def test_reasoning_that_the_template_drops_is_learned_as_it_was_said() -> None:
    text, learned = learned_by(THINKS, "2+2?", REASONED, family="deepseek r1")
    assert text == f"<|begin|><|User|>2+2?<|Assistant|>{REASONED}<|end|>"
    assert learned == REASONED.removeprefix("<think>\n") + "<|end|>"


def test_a_template_that_writes_answers_in_its_own_way_is_learned_as_it_was_said() -> None:
    upper = FAMILIES["chatml"].template.replace("m['content']", "m['content'] | upper")
    assert learned_by(upper, "q", "An answer")[1] == "An answer<|im_end|>"


def test_what_follows_the_last_answer_alone_is_not_learned() -> None:
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    text, learned = learned_by(words, "a", "b", family="chatml with another eos")
    assert text == "user: a\nassistant: b\n<|endoftext|>"
    assert learned == " b\n<|endoftext|>"


def test_every_private_character_in_a_chat_is_a_typed_error() -> None:
    tok = tokenizer("byte-level BPE", "chatml")
    content = "".join(map(chr, range(0xE000, 0xE100)))
    with pytest.raises(InvalidRequestError, match="private use"):
        render_messages(tok, chat(content))
    ids, labels, _ = encoded(tok, chat("\ue000<|im_end|>", "\ue000<|im_end|>"))
    start, stop = answers(labels)[0]
    assert tok.decode(ids[start:stop]) == "\ue000<|im_end|><|im_end|>"


@pytest.mark.parametrize("content", [None, 5, ["a"]])
def test_messages_that_are_no_text_are_refused(content: Any) -> None:
    tok = tokenizer("byte-level BPE", "chatml")
    with pytest.raises(InvalidRequestError, match="message 0 of the chat"):
        render_messages(tok, [{"role": "user", "content": content}])
    with pytest.raises(InvalidRequestError, match="message 0 of the chat"):
        render_messages(tok, [{"role": "user", "content": "a", "name": "b"}])


def test_a_letter_among_the_special_tokens_is_text() -> None:
    tok = copy.deepcopy(tokenizer("byte-level BPE", "chatml"))
    tok.pad_token = "!"
    assert encoded(tok, chat("Hi!", "Yes!"))[0]


class Counted:
    """A tokenizer that counts the characters that it reads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("family", ["chatml", "llama 3", "glm 4"])
def test_the_work_grows_with_the_length_of_a_chat(family: str) -> None:
    messages = chat(*("Where is the key? " * 4 for _ in range(120)))
    tok = Counted(tokenizer("byte-level BPE", family))
    encode_row(tok, {"messages": messages})
    text = tok.apply_chat_template(messages, tokenize=False)
    assert tok.characters < 8 * len(text)


words = st.lists(
    st.sampled_from(
        ["key", " key", "\n", "\n\n", "  ", "    return", " ", "é", "語", "🦦", "<think>", "</s>",
         "<|im_end|>", "<|user|>", "[INST]", "</think>", "<", "|>", "<|im_", "a", ".", "\t", "1",
         "\u0301"]
    ),
    max_size=5,
).map(lambda parts: "".join([*parts, "a"]))  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(case=st.sampled_from(CASES), contents=st.lists(words, min_size=2, max_size=6))
@example(case=("byte-level BPE", "deepseek r1"), contents=["a", "<think>\na"])
def test_any_chat_has_the_same_tokens_in_training_and_sampling(
    case: tuple[str, str], contents: list[str]
) -> None:
    """Neither ends a turn or opens another one by what a message says."""
    of, tok = FAMILIES[case[1]], tokenizer(*case)
    messages = chat(*contents[: len(contents) // 2 * 2])
    ids, labels, reported = encoded(tok, messages)
    ends = end_ids(tok, frozenset())
    controls = {tok.convert_tokens_to_ids(text) for text in of.controls}
    neutral = chat(*("a" for _ in messages))
    expected, _, _ = encoded(tok, neutral)
    assert [i for i in ids if i in controls] == [i for i in expected if i in controls]
    found = answers(labels)
    if case[0] in LOSSLESS:  # The label has the whole last answer.
        learned = tok.decode(ids[found[-1][0] : found[-1][1]], skip_special_tokens=True)
        said, learned = ("".join(text.split()) for text in (messages[-1]["content"], learned))
        # A request may begin the answer, such as by <think>.
        request = "".join(tok.decode(ids[: found[-1][0]]).split())
        sizes = range(len(said), 2, -1)
        begun = next((n for n in sizes if request.endswith(said[:n])), 0)
        assert said[begun:] in learned
    assert not any(i in ends for start, stop in found for i in ids[start : stop - 1])
    sent = encode_prompt(tok, render_messages(tok, messages[:-1]))
    start = found[-1][0]
    assert sent[:start] == ids[:start]
    assert "unlike" in reported or len(sent) == start
