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

from actors.registry.audit_log import ANYONE, SDK, AuditLog
from actors.registry.database import METADATA
from tg_tinker.errors import AccessDeniedError, NotFoundError, StorageError
from tg_tinker.types import ApiKeyInfo

_keys = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("models", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
)
_PREFIX = "tgt"


class ApiKeys(AuditLog):
    """The part of the registry that knows who may sample over HTTP."""

    def create_api_key(
        self, tenant: str, label: str, models: Sequence[str], days: float | None
    ) -> tuple[str, ApiKeyInfo]:
        """A new key, which is told here and never again.

        Args:
            models: runs and artifacts it may use; all of the tenant's when empty.
            days: until it expires; None is never.
        """
        identity, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), time.time()
        with self._change() as tx:
            tx.execute(
                _keys.insert().values(
                    id=identity, tenant=tenant, label=label, hash=_hash(secret),
                    models=json.dumps(sorted(models)), created_at=now,
                    expires_at=None if days is None else now + 86_400 * days,
                )
            )  # fmt: skip
            self._note(tx, tenant, SDK, "api_key.create", identity)
        (info,) = [known for known in self.api_keys(tenant) if known.key_id == identity]
        return f"{_PREFIX}-{identity}-{secret}", info

    def api_keys(self, tenant: str) -> list[ApiKeyInfo]:
        """All that are not revoked, oldest first."""
        query = (
            sa.select(_keys)
            .where(_keys.c.tenant == tenant, _keys.c.revoked_at.is_(None))
            .order_by(_keys.c.created_at)
        )
        with self._reading() as connection:
            return [_info(row) for row in connection.execute(query)]

    def wants_api_keys(self, tenant: str) -> bool:
        """Whether this tenant ever made one: to revoke the last opens the door to nobody."""
        query = sa.select(_keys.c.id).where(_keys.c.tenant == tenant).limit(1)
        with self._reading() as connection:
            return connection.execute(query).first() is not None

    def revoke_api_key(self, tenant: str, key_id: str) -> None:
        """From now on it opens nothing.

        Raises:
            NotFoundError: the tenant has no such key, or it is revoked.
        """
        unrevoked = (_keys.c.id == key_id, _keys.c.tenant == tenant, _keys.c.revoked_at.is_(None))
        with self._change() as tx:
            changed = tx.execute(_keys.update().where(*unrevoked).values(revoked_at=time.time()))
            if not changed.rowcount:
                raise NotFoundError(f"no API key {key_id!r}: `tg-tinker api-keys list` names them")
            self._note(tx, tenant, SDK, "api_key.revoke", key_id)

    def check_api_key(self, token: str, tenant: str) -> tuple[str, ApiKeyInfo]:
        """The tenant of a key, and what it may do.

        Args:
            tenant: whose audit log gets attempts with keys that were never made.

        Raises:
            AccessDeniedError: unknown, expired or revoked; which of them is not told.
        """
        prefix, _, rest = token.partition("-")
        identity, _, secret = rest.partition("-")
        identity = identity if prefix == _PREFIX else ""
        with self._reading() as connection:
            row = connection.execute(sa.select(_keys).where(_keys.c.id == identity)).one_or_none()
        stored = row.hash if row is not None else _hash("")
        right = hmac.compare_digest(stored, _hash(secret))
        if row is None or not right or row.revoked_at is not None or _expired(row):
            owner, who = (tenant, ANYONE) if row is None else (row.tenant, f"api-key {row.id}")
            subject = "" if row is None else row.id  # what an unknown key says may be anything
            with suppress(StorageError):
                self._note_refusal(owner, who, "api_key.check", subject, AccessDeniedError.code)
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
