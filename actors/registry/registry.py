"""The registry: one database of runs, artifacts, ledgers and audit logs that outlives Ray clusters.

    registry.runs         which actor owns a run, and the run's last step
    registry.catalogue    which artifacts exist, their labels and expiry
    registry.artifacts    publishing, resealing and deleting artifacts
    registry.orphans      what a sweep remembers of a store
    registry.ledgers      budgets of datasets: check and charge in one transaction
    registry.audit_log    who did what
    registry.heads        comparing ledgers and log with the heads that a store keeps
    registry.api_keys     who may sample over HTTP
    registry.data_keys    who receives the data key of an artifact; the tenant's keys
    registry.home_keys    rotating the signing key and the secrets beside it

Only the registry holds keys. It is a plain object; `actor` wraps it in a Ray actor,
and remote calls name the part. Every change is one immediate transaction, and all lasting state is
in the database.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import cast

from actors.registry.api_keys import ApiKeys, seal_older
from actors.registry.artifacts import Artifacts
from actors.registry.audit_log import AuditLog, AuditWriter
from actors.registry.book import Book
from actors.registry.catalogue import Catalogue
from actors.registry.data_keys import DataKeys
from actors.registry.database import Database
from actors.registry.heads import Heads, InTurn
from actors.registry.home_keys import HomeKeys
from actors.registry.key_names import KeyNames
from actors.registry.ledgers import Ledgers
from actors.registry.orphans import Orphans
from actors.registry.runs import Runs
from actors.storage.key_providers import open_keyring
from actors.storage.secrets import Secrets
from actors.storage.signing import SigningKey
from tg_tinker.errors import StorageError

PARTS = {
    "api_keys": ApiKeys,
    "artifacts": Artifacts,
    "audit_log": AuditLog,
    "catalogue": Catalogue,
    "data_keys": DataKeys,
    "heads": Heads,
    "home_keys": HomeKeys,
    "ledgers": Ledgers,
    "orphans": Orphans,
    "runs": Runs,
}
"""The parts that remote calls may name. Every client of the cluster may call the public methods of
each part."""


class Registry:
    """The parts of the registry over one database."""

    def __init__(
        self, database: str, keyring: str | os.PathLike[str], audit_keys: Path | None = None,
        *, sole: bool = False, looks_only: bool = False,
    ) -> None:  # fmt: skip
        """Opens the database and the keyring, and checks the other files of keys.

        Args:
            keyring: The path of a keyring file, or ``env:NAME``.
            audit_keys: The folder of the signing key and the secrets. None means the folder of the
                keyring file.
            sole: True fences registries that were opened earlier: they can change nothing from now
                on. False lets this registry work beside them. That is equally safe, because no
                registry relies on its memory alone.
            looks_only: Changes nothing, for callers that promise this: no rows, no tables, and no
                record of known keys. An operation that would change something raises StorageError.
        """
        keys = open_keyring(keyring)
        folder = audit_keys or Path(keyring).parent
        signing, secrets = SigningKey(folder), Secrets(folder)
        self.database = opened = Database(database, looks_only=looks_only)
        key_names = KeyNames(opened, keys, signing, secrets)
        if looks_only:
            key_names.compare()
        else:
            key_names.recognize()
        writer = AuditWriter(opened, keys, signing)
        book = Book(writer, keys)
        self.audit_log = AuditLog(opened, writer, signing)
        self.api_keys = ApiKeys(opened, writer, secrets)
        self.catalogue = Catalogue(opened, writer)
        self.orphans = Orphans(opened, writer)
        self.artifacts = Artifacts(opened, writer, self.catalogue, keys)
        self.runs = Runs(opened, writer, book)
        self.ledgers = Ledgers(opened, writer, book)
        self.heads = Heads(opened, writer, self.audit_log, book, signing, secrets)
        self.data_keys = DataKeys(
            opened, writer, book, self.catalogue, self.heads, key_names, keys, secrets
        )  # fmt: skip
        self.home_keys = HomeKeys(
            opened, writer, self.audit_log, key_names, self.api_keys, signing, secrets
        )  # fmt: skip
        if sole:
            opened.fence_others()
        if not looks_only:
            seal_older(self.api_keys, folder)

    def take_turns(self, in_turn: InTurn) -> None:
        """Has calls that wait for stores use the database in turn with all others."""
        self.heads._in_turn = in_turn

    def close(self) -> None:
        """Writes the rows that wait, and closes all connections to the database."""
        with suppress(StorageError):
            self.audit_log.settle(whole=True)
        self.database.close()


def as_registry(remote: object) -> Registry:
    """Returns a `RemoteRegistry` of the SDK, typed as the `Registry` that these packages call. It
    has the same parts and methods, and takes arguments by position. It has neither `close` nor
    `database`."""
    return cast("Registry", remote)
