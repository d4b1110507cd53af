"""Makes, lists and ends the keys of one tenant: those that seal artifacts, and those for HTTP.

A change that an older copy of the registry's database would undo is covered by the store first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tg_tinker.backend import Registry, actors_backend
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import ApiKeyInfo, KeyUses


class Keys:
    """See `ServiceClient` for what each method promises."""

    def __init__(self, registry: Registry, store: str, tenant: str) -> None:
        self._registry, self._store, self._tenant = registry, store, tenant

    # --- of the keyring ----------------------------------------------------------------------

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

    # --- for HTTP ----------------------------------------------------------------------------

    def wants_api_keys(self) -> bool:
        """Whether only who has a key may sample over HTTP."""
        wanted: bool = self._registry.api_keys.wanted(self._tenant)
        return wanted

    def create_api_key(
        self, label: str, models: Sequence[str], days: float | None
    ) -> tuple[str, ApiKeyInfo]:
        if days is not None and not 0 < days < 36_500:
            raise InvalidRequestError(f"days={days} is out of range: it must be in (0, 36500)")
        with actors_backend().covered_change(self._registry, self._store, self._tenant):
            made: tuple[str, ApiKeyInfo] = self._registry.api_keys.create(
                self._tenant, label, list(models), days
            )
        return made

    def api_keys(self) -> list[ApiKeyInfo]:
        keys: list[ApiKeyInfo] = self._registry.api_keys.of(self._tenant)
        return keys

    def revoke_api_key(self, key_id: str) -> None:
        with actors_backend().covered_change(self._registry, self._store, self._tenant):
            self._registry.api_keys.revoke(self._tenant, key_id)
