"""Loads tokenizers and turns text into tokens: prompts, and texts in which some places must hold.

In the SDK, only this module loads a tokenizer. `decoding` turns tokens into text, `template` and
`chat` turn chats into texts. The sampling service and the training actor share it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from tg_tinker.errors import InvalidRequestError
from tg_tinker.texts import check_text

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "config.json",
)  # fmt: skip


def read_tokenizer(directory: Path) -> dict[str, bytes]:
    """Returns the files of a tokenizer that the directory holds, by name."""
    return {
        name: (directory / name).read_bytes()
        for name in TOKENIZER_FILES
        if (directory / name).exists()
    }


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """Returns a transformers tokenizer from the files of `read_tokenizer`. Uses no network.

    Raises:
        InvalidRequestError: transformers cannot load these files.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if name in files:
                (Path(folder) / name).write_bytes(files[name])
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise InvalidRequestError(
                f"the tokenizer of this model cannot be loaded ({type(error).__name__}): save it by"
                " transformers' save_pretrained, which writes tokenizer.json; if the model has only"
                " tokenizer.model, install sentencepiece or tiktoken first"
            ) from None


class ChatPrompt(str):
    """A prompt that a chat template has rendered, with its tokens.

    It prints and compares as its text. Sampling sends `token_ids`, and adds no special tokens,
    because the template has written those that the model expects.

    Attributes:
        token_ids: the tokens of the prompt, as training has them before the answer.
    """

    token_ids: tuple[int, ...]

    def __new__(cls, text: str, token_ids: Iterable[int]) -> Self:
        made = super().__new__(cls, text)
        made.token_ids = tuple(token_ids)
        return made

    def __getnewargs__(self) -> tuple[str, tuple[int, ...]]:  # type: ignore[override]
        return str(self), self.token_ids


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Returns the token ids of a prompt, with the special tokens that the model expects before it.

    A plain text gets the tokens that the tokenizer puts before a text, unless it begins with them,
    and never those that the tokenizer puts after a text: the model is to go on. A `ChatPrompt`
    keeps its own tokens.

    Raises:
        InvalidRequestError: the prompt has no tokens, and the model has no start token; or the
            prompt is no valid text.
    """
    if isinstance(prompt, ChatPrompt):
        return list(prompt.token_ids)
    check_text(prompt, "the prompt")
    ids = plain_tokens(tokenizer, prompt)
    before = _tokens_before(tokenizer)
    if ids[: len(before)] != before:
        ids = before + ids
    if not ids and tokenizer.bos_token_id is not None:
        ids = before or [tokenizer.bos_token_id]
    if not ids:
        raise InvalidRequestError(
            "the prompt has no tokens, and this model has no start token: pass a longer prompt"
        )
    return ids


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of the text alone: none are added before or after it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokens_after(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text that continues another one.

    Tokenizers of the SentencePiece family put a space before every text. Here the text stands
    behind a short other one, whose tokens are taken away again.
    """
    for anchor in ("\n", "a", ".", "0"):
        before = plain_tokens(tokenizer, anchor)
        both = plain_tokens(tokenizer, anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return plain_tokens(tokenizer, text)


def tokens_divided(
    tokenizer: Any,
    text: str,
    starts: Iterable[int],
    cuts: Iterable[int] = (),
    controls: Iterable[int] = (),
) -> tuple[list[int], dict[int, int], bool]:
    """Returns the tokens of a text, none of which spans certain places.

    The text is tokenized as a whole. Where a token would span one of `starts`, the tokens before
    that place are those of the text up to it, which is what sampling sends.

    Args:
        starts: offsets in the text.
        cuts: offsets at which the text is tokenized in two parts in any case.
        controls: the offsets of control tokens. Tokenizers read the text between them alone, so it
            is looked at in these parts: the time grows with the text, not with its square.

    Returns:
        The tokens, the number of tokens before each start, and whether the text as a whole would
        have other tokens because of a start.
    """
    starts, cuts = {*starts}, {*cuts}
    edges = sorted({0, *controls, len(text)})
    parts = [plain_tokens(tokenizer, text[a:b]) for a, b in pairwise(edges)]
    if [token for part in parts for token in part] != plain_tokens(tokenizer, text):
        edges = [0, len(text)]  # A control token takes spaces before it along, for example.
    ids: list[int] = []
    at: dict[int, int] = {0: 0}
    spanned = False
    for first, last in pairwise(edges):
        inside, places, split = _divided(
            tokenizer,
            text[first:last],
            {place - first for place in starts if first < place <= last},
            {place - first for place in cuts if first < place < last},
        )
        at |= {first + place: len(ids) + count for place, count in places.items()}
        ids += inside
        spanned = spanned or split
    return ids, at, spanned


def _divided(
    tokenizer: Any, text: str, starts: set[int], cuts: set[int]
) -> tuple[list[int], dict[int, int], bool]:
    """Returns what `tokens_divided` does, for one part."""
    ids: list[int] = []
    at: dict[int, int] = {}
    fixed, origin, place, spanned = ids, 0, 0, False
    for stop in sorted({*starts, *cuts, len(text)}):
        longer = fixed + _part(tokenizer, text[origin:stop], origin)
        if longer[: len(ids)] != ids:
            fixed, origin, spanned = ids, place, True
            longer = fixed + _part(tokenizer, text[origin:stop], origin)
        ids, place, at[stop] = longer, stop, len(longer)
        if stop in cuts:
            fixed, origin = ids, stop
    return ids, at, spanned


def _part(tokenizer: Any, text: str, origin: int) -> list[int]:
    return tokens_after(tokenizer, text) if origin else plain_tokens(tokenizer, text)


def _tokens_before(tokenizer: Any) -> list[int]:
    """Returns the special tokens that the tokenizer puts before every text."""
    alone = plain_tokens(tokenizer, "a")
    full = list(tokenizer("a")["input_ids"])
    found = [i for i in range(len(full)) if full[i : i + len(alone)] == alone]
    return full[: found[0]] if found else []
