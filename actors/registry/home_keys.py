"""Rotates the signing key and the secrets of a home, each by itself, and records it.

Whoever may call the registry may rotate; no call returns a key.
"""

from __future__ import annotations

from actors.registry.api_keys import ApiKeys
from actors.registry.audit_log import SDK, AuditLog, AuditWriter
from actors.registry.database import Database
from actors.registry.key_names import KeyNames
from actors.storage.secrets import API_KEY_ROWS, Secrets
from actors.storage.signing import SigningKey


class HomeKeys:
    """The part of the registry that rotates the keys beside the keyring. A rotation holds for every
    process of this home from then on."""

    def __init__(
        self, database: Database, writer: AuditWriter, audit_log: AuditLog, key_names: KeyNames,
        api_keys: ApiKeys, signing: SigningKey, secrets: Secrets,
    ) -> None:  # fmt: skip
        self._database, self._writer, self._audit_log = database, writer, audit_log
        self._key_names, self._api_keys = key_names, api_keys
        self._signing, self._secrets = signing, secrets

    def rotate_signing_key(self) -> str:
        """Replaces the signing key, destroys the old one, and records this in every audit log.
        Returns the new public key, 32 bytes in hex.

        Raises:
            StorageError: A file or the database cannot be written. If the key was replaced, the
                row of the rotation precedes the next row of each log, and what the old key had
                accepted must be accepted again.
        """
        accepted = {one: self._audit_log.accepted(one) for one in self._audit_log.tenants()}
        self._secrets.pin()  # A home of an older release derives them from the old key.
        key = self._signing.rotate()
        self._key_names.recognize()
        with self._database.change() as tx:
            for tenant, places in accepted.items():
                self._writer.note_successions(tx, tenant)
                # Only the key of today accepts: a thief of the old key could accept an older copy.
                if places:
                    self._writer.note_acceptance(tx, tenant, places)
        return key

    def rotate_secret(self, tenant: str, name: str) -> int:
        """Makes a fresh version of a secret, which everything new is made from, and returns its
        number. What older versions made stays valid until they are retired; rows of API keys get
        new MACs at once.

        Raises:
            InvalidRequestError: There is no secret of this name.
        """
        version = self._secrets.rotate(name)
        self._key_names.recognize()
        with self._database.change() as tx:
            if name == API_KEY_ROWS:
                self._api_keys._renew_macs(tx)
            self._writer.note(tx, tenant, SDK, "secret.rotate", name, {"version": version})
        return version

    def retire_secret(self, tenant: str, name: str) -> None:
        """Destroys the older versions of a secret: what they made is refused from now on.

        Raises:
            InvalidRequestError: There is no such secret, or its older versions are needed for ever.
        """
        self._secrets.check_retirable(name)
        with self._database.change() as tx:
            if name == API_KEY_ROWS:  # The rotation may have been cut off.
                self._api_keys._renew_macs(tx)
            self._writer.note(tx, tenant, SDK, "secret.retire", name)
            # Last, so that no row is written if it fails.
            self._secrets.retire(name)
