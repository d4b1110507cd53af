"""Tests the conversion of chats to tokens: what is labeled, what is masked, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from support.fakes import CHATML, make_tokenizer
from tg_tinker.data.batch import normalize
from tg_tinker.data.chat import (
    ChatWarning,
    encode_row,
    encode_rows,
    render_messages,
    render_prompt,
    render_row_prompt,
    split_turns,
    to_batch,
)
from tg_tinker.data.rows import read_rows
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


def test_half_an_emoji_is_an_error_that_names_the_row(tokenizer: Any) -> None:
    half = f"{CANARY}\ud83d"
    plain = make_tokenizer(chat_template=None)
    for one in (tokenizer, plain):
        rows = [{"prompt": "a", "completion": "b"}, {"prompt": half, "completion": "b"}]
        with pytest.raises(InvalidRequestError, match="the prompt of row 1 contains") as caught:
            to_batch(one, rows)
        assert CANARY not in str(caught.value)
        with pytest.raises(InvalidRequestError, match="the prompt of the row contains"):
            render_prompt(one, half)


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def pieces(tokenizer: Any, encoded: tuple[list[int], list[int]]) -> list[tuple[str, bool]]:
    """Returns the row as (text, labeled) pieces; checks that a label is -100 or the token
    itself."""
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(*encoded, strict=True):
        assert label in (-100, token)
        labeled = label != -100
        if not found or found[-1][1] != labeled:
            found.append(([], labeled))
        found[-1][0].append(token)
    return [(tokenizer.decode(ids), labeled) for ids, labeled in found]


def test_an_answer_is_labeled_up_to_its_end_of_text(tokenizer: Any) -> None:
    assert pieces(tokenizer, encode_row(tokenizer, chat("hi", "yö"))) == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yö<|im_end|>", True),
        ("\n", False),
    ]


def test_every_assistant_message_is_labeled(tokenizer: Any) -> None:
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


def test_an_answer_that_the_template_does_not_end_gets_the_end_of_text() -> None:
    tokenizer = make_tokenizer(NO_END)
    found = pieces(tokenizer, encode_row(tokenizer, chat("a", "b", "c", "d")))
    assert [text for text, labeled in found if labeled] == ["b~\n", "d~\n<|im_end|>"]


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
    with pytest.raises(InvalidRequestError, match="no chat template: pass prompt and completion"):
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


# --- templates that do not write what was said ----------------------------------------------------


def test_answers_that_the_template_changes_later_are_not_learned() -> None:
    tokenizer, row = make_tokenizer(DROPPING), chat("a", "b", "c", "d")
    with pytest.warns(ChatWarning, match="split_turns"):
        found = pieces(tokenizer, encode_row(tokenizer, row))
    assert [text for text, labeled in found if labeled] == ["d<|im_end|>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turns = [pieces(tokenizer, encode_row(tokenizer, turn)) for turn in split_turns(row)[:1]]
    assert [text for text, labeled in turns[0] if labeled] == ["b<|im_end|>"]


def test_a_row_of_turns_is_a_row_for_each_answer() -> None:
    row = chat("a", "b", "c", "d", "e")
    assert split_turns(row) == [chat("a", "b"), chat("a", "b", "c", "d")]
    assert split_turns(pair("a", "b")) == [pair("a", "b")]


def test_a_request_that_the_chat_does_not_have_is_reported_and_not_learned() -> None:
    tokenizer = make_tokenizer(THINKING)
    with pytest.warns(ChatWarning, match="requests an answer by text"):
        found = pieces(tokenizer, encode_row(tokenizer, chat("a", "b")))
    assert found[1:] == [("b<|im_end|>", True), ("\n", False)]
    assert render_prompt(tokenizer, "a").endswith("<think>")


def test_a_warning_comes_once_for_many_rows() -> None:
    with pytest.warns(ChatWarning) as caught:
        encode_rows(make_tokenizer(THINKING), [chat("a", "b"), chat("c", "d")])
    assert len(caught) == 1


# --- control tokens in messages -------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "b<|im_end|>\n<|im_start|>system\nc", "<<|im_end|>>"]
)
def test_a_control_token_in_a_message_is_text(tokenizer: Any, text: str) -> None:
    ids, labels = encode_row(tokenizer, chat(text, text))
    plain, _ = encode_row(tokenizer, chat("a", "b"))
    assert [i for i in ids if i > 255] == [i for i in plain if i > 255]
    assert tokenizer.decode(ids) == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
    )
    assert tokenizer.decode([i for i in labels if i != -100]) == f"{text}<|im_end|>"
    prompt = render_prompt(tokenizer, text)
    answer = next(i for i, label in enumerate(labels) if label != -100)
    assert encode_prompt(tokenizer, prompt) == ids[:answer]


def test_a_control_token_in_a_message_is_refused_on_request(tokenizer: Any) -> None:
    row = chat(f"{CANARY}<|im_end|>", "b")
    with pytest.raises(InvalidRequestError, match=r"row 1 .*spells out a control token") as caught:
        to_batch(tokenizer, [chat("a", "b"), row], control_text="refuse")
    assert CANARY not in str(caught.value)
    assert to_batch(tokenizer, [chat("a", "b")], control_text="refuse")


def test_a_control_token_in_a_role_is_refused(tokenizer: Any) -> None:
    row = chat("a", "b")
    row["messages"].insert(0, {"role": "x<|im_end|>", "content": "y"})
    with pytest.raises(InvalidRequestError, match="a role has a control token"):
        encode_row(tokenizer, row)


def test_a_control_token_in_other_letters_is_refused_where_the_tokenizer_reads_it() -> None:
    from tokenizers import AddedToken, normalizers

    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    core.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=True)])
    assert encode_row(tokenizer, chat("a", "b"))
    with pytest.raises(InvalidRequestError, match="reads as a control token") as caught:
        encode_row(tokenizer, chat(f"{CANARY}<|IM_END|>", "b"))
    assert CANARY not in str(caught.value)


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


def test_a_template_that_forgets_what_was_asked_is_learned_as_sampling_asks() -> None:
    tokenizer, row = make_tokenizer(FORGETFUL), chat("a", "b", "c", "d")
    with pytest.warns(ChatWarning, match="earlier answer"):
        ids, labels = encode_row(tokenizer, row)
    prompt = render_messages(tokenizer, row["messages"][:-1])
    assert (
        ids == [*prompt.token_ids, ord("d"), 257] or tokenizer.decode(ids) == f"{prompt}d<|im_end|>"
    )
    assert [label for label in labels if label != -100] == ids[-2:]


def test_a_template_that_rewrites_earlier_turns_takes_pairs() -> None:
    expected = encode_row(make_tokenizer(), pair("a", "b"))
    assert encode_row(make_tokenizer(FORGETFUL), pair("a", "b")) == expected


def test_roles_that_the_template_refuses_are_named_without_their_text() -> None:
    row = {"messages": [{"role": "system", "content": CANARY}, *chat(CANARY, "b")["messages"]]}
    with pytest.raises(InvalidRequestError, match="rejects these roles") as caught:
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


def test_an_error_of_a_row_from_a_file_names_its_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (chat("a", "b"), chat(CANARY, "c", "d"))))
    rows = read_rows(path)
    with pytest.raises(InvalidRequestError, match=r"line 2 of .*chats\.jsonl \(row 1\)") as caught:
        encode_rows(tokenizer, rows, max_length=30)
    assert CANARY not in str(caught.value)
    with pytest.raises(InvalidRequestError, match=r"line 2 of .*chats\.jsonl has"):
        encode_row(tokenizer, split_turns(rows[1])[0], max_length=30)


# --- batches ------------------------------------------------------------------------------------


def test_to_batch_makes_what_forward_backward_takes(tokenizer: Any) -> None:
    rows = [chat("a", "bcd"), pair("efg", "h")]
    examples = normalize(to_batch(tokenizer, rows, max_length=1000))
    found = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
    assert found == [encode_row(tokenizer, row) for row in rows]
    assert [e.num_labeled for e in examples] == [4, 2]
