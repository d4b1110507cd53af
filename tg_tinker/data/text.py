"""Between text and tokens: the only door to the tokenizer, and exact streaming of text.

It knows nothing of models or of how tokens are drawn; the sampling service and the training
actor share it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tg_tinker.errors import InvalidRequestError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "config.json",
)  # fmt: skip
_INCOMPLETE = "\ufffd"


def read_tokenizer(directory: Path) -> dict[str, bytes]:
    """The files that make up a tokenizer, by name."""
    return {
        name: (directory / name).read_bytes()
        for name in TOKENIZER_FILES
        if (directory / name).exists()
    }


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """A transformers tokenizer from `read_tokenizer`'s files, without network."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, with the special tokens the model expects, once."""
    starts = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not starts)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise InvalidRequestError("a prompt has no tokens, and this model has no start token")
    return list(ids)


class TextStream:
    """Tokens in, text out: whole characters, and nothing that could be part of a stop sequence.

    `push` returns the text that is certain after one more token; `flush` the rest. After a stop
    sequence was found `stopped` is true, and neither it nor what follows is ever returned.
    The text returned over a stream is the decoding of all its tokens, cut at the first stop.
    """

    def __init__(self, tokenizer: Any, stop_sequences: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stop_sequences)
        self._ids: list[int] = []
        self._anchor = 0  # ids before it are context for spacing only
        self._read = 0  # ids before it are decoded into `_held` or returned
        self._held = ""  # decoded, but it may be the beginning of a stop sequence

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._release(self._decode(final=False), final=False)

    def flush(self) -> str:
        return self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        """New text since the last call; empty while the last character is incomplete."""
        before = self._text(self._ids[self._anchor : self._read])
        after = self._text(self._ids[self._anchor :])
        if not final and (after.endswith(_INCOMPLETE) or len(after) <= len(before)):
            return ""
        self._anchor, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        # The stop that is complete first wins, however the text is cut into tokens.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, self._held[: min(found)[1]], ""
            return text
        keep = 0 if final else self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text with which a stop sequence begins."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
