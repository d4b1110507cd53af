"""Keys of HTTP clients in the registry: only their hashes are stored."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import ANYONE, SDK, AuditWriter
from actors.registry.database import Database
from actors.registry.schema import API_KEYS
from tg_tinker.errors import AccessDeniedError, NotFoundError, StorageError
from tg_tinker.types import ApiKeyInfo

_PREFIX = "tgt"


class ApiKeys:
    """The part of the registry that knows who may sample over HTTP."""

    def __init__(self, database: Database, writer: AuditWriter) -> None:
        self._database, self._writer = database, writer

    def create(
        self, tenant: str, label: str, models: Sequence[str], days: float | None
    ) -> tuple[str, ApiKeyInfo]:
        """A new key, which is told here and never again.

        Args:
            models: runs and artifacts it may use; all of the tenant's when empty.
            days: until it expires; None is never.
        """
        identity, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), time.time()
        with self._database.change() as tx:
            tx.execute(
                API_KEYS.insert().values(
                    id=identity, tenant=tenant, label=label, hash=_hash(secret),
                    models=json.dumps(sorted(models)), created_at=now,
                    expires_at=None if days is None else now + 86_400 * days,
                )
            )  # fmt: skip
            self._writer.note(tx, tenant, SDK, "api_key.create", identity)
        (info,) = [known for known in self.of(tenant) if known.key_id == identity]
        return f"{_PREFIX}-{identity}-{secret}", info

    def of(self, tenant: str) -> list[ApiKeyInfo]:
        """All that are not revoked, oldest first."""
        query = (
            sa.select(API_KEYS)
            .where(API_KEYS.c.tenant == tenant, API_KEYS.c.revoked_at.is_(None))
            .order_by(API_KEYS.c.created_at)
        )
        with self._database.reading() as connection:
            return [_info(row) for row in connection.execute(query)]

    def wanted(self, tenant: str) -> bool:
        """Whether this tenant ever made one: to revoke the last opens the door to nobody."""
        query = sa.select(API_KEYS.c.id).where(API_KEYS.c.tenant == tenant).limit(1)
        with self._database.reading() as connection:
            return connection.execute(query).first() is not None

    def revoke(self, tenant: str, key_id: str) -> None:
        """From now on it opens nothing.

        Raises:
            NotFoundError: the tenant has no such key, or it is revoked.
        """
        unrevoked = (
            API_KEYS.c.id == key_id,
            API_KEYS.c.tenant == tenant,
            API_KEYS.c.revoked_at.is_(None),
        )
        with self._database.change() as tx:
            changed = tx.execute(API_KEYS.update().where(*unrevoked).values(revoked_at=time.time()))
            if not changed.rowcount:
                raise NotFoundError(f"no API key {key_id!r}: `tg-tinker api-keys list` names them")
            self._writer.note(tx, tenant, SDK, "api_key.revoke", key_id)

    def check(self, token: str, tenant: str) -> tuple[str, ApiKeyInfo]:
        """The tenant of a key, and what it may do.

        Args:
            tenant: whose audit log gets attempts with keys that were never made.

        Raises:
            AccessDeniedError: unknown, expired or revoked; which of them is not told.
        """
        prefix, _, rest = token.partition("-")
        identity, _, secret = rest.partition("-")
        identity = identity if prefix == _PREFIX else ""
        with self._database.reading() as connection:
            row = connection.execute(
                sa.select(API_KEYS).where(API_KEYS.c.id == identity)
            ).one_or_none()
        stored = row.hash if row is not None else _hash("")
        right = hmac.compare_digest(stored, _hash(secret))
        if row is None or not right or row.revoked_at is not None or _expired(row):
            owner, who = (tenant, ANYONE) if row is None else (row.tenant, f"api-key {row.id}")
            subject = "" if row is None else row.id  # what an unknown key says may be anything
            with suppress(StorageError):
                self._writer.note_refusal(
                    owner, who, "api_key.check", subject, AccessDeniedError.code
                )
            raise AccessDeniedError("this API key opens nothing: it is unknown, expired or revoked")
        return row.tenant, _info(row)


def _hash(secret: str) -> str:
    """Of 256 random bits: nothing slower is needed."""
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
