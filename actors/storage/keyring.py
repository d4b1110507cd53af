"""The text of a keyring, and what its keys do. Where the text lies is the affair of
`key_providers`.

{"format": 1, "primary": "k2", "keys": {"k1": "<base64>", "k2": "<base64>"}}
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import KEY_BYTES, derive_key, new_key, unwrap_key, wrap_key

_FORMAT = 1
_NAME = re.compile(r"k[1-9][0-9]{0,8}")
_MOST = 10**9 - 1


@dataclass(frozen=True, repr=False)
class Keys:
    """Tenant keys by id, oldest first. What is wrapped is wrapped under the primary one."""

    primary: str
    by_id: dict[str, bytes]

    @classmethod
    def new(cls) -> Keys:
        return cls("k1", {"k1": new_key()})

    @classmethod
    def parse(cls, text: str | bytes) -> Keys:
        """The inverse of `text`. Raises ValueError, without a word of the text, for any other."""
        try:
            content = json.loads(text)
            by_id = {name: base64.b64decode(key, validate=True)
                     for name, key in content["keys"].items()}  # fmt: skip
            found, version = cls(content["primary"], by_id), content["format"]
            named = all(map(_NAME.fullmatch, by_id))
            whole = version == _FORMAT and {*map(len, by_id.values())} == {KEY_BYTES}
            if named and whole and found.primary in by_id:
                return found
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            pass
        raise ValueError("not the text of a keyring")

    def text(self) -> str:
        """The keys in clear."""
        encoded = {name: base64.b64encode(key).decode() for name, key in self.by_id.items()}
        return json.dumps({"format": _FORMAT, "primary": self.primary, "keys": encoded})

    def rotated(self, name: str) -> Keys:
        """With a fresh primary key; the older ones stay, for what they have wrapped."""
        return Keys(name, self.by_id | {name: new_key()})

    def without(self, key_id: str) -> Keys:
        return Keys(self.primary, {name: k for name, k in self.by_id.items() if name != key_id})


def names_in(wrapped: bytes) -> set[str]:
    """The name of a key that a wrapped data key states, if it has the form of ours."""
    found = re.match(rb'\{"key_id": "(k[1-9][0-9]{0,8})"', wrapped)
    return {found[1].decode()} if found else set()


def next_name(used: Iterable[str]) -> str:
    """The name above all of these; the first one that is free where there is none above."""
    numbers = {int(name[1:]) for name in used if _NAME.fullmatch(name)}
    above = 1 + max(numbers, default=0)
    free = above if above <= _MOST else next(n for n in count(1) if n not in numbers)
    return f"k{free}"


def random_name(used: Collection[str]) -> str:
    """None of these. For where nobody can tell which names were in use after them."""
    while (name := f"k{secrets.randbelow(_MOST) + 1}") in used:
        pass
    return name


class Keyring:
    """The part of a `KeyProvider` that is the same wherever the keys lie."""

    @property
    def _keys(self) -> Keys:
        """As they are now. Once a call: the next reading may find others."""
        raise NotImplementedError

    @property
    def primary(self) -> str:
        return self._keys.primary

    @property
    def key_ids(self) -> list[str]:
        return [*self._keys.by_id]

    def wrap(self, data_key: bytes, context: bytes) -> dict[str, str]:
        keys = self._keys
        wrapped = wrap_key(keys.by_id[keys.primary], data_key, context)
        return {"key_id": keys.primary, "wrapped": base64.b64encode(wrapped).decode()}

    def unwrap(self, wrapped: dict[str, str], context: bytes) -> bytes:
        try:
            key_id = wrapped["key_id"]
            sealed = base64.b64decode(wrapped["wrapped"], validate=True)
            if base64.b64encode(sealed).decode() != wrapped["wrapped"] or len(wrapped) != 2:
                raise ValueError  # base64 has unused bits: one key, one text
            if not _NAME.fullmatch(key_id):
                raise ValueError  # it is repeated below
        except (ValueError, KeyError, TypeError):
            raise IntegrityError("the wrapped data key is damaged: put its backup back") from None
        by_id = self._keys.by_id
        key = by_id.get(key_id)
        if key is None:
            raise IntegrityError(
                f"the artifact needs key {key_id!r}, this keyring has {sorted(by_id)}: use the"
                " keyring it was saved with"
            )
        return unwrap_key(key, sealed, context)

    def derive(self, purpose: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        keys = self._keys
        name = keys.primary if key_id is None else key_id
        return name, derive_key(keys.by_id[name], purpose)
