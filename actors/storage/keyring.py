"""The text of a keyring, and the operations of its keys.

`key_providers` decides where the text is stored.

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
    """Tenant keys by id, oldest first. The primary key wraps new data keys."""

    primary: str
    by_id: dict[str, bytes]

    @classmethod
    def new(cls) -> Keys:
        return cls("k1", {"k1": new_key()})

    @classmethod
    def parse(cls, text: str | bytes) -> Keys:
        """Returns the keys that `text` wrote. Raises ValueError for any other text; the error
        repeats no word of it."""
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
        """Returns the keys as text, in clear."""
        encoded = {name: base64.b64encode(key).decode() for name, key in self.by_id.items()}
        return json.dumps({"format": _FORMAT, "primary": self.primary, "keys": encoded})

    def rotated(self, name: str) -> Keys:
        """Returns the keys with a fresh primary key. The older keys stay, because data keys are
        wrapped under them."""
        return Keys(name, self.by_id | {name: new_key()})

    def without(self, key_id: str) -> Keys:
        return Keys(self.primary, {name: k for name, k in self.by_id.items() if name != key_id})


def names_in(wrapped: bytes) -> set[str]:
    """Returns the name of the key that a wrapped data key states; empty if the form is not that of
    a file keyring."""
    found = re.match(rb'\{"key_id": "(k[1-9][0-9]{0,8})"', wrapped)
    return {found[1].decode()} if found else set()


def parse_wrapped(content: bytes) -> dict[str, str]:
    """Returns a stored data key in the form that `Keyring.unwrap` takes.

    Raises:
        IntegrityError: The bytes are not the one spelling of a wrapped key: `key_id`, then
            `wrapped`, as `json.dumps` writes them, in canonical base64.
    """
    try:
        found = json.loads(content)
        if json.dumps(_checked(found)).encode() == content:
            return dict(found)
    except (ValueError, RecursionError):
        pass
    raise _damaged_key()


def _checked(wrapped: object) -> dict[str, str]:
    """Returns a wrapped key of exactly its two fields in their order. Raises ValueError for
    anything else."""
    if not isinstance(wrapped, dict) or [*wrapped] != ["key_id", "wrapped"]:
        raise ValueError
    key_id, text = wrapped.values()
    if not (isinstance(key_id, str) and isinstance(text, str)):
        raise ValueError
    # The name is repeated in errors, so it must have the form of a name. Base64 has unused bits.
    if not _NAME.fullmatch(key_id) or _text_of(base64.b64decode(text, validate=True)) != text:
        raise ValueError
    return wrapped


def _text_of(wrapped: bytes) -> str:
    return base64.b64encode(wrapped).decode()


def _damaged_key() -> IntegrityError:
    return IntegrityError("the wrapped data key is damaged: restore its backup")


def next_name(used: Iterable[str]) -> str:
    """Returns the name above all of these; if there is no name above, the first name that is
    free."""
    numbers = {int(name[1:]) for name in used if _NAME.fullmatch(name)}
    above = 1 + max(numbers, default=0)
    free = above if above <= _MOST else next(n for n in count(1) if n not in numbers)
    return f"k{free}"


def random_name(used: Collection[str]) -> str:
    """Returns a random name that is none of these, for use when it is unknown which names were used
    after them."""
    while (name := f"k{secrets.randbelow(_MOST) + 1}") in used:
        pass
    return name


class Keyring:
    """The part of a `KeyProvider` that is the same wherever the keys are stored."""

    @property
    def _keys(self) -> Keys:
        """The keys as they are now. Read this once per call: the next read may return other
        keys."""
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
        return {"key_id": keys.primary, "wrapped": _text_of(wrapped)}

    def unwrap(self, wrapped: dict[str, str], context: bytes) -> bytes:
        try:
            key_id, text = _checked(wrapped).values()
        except ValueError:
            raise _damaged_key() from None
        sealed = base64.b64decode(text)
        by_id = self._keys.by_id
        key = by_id.get(key_id)
        if key is None:
            raise IntegrityError(
                f"the artifact needs key {key_id!r}, this keyring has {sorted(by_id)}: use the"
                " keyring that the artifact was saved with"
            )
        return unwrap_key(key, sealed, context)

    def derive(self, purpose: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        keys = self._keys
        name = keys.primary if key_id is None else key_id
        return name, derive_key(keys.by_id[name], purpose)
