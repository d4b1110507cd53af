"""Converts chats into token ids and labels, by the chat template of the model.

    from tg_tinker.data import render_prompt, to_batch
    batch = to_batch(tc.tokenizer, [{"prompt": "Capital of France?", "completion": "Paris."}])
    tc.forward_backward(batch)
    tc.sample(render_prompt(tc.tokenizer, "Capital of Spain?"))

The answers (every assistant message, or the completion) are labeled up to and including the control
token that ends them; sampling ends there, too. All other tokens have the label -100. A chat is
rendered and tokenized as a whole. The tokens before an answer are those that `render_prompt` and
`/v1/chat/completions` send for the same history; `ChatWarning` says where they are not. Without a
chat template, prompt and completion are used unchanged, and the end-of-text token is appended.

Control tokens that a message spells out become ordinary text, so that no content ends a turn or
opens another one.

`tokenizer` is always a transformers tokenizer. `template` finds the answers in a chat, `text` turns
texts into tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tg_tinker.data.batch import IGNORED, BatchData
from tg_tinker.data.rows import (
    ID,
    Encoded,
    EncodedWithId,
    Row,
    RowOfFile,
    as_batch,
    check_messages,
    check_row,
    name_of_row,
)
from tg_tinker.data.template import (
    Layout,
    Message,
    control_ids,
    final_id,
    lay_out_chat,
    lay_out_prompt,
    shared_length,
)
from tg_tinker.data.text import (
    ChatPrompt,
    encode_prompt,
    tokens_divided,
)
from tg_tinker.errors import InvalidRequestError

ControlText = Literal["text", "refuse"]
"""What to do with a control token that a message spells out: read it as text, or refuse the row."""


class ChatWarning(UserWarning):
    """A chat template makes training differ from what the rows say, or from sampling."""


def to_batch(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    max_length: int | None = None,
    control_text: ControlText = "text",
) -> BatchData:
    """Returns rows of text as one batch for `forward_backward`. See `encode_row`."""
    return as_batch(encode_rows(tokenizer, rows, max_length, control_text))


def encode_rows(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    max_length: int | None = None,
    control_text: ControlText = "text",
) -> list[Encoded]:
    """Encodes each row as `encode_row` does. An error names the row, counted from 0."""
    encoder = _Encoder(tokenizer, max_length, control_text)
    encoded = [encoder.encode(row, f"row {i}") for i, row in enumerate(rows)]
    encoder.warn()
    return encoded


def encode_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    max_length: int | None = None,
    control_text: ControlText = "text",
) -> Encoded:
    """Returns (input_ids, labels) of one chat or pair; labels are -100 where no loss is wanted.

    Args:
        tokenizer: the model's own tokenizer, `tc.tokenizer`.
        row: ``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}``, with an
            ``example_id`` if you like, which `as_batch` and `make_batches` hand on.
        max_length: the maximum number of tokens; a longer row is cut at its end. None: no limit.
        control_text: ``"text"`` reads a control token that a message spells out, such as
            ``<|im_end|>``, as ordinary text; ``"refuse"`` refuses the row. It does not apply to
            models without a chat template, whose prompts and completions are used unchanged.

    Raises:
        InvalidRequestError: the row has another form, the cut row has no labeled token, or the chat
            template rejects the roles.

    Warns:
        ChatWarning: an earlier answer is not learned, since the template changes it; see
            `split_turns`. Or the request for an answer, which sampling sends, is not part of the
            rendered chat. Or a token of the rendered chat would span the start of an answer, and is
            split there as in sampling.
    """
    encoder = _Encoder(tokenizer, max_length, control_text)
    encoded = encoder.encode(row, "the row")
    encoder.warn()
    return encoded


def split_turns(row: Mapping[str, Any]) -> list[Row]:
    """Returns a row for each answer of a chat: the messages up to it.

    It serves templates that change earlier answers, which drop the reasoning of earlier turns for
    example: `encode_row` learns only the last answer of such rows. All rows of one chat belong to
    the same person: they keep the ``example_id`` of the chat, so give it one when you train with
    privacy.
    """
    checked = check_row(row, "the row")
    messages = checked.get("messages", [])
    turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    split: list[Row] = [checked | {"messages": messages[: turn + 1]} for turn in turns] or [checked]
    return [RowOfFile(one, row.place) for one in split] if isinstance(row, RowOfFile) else split


def render_prompt(tokenizer: Any, text: str) -> str:
    """Returns the prompt for `sample` that asks the model to answer `text`, a user's message.

    With a chat template it is a `ChatPrompt`: a string that carries its tokens.
    """
    return render_row_prompt(tokenizer, {"prompt": text, "completion": ""})


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> ChatPrompt:
    """Returns the prompt for `sample` that asks the model to answer the last of these messages.

    Raises:
        InvalidRequestError: the model has no chat template, or the template rejects these roles.
    """
    layout = lay_out_prompt(tokenizer, check_messages(messages, "the chat"), "the chat")
    ids, _, _ = _tokens(tokenizer, layout, "the chat")
    return ChatPrompt(layout.text, ids)


def render_row_prompt(tokenizer: Any, row: Mapping[str, Any]) -> str:
    """Returns the prompt for `sample` that asks the model for the first answer of this row."""
    checked = check_row(row, "the row")
    if tokenizer.chat_template is None and "prompt" in checked:
        return str(checked["prompt"])
    messages = _messages(checked)
    return render_messages(tokenizer, messages[: _first_answer(messages, "the row")])


class _Encoder:
    """An encoder of many rows, which warns once for all of them."""

    def __init__(self, tokenizer: Any, max_length: int | None, control_text: ControlText) -> None:
        self._tokenizer, self._max_length, self._control_text = tokenizer, max_length, control_text
        self._warnings: dict[str, None] = {}

    def warn(self) -> None:
        for message in self._warnings:
            warnings.warn(message, ChatWarning, stacklevel=3)

    def encode(self, row: Mapping[str, Any], where: str) -> Encoded:
        where = name_of_row(row, where)
        checked = check_row(row, where)
        if self._tokenizer.chat_template is None:
            encoded = self._encode_pair(checked, where)
        else:
            encoded = self._encode_chat(_messages(checked), where)
        ids, labels = _cut(encoded, self._max_length, where)
        name = checked.get(ID)
        return (ids, labels) if name is None else EncodedWithId(ids, labels, name)

    def _encode_chat(self, messages: list[Message], where: str) -> Encoded:
        _first_answer(messages, where)
        layout = lay_out_chat(self._tokenizer, messages, where)
        if layout.cuts and self._control_text == "refuse":
            raise InvalidRequestError(
                f"{where} has a message that spells out a control token of this model: remove it,"
                ' or pass control_text="text"'
            )
        ids, at, spanned = _tokens(self._tokenizer, layout, where)
        labels = [IGNORED] * len(ids)
        for answer in layout.answers:
            start = at[answer.start]
            stop = at[answer.stop] if answer.ended else self._stop(layout, ids, answer.stop)
            labels[start:stop] = ids[start:stop]
        end = final_id(self._tokenizer)
        if end is not None and not layout.answers[-1].ended:
            # The template does not end its last answer: the model must learn that it ends.
            ids.append(end)
            labels.append(end)
        self._warnings |= dict.fromkeys(_noteworthy(layout, spanned))
        return ids, labels

    def _stop(self, layout: Layout, ids: list[int], offset: int) -> int:
        """Returns the number of tokens before an offset, without one that spans it."""
        starts, cuts = (
            [place for place in places if place <= offset]
            for places in (layout.starts, layout.cuts)
        )
        controls = [place for place in layout.controls if place < offset]
        until, _, _ = tokens_divided(self._tokenizer, layout.text[:offset], starts, cuts, controls)
        return shared_length(ids, until)

    def _encode_pair(self, row: Row, where: str) -> Encoded:
        """Encodes a pair without a chat template: prompt, completion, end-of-text token."""
        tokenizer = self._tokenizer
        if "messages" in row or tokenizer.eos_token_id is None:
            lacks = "chat template" if "messages" in row else "end-of-text token"
            raise InvalidRequestError(
                f"{where}: this model's tokenizer has no {lacks}: pass "
                + ("prompt and completion" if "messages" in row else "input_ids in a BatchData")
            )
        prompt = row["prompt"]
        asked = encode_prompt(tokenizer, prompt)
        ids, at, spanned = tokens_divided(tokenizer, prompt + row["completion"], [len(prompt)])
        answer = [*ids[at[len(prompt)] :], tokenizer.eos_token_id]
        if spanned:
            self._warnings[_SPANNED] = None
        return asked + answer, [IGNORED] * len(asked) + answer


def _tokens(tokenizer: Any, layout: Layout, where: str) -> tuple[list[int], dict[int, int], bool]:
    """Returns what `tokens_divided` does for a chat.

    Raises:
        InvalidRequestError: the tokenizer reads a control token that the template did not write.
    """
    ended = [answer.stop for answer in layout.answers if answer.ended]
    found = tokens_divided(
        tokenizer, layout.text, [*layout.starts, *ended], layout.cuts, layout.controls
    )
    controls = control_ids(tokenizer)
    if sum(index in controls for index in found[0]) > len(layout.controls):
        raise InvalidRequestError(
            f"{where} has text that the tokenizer reads as a control token of this model: remove it"
        )
    return found


_CHANGED = (
    "the chat template changes an earlier answer of some rows once the chat goes on (many drop its"
    " reasoning), so those answers are not learned: make a row of each answer by"
    " tg_tinker.data.split_turns"
)
_UNLIKE = (
    "the chat template requests an answer by text that it does not write before the answers of some"
    " rows (such as <think>), so sampling sends text that training has not seen: write that text"
    " at the beginning of the answers, or use a template without it"
)
_SPANNED = (
    "in some rows a token would span the start of the answer: it is split there, as in sampling"
)


def _noteworthy(layout: Layout, spanned: bool) -> Iterable[str]:
    found = {_CHANGED: layout.changed, _UNLIKE: layout.unlike_prompt, _SPANNED: spanned}
    return [message for message, holds in found.items() if holds]


def _messages(row: Row) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def _first_answer(messages: Sequence[Message], where: str) -> int:
    """Returns the number of the first assistant message.

    Raises:
        InvalidRequestError: there is none, or it is the first message.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise InvalidRequestError(
            f"{where} has no assistant message: add the answer that the model must learn"
        )
    if first == 0:
        raise InvalidRequestError(
            f"{where} begins with an assistant message: put the message that it answers before it"
        )
    return first


def _cut(encoded: Encoded, max_length: int | None, where: str) -> Encoded:
    ids, labels = encoded[0][:max_length], encoded[1][:max_length]
    # No token comes before the first token of a row, so its label does not count in the loss.
    if all(label == IGNORED for label in labels[1:]):
        raise InvalidRequestError(
            f"{where} has {len(encoded[0])} tokens, but none is labeled within max_length"
            f" {max_length}: raise max_length, shorten the prompt or leave the row out",
            details={"tokens": len(encoded[0]), "max_length": max_length},
        )
    return ids, labels
