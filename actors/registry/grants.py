"""Holds rows that grant access against what whoever writes the database cannot make.

A row that grants has a MAC under a key of the registry, so nobody else can make or change one. A
MAC does not tell a row of today from a copy of it that was put back. Therefore the audit log, whose
heads the artifact store keeps, says which grants were ended, and only as long as it is whole.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from actors.registry.schema import AUDIT_ROWS
from actors.storage.secrets import API_KEY_ROWS, Secrets
from tg_tinker.errors import IntegrityError
from tg_tinker.records.audit_log import GENESIS, AuditRow, continued

MAC = "mac"
"""The column of a table of grants that has the MAC of the other columns."""

_PURPOSE = b"tg-tinker api-key rows v1"


class GrantMacs:
    """Makes the MACs of rows that grant access.

    Args:
        secrets: The secrets of the registry. Rows that were made before a rotation stay genuine
            until the older versions are retired.
    """

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    def of(self, table: sa.Table, values: Mapping[str, Any]) -> str:
        """Returns the MAC of a row: over the name of its table and all its other columns.

        Args:
            values: What this registry writes, or has read and found genuine. What a database
                returns for a row that was just written may be what a trigger made of it.
        """
        return _mac(self._secrets.newest(API_KEY_ROWS, _PURPOSE), table, values)

    def genuine(self, table: sa.Table, row: sa.Row[Any]) -> bool:
        """Returns whether this registry wrote a row as it is, now or earlier."""
        values = row._asdict()
        found = str(values[MAC]).encode("utf-8", "replace")
        keys = self._secrets.keys(API_KEY_ROWS, _PURPOSE).values()
        return any(hmac.compare_digest(_mac(key, table, values).encode(), found) for key in keys)


def _mac(key: bytes, table: sa.Table, values: Mapping[str, Any]) -> str:
    names = [column.name for column in table.columns if column.name != MAC]
    fields = {name: values[name] for name in names}
    # A column of SQLite may hold anything, even what JSON cannot.
    text = json.dumps([table.name, fields], sort_keys=True, default=repr)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


@dataclass
class Told:
    """What the audit log of a tenant says about grants of one kind, up to a row.

    Attributes:
        made, ended: The ids of the grants that were made, and of those that were ended. What this
            process has once read stays, even if the log loses it.
        sealed: Whether rows of an older release have their MACs.
        broken: Whether a row does not continue the row before it. Then nobody knows what the log
            said before others changed it.
    """

    made: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    sealed: bool = False
    broken: bool = False
    seq: int = 0
    hash: str = GENESIS


_END = sa.select(sa.func.max(AUDIT_ROWS.c.seq)).where(AUDIT_ROWS.c.tenant == sa.bindparam("tenant"))
_SINCE = (
    sa.select(AUDIT_ROWS.c.seq, AUDIT_ROWS.c.row)
    .where(AUDIT_ROWS.c.tenant == sa.bindparam("tenant"), AUDIT_ROWS.c.seq > sa.bindparam("since"))
    .order_by(AUDIT_ROWS.c.seq)
    .limit(10_000)
)


class GrantLog:
    """Reads what audit logs say about grants of one kind. Each call reads only the rows that are
    new to this process.

    It follows the hash chain. A store keeps heads of a log, and a head proves a row only together
    with all rows before it: otherwise whoever writes the database could change the row that ends a
    grant, and leave the hash that the row states.

    Args:
        kind: The part of an event's name before the dot: `KIND.create` makes a grant, `KIND.revoke`
            ends it, and `KIND.seal` records that older rows have their MACs.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._told: dict[str, Told] = {}
        self._lock = threading.Lock()

    def told(self, connection: sa.Connection, tenant: str) -> Told:
        with self._lock:
            told = self._told.setdefault(tenant, Told())
            if told.broken or not self._follows(connection, tenant, told):
                # The database may be another or an older one: its log may be whole, and say more.
                told.seq, told.hash = 0, GENESIS
                told.broken = not self._follows(connection, tenant, told)
            return told

    def _follows(self, connection: sa.Connection, tenant: str, told: Told) -> bool:
        """Reads the rows that are new; returns whether each continues the row before it."""
        end = connection.execute(_END, {"tenant": tenant}).scalar() or 0
        while told.seq < end:
            rows = connection.execute(_SINCE, {"tenant": tenant, "since": told.seq}).all()
            for seq, line in rows:
                found = continued(told.hash, line) if seq == told.seq + 1 else None
                if found is None:
                    return False
                told.seq, (told.hash, body) = seq, found
                if f'"event":"{self._kind}.' in body:
                    try:
                        self._read(told, AuditRow.parse(line))
                    except IntegrityError:
                        return False
        return told.seq == end

    def _read(self, told: Told, row: AuditRow) -> None:
        if row.outcome != "ok":
            return
        match row.event.removeprefix(f"{self._kind}."):
            case "create":
                told.made.add(row.subject)
            case "revoke":
                told.ended.add(row.subject)
            case "seal":
                told.sealed = True
