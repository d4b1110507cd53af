"""What a sweep remembers, in the registry: orphans it saw in a store, and those it removes.

An orphan that is to be removed is buried first, in the transaction that makes sure that it is
none of the artifacts. `artifact_index` enters no buried name, in its own transaction. So of a
sweep and a slow save exactly one gets its way, and whoever comes second knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditLog, Details
from actors.registry.database import METADATA
from tg_tinker.errors import StorageError

_orphans = sa.Table(
    "orphans",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("buried", sa.Boolean, nullable=False),
)


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


class Orphans(AuditLog):
    """The part of the registry that remembers what lies in a store and belongs to nothing."""

    def _reaches(self, connection: sa.Connection, tenant: str, name: str) -> bool:
        """Whether an artifact of this tenant needs a folder; `Registry` knows."""
        raise NotImplementedError

    def orphans(self, tenant: str) -> dict[str, Seen]:
        """What earlier sweeps saw, by name."""
        query = sa.select(_orphans).where(_orphans.c.tenant == tenant)
        with self._reading() as connection:
            rows = connection.execute(query)
            return {row.name: Seen(row.fingerprint, row.seen_at, row.buried) for row in rows}

    def note_orphans(self, tenant: str, fingerprints: Mapping[str, str], now: float) -> None:
        """Remembers orphans as they are at `now`, in seconds by the store's clock.

        One that is never asked for again does no harm: it counts with the same fingerprint only.
        """
        this = (_orphans.c.tenant == tenant, _orphans.c.name == sa.bindparam("called"))
        with self._change() as tx:
            buried = sa.select(_orphans.c.name).where(
                _orphans.c.tenant == tenant, _orphans.c.buried
            )
            graves = set(tx.execute(buried).scalars())  # another sweep's, dug just now
            for name in fingerprints.keys() - graves:
                tx.execute(_orphans.delete().where(*this), {"called": name})
                values = {"tenant": tenant, "name": name, "fingerprint": fingerprints[name]}
                tx.execute(_orphans.insert().values(seen_at=now, buried=False, **values))

    def bury(self, tenant: str, name: str, files: int, size_bytes: int) -> bool:
        """Decides that an orphan is removed: from now on nothing of its name is published.

        False, and nothing is decided, if it has become an artifact or no sweep has seen it.
        """
        this = (_orphans.c.tenant == tenant, _orphans.c.name == name)
        with self._change() as tx:
            buried = tx.execute(sa.select(_orphans.c.buried).where(*this)).scalar()
            if buried is None or self._reaches(tx, tenant, name):
                return False
            if not buried:
                tx.execute(_orphans.update().where(*this).values(buried=True))
                details: Details = {"files": files, "size_bytes": size_bytes}
                self._note(tx, tenant, SDK, "artifact.sweep", name, details)
        return True

    def _refuse_buried(self, tx: sa.Connection, tenant: str, name: str) -> None:
        """For whoever makes a folder reachable, in the same transaction.

        Raises:
            StorageError: a sweep removes its files.
        """
        this = (_orphans.c.tenant == tenant, _orphans.c.name == name)
        if tx.execute(sa.select(_orphans.c.buried).where(*this)).scalar():
            raise StorageError(
                "a sweep took the new files of this artifact for left over, as nothing was added"
                " for longer than its min_age, and removes them: nothing else is affected. Repeat"
                " the call, and sweep with a larger min_age",
                details={"reason": "swept"},
            )
