"""Names single tokens, which may be parts of characters, and finds where they begin in a text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tg_tinker.data.decoding import token_bytes


class Tokens:
    """The tokens of a tokenizer, one by one. `of` returns the one object of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        if token_id not in self._bytes:
            self._bytes[token_id] = token_bytes(self._tokenizer, token_id)
        return self._bytes[token_id]

    def text_of(self, token_id: int) -> bytes | None:
        """Returns what a token adds to a text; None for a token that only controls the model."""
        return None if token_id in self._special else self.bytes_of(token_id)

    def name_of(self, token_id: int) -> str:
        """Returns the text of a token.

        A token that is no text, such as a part of a character, has a name in the form of OpenAI,
        `bytes:` and its bytes; an id without a token is named `token_id:` and the number.
        """
        data = self.bytes_of(token_id)
        if not data:
            return _numbered(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_escaped, data))

    def by_name(self, values: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Returns values of tokens by name. A second token of the same name goes by its number."""
        found: dict[str, float] = {}
        for token_id, value in values:
            name = self.name_of(token_id)
            found[_numbered(token_id) if name in found else name] = value
        return found


@lru_cache(maxsize=4)
def of(tokenizer: Any) -> Tokens:
    return Tokens(tokenizer)


class Offsets:
    """A counter of characters: where each token of a text begins, from the bytes of the tokens.

    All tokens of one character begin where it begins.

    Args:
        at: the place at which the text begins.

    Attributes:
        at: the place after the characters that are complete.
    """

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> int:
        """Returns where the text of the next token begins."""
        incomplete, _ = self._decoder.getstate()
        if data and not _may_begin(incomplete + data[:1]):
            self.at += len(self._decoder.decode(b"", final=True))  # That character stays broken.
        start = self.at
        self.at += len(self._decoder.decode(data))
        return start


def _may_begin(data: bytes) -> bool:
    """Returns whether the bytes may be the beginning of a text.

    An incremental decoder would keep half of a surrogate, which no further byte can complete.
    """
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _numbered(token_id: int) -> str:
    return f"token_id:{token_id}"


def _escaped(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}"
