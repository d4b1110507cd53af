"""The part of `ServiceClient` that is about a registry whose database was put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tg_tinker.backend import provided
from tg_tinker.types import RegistryAcceptance, RegistryCheck


class RegistryCalls:
    """Tells whether the database is an older copy, and goes on from one."""

    _home: Path
    _registry: Any
    _store: str
    _tenant: str

    def check_registry(self) -> RegistryCheck:
        """Holds the database against all that the store and this home know of this tenant.

        Raises:
            StorageError: the store does not answer, so nobody knows.
        """
        found: RegistryCheck = provided("check_registry")(
            self._registry, self._store, self._tenant, self._home
        )
        return found

    def accept_registry(self) -> RegistryAcceptance:
        """Goes on from an older copy of the database, for when no newer one is left.

        The loss becomes a row of the audit log, which names the heads of what is lost; from then
        on they count as known. What was deleted after the copy was made is no longer deleted, what
        was saved since is left over. Ledgers are not accepted: see `book_missing_charges`.

        Raises:
            StorageError: the store does not answer. Either nothing was accepted, or, as the message
                then says, another call goes on.
        """
        accepted: RegistryAcceptance = provided("accept_registry")(
            self._registry, self._store, self._tenant, self._home
        )
        return accepted
