"""Manages the keys of one tenant: the tenant keys that wrap data keys, and the API keys for HTTP.

A change to an API key first checks the registry against the store, and then puts a head of the
audit log into the store. If the store takes this head, a later rollback of the registry's database
cannot undo the change undetected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tg_tinker.backend import Registry, actors_backend
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import ApiKeyInfo, KeyUses


class Keys:
    """The part of `ServiceClient` about keys; `ServiceClient` documents each method."""

    def __init__(self, registry: Registry, store: str, tenant: str) -> None:
        self._registry, self._store, self._tenant = registry, store, tenant

    # --- tenant keys -------------------------------------------------------------------------

    def uses(self) -> KeyUses:
        found: KeyUses = actors_backend().key_uses(self._registry, self._store)
        return found

    def rotate(self) -> str:
        key_id: str = actors_backend().rotate_key(self._registry, self._store, self._tenant)
        return key_id

    def rewrap(self) -> Iterator[tuple[str, str]]:
        yield from actors_backend().rewrap_keys(self._registry, self._store)

    def retire(self, key_id: str) -> None:
        actors_backend().retire_key(self._registry, self._store, self._tenant, key_id)

    # --- the other keys of the home ----------------------------------------------------------

    def rotate_audit(self) -> str:
        key: str = actors_backend().rotate_signing_key(self._registry, self._store)
        return key

    def rotate_secret(self, name: str) -> int:
        version: int = actors_backend().rotate_secret(
            self._registry, self._store, self._tenant, name
        )
        return version

    def retire_secret(self, name: str) -> None:
        actors_backend().retire_secret(self._registry, self._store, self._tenant, name)

    # --- API keys ----------------------------------------------------------------------------

    def wants_api_keys(self) -> bool:
        """Returns whether sampling over HTTP requires an API key of the tenant.

        An API key is required once the tenant has created one, even if all keys are revoked.
        """
        wanted: bool = self._registry.api_keys.wanted(self._tenant)
        return wanted

    def create_api_key(
        self, label: str, models: Sequence[str] | None, days: float | None
    ) -> tuple[str, ApiKeyInfo]:
        # A list that a filter left empty must not become a key to everything.
        if models is not None and (
            isinstance(models, str) or not models or not all(isinstance(m, str) for m in models)
        ):
            raise InvalidRequestError(
                "models must be a list with at least one id of a run or artifact, or None for all"
            )
        if days is not None and not 0 < days < 36_500:
            raise InvalidRequestError(
                f"days={days} is out of range: it must be in (0, 36500), or None for no expiry"
            )
        with actors_backend().covered_change(self._registry, self._store, self._tenant):
            made: tuple[str, ApiKeyInfo] = self._registry.api_keys.create(
                self._tenant, label, list(models or ()), days
            )
        return made

    def api_keys(self) -> list[ApiKeyInfo]:
        keys: list[ApiKeyInfo] = self._registry.api_keys.of(self._tenant)
        return keys

    def revoke_api_key(self, key_id: str) -> None:
        with actors_backend().covered_change(self._registry, self._store, self._tenant):
            self._registry.api_keys.revoke(self._tenant, key_id)
