"""Stores the API keys of HTTP clients in the registry, as hashes only.

A key opens only if this registry wrote its row, see `grants`, and the audit log does not say that
it was revoked. Rows of a release without MACs get theirs once. A file beside the signing key says
that this was done, because whoever writes the database could otherwise have it done again, after
adding a row.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter, Details
from actors.registry.database import Database
from actors.registry.grants import MAC, GrantLog, GrantMacs, Told
from actors.registry.lookups import ANYONE
from actors.registry.request_rows import Request
from actors.registry.schema import API_KEYS
from actors.storage.home import SEALED, SEALED_TEXT
from actors.storage.secrets import Secrets
from tg_tinker.errors import AccessDeniedError, NotFoundError
from tg_tinker.storage.files import written
from tg_tinker.types import ApiKeyInfo

_PREFIX = "tgt"

_log = logging.getLogger("tg_tinker")


def seal_older(keys: ApiKeys, folder: Path) -> None:
    """Gives the rows of a release without MACs theirs, once for each folder, and never in a home
    that this release has made. Only a row that the audit log tells of as it is gets one. The others
    open nothing.

    No remote call reaches this: a caller could have forged rows sealed.

    Args:
        folder: The folder of the signing key.
    """
    mark = folder / SEALED
    if mark.exists():
        return
    try:
        with written(mark, SEALED_TEXT) as partial:
            # The mark is whole on the disk, so that only the database can fail from here on.
            keys._seal_rows()
            partial.rename(mark)
    except OSError as error:
        _log.warning(
            "cannot write %s (%s): API keys of an older release open nothing until the folder is"
            " writable",
            mark,
            error.strerror,
        )


class ApiKeys:
    """The part of the registry that knows who may sample over HTTP."""

    def __init__(self, database: Database, writer: AuditWriter, of_home: Secrets) -> None:
        """
        Args:
            of_home: The secrets of the registry, for the MACs of rows.
        """
        self._database, self._writer = database, writer
        self._macs, self._said = GrantMacs(of_home), GrantLog("api_key")

    def create(
        self, tenant: str, label: str, models: Sequence[str], days: float | None
    ) -> tuple[str, ApiKeyInfo]:
        """Makes a new key. Returns the key, which can never be read again, and its description.

        Args:
            models: The runs and artifacts that the key may use. Empty means all of the tenant's.
            days: The number of days until the key expires. None means never.
        """
        identity, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), time.time()
        row: dict[str, Any] = {
            "id": identity, "tenant": tenant, "label": label, "hash": _hash(secret),
            "models": json.dumps(sorted(models)), "created_at": now,
            "expires_at": None if days is None else now + 86_400 * days, "revoked_at": None,
        }  # fmt: skip
        row[MAC] = self._macs.of(API_KEYS, row)
        with self._database.change() as tx:
            tx.execute(API_KEYS.insert().values(row))
            self._writer.note(tx, tenant, SDK, "api_key.create", identity)
        return f"{_PREFIX}-{identity}-{secret}", _info(SimpleNamespace(**row))

    def of(self, tenant: str) -> list[ApiKeyInfo]:
        """Returns all keys of a tenant that may open something, oldest first."""
        query = (
            sa.select(API_KEYS)
            .where(API_KEYS.c.tenant == tenant, API_KEYS.c.revoked_at.is_(None))
            .order_by(API_KEYS.c.created_at)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
            return [_info(row) for row in rows if not self._problem(connection, row)]

    def wanted(self, tenant: str) -> bool:
        """Returns whether this tenant has ever made a key. Requests then need a key, even after the
        last key is revoked, or somebody has removed its row."""
        query = sa.select(API_KEYS.c.id).where(API_KEYS.c.tenant == tenant).limit(1)
        with self._database.reading() as connection:
            if connection.execute(query).first() is not None:
                return True
            told = self._said.told(connection, tenant)
            return bool(told.made) or told.broken

    def revoke(self, tenant: str, key_id: str) -> None:
        """Revokes a key: from now on it gives no access. Of a key whose row others wrote, the row
        is removed.

        Raises:
            NotFoundError: The tenant has no such key, or the key is revoked.
        """
        this = API_KEYS.c.id == key_id
        with self._database.change() as tx:
            row = tx.execute(_BY_ID, {"id": key_id}).one_or_none()
            if row is None or row.tenant != tenant or row.revoked_at is not None:
                raise NotFoundError(
                    f"no API key {key_id!r}: `tg-tinker api-keys list` lists the keys"
                )
            if self._macs.genuine(API_KEYS, row):
                revoked = row._asdict() | {"revoked_at": time.time()}
                revoked[MAC] = self._macs.of(API_KEYS, revoked)
                tx.execute(API_KEYS.update().where(this).values(revoked))
            else:
                tx.execute(API_KEYS.delete().where(this))
            self._writer.note(tx, tenant, SDK, "api_key.revoke", key_id)

    def check(self, token: str, tenant: str) -> tuple[str, ApiKeyInfo]:
        """Returns the tenant that owns a key, and the description of the key.

        Args:
            tenant: The tenant whose audit log records attempts with unknown keys.

        Raises:
            AccessDeniedError: The key is unknown, expired or revoked. The error does not say which.
        """
        prefix, _, rest = token.partition("-")
        identity, _, secret = rest.partition("-")
        identity = identity if prefix == _PREFIX else ""
        with self._database.reading() as connection:
            row: Any = connection.execute(_BY_ID, {"id": identity}).one_or_none()
            genuine = row is not None and self._macs.genuine(API_KEYS, row)
            stored = row.hash if genuine else _hash("")
            right = hmac.compare_digest(stored, _hash(secret)) and genuine
            # Only for the holder of the key: others must not see by the time that there is one.
            ended = right and self._problem_with_log(connection, row) != ""
        if not right or ended or row.revoked_at is not None or _expired(row):
            # An unknown key may be any text, so nothing of it is recorded.
            owner, subject = (row.tenant, row.id) if genuine else (tenant, "")
            # Only the holder of a key knows its secret, and its id is no secret.
            who = f"api-key {subject}" if right else ANYONE
            # After the answer: its time must not tell whether there is a key of this id.
            request = Request(owner, who, "api_key.check", subject, AccessDeniedError.code)
            self._database.requests.ask(request)
            raise AccessDeniedError(
                "this API key gives no access: it is unknown, expired or revoked"
            )
        return row.tenant, _info(row)

    # --- what others may have written --------------------------------------------------------

    def problems(self, tenant: str | None = None) -> dict[str, str]:
        """Returns the keys, by id, whose rows are not as this registry wrote them last, with the
        reason. None means the keys of all tenants."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(API_KEYS)).all()
            tenants = {row.tenant for row in rows} if tenant is None else {tenant}
            mine = [row for row in rows if row.tenant in tenants]
            found = {row.id: why for row in mine if (why := self._problem(connection, row))}
            for one in tenants:
                told = self._said.told(connection, one)
                gone = told.made - told.ended - {row.id for row in rows}
                found |= dict.fromkeys(gone, "its row was removed from the database")
        return found

    def _seal_rows(self) -> None:
        with self._database.change() as tx:
            older = tx.execute(sa.select(API_KEYS).where(API_KEYS.c.mac.is_(None))).all()
            for tenant in sorted({row.tenant for row in older}):
                told = self._said.told(tx, tenant)
                if told.sealed:
                    continue
                rows = [row for row in older if row.tenant == tenant and _as_told(row, told)]
                self._write_macs(tx, rows)
                left = sum(row.tenant == tenant for row in older) - len(rows)
                details: Details = {"keys": len(rows), "refused": left}
                self._writer.note(tx, tenant, SDK, "api_key.seal", "", details)

    def _renew_macs(self, tx: sa.Connection) -> None:
        """Gives each genuine row that the audit log tells of a MAC under the newest version of the
        secret. Then nothing needs the older versions, which somebody may have stolen."""
        found = tx.execute(sa.select(API_KEYS)).all()
        rows = [row for row in found if self._macs.genuine(API_KEYS, row)]
        self._write_macs(
            tx, [row for row in rows if _as_told(row, self._said.told(tx, row.tenant))]
        )

    def _write_macs(self, tx: sa.Connection, rows: Sequence[Any]) -> None:
        for row in rows:
            mac = self._macs.of(API_KEYS, row._asdict())
            tx.execute(API_KEYS.update().where(API_KEYS.c.id == row.id).values(mac=mac))

    def _problem(self, connection: sa.Connection, row: Any) -> str:
        """Returns why a row does not count; an empty text if it is as it was written last."""
        if not row.mac:
            return "its row has no MAC: this registry did not write it, or an older release did"
        if not self._macs.genuine(API_KEYS, row):
            return "its row was changed, or this registry did not write it"
        return self._problem_with_log(connection, row)

    def _problem_with_log(self, connection: sa.Connection, row: Any) -> str:
        """Returns why the audit log does not let a genuine row count; an empty text if it does."""
        if row.revoked_at is not None:
            return ""
        told = self._said.told(connection, row.tenant)
        if row.id in told.ended:
            return "it was revoked, and its earlier row was put back"
        # A row of the log that was changed may have been that of its revocation.
        return "its audit log was changed: `tg-tinker audit-log verify` says where" * told.broken


_BY_ID = sa.select(API_KEYS).where(API_KEYS.c.id == sa.bindparam("id"))


def _as_told(row: Any, told: Told) -> bool:
    """Returns whether the audit log has the creation of a key, and its revocation if and only if
    the row says so."""
    revoked = row.revoked_at is not None
    return not told.broken and row.id in told.made and revoked == (row.id in told.ended)


def _hash(secret: str) -> str:
    """Returns the hash of a secret. The secret has 256 random bits, so no slower hash is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _expired(row: Any) -> bool:
    return row.expires_at is not None and row.expires_at <= time.time()


def _info(row: Any) -> ApiKeyInfo:
    expires = None if row.expires_at is None else datetime.fromtimestamp(row.expires_at, UTC)
    return ApiKeyInfo(
        key_id=row.id,
        label=row.label,
        models=tuple(json.loads(row.models)),
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        expires_at=expires,
    )
