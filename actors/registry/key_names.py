"""What the registry knows a tenant key by beside its name: two keyrings may both have a `k1`."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from actors.registry.database import Database
from actors.registry.schema import KEYS
from actors.storage.key_providers import KeyProvider
from tg_tinker.errors import IntegrityError

_PURPOSE = b"tg-tinker key fingerprint v1"


class KeyNames:
    """The part of the registry that recognises the keys of its keyring."""

    def __init__(self, database: Database, keyring: KeyProvider) -> None:
        self._database, self._keyring = database, keyring

    def recognise(self) -> None:
        """Notes keys that are new, and refuses another one of a known name: what would be saved
        under it, the right keyring would not open.

        A fingerprint is derived from the key as every derived key is, and opens nothing.

        Raises:
            IntegrityError: this is not the keyring that the registry was used with.
        """
        found = self._fingerprints_here()
        with self._database.change() as tx:
            known = _fingerprints(tx)
            _refuse_another(found, known)
            for place, name in enumerate(name for name in found if name not in known):
                row = {"id": name, "fingerprint": found[name], "place": len(known) + place}
                tx.execute(KEYS.insert().values(row))

    def compare(self) -> None:
        """The same, and notes nothing."""
        with self._database.reading() as connection:
            _refuse_another(self._fingerprints_here(), _fingerprints(connection))

    def _fingerprints_here(self) -> dict[str, str]:
        derived = (self._keyring.derive(_PURPOSE, name) for name in self._keyring.key_ids)
        return {name: value.hex() for name, value in derived}

    def noted(self) -> list[str]:
        """Names of all keys that were ever seen, the oldest first."""
        with self._database.reading() as connection:
            return [*_fingerprints(connection)]

    def missing(self) -> list[str]:
        """Keys that were first seen after all that are here: the keyring is an older copy. What was
        retired is not among them, for a rotation came after it."""
        here = set(self._keyring.key_ids)
        known = self.noted()
        newest = max((place for place, name in enumerate(known) if name in here), default=-1)
        return known[newest + 1 :]


def _fingerprints(connection: sa.Connection) -> dict[str, str]:
    """By name, in the order in which they were first seen."""
    rows = connection.execute(sa.select(KEYS).order_by(KEYS.c.place))
    return {row.id: row.fingerprint for row in rows}


def _refuse_another(found: Mapping[str, str], known: Mapping[str, str]) -> None:
    remedy = "correct `keyring`, or put the right keyring's backup back"
    for name in found.keys() & known.keys():
        if found[name] != known[name]:
            raise IntegrityError(
                f"key {name!r} of this keyring is another one than the {name!r} that this registry"
                f" was used with: {remedy}"
            )
