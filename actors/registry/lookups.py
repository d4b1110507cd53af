"""Finds artifacts and runs by name. Every lookup by a name that a caller gives goes through here.

A lookup of something that another tenant owns finds nothing, and the log of the owner gets a row
once the caller has its answer. A lookup of a name that never was costs the same and leaves no row.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from actors.registry.database import requests_of
from actors.registry.request_rows import Request
from actors.registry.schema import ARTIFACTS, RUNS
from tg_tinker.errors import AccessDeniedError

ANYONE = "anyone"
"""The name in the audit log of a caller of whom the owner of the log learns nothing."""

# Built once: building a statement in SQLAlchemy takes longer than running it in the database.
_BY_ID = {table: sa.select(table).where(table.c.id == sa.bindparam("id"))
          for table in (ARTIFACTS, RUNS)}  # fmt: skip
_EVENTS = {ARTIFACTS: "artifact.ask", RUNS: "run.ask"}


def owned(
    connection: sa.Connection, table: sa.Table, tenant: str, identity: str, *, new: bool = False
) -> Any:
    """Returns the row of an artifact, which may be deleted, or of a run. Returns None if the
    tenant has none of this name.

    Args:
        table: `ARTIFACTS` or `RUNS`.
        new: Whether the caller wants a name that nothing has yet.
    """
    row = connection.execute(_BY_ID[table], {"id": identity}).one_or_none()
    if row is not None and row.tenant == tenant:
        return row
    if row is not None:
        code = AccessDeniedError.code
        requests_of(connection).ask(Request(row.tenant, ANYONE, _EVENTS[table], identity, code))
    elif not new:
        requests_of(connection).ask(None)
    return None


def exists(connection: sa.Connection, table: sa.Table, identity: str) -> bool:
    """Returns whether any tenant has, or had, an artifact or a run of this name. Callers that want
    a new name learn this; nobody else may."""
    return connection.execute(_BY_ID[table], {"id": identity}).first() is not None
