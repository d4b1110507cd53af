"""Where a keyring is: what `keyring=` of `ServiceClient` and TG_TINKER_KEYRING may name.

    /secure/keyring     a file of mode 0600
    env:TENANT_KEYS     the same text in an environment variable of the registry's process

It reads no keyring; `actors.storage.key_providers` does.
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
"""32 bytes in base64, whatever stands around them; or a word as long, such as 64 hex digits."""


@dataclass(frozen=True)
class Variable:
    """An environment variable that holds the text of a keyring."""

    name: str

    def __str__(self) -> str:
        return f"{_ENVIRONMENT}{self.name}"


def place_of(keyring: str | os.PathLike[str]) -> Path | Variable:
    """A whole path, from here or from `~`, or a variable for ``env:NAME``.

    Raises:
        InvalidRequestError: another form. The text is not repeated: it may be the keys themselves.
    """
    text = os.fspath(keyring)
    variable = text.removeprefix(_ENVIRONMENT)
    if variable != text and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        return Variable(variable)
    service = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text)  # kms:..., vault:..., env: without a name
    path = None if service or is_keyring(text) or _KEY.fullmatch(text) else local_path(text)
    if path is None:
        raise InvalidRequestError(
            "a keyring is the path of a file, or env:NAME for an environment variable that holds"
            " its text; it is never the text itself, and key services are not supported yet"
        )
    return path


def check_key_id(text: str) -> str:
    """What may name a key of a keyring, itself.

    Raises:
        InvalidRequestError: it is none. The text is not repeated: it may be the key.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,31}", text):
        raise InvalidRequestError(
            "this is no name of a key, which are like k1, so it cannot be retired; `tg-tinker keys"
            " list` shows them. If it was a key, treat it as known to others: rotate, then retire"
            " it by its name"
        )
    return text


def default_place(home: Path) -> Path | Variable:
    """What `TG_TINKER_KEYRING` names, or the file `keyring` in the home directory."""
    return place_of(os.environ.get(SETTING) or home / "keyring")


def audit_folder(place: Path | Variable, home: Path) -> Path:
    """Where `audit.key` and `audit.pub` lie: beside a keyring file, else in the home directory."""
    return home if isinstance(place, Variable) else place.parent


def is_keyring(text: str) -> bool:
    """Whether a text looks like a keyring, a damaged one included."""
    return '"keys"' in text and '"primary"' in text
