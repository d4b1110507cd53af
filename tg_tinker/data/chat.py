"""Chats into token ids and labels, by the chat template of the model.

    from tg_tinker.data import render_prompt, to_batch
    batch = to_batch(tc.tokenizer, [{"prompt": "Capital of France?", "completion": "Paris."}])
    tc.forward_backward(batch)
    tc.sample(render_prompt(tc.tokenizer, "Capital of Spain?"))

What the model should say (every assistant message, or the completion) is labelled up to and
including the first end-of-text token; everything else has the label -100. The text is rendered
turn by turn and each piece is tokenised on its own, so a prompt has in training the very tokens
that it has in sampling. A tokenizer without a chat template takes prompt and completion as they
are and ends with its end-of-text token.

`tokenizer` is always a transformers tokenizer; `text` loads it and encodes prompts for sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tg_tinker.data.batch import IGNORED, BatchData
from tg_tinker.data.rows import Encoded, as_batch, check_row
from tg_tinker.data.text import encode_prompt
from tg_tinker.errors import InvalidRequestError

Message = dict[str, str]


def to_batch(
    tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int | None = None
) -> BatchData:
    """Rows of text as one batch: what `forward_backward` takes. See `encode_row`."""
    return as_batch(encode_rows(tokenizer, rows, max_length))


def encode_rows(
    tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int | None = None
) -> list[Encoded]:
    """`encode_row` for each row; an error names the row, counted from 0."""
    return [_encode(tokenizer, row, max_length, f"row {i}") for i, row in enumerate(rows)]


def encode_row(tokenizer: Any, row: Mapping[str, Any], max_length: int | None = None) -> Encoded:
    """(input_ids, labels) of one chat or pair; labels are -100 where no loss is wanted.

    Args:
        tokenizer: the model's own, `tc.tokenizer`.
        row: ``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}``.
        max_length: tokens, T; what is longer is cut at the end.

    Raises:
        InvalidRequestError: the row has another form, nothing labelled is left of it, or its
            chat template cannot be followed turn by turn.
    """
    return _encode(tokenizer, row, max_length, "the row")


def render_prompt(tokenizer: Any, text: str) -> str:
    """What to pass to `sample` to have `text` answered: rendered as a user's message."""
    return render_row_prompt(tokenizer, {"prompt": text, "completion": ""})


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """What to pass to `sample` to have the last of these messages answered.

    Raises:
        InvalidRequestError: the model has no chat template, or it refuses these roles.
    """
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            "this model has no chat template: use completions, with a prompt of your own form"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever the template raises: its text could quote a message
        raise InvalidRequestError(
            f"the model's chat template refuses these messages ({type(error).__name__}): check the"
            " order of the roles"
        ) from None
    return text


def render_row_prompt(tokenizer: Any, row: Mapping[str, Any]) -> str:
    """What to pass to `sample` to have the model give its first answer of this row."""
    checked = check_row(row, "the row")
    if tokenizer.chat_template is None and "prompt" in checked:
        return str(checked["prompt"])
    return next(_exchanges(tokenizer, _messages(checked), "the row"))[0]


def _encode(tokenizer: Any, row: Mapping[str, Any], max_length: int | None, where: str) -> Encoded:
    checked = check_row(row, where)
    if tokenizer.chat_template is None:
        encoded = _encode_pair(tokenizer, checked, where)
    else:
        encoded = _encode_chat(tokenizer, _messages(checked), where)
    return _cut(encoded, max_length, where)


def _messages(row: dict[str, Any]) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def _encode_chat(tokenizer: Any, messages: list[Message], where: str) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for prompt, answer in _exchanges(tokenizer, messages, where):
        asked = _tokens(tokenizer, prompt) if ids else encode_prompt(tokenizer, prompt)
        answered = _tokens(tokenizer, answer)
        ids += asked + answered
        labels += _masked(asked) + _labels(answered, tokenizer.eos_token_id)
    return ids, labels


def _encode_pair(tokenizer: Any, row: dict[str, Any], where: str) -> Encoded:
    """Without a template: the prompt as sampling encodes it, the completion, end of text."""
    if "messages" in row or tokenizer.eos_token_id is None:
        lacks = "chat template" if "messages" in row else "end-of-text token"
        raise InvalidRequestError(
            f"{where}: this model's tokenizer has no {lacks}; pass "
            + ("prompt and completion" if "messages" in row else "input_ids in a BatchData")
        )
    prompt = encode_prompt(tokenizer, row["prompt"])
    answer = [*_tokens(tokenizer, row["completion"]), tokenizer.eos_token_id]
    return prompt + answer, _masked(prompt) + answer


def _exchanges(tokenizer: Any, messages: list[Message], where: str) -> Iterator[tuple[str, str]]:
    """Per assistant message: the text since the last one, and the text of the answer."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InvalidRequestError(f"{where} has no assistant message: there is nothing to learn")
    if turns[0] == 0:
        raise InvalidRequestError(
            f"{where} begins with an assistant message: put what it answers before it"
        )
    done = ""
    for turn in turns:
        prefix = _render(tokenizer, messages[:turn], True, where)
        full = _render(tokenizer, messages[: turn + 1], False, where)
        if not (prefix.startswith(done) and full.startswith(prefix)):
            raise InvalidRequestError(_REWRITES.format(where=where, turn=turn))
        yield prefix[len(done) :], full[len(prefix) :]
        done = full


_REWRITES = (
    "{where}: up to message {turn} the chat template rewrites earlier turns or the prompt that it"
    " gives to sampling, so no labels fit both; use prompt/completion rows of one exchange each,"
    " or pass input_ids and labels of your own in a BatchData"
)


def _render(tokenizer: Any, messages: list[Message], prompt: bool, where: str) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError:
        pass  # The template's own message may quote the chat.
    else:
        return str(text)
    raise InvalidRequestError(
        f"{where}: the model's chat template refuses these roles; most want user and assistant in"
        " turn, some no system message"
    )


def _tokens(tokenizer: Any, piece: str) -> list[int]:
    return list(tokenizer(piece, add_special_tokens=False)["input_ids"])


def _masked(tokens: Sequence[int]) -> list[int]:
    return [IGNORED] * len(tokens)


def _labels(tokens: list[int], eos: int | None) -> list[int]:
    """The tokens themselves up to and including the first end of text, masked after it."""
    end = tokens.index(eos) + 1 if eos is not None and eos in tokens else len(tokens)
    return tokens[:end] + _masked(tokens[end:])


def _cut(encoded: Encoded, max_length: int | None, where: str) -> Encoded:
    ids, labels = encoded[0][:max_length], encoded[1][:max_length]
    # The first token of a row is predicted from nothing, so its label carries no loss.
    if all(label == IGNORED for label in labels[1:]):
        raise InvalidRequestError(
            f"{where} has {len(encoded[0])} tokens and nothing labelled within max_length"
            f" {max_length}: raise max_length, shorten the prompt or leave the row out",
            details={"tokens": len(encoded[0]), "max_length": max_length},
        )
    return ids, labels
