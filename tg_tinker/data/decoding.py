"""Turns tokens into exact text: streams of whole characters, stop sequences, bytes of a token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from tg_tinker.errors import InvalidRequestError

CONTEXT = 8
"""The number of tokens before a stream that its first text may depend on."""

_MOST_WAITING, _LAST = 8, 3
"""How many tokens wait for a character at most, and how many of them may begin one, which has up to
four bytes."""

_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class _Facts:
    """What is asked of a tokenizer again and again, and takes it long to find.

    Attributes:
        size: the number of tokens when it was found; tokens may be added later.
        byte_level: whether ordinary tokens are written in GPT-2's alphabet of bytes.
    """

    size: int
    added: dict[str, int]
    special: dict[str, int]
    byte_level: bool


_known: WeakKeyDictionary[Any, _Facts] = WeakKeyDictionary()


def _facts(tokenizer: Any) -> _Facts:
    found = _known.get(tokenizer)
    if found is None or found.size != len(tokenizer):
        tokens = [(int(i), token) for i, token in tokenizer.added_tokens_decoder.items()]
        found = _known[tokenizer] = _Facts(
            len(tokenizer),
            {token.content: i for i, token in tokens},
            {token.content: i for i, token in tokens if token.special},
            _is_byte_level(tokenizer),
        )
    return found


class TextStream:
    """A decoder that turns tokens into text, one token at a time.

    `push` takes one token and returns the text that is now certain: whole characters that cannot
    belong to a stop sequence. `flush` returns the rest. Once a stop sequence is found, `stopped` is
    true; the stop sequence and the text after it are never returned. The texts that a stream
    returns add up to the decoding of all its tokens, cut at the first stop sequence.

    Args:
        before: the tokens that the stream continues. Without them it is a text of its own, so that
            tokenizers of the SentencePiece family drop a space at its start.
    """

    def __init__(
        self, tokenizer: Any, stop_sequences: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stop_sequences)
        self._ids = list(before[-CONTEXT:])
        self._anchor = 0  # ids from here to `_read` are context: spacing depends on them
        self._read = len(self._ids)  # ids before this index are context, in `_held`, or returned
        self._held = ""  # decoded text that may be the beginning of a stop sequence

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._release(self._decode(final=False), final=False)

    def flush(self) -> str:
        return self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        """Returns the text since the last call; empty while its last character is incomplete.

        A model may draw bytes that never become a character, or tokens without text, as often as it
        likes. So few of them wait, else each token would decode all before it.
        """
        before = self._text(self._ids[self._anchor : self._read])
        after = self._text(self._ids[self._anchor :])
        end = len(self._ids)
        if not final and (after.endswith(_INCOMPLETE) or len(after) <= len(before)):
            if end - self._read > _MOST_WAITING:
                self._ids[self._read :] = filter(self._has_text, self._ids[self._read :])
            if len(self._ids) - self._read <= _MOST_WAITING:
                return ""
            end = len(self._ids) - _LAST
            after = self._text(self._ids[self._anchor : end])
        self._anchor, self._read = self._read, end
        return after[len(before) :]

    def _has_text(self, token_id: int) -> bool:
        return bool(self._text([token_id]))

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        # The stop sequence that ends first wins, however the text is split into tokens.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, self._held[: min(found)[1]], ""
            return text
        keep = 0 if final else self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return text

    def _possible_stop(self) -> int:
        """Returns the length of the longest end of the held text that begins a stop sequence."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def split_stops(
    tokenizer: Any, stop_sequences: Sequence[str]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the stop sequences that are text, and the tokens of those that are one special token.

    Special tokens are no part of the text, so a text that contains one could never match.

    Raises:
        InvalidRequestError: a stop sequence contains a special token and more.
    """
    if not stop_sequences:
        return (), ()
    special = special_tokens(tokenizer)
    texts = [stop for stop in stop_sequences if stop not in special]
    for token in special:
        if any(token in stop for stop in texts):
            raise InvalidRequestError(
                f"a stop sequence contains the special token {token!r} and other text, which never"
                f" occur together in an answer: pass {token!r} alone"
            )
    return tuple(texts), tuple(special[stop] for stop in stop_sequences if stop in special)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns the control tokens of a tokenizer, by their texts. Decoding leaves them out."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return _facts(tokenizer).special | {text: index for text, index in named if index is not None}


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns the tokens that are added to the vocabulary, by their texts."""
    return _facts(tokenizer).added


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Returns the bytes of a token, which may be a part of a character.

    Those of all tokens of a text, joined, are the text, behind a space if the tokenizer puts one
    before every text.
    """
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return b""
    facts = _facts(tokenizer)
    if token_id in facts.special.values():
        return str(token).encode()
    added = token_id in facts.added.values()
    if not added and facts.byte_level and all(char in _byte_of_char() for char in token):
        return bytes(_byte_of_char()[char] for char in token)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(byte[1])
    # A text before it, else decoders drop a space or a mark of a continued word.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    text: str = tokenizer.decode([*before, token_id], **options)
    return text.removeprefix(tokenizer.decode(before, **options)).encode()


def _is_byte_level(tokenizer: Any) -> bool:
    """Returns whether tokens are written in GPT-2's alphabet of bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    return "ByteLevel" in repr(backend.decoder)


@cache
def _byte_of_char() -> dict[str, int]:
    """Returns GPT-2's alphabet: printable bytes stand for themselves, others for what follows."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
