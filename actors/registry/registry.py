"""The registry: runs, artifacts, ledgers and the audit log in one database that outlives every Ray
cluster.

    registry.runs         who acts for a run, how far it is
    registry.catalogue    which artifacts there are, their labels and expiry
    registry.artifacts    artifacts entered, resealed, deleted
    registry.orphans      what a sweep remembers of a store
    registry.ledgers      budgets of data sets: check and charge in one transaction
    registry.audit_log    who did what
    registry.heads        ledgers and log against the heads that a store keeps of them
    registry.api_keys     who may sample over HTTP
    registry.data_keys    who is given the key of an artifact; the tenant's keys

The only owner of the tenant's keys. A plain object; its Ray shell is `actor`, and remote calls name
the part. Every change is one immediate transaction, and nothing lasting is kept in memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from actors.registry.api_keys import ApiKeys
from actors.registry.artifacts import Artifacts
from actors.registry.audit_log import AuditLog, AuditWriter
from actors.registry.book import Book
from actors.registry.catalogue import Catalogue
from actors.registry.data_keys import DataKeys
from actors.registry.database import Database
from actors.registry.heads import Heads
from actors.registry.key_names import KeyNames
from actors.registry.ledgers import Ledgers
from actors.registry.orphans import Orphans
from actors.registry.runs import Runs
from actors.storage import signing
from actors.storage.key_providers import open_keyring

PARTS = {
    "api_keys": ApiKeys,
    "artifacts": Artifacts,
    "audit_log": AuditLog,
    "catalogue": Catalogue,
    "data_keys": DataKeys,
    "heads": Heads,
    "ledgers": Ledgers,
    "orphans": Orphans,
    "runs": Runs,
}
"""What remote calls may name. The public methods of each are for every client of the cluster."""


class Registry:
    """Parts over one database."""

    def __init__(
        self, database: str, keyring: str | os.PathLike[str], audit_keys: Path | None = None,
        *, sole: bool = False, looks_only: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            keyring: a path, or ``env:NAME``.
            audit_keys: folder of `audit.key` and `audit.pub`; beside a keyring file when None.
            sole: from now on registries that were opened earlier change nothing. Otherwise this
                one works beside them, which is as safe: no registry trusts its memory.
            looks_only: changes nothing, for who promises so: neither rows nor tables, nor what
                keys are known. What would change something raises StorageError.
        """
        keys = open_keyring(keyring)
        signing_key = signing.load(audit_keys or Path(keyring).parent)
        self.database = opened = Database(database, looks_only=looks_only)
        key_names = KeyNames(opened, keys)
        if looks_only:
            key_names.compare()
        else:
            key_names.recognise()
        writer = AuditWriter(opened, keys, signing_key)
        book = Book(writer, keys)
        self.audit_log = AuditLog(opened, writer, signing_key)
        self.api_keys = ApiKeys(opened, writer)
        self.catalogue = Catalogue(opened, writer)
        self.orphans = Orphans(opened, writer)
        self.artifacts = Artifacts(opened, writer, self.catalogue, keys)
        self.runs = Runs(opened, writer, book)
        self.ledgers = Ledgers(opened, writer, book)
        self.heads = Heads(opened, writer, self.audit_log, book, signing_key)
        self.data_keys = DataKeys(
            opened, writer, book, self.catalogue, self.heads, key_names, keys, signing_key
        )  # fmt: skip
        if sole:
            opened.fence_others()

    def close(self) -> None:
        """Ends all connections to the database."""
        self.database.close()


def as_registry(remote: object) -> Registry:
    """A `RemoteRegistry`, which the SDK holds, as what these packages call: it has the same parts
    and methods, with arguments by position. It has neither `close` nor `database`."""
    return cast("Registry", remote)
