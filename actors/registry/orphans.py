"""What a sweep remembers, in the registry: orphans it saw in a store, and those it removes.

An orphan that is to be removed is buried first, in the transaction that makes sure that it is
none of the artifacts. `artifacts` enters no buried name, in its own transaction. So of a
sweep and a slow save exactly one gets its way, and whoever comes second knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter, Details
from actors.registry.catalogue import reaches
from actors.registry.database import Database
from actors.registry.schema import ORPHANS
from tg_tinker.errors import StorageError


class Seen(NamedTuple):
    """An orphan as a sweep found it.

    Attributes:
        fingerprint: of its files' names, sizes and times.
        at: when it was first so, in seconds by the store's clock.
        buried: it is being removed, and its name is never published.
    """

    fingerprint: str
    at: float
    buried: bool


class Orphans:
    """The part of the registry that remembers what lies in a store and belongs to nothing."""

    def __init__(self, database: Database, writer: AuditWriter) -> None:
        self._database, self._writer = database, writer

    def of(self, tenant: str) -> dict[str, Seen]:
        """What earlier sweeps saw, by name."""
        query = sa.select(ORPHANS).where(ORPHANS.c.tenant == tenant)
        with self._database.reading() as connection:
            rows = connection.execute(query)
            return {row.name: Seen(row.fingerprint, row.seen_at, row.buried) for row in rows}

    def note(self, tenant: str, fingerprints: Mapping[str, str], now: float) -> None:
        """Remembers orphans as they are at `now`, in seconds by the store's clock.

        One that is never asked for again does no harm: it counts with the same fingerprint only.
        """
        this = (ORPHANS.c.tenant == tenant, ORPHANS.c.name == sa.bindparam("called"))
        with self._database.change() as tx:
            buried = sa.select(ORPHANS.c.name).where(ORPHANS.c.tenant == tenant, ORPHANS.c.buried)
            graves = set(tx.execute(buried).scalars())  # another sweep's, dug just now
            for name in fingerprints.keys() - graves:
                tx.execute(ORPHANS.delete().where(*this), {"called": name})
                values = {"tenant": tenant, "name": name, "fingerprint": fingerprints[name]}
                tx.execute(ORPHANS.insert().values(seen_at=now, buried=False, **values))

    def bury(self, tenant: str, name: str, files: int, size_bytes: int) -> bool:
        """Decides that an orphan is removed: from now on nothing of its name is published.

        False, and nothing is decided, if it has become an artifact or no sweep has seen it.
        """
        this = (ORPHANS.c.tenant == tenant, ORPHANS.c.name == name)
        with self._database.change() as tx:
            buried = tx.execute(sa.select(ORPHANS.c.buried).where(*this)).scalar()
            if buried is None or reaches(tx, tenant, name):
                return False
            if not buried:
                tx.execute(ORPHANS.update().where(*this).values(buried=True))
                details: Details = {"files": files, "size_bytes": size_bytes}
                self._writer.note(tx, tenant, SDK, "artifact.sweep", name, details)
        return True


def refuse_buried(tx: sa.Connection, tenant: str, name: str) -> None:
    """For whoever makes a folder reachable, in the same transaction.

    Raises:
        StorageError: a sweep removes its files.
    """
    this = (ORPHANS.c.tenant == tenant, ORPHANS.c.name == name)
    if tx.execute(sa.select(ORPHANS.c.buried).where(*this)).scalar():
        raise StorageError(
            "a sweep took the new files of this artifact for left over, as nothing was added"
            " for longer than its min_age, and removes them: nothing else is affected. Repeat"
            " the call, and sweep with a larger min_age",
            details={"reason": "swept"},
        )
