"""Checks that texts can be tokenized, stored and sent: that they have a form in UTF-8.

A Python string may hold half of a character, a lone surrogate: JSON can write it as an escape such
as ``"\\ud83d"``, and Python makes it from bytes that are no UTF-8. No tokenizer, database or file
takes it, and each fails with an error of its own, often late.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tg_tinker.errors import InvalidRequestError


def check_text(text: str, what: str) -> str:
    """Returns a text unchanged.

    Args:
        what: the name of the text in the error, such as ``the prompt``.

    Raises:
        InvalidRequestError: the text contains a lone surrogate. The message does not repeat it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start  # raised below: this error holds the text and must not become our context
    else:
        return text
    raise InvalidRequestError(
        f"{what} contains a lone surrogate, half of a character, at position {at}: this is no valid"
        " text. Remove it, or write the whole character",
        details={"position": at},
    )


def check_path(path: Path) -> Path:
    """Returns a path unchanged.

    Raises:
        InvalidRequestError: the system cannot have such a path. The message does not repeat it.
    """
    with suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(path):
            return path
    raise InvalidRequestError(
        "the path contains half of a character or a NUL, which no name of a file can have: pass"
        " another path"
    )


def check_texts(value: Any, what: str) -> None:
    """Checks all texts in a value as `check_text` does: also in dicts, their keys, and lists.

    Raises:
        InvalidRequestError: see `check_text`.
    """
    if isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_texts(key, f"a key of {what}")
            check_texts(inner, what)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_texts(inner, what)
