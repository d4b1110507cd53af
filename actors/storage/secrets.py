"""The secrets of a home besides the tenant keys and the signing key, each with versions.

    {"format": 1, "secrets": {"capabilities": ["<base64>", ...], ...}}

`secrets.json` (mode 0600) is beside `audit.key`. Each list begins with version 1; null stands for a
version that was retired. A secret is 32 bytes, and each key is derived from one version of one
secret for one purpose. A home that was made before this file existed has version 1 of every secret
in its signing key, until the first rotation writes the file. Its other versions are random.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.storage import signing
from actors.storage.key_providers import locked, remove_partials
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.storage.envelope import KEY_BYTES, expand_key, extract_key, new_key
from tg_tinker.storage.files import sync, written

FILE = "secrets.json"
TRANSPORT, CAPABILITIES = "transport", "capabilities"
PSEUDONYMS, ENTRIES, API_KEY_ROWS = "pseudonyms", "entries", "api-key-rows"
NAMES = (API_KEY_ROWS, CAPABILITIES, ENTRIES, PSEUDONYMS, TRANSPORT)
"""The names of all secrets. What a release adds here, homes of older releases do not have yet."""

RETIRABLE = (API_KEY_ROWS, CAPABILITIES, TRANSPORT)
"""The secrets whose older versions may end. Heads of ledgers, which a store keeps for ever, need
each version of the others."""

_FORMAT = 1
_FINGERPRINT = b"tg-tinker secret fingerprint v1"

Versions = tuple[bytes | None, ...]
"""The versions of one secret from version 1 on; None for a version that was retired."""


@dataclass(frozen=True, repr=False)
class _Known:
    """The versions of every secret, by its name."""

    by_name: Mapping[str, Versions]

    @classmethod
    def new(cls) -> _Known:
        return cls({name: (new_key(),) for name in NAMES})

    @classmethod
    def parse(cls, text: bytes) -> _Known:
        """Returns the secrets that `text` wrote. Raises ValueError for any other text; the error
        repeats no word of it."""
        try:
            content = json.loads(text)
            found = cls({
                name: tuple(one if one is None else base64.b64decode(one, validate=True)
                            for one in versions)
                for name, versions in content["secrets"].items()
            })  # fmt: skip
            if content["format"] == _FORMAT and all(map(_sound, found.by_name.values())):
                return found
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            pass
        raise ValueError("not the text of secrets")

    def text(self) -> bytes:
        """Returns the secrets as text, in clear."""
        encoded = {
            name: [one if one is None else base64.b64encode(one).decode() for one in versions]
            for name, versions in self.by_name.items()
        }
        return json.dumps({"format": _FORMAT, "secrets": encoded}).encode()

    def with_versions(self, name: str, versions: Versions) -> _Known:
        return _Known({**self.by_name, name: versions})


def _sound(versions: Versions) -> bool:
    lengths = {len(one) for one in versions if one is not None}
    return lengths == {KEY_BYTES} and versions[-1] is not None


class Secrets:
    """The secrets in one folder, as they are at each use. Several processes may use one folder.

    Any method raises StorageError if a file is missing, or other users can read it, and
    IntegrityError if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keys(self, name: str, purpose: bytes) -> dict[int, bytes]:
        """Returns the key of each living version of a secret, by version, the newest first.

        Use the first key for what is made from now on, and all keys for what was made before.
        """
        versions = self._versions(name)
        numbered = [*enumerate(versions, 1)][::-1]
        return {version: expand_key(one, purpose) for version, one in numbered if one is not None}

    def newest(self, name: str, purpose: bytes) -> bytes:
        """Returns the key of the newest version of a secret."""
        return next(iter(self.keys(name, purpose).values()))

    def fingerprints(self) -> dict[str, dict[int, str]]:
        """Returns the fingerprints of the living versions of all secrets, by name and version. A
        fingerprint is derived as a key is, and opens nothing."""
        return {
            name: {version: key.hex() for version, key in self.keys(name, _FINGERPRINT).items()}
            for name in NAMES
        }

    def rotate(self, name: str) -> int:
        """Adds a fresh version of a secret, which is the newest from now on; returns its number.

        Raises:
            InvalidRequestError: There is no secret of this name.
        """
        _check_name(name, NAMES)
        known = self._change(
            lambda known: known.with_versions(name, (*known.by_name[name], new_key()))
        )
        return len(known.by_name[name])

    def retire(self, name: str) -> None:
        """Destroys all versions of a secret but the newest.

        Raises:
            InvalidRequestError: There is no secret of this name whose versions may end.
        """
        self.check_retirable(name)
        self._change(lambda known: known.with_versions(name, _newest_only(known.by_name[name])))

    def check_retirable(self, name: str) -> None:
        """Raises InvalidRequestError unless `name` is a secret whose older versions may end."""
        _check_name(name, RETIRABLE)

    def pin(self) -> None:
        """Writes the file if there is none, so that the secrets no longer depend on the signing
        key."""
        self._change(lambda known: known)

    def _versions(self, name: str) -> Versions:
        try:
            return self._read().by_name[name]
        except KeyError:
            raise IntegrityError(
                f"{self._folder / FILE} has no secret {name!r}: restore its newest backup"
            ) from None

    def _read(self) -> _Known:
        path = self._folder / FILE
        try:
            content = signing.private_file(path, "the file of secrets")
        except FileNotFoundError:
            first = extract_key(signing.load(self._folder))
            # A rotation of the signing key writes the file first: that key was not the one here.
            if path.exists():
                return self._read()
            return _Known(dict.fromkeys(NAMES, (first,)))
        except OSError as error:
            raise StorageError(f"cannot read {path} ({error.strerror})") from None
        try:
            return _Known.parse(content)
        except ValueError:
            raise IntegrityError(f"{path} is damaged: restore its backup") from None

    def _change(self, change: Callable[[_Known], _Known]) -> _Known:
        """Replaces the file in one step, starting from its current content; returns the new
        content."""
        # A link stays, and the file that has the old secrets is the one that is replaced.
        path = (self._folder / FILE).resolve()
        self._read()  # A defect of a file is reported here, before the lock.
        try:
            # The lock is on the signing key, because there may be no file of secrets yet.
            with locked(self._folder / signing.SIGNING_KEY):
                known = change(self._read())
                remove_partials(path)
                with written(path, known.text()) as partial:
                    partial.replace(path)
                sync(path.parent)
        except OSError as error:
            raise StorageError(f"cannot write {path} ({error.strerror})") from None
        return known


def _newest_only(versions: Versions) -> Versions:
    return (*[None] * (len(versions) - 1), versions[-1])


def create(folder: Path) -> None:
    """Creates the file with fresh secrets. A file that exists stays as it is."""
    signing.write_new(folder / FILE, _Known.new().text())


def _check_name(name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        what = "is needed for ever in all its versions" if name in NAMES else "does not exist"
        raise InvalidRequestError(f"this secret {what}: choose among {', '.join(names)}")
