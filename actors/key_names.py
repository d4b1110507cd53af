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
    """The part of the registry that recognises the primary key of its keyring."""

    _keyring: KeyProvider

    def _recognise_key(self) -> None:
        """Notes a primary key that is new, and refuses another one of a known name: what would be
        saved under it, the right keyring would not open.

        A fingerprint is derived from the key as every derived key is, and opens nothing.

        Raises:
            IntegrityError: this is not the keyring that the registry was used with.
        """
        name, derived = self._keyring.derive(_PURPOSE)
        with self._change() as tx:
            known = tx.execute(sa.select(_KEYS.c.fingerprint).where(_KEYS.c.id == name)).scalar()
            if known is None:
                tx.execute(_KEYS.insert().values(id=name, fingerprint=derived.hex()))
        if known not in (None, derived.hex()):
            raise IntegrityError(
                f"key {name!r} of this keyring is another one than the {name!r} that this registry"
                " was used with: correct `keyring`, or put the right keyring's backup back"
            )
