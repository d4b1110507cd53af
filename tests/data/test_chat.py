"""Chats into tokens: what is labelled, what is masked, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from support.fakes import CHATML, make_tokenizer
from tg_tinker.data.batch import normalise
from tg_tinker.data.chat import encode_row, encode_rows, render_prompt, render_row_prompt, to_batch
from tg_tinker.data.text import encode_prompt
from tg_tinker.errors import InvalidRequestError

CANARY = "patient 4711"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('not this: ' + m['content']) }}{% endif %}{% endfor %}" + CHATML
)
FORGETFUL = "{% set messages = messages[-2:] %}" + CHATML  # rewrites all earlier turns
DROPPING = CHATML.replace(  # forgets answers once the user has spoken again
    "{{ m['content'] }}",
    "{% if m['role'] == 'user' or loop.index >= messages|length + messages|length % 2 %}"
    "{{ m['content'] }}{% endif %}",
)
PLAIN = (  # does not begin with the token that a tokenizer puts before every text
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = CHATML.removesuffix("{% endif %}") + "<think>{% endif %}"  # only in the prompt
NO_END = CHATML.replace("<|im_end|>", "~")  # its end of turn is not the end-of-text token


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def pieces(tokenizer: Any, encoded: tuple[list[int], list[int]]) -> list[tuple[str, bool]]:
    """The row as (text, labelled) stretches; checks that a label is -100 or the token itself."""
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(*encoded, strict=True):
        assert label in (-100, token)
        labelled = label != -100
        if not found or found[-1][1] != labelled:
            found.append(([], labelled))
        found[-1][0].append(token)
    return [(tokenizer.decode(ids), labelled) for ids, labelled in found]


def test_an_answer_is_labelled_up_to_its_end_of_text(tokenizer: Any) -> None:
    assert pieces(tokenizer, encode_row(tokenizer, chat("hi", "yö"))) == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yö<|im_end|>", True),
        ("\n", False),
    ]


def test_every_assistant_message_is_labelled(tokenizer: Any) -> None:
    row = chat("a", "b", "c", "d")
    row["messages"].insert(0, {"role": "system", "content": "S"})
    assert pieces(tokenizer, encode_row(tokenizer, row)) == [
        (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        ("b<|im_end|>", True),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
        ("\n", False),
    ]


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    assert encode_row(tokenizer, chat("a", "b", "c")) == encode_row(tokenizer, chat("a", "b"))


def test_a_pair_is_an_exchange_where_there_is_a_template(tokenizer: Any) -> None:
    assert encode_row(tokenizer, pair("a", "b")) == encode_row(tokenizer, chat("a", "b"))


def test_an_end_of_text_inside_an_answer_ends_its_labels(tokenizer: Any) -> None:
    found = pieces(tokenizer, encode_row(tokenizer, chat("a", "b<|im_end|>c")))
    assert found[1:] == [("b<|im_end|>", True), ("c<|im_end|>\n", False)]


def test_an_answer_without_end_of_text_is_labelled_to_its_end() -> None:
    tokenizer = make_tokenizer(NO_END)
    assert pieces(tokenizer, encode_row(tokenizer, chat("a", "b")))[1:] == [("b~\n", True)]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, PLAIN, None])
@pytest.mark.parametrize("text", ["hi", " spaces  and\nlines ", "<|im_start|>user"])
def test_training_sees_the_very_prompt_tokens_of_sampling(
    template: str | None, bos: bool, text: str
) -> None:
    tokenizer = make_tokenizer(template, bos)
    ids, labels = encode_row(tokenizer, pair(text, "answer"))
    sampled = encode_prompt(tokenizer, render_prompt(tokenizer, text))
    assert ids[: len(sampled)] == sampled
    assert labels[: len(sampled)] == [-100] * len(sampled)
    assert labels[len(sampled)] == ids[len(sampled)] == tokenizer.encode("a")[-1]


def test_without_a_template_a_pair_is_prompt_completion_end() -> None:
    tokenizer = make_tokenizer(None)
    assert pieces(tokenizer, encode_row(tokenizer, pair("2+2=", "4"))) == [
        ("2+2=", False),
        ("4<|im_end|>", True),
    ]
    assert render_prompt(tokenizer, "2+2=") == "2+2="


def test_without_a_template_a_chat_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template; pass prompt and completion"):
        encode_row(make_tokenizer(None), chat("a", CANARY))


def test_without_an_end_of_text_token_a_pair_is_refused() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(InvalidRequestError, match="no end-of-text token"):
        encode_row(tokenizer, pair("a", "b"))


def test_rendered_prompts_end_where_the_answer_begins(tokenizer: Any) -> None:
    expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer, "a") == expected
    assert render_row_prompt(tokenizer, chat("a", "b", "c", "d")) == expected


# --- length -------------------------------------------------------------------------------------


def test_long_rows_are_cut_at_the_end(tokenizer: Any) -> None:
    ids, labels = encode_row(tokenizer, chat("hi", "a long answer"))
    for length in (len(ids), len(ids) - 1, len(ids) - 9):
        assert encode_row(tokenizer, chat("hi", "a long answer"), length) == (
            ids[:length],
            labels[:length],
        )


def test_a_row_with_one_label_left_is_kept_and_with_none_refused(tokenizer: Any) -> None:
    prompt = len(encode_prompt(tokenizer, render_prompt(tokenizer, "hi")))
    _, labels = encode_row(tokenizer, pair("hi", CANARY), prompt + 1)
    assert sum(label != -100 for label in labels) == 1
    with pytest.raises(InvalidRequestError, match=f"max_length {prompt}: raise") as caught:
        encode_row(tokenizer, pair("hi", CANARY), prompt)
    assert CANARY not in str(caught.value)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [FORGETFUL, DROPPING, THINKING])
def test_a_template_that_rewrites_what_was_said_is_refused(template: str) -> None:
    row = chat("a", "b", CANARY, "d")
    with pytest.raises(InvalidRequestError, match=r"rewrites .*use prompt/completion") as caught:
        encode_row(make_tokenizer(template), row)
    assert CANARY not in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_takes_pairs() -> None:
    expected = encode_row(make_tokenizer(), pair("a", "b"))
    assert encode_row(make_tokenizer(FORGETFUL), pair("a", "b")) == expected


def test_roles_that_the_template_refuses_are_named_without_their_text() -> None:
    row = {"messages": [{"role": "system", "content": CANARY}, *chat(CANARY, "b")["messages"]]}
    with pytest.raises(InvalidRequestError, match="refuses these roles") as caught:
        encode_row(make_tokenizer(ALTERNATING), row)
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_chat_without_an_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError, match="no assistant message"):
        encode_row(tokenizer, chat(CANARY))


def test_a_chat_that_begins_with_an_answer_is_refused(tokenizer: Any) -> None:
    row = {"messages": chat("", CANARY, "c", "d")["messages"][1:]}
    with pytest.raises(InvalidRequestError, match="begins with an assistant message"):
        encode_row(tokenizer, row)


@pytest.mark.parametrize("row", [{"text": CANARY}, {"prompt": CANARY}, CANARY])
def test_rows_of_another_form_are_refused(tokenizer: Any, row: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"neither form|not an object") as caught:
        encode_row(tokenizer, row)
    assert CANARY not in str(caught.value)


def test_among_many_rows_the_bad_one_is_named(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError, match="row 2 has no assistant message"):
        encode_rows(tokenizer, [chat("a", "b"), pair("a", "b"), chat("a")])


# --- batches ------------------------------------------------------------------------------------


def test_to_batch_makes_what_forward_backward_takes(tokenizer: Any) -> None:
    rows = [chat("a", "bcd"), pair("efg", "h")]
    examples = normalise(to_batch(tokenizer, rows, max_length=1000))
    found = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
    assert found == [encode_row(tokenizer, row) for row in rows]
    assert [e.num_labelled for e in examples] == [4, 2]
