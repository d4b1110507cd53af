"""Stores what a sweep remembers: the orphans that it saw in a store, and those that it removes.

Before an orphan is removed, it is buried, in the transaction that verifies that it belongs to no
artifact. `artifacts` refuses a buried name, in the transaction that would publish it. Therefore
exactly one of a sweep and a slow save succeeds, and the one that comes second learns of it.
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
        fingerprint: The fingerprint of its files' names, sizes and times.
        at: When it first had this fingerprint, in seconds by the store's clock.
        buried: Whether it is being removed; its name is then never published.
    """

    fingerprint: str
    at: float
    buried: bool


class Orphans:
    """The part of the registry that remembers files in a store that belong to no artifact."""

    def __init__(self, database: Database, writer: AuditWriter) -> None:
        self._database, self._writer = database, writer

    def of(self, tenant: str) -> dict[str, Seen]:
        """Returns the orphans that earlier sweeps saw, by name."""
        query = sa.select(ORPHANS).where(ORPHANS.c.tenant == tenant)
        with self._database.reading() as connection:
            rows = connection.execute(query)
            return {row.name: Seen(row.fingerprint, row.seen_at, row.buried) for row in rows}

    def note(self, tenant: str, fingerprints: Mapping[str, str], now: float) -> None:
        """Records orphans as they are at `now`, in seconds by the store's clock.

        A record that no sweep asks for again does no harm: it counts only with the same
        fingerprint.
        """
        this = (ORPHANS.c.tenant == tenant, ORPHANS.c.name == sa.bindparam("called"))
        with self._database.change() as tx:
            buried = sa.select(ORPHANS.c.name).where(ORPHANS.c.tenant == tenant, ORPHANS.c.buried)
            # Another sweep may have buried some of them meanwhile.
            graves = set(tx.execute(buried).scalars())
            for name in fingerprints.keys() - graves:
                tx.execute(ORPHANS.delete().where(*this), {"called": name})
                values = {"tenant": tenant, "name": name, "fingerprint": fingerprints[name]}
                tx.execute(ORPHANS.insert().values(seen_at=now, buried=False, **values))

    def bury(self, tenant: str, name: str, files: int, size_bytes: int) -> bool:
        """Decides that an orphan is removed: from now on its name is never published. Returns True.

        Returns False, and decides nothing, if the orphan has become an artifact or no sweep has
        seen it.
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
    """Refuses a buried name. It runs in the transaction that makes a folder reachable.

    Raises:
        StorageError: A sweep removes the files of this name.
    """
    this = (ORPHANS.c.tenant == tenant, ORPHANS.c.name == name)
    if tx.execute(sa.select(ORPHANS.c.buried).where(*this)).scalar():
        raise StorageError(
            "a sweep removes the new files of this artifact, because none was added for longer"
            " than its min_age: nothing else is affected. Repeat the call, and sweep with a larger"
            " min_age",
            details={"reason": "swept"},
        )
