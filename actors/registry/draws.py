"""Makes the Poisson draws of a dataset from its draw key, and ratchets that key.

Each dataset has one stream of draws, at positions 0, 1, 2, and so on. A unit is drawn at position n
if its uniform number is below the rate. The number is AES-256 of the unit's keyed hash, under a key
derived from the draw key K_n and n: a pseudorandom permutation of distinct blocks, so the numbers
of the units are independent to anybody who lacks K_n. Neither the order of the units nor a repeated
unit changes a number.

When position n is used or given up, K_(n+1) = HMAC(K_n) replaces K_n in the same transaction.
Whoever reads the database and the keyring later cannot compute the draws of earlier positions from
them. What remains: backups, the -wal file of SQLite and unvacuumed rows of PostgreSQL may hold
earlier keys, wrapped under a tenant key, until they are deleted or overwritten.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from dataclasses import dataclass

import sqlalchemy as sa

from actors.registry.schema import DATASETS
from actors.storage.key_providers import KeyProvider
from actors.storage.keyring import parse_wrapped
from tg_tinker.storage.envelope import context_of, new_key, permuted

BLOCK = 16
"""Bytes of a unit's hash, and of a block of AES."""

_STEP, _NEXT = b"tg-tinker draw v1\0", b"tg-tinker next draw key v1"
_UNITS = b"tg-tinker drawn units v1\0"


@dataclass(frozen=True)
class Draw:
    """A draw as its run is told it.

    Attributes:
        position: the position in the stream of the dataset.
        units: the keyed digest of the list of units that it was drawn from.
        drawn: the indices of the drawn units in that list, ascending.
        place: the position of the ledger's end, ``SEQ-HASH``.
    """

    position: int
    units: str
    drawn: list[int]
    place: str


def drawn_of(key: bytes, position: int, units: bytes, rate: float) -> list[int]:
    """Returns the indices of the drawn units, ascending.

    Args:
        key: the draw key of this position.
        units: the keyed hashes of all units, `BLOCK` bytes each.
        rate: the probability of each unit, exact to 2^-53.
    """
    step = hmac.digest(key, _STEP + position.to_bytes(8, "big"), hashlib.sha256)
    words = memoryview(permuted(step, units)).cast("Q")[:: BLOCK // 8]
    # With the upper 53 bits, x / 2^53 < rate holds for exactly the integers x below this bound.
    bound = math.ceil(rate * 2**53) << 11
    return [index for index, word in enumerate(words) if word < bound]


def digest_of(unit_key: bytes, position: int, units: bytes) -> str:
    """Returns a keyed digest of a list of units, in hex. Digests of two positions tell nothing of
    whether their lists are equal."""
    key = hmac.digest(unit_key, _UNITS + position.to_bytes(8, "big"), hashlib.sha256)
    return hmac.digest(key, units, hashlib.sha256).hex()


class DrawKeys:
    """The draw keys of all datasets, wrapped in the database. They never leave this process."""

    def __init__(self, keyring: KeyProvider) -> None:
        self._keyring = keyring

    def key(self, tx: sa.Connection, tenant: str, dataset: str, position: int) -> bytes:
        """Returns the draw key of the ledger's present position, and makes it when it is first
        needed."""
        stored = self._stored(tx, tenant, dataset, position)
        if stored is None:
            stored = new_key()
            self._store(tx, tenant, dataset, position, stored)
        return stored

    def advance(self, tx: sa.Connection, tenant: str, dataset: str, position: int) -> None:
        """Replaces the draw key, if there is one, by that of a later position."""
        key = self._stored(tx, tenant, dataset, position)
        if key is not None:
            self._store(tx, tenant, dataset, position, key)

    def replace(self, tx: sa.Connection, tenant: str, dataset: str) -> None:
        """Forgets the draw key. The next draw has a new key, which follows from no earlier key."""
        tx.execute(_of(tenant, dataset).values(draw_position=None, wrapped_draw_key=None))

    def rewrap(self, tx: sa.Connection, row: sa.Row[tuple[object]]) -> None:
        """Wraps the draw key of a dataset, if there is one, under the keyring's primary key.

        Raises:
            IntegrityError: it cannot be unwrapped.
        """
        if row.wrapped_draw_key is not None:
            self.advance(tx, row.tenant, row.id, row.draw_position)

    def _stored(
        self, tx: sa.Connection, tenant: str, dataset: str, position: int
    ) -> bytes | None:  # fmt: skip
        query = sa.select(DATASETS.c.draw_position, DATASETS.c.wrapped_draw_key).where(
            DATASETS.c.tenant == tenant, DATASETS.c.id == dataset
        )
        at, wrapped = tx.execute(query).one()
        if wrapped is None:
            return None
        key = self._keyring.unwrap(
            parse_wrapped(wrapped.encode()), _context(tenant, dataset, at)
        )  # fmt: skip
        for _ in range(at, position):
            key = hmac.digest(key, _NEXT, hashlib.sha256)
        return key

    def _store(
        self, tx: sa.Connection, tenant: str, dataset: str, position: int, key: bytes
    ) -> None:
        wrapped = json.dumps(self._keyring.wrap(key, _context(tenant, dataset, position)))
        values = {"draw_position": position, "wrapped_draw_key": wrapped}
        tx.execute(_of(tenant, dataset).values(values))


def _of(tenant: str, dataset: str) -> sa.Update:
    return DATASETS.update().where(DATASETS.c.tenant == tenant, DATASETS.c.id == dataset)


def _context(tenant: str, dataset: str, position: int) -> bytes:
    return context_of(tenant, dataset, f"draw key {position}")
