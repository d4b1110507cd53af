"""Renders chats by a model's chat template, and finds where answers begin and end in the text.

    layout = lay_out_chat(tokenizer, messages, "row 3")
    layout.text, layout.starts, layout.answers

A template is a program that writes a whole chat. This module finds an answer by comparing what the
template writes up to it, with and without the request for an answer, and with the answer.

A control token that a message spells out is text, which the tokenizer must not read as a token.
While the template runs, a mark stands behind the first character of each; there the text is
tokenized in two parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from tg_tinker.data.decoding import added_tokens, special_tokens
from tg_tinker.errors import InvalidRequestError
from tg_tinker.texts import check_text

Message = dict[str, str]

_MARKS = [chr(code) for code in range(0xE000, 0xE100)]  # for private use: no template writes them
_PROBE = "\ue123"


@dataclass(frozen=True)
class Answer:
    """An assistant message in the text of a chat.

    Attributes:
        start: the offset of its first character.
        stop: the offset behind the control token that ends it, or behind its text if none does.
        ended: whether a control token ends it.
    """

    start: int
    stop: int
    ended: bool


@dataclass(frozen=True, repr=False)
class Layout:
    """A rendered chat.

    Attributes:
        starts: the offsets at which answers begin. Sampling begins there, so no token may span
            them. They include answers that the template has changed since.
        cuts: the offsets inside control tokens that messages spell out.
        controls: the offsets of the control tokens that the template wrote.
        answers: the answers to learn, in order.
        changed: whether `answers` lacks an earlier answer, because the template has changed it.
        unlike_prompt: whether the request for an answer writes text that the chat does not have.
    """

    text: str
    starts: tuple[int, ...]
    cuts: tuple[int, ...]
    controls: tuple[int, ...]
    answers: tuple[Answer, ...] = ()
    changed: bool = False
    unlike_prompt: bool = False


@dataclass(frozen=True)
class _Habits:
    """What a template does in every chat.

    Attributes:
        header: the text that precedes an answer, where the template cannot request one.
        turn_end: the control token that ends an answer, or None.
        ends: all control tokens that end an answer or the text.
        rest: the number of characters that follow the last answer of a chat and no other.
    """

    header: str
    turn_end: str | None
    ends: tuple[str, ...]
    rest: int


def lay_out_prompt(tokenizer: Any, messages: Sequence[Message], where: str) -> Layout:
    """Returns the text that asks the model to answer the last of the messages.

    Raises:
        InvalidRequestError: the model has no chat template, or the template rejects the roles.
    """
    marked, mark = _marked(tokenizer, messages, where)
    text = _render_prompt(tokenizer, marked, where)
    found = [_start(tokenizer, text, marked[:turn], where)[0] for turn in _turns(marked)]
    return _unmarked(tokenizer, text, mark, [start for start in found if start is not None], [])


def lay_out_chat(tokenizer: Any, messages: Sequence[Message], where: str) -> Layout:
    """Returns the rendered chat up to its last answer, and the answers to learn.

    An earlier answer that the template writes otherwise once the chat has gone on is not learned:
    the model would learn what nobody said. If the template does not write the last answer as it
    was said, behind what came before it, the text is the request for the answer, the answer as it
    was said, and the end of a turn.

    Raises:
        InvalidRequestError: the model has no chat template, or the template rejects the roles.
    """
    turns = _turns(messages)
    marked, mark = _marked(tokenizer, messages[: turns[-1] + 1], where)
    text = _learned(tokenizer, marked, where)
    starts, answers, changed, unlike = [], [], False, False
    for turn in turns:
        start, shared = _start(tokenizer, text, marked[:turn], where)
        last = turn == turns[-1]
        said = text if last else _render(tokenizer, marked[: turn + 1], where)
        answer = None if start is None else _answer(tokenizer, text, start, said, last)
        starts += [] if start is None else [start]
        if answer is None:
            changed = True
        else:
            answers.append(answer)
            unlike = unlike or not shared
    if not answers[-1].ended:
        text = text[: answers[-1].stop]
    return _unmarked(tokenizer, text, mark, starts, answers, changed, unlike)


def end_ids(tokenizer: Any, configured: frozenset[int]) -> frozenset[int]:
    """Returns the tokens that end an answer, for labels and for sampling.

    They are those of the model's configuration, the tokenizer's end of text, and the one by which
    the template ends a turn, as far as they are added to the vocabulary: templates that write roles
    as words end a turn with ordinary text, at which no answer may end.
    """
    added = set(added_tokens(tokenizer).values())
    return frozenset(
        {added_tokens(tokenizer)[text] for text in _habits(tokenizer).ends} | (configured & added)
    )


def final_id(tokenizer: Any) -> int | None:
    """Returns the token that must end a last answer which the template does not end, or None.

    It is the control token by which the template ends the other turns, else the end of text.
    """
    habits = _habits(tokenizer)
    text = habits.turn_end or next(iter(habits.ends), None)
    return None if text is None else added_tokens(tokenizer)[text]


def control_ids(tokenizer: Any) -> set[int]:
    """Returns the control tokens that no text of a message may become."""
    return {added_tokens(tokenizer)[text] for text in _controls(tokenizer)}


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns how many first items two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


# --- what a template writes ----------------------------------------------------------------------


def _render(
    tokenizer: Any, messages: Sequence[Message], where: str, *, request: bool = False
) -> str:
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            f"{where}: this model has no chat template: use completions, or rows of prompt and"
            " completion, and write the whole prompt yourself"
        )
    with suppress(Exception):  # Raised below: the template's own message may quote the chat.
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=request
            )
        )
    raise InvalidRequestError(
        f"{where}: the model's chat template rejects these roles: most templates want user and"
        " assistant in turn, and some accept no system message"
    )


def _render_prompt(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    return _render(tokenizer, messages, where, request=True) + _habits(tokenizer).header


_known: WeakKeyDictionary[Any, tuple[object, _Habits]] = WeakKeyDictionary()


def _habits(tokenizer: Any) -> _Habits:
    state = tokenizer.chat_template, tokenizer.eos_token
    if tokenizer not in _known or _known[tokenizer][0] != state:
        _known[tokenizer] = state, _find_habits(tokenizer)
    return _known[tokenizer][1]


def _find_habits(tokenizer: Any) -> _Habits:
    header, last, middle = "", "", ""
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
    with suppress(InvalidRequestError):
        before, shown, last = _render(tokenizer, [ask, answer], "").partition(_PROBE)
        plain = _render(tokenizer, [ask], "")
        requests = plain != _render(tokenizer, [ask], "", request=True)
        if shown and not requests and before.startswith(plain):
            # Spaces stay with the answer, whose first token contains them.
            header = before[len(plain) :].rstrip(" ")
    with suppress(InvalidRequestError):
        middle = _render(tokenizer, [ask, answer, ask], "").partition(_PROBE)[2]
    # Some templates end a turn only by the beginning of the next one.
    turn_end = _leading_token(tokenizer, last) or _leading_token(tokenizer, middle)
    eos = tokenizer.eos_token if tokenizer.eos_token in added_tokens(tokenizer) else None
    ends = dict.fromkeys(text for text in (turn_end, eos) if text)
    return _Habits(header, turn_end, tuple(ends), len(last) - shared_length(last, middle or last))


def _leading_token(tokenizer: Any, text: str) -> str | None:
    """Returns the added token that the text begins with, after spaces."""
    text = text.lstrip()
    found = [token for token in added_tokens(tokenizer) if token.strip() and text.startswith(token)]
    return max(found, key=len, default=None)


# --- where answers are ---------------------------------------------------------------------------


def _turns(messages: Sequence[Message]) -> list[int]:
    """Returns the numbers of the assistant messages that answer something."""
    return [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]


def _learned(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    """Returns the rendered chat, whose last answer is written as it was said."""
    text, before = _render(tokenizer, messages, where), messages[:-1]
    start, _ = _start(tokenizer, text, before, where)
    content = messages[-1]["content"].strip()
    if start is not None and text.find(content, start) >= 0:
        return text
    prompt = _render_prompt(tokenizer, before, where)
    habits = _habits(tokenizer)
    # A request may begin the answer, such as by <think>, as the answer itself does.
    sizes = range(min(len(prompt.rstrip()), len(content)), 2, -1)
    begun = next((n for n in sizes if prompt.rstrip().endswith(content[:n])), 0)
    rest = content[begun:].lstrip() if begun else content
    return prompt + rest + next(iter(habits.ends), "")


def _start(
    tokenizer: Any, text: str, before: Sequence[Message], where: str
) -> tuple[int | None, bool]:
    """Returns the offset at which the answer to these messages begins, and whether the text has all
    of the request for it. The offset is None if the text has other messages before."""
    prompt = _render_prompt(tokenizer, before, where)
    if text.startswith(prompt):
        return len(prompt), True
    probe = {"role": "assistant", "content": _PROBE}
    header = _render(tokenizer, [*before, probe], where).partition(_PROBE)[0]
    shared = min(shared_length(text, prompt), shared_length(text, header))
    if text[:shared].startswith(_render(tokenizer, before, where)):
        return shared, False
    return None, False


def _answer(tokenizer: Any, text: str, start: int, said: str, last: bool) -> Answer | None:
    """Returns the answer that begins at `start`; None if it was another when it was said.

    Args:
        said: the rendered chat up to this answer.
        last: whether it is the last answer of the chat.
    """
    habits = _habits(tokenizer)
    stops = [at for end in habits.ends if (at := said.find(end, start)) >= 0]
    body = said[start : min(stops, default=len(said))].rstrip()
    if not text.startswith(body, start):
        return None
    behind = start + len(body)
    space = len(text[behind:]) - len(text[behind:].lstrip())
    follow = [space + len(end) for end in habits.ends if text.startswith(end, behind + space)]
    if follow:
        return Answer(start, behind + max(follow), True)
    kept = len(text) - habits.rest if last else start + shared_length(text[start:], said[start:])
    return Answer(start, max(kept, start), False)


# --- control tokens in messages ------------------------------------------------------------------


def _controls(tokenizer: Any) -> set[str]:
    """Returns the control tokens that must be kept apart from text.

    Some tokenizers have a letter among their special tokens, such as a padding of "!". Text may
    contain it.
    """
    unknown = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    names = {tokenizer.unk_token, getattr(unknown, "unk_token", None)}
    ends = _habits(tokenizer).ends
    return {
        text
        for text in (*special_tokens(tokenizer), *ends)
        if text in ends or (text not in names and len(text) > 1)
    }


def _marked(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[list[Message], str]:
    """Returns the messages with a mark inside each control token that they spell out.

    Raises:
        InvalidRequestError: a role has a control token, a control token is one character, or the
            messages contain every mark.
    """
    controls = _controls(tokenizer)
    texts = [text for message in messages for text in (message["role"], message["content"])]
    mark = next((m for m in _MARKS if not any(m in text for text in texts)), None)
    if mark is None:
        raise InvalidRequestError(
            f"{where} has all characters from U+E000 to U+E0FF, which are for private use: remove"
            " some"
        )
    marked = []
    for i, message in enumerate(messages):
        check_text(message["content"], f"message {i} of {where}")
        found = [control for control in controls if control in message["content"]]
        if any(control in message["role"] for control in controls):
            raise InvalidRequestError(f"message {i} of {where}: a role has a control token")
        if any(len(control) == 1 for control in found):
            raise InvalidRequestError(
                f"message {i} of {where} has a character that is a control token of this model:"
                " remove it"
            )
        marked.append({"role": message["role"], "content": _mark(message["content"], found, mark)})
    return marked, mark


def _mark(content: str, controls: Sequence[str], mark: str) -> str:
    inside = {
        match.start() + 1
        for control in controls
        for match in re.finditer(f"(?={re.escape(control)})", content)
    }
    edges = [0, *sorted(inside), len(content)]
    return mark.join(content[a:b] for a, b in pairwise(edges))


def _unmarked(
    tokenizer: Any, text: str, mark: str, starts: list[int], answers: list[Answer],
    changed: bool = False, unlike_prompt: bool = False,
) -> Layout:  # fmt: skip
    """Returns the layout of the text without marks."""

    def moved(offset: int) -> int:
        return offset - text.count(mark, 0, offset)

    controls = "|".join(map(re.escape, sorted(_controls(tokenizer), key=len, reverse=True)))
    return Layout(
        text.replace(mark, ""),
        tuple(map(moved, starts)),
        tuple(moved(match.start()) for match in re.finditer(mark, text)),
        tuple(moved(match.start()) for match in re.finditer(controls, text)) if controls else (),
        tuple(Answer(moved(a.start), moved(a.stop), a.ended) for a in answers),
        changed,
        unlike_prompt,
    )
