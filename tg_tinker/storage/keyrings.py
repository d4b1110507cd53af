"""Checks the location of a keyring, as `ServiceClient(keyring=...)` and TG_TINKER_KEYRING name it.

    /secure/keyring     a file of mode 0600
    env:TENANT_KEYS     the same text in an environment variable of the registry's process

This module reads no keyring; `actors.storage.key_providers` does.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tg_tinker.errors import InvalidRequestError
from tg_tinker.storage.stores import local_path

SETTING = "TG_TINKER_KEYRING"
_ENVIRONMENT = "env:"
_KEY = re.compile(r".*[A-Za-z0-9+/_-]{43}=.*|[A-Za-z0-9+_-]{43,}", re.DOTALL)
"""Matches a text that may hold a key: 32 bytes in base64 with anything around them, or one word of
43 or more characters, such as 64 hex digits."""


@dataclass(frozen=True)
class Variable:
    """The name of an environment variable that holds the text of a keyring."""

    name: str

    def __str__(self) -> str:
        return f"{_ENVIRONMENT}{self.name}"


def place_of(keyring: str | os.PathLike[str]) -> Path | Variable:
    """Returns the location of a keyring: a `Variable` for ``env:NAME``, else an absolute path.

    Paths are resolved against the working directory; `~` is expanded.

    Raises:
        InvalidRequestError: the text has another form. The message does not repeat the text, which
            may be the keys themselves.
    """
    text = os.fspath(keyring)
    variable = text.removeprefix(_ENVIRONMENT)
    if variable != text and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        return Variable(variable)
    service = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text)  # kms:..., vault:..., env: without a name
    key = is_keyring(text) or (_KEY.fullmatch(text) and not _in_a_folder(text))
    path = None if service or key else local_path(text)
    if path is None:
        raise InvalidRequestError(
            "a keyring is the path of a file, or env:NAME for an environment variable that holds"
            " the keyring's text, but never the text itself. Key services are not supported yet"
        )
    return path


def _in_a_folder(text: str) -> bool:
    """Returns whether a text begins with a folder of this machine, such as ``/home/``. A key would
    do so by chance alone, while folders such as `lr=0.1` are common."""
    path = Path(text)
    return path.is_absolute() and len(path.parts) > 2 and Path(*path.parts[:2]).is_dir()


def check_key_id(text: str) -> str:
    """Returns the text if it can be the name of a key in a keyring.

    Raises:
        InvalidRequestError: the text cannot be such a name. The message does not repeat the text,
            which may be the key itself.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,31}", text):
        raise InvalidRequestError(
            "this is not the name of a key and cannot be retired: names look like k1, and"
            " `tg-tinker keys list` shows them. If you typed the key itself, treat it as known to"
            " others: rotate, then retire it by its name"
        )
    return text


def default_place(home: Path) -> Path | Variable:
    """Returns the location in `TG_TINKER_KEYRING`, or the file `keyring` in the home directory."""
    return place_of(os.environ.get(SETTING) or home / "keyring")


def audit_folder(place: Path | Variable, home: Path) -> Path:
    """Returns the folder of `audit.key` and `audit.pub`.

    This is the folder of a keyring file. For a keyring in a variable it is the home directory.
    """
    return home if isinstance(place, Variable) else place.parent


def is_keyring(text: str) -> bool:
    """Returns whether a text looks like a keyring, even a damaged one."""
    return '"keys"' in text and '"primary"' in text
