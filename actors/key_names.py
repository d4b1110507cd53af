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

    def _refuse_older_keyring(self) -> None:
        """Before a rotation: of an older copy the next key would have the name of one that is lost
        from it, and the registry would refuse the keyring from then on.

        Raises:
            IntegrityError: a key that was noted is newer than all that are here.
        """
        with self._reading() as connection:
            known = set(connection.execute(sa.select(_KEYS.c.id)).scalars())
        here = self._keyring.key_ids
        lost = [name for name in known.difference(here) if _number(name) > max(map(_number, here))]
        if lost:
            raise IntegrityError(
                f"this keyring is an older copy: it lacks {', '.join(sorted(lost))}, which this"
                " registry has used. Put the newest copy back; nothing was changed"
            )


def _number(key_id: str) -> int:
    """Of a key's name `k7`; 0 where a provider names keys otherwise."""
    return int(key_id[1:]) if key_id[:1] == "k" and key_id[1:].isdecimal() else 0
