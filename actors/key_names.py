"""What the registry knows a tenant key by beside its name: two keyrings may both have a `k1`."""

from __future__ import annotations

import sqlalchemy as sa

from actors.database import METADATA, Database
from actors.keys import KeyProvider
from tg_tinker.errors import IntegrityError

_PURPOSE = b"tg-tinker key fingerprint v1"
_KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
)


class KeyNames(Database):
    """The part of the registry that recognises the keys of its keyring."""

    _keyring: KeyProvider

    def _recognise_keys(self) -> None:
        """Notes keys that are new, and refuses another one of a known name: what would be saved
        under it, the right keyring would not open.

        A fingerprint is derived from the key as every derived key is, and opens nothing.

        Raises:
            IntegrityError: this is not the keyring that the registry was used with.
        """
        derived = (self._keyring.derive(_PURPOSE, name) for name in self._keyring.key_ids)
        found = {name: value.hex() for name, value in derived}
        with self._change() as tx:
            known = {row.id: row.fingerprint for row in tx.execute(sa.select(_KEYS))}
            for name in found.keys() & known.keys():
                if found[name] != known[name]:
                    raise IntegrityError(
                        f"key {name!r} of this keyring is another one than the {name!r} that this"
                        " registry was used with: correct `keyring`, or put the right keyring's"
                        " backup back"
                    )
            for name in found.keys() - known.keys():
                tx.execute(_KEYS.insert().values(id=name, fingerprint=found[name]))
