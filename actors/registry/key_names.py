"""Recognizes keys by fingerprints in the database: two keyrings may both have a `k1`, and an older
copy of a file lacks keys that this registry was used with."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from actors.registry.database import Database
from actors.registry.schema import KEYS
from actors.storage.key_providers import KeyProvider
from actors.storage.secrets import FILE, Secrets
from actors.storage.signing import CHAIN, PUBLIC_KEY, SIGNING_KEY, SigningKey
from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import raw_public_key

_PURPOSE = b"tg-tinker key fingerprint v1"
_SIGNING = "audit key"
_NUMBERED = " "
"""What only the names of numbered keys have: ``audit key 2``, ``secret entries 1``."""


class KeyNames:
    """The part of the registry that recognizes the keys of its home."""

    def __init__(
        self, database: Database, keyring: KeyProvider, signing: SigningKey, secrets: Secrets
    ) -> None:
        self._database, self._keyring = database, keyring
        self._signing, self._secrets = signing, secrets

    def recognize(self) -> None:
        """Records new keys, and refuses another key of a known name: the right keyring could not
        open what would be saved under it, and heads and pseudonyms of another key are not found.

        A fingerprint is derived from the key as every derived key is, and opens nothing.

        Raises:
            IntegrityError: The registry was used with another keyring, or with a newer or another
                key of the other files of keys.
        """
        found = self._fingerprints_here()
        with self._database.change() as tx:
            known = _fingerprints(tx)
            _refuse_another(found, known)
            for place, name in enumerate(name for name in found if name not in known):
                row = {"id": name, "fingerprint": found[name], "place": len(known) + place}
                tx.execute(KEYS.insert().values(row))

    def compare(self) -> None:
        """Makes the same comparison as `recognize`, and records nothing."""
        with self._database.reading() as connection:
            _refuse_another(self._fingerprints_here(), _fingerprints(connection))

    def _fingerprints_here(self) -> dict[str, str]:
        derived = (self._keyring.derive(_PURPOSE, name) for name in self._keyring.key_ids)
        publics = reversed(self._signing.publics())
        return (
            {name: value.hex() for name, value in derived}
            | {f"{_SIGNING} {n}": raw_public_key(one) for n, one in enumerate(publics, 1)}
            | {
                f"secret {name} {version}": value
                for name, versions in self._secrets.fingerprints().items()
                for version, value in versions.items()
            }
        )

    def noted(self) -> list[str]:
        """Returns the names of all tenant keys that were ever seen, oldest first."""
        with self._database.reading() as connection:
            return [name for name in _fingerprints(connection) if _NUMBERED not in name]

    def missing(self) -> list[str]:
        """Returns the tenant keys that were first seen after every key of this keyring: the keyring
        is an older copy. A retired key is not among them, because a newer key followed it."""
        here = set(self._keyring.key_ids)
        known = self.noted()
        newest = max((place for place, name in enumerate(known) if name in here), default=-1)
        return known[newest + 1 :]


def _fingerprints(connection: sa.Connection) -> dict[str, str]:
    """Returns fingerprints by key name, in the order in which the keys were first seen."""
    rows = connection.execute(sa.select(KEYS).order_by(KEYS.c.place))
    return {row.id: row.fingerprint for row in rows}


def _refuse_another(found: Mapping[str, str], known: Mapping[str, str]) -> None:
    for name in found:  # tenant keys come first
        if known.get(name, found[name]) != found[name]:
            raise IntegrityError(
                f"key {name!r} of this keyring is another key than the {name!r} that this registry"
                " was used with: correct `keyring`, or restore a backup of the right keyring"
                if _NUMBERED not in name
                else f"{name!r} of this home is another key than the one that this registry was"
                f" used with: {_remedy(name)}"
            )
    here = _newest(found)
    for kind, number in _newest(known).items():
        if number > here.get(kind, number):
            raise IntegrityError(
                f"this registry was used with {kind!r} {number}, but this home has only"
                f" {here[kind]}: {_remedy(kind)}"
            )


def _newest(names: Mapping[str, str]) -> dict[str, int]:
    """Returns the highest number of each kind of numbered keys."""
    found: dict[str, int] = {}
    for name in filter(lambda name: _NUMBERED in name, names):
        kind, _, number = name.rpartition(_NUMBERED)
        found[kind] = max(int(number), found.get(kind, 0))
    return found


def _remedy(name: str) -> str:
    files = f"{SIGNING_KEY}, {PUBLIC_KEY} and {CHAIN}" if name.startswith(_SIGNING) else FILE
    return f"restore the newest backup of {files} beside the keyring"
