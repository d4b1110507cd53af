"""Rotates tenant keys, rewraps the data keys under them, retires old keys; rotates other keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from actors.registry.registry import Registry
from actors.registry.rollback import (
    keep_in,
    keep_newest,
    meet_all,
    meet_ledger,
    sign_ledger_again,
)
from actors.storage.keyring import names_in
from actors.storage.store import ArtifactStore
from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, TGTinkerError
from tg_tinker.storage.stores import is_component
from tg_tinker.types import KeyUses


def rotate(registry: Registry, root: str, tenant: str) -> str:
    """Rotates the tenant key, and returns the id of the new key; see `DataKeys.rotate`.

    The new id also differs from all key ids in the store. The database and the keyring may both be
    older copies, and a second key of the same name would hide the first.

    Raises:
        RollbackError, StorageError: see `rollback.meet`; nothing was changed.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    key_id = registry.data_keys.rotate(tenant, _named_in(store))
    keep_newest(registry, store, tenant)
    return key_id


def _named_in(store: ArtifactStore) -> list[str]:
    """Returns the ids of tenant keys that the key files of all tenants name, without a check."""
    named = set[str]()
    for tenant in store.tenants():
        for stored_as in filter(is_component, store.with_key(tenant)):
            with suppress(NotFoundError, IntegrityError):
                named |= names_in(store.read_key(tenant, stored_as))
    return sorted(named)


def rewrap(registry: Registry, root: str) -> Iterator[tuple[str, str]]:
    """Rewraps the data key of every artifact, of all tenants, under the primary key.

    Yields (id, problem) for each artifact; the problem is empty after a success. The unit keys of
    the datasets come first, because a read-only keyring may have been rotated elsewhere. They are
    yielded only where there is a problem.

    Only key files are written, each in one step. If the call is interrupted, every artifact opens
    as before, and the next call finds the remaining keys.

    Raises:
        RollbackError, StorageError: see `rollback.meet`. With an older database, old key files
            could replace new ones, so nothing was changed.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    yield from registry.data_keys.rewrap_unit_keys().items()
    for tenant, artifact_id, stored_as in registry.catalogue.all():
        try:
            _rewrap_one(registry, store, tenant, artifact_id, stored_as)
        except TGTinkerError as error:
            yield artifact_id, error.message
        else:
            yield artifact_id, ""


def _rewrap_one(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, stored_as: str
) -> None:
    wrapped = store.read_key(tenant, stored_as)
    held = registry.data_keys.held(tenant, artifact_id, wrapped)
    again = registry.data_keys.rewrapped(tenant, artifact_id, wrapped)
    while again is not None:
        store.write_key(tenant, stored_as, again)
        if not registry.catalogue.reaches(tenant, stored_as):
            # The artifact was deleted meanwhile, and its key must not be restored.
            store.delete_key(tenant, stored_as)
            return
        # This write may have been late and replaced a newer key file, while the tenant keys of both
        # older wrappings were destroyed. Only a key that is no longer primary can be destroyed, so
        # the loop ends when the key is under the primary one.
        again = registry.data_keys.rewrapped_held(
            tenant, artifact_id, held, registry.data_keys.key_of(again)
        )


def uses(registry: Registry, root: str) -> KeyUses:
    """Returns how many artifacts each key opens, unreadable key files, and missing keys."""
    wrapped, unreadable = _wrapped_under(registry, root)
    counts = dict.fromkeys(registry.data_keys.key_ids(), 0) | Counter(wrapped.values())
    missing = tuple(registry.data_keys.missing_keys())
    return KeyUses(registry.data_keys.key_info()[0], counts, unreadable, missing)


def _wrapped_under(registry: Registry, root: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the id of the tenant key by artifact name in the store, and problems by artifact id.

    A problem means that the key file of an artifact is missing or damaged.
    """
    store = ArtifactStore(root)
    wrapped, unreadable = {}, {}
    for tenant, artifact_id, stored_as in registry.catalogue.all():
        try:
            stored = store.read_key(tenant, stored_as)
            # This opens the key, because the key name in the file proves nothing.
            registry.data_keys.rewrapped(tenant, artifact_id, stored)
            wrapped[stored_as] = registry.data_keys.key_of(stored)
        except (NotFoundError, IntegrityError) as error:
            unreadable[artifact_id] = error.message
    return wrapped, unreadable


def retire(registry: Registry, root: str, tenant: str, key_id: str) -> None:
    """Destroys a key that no longer opens any artifact.

    Raises:
        InvalidRequestError: the key is the primary one, or still opens an artifact, or an artifact
            was saved meanwhile.
        IntegrityError: the key of an artifact cannot be determined, or the key of a dataset does
            not open.
        RollbackError, StorageError: see `rollback.meet`. Artifacts that an older database has lost
            may need the key.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    # Before the files are read: `_rewrap_one` relies on this order.
    if key_id == registry.data_keys.key_info()[0]:
        raise InvalidRequestError(
            f"key {key_id!r} is the primary one, which cannot be retired: rotate first"
        )
    wrapped, unreadable = _wrapped_under(registry, root)
    # The backup of an unreadable key file may need this key.
    if unreadable:
        raise IntegrityError(
            f"the key of {', '.join(sorted(unreadable)[:5])} ({len(unreadable)} in all) cannot be"
            " determined, so nothing was changed: restore their key files from a backup of the"
            " store, or delete these artifacts"
        )
    registry.data_keys.retire(tenant, key_id, wrapped)
    keep_newest(registry, store, tenant)


# --- the other keys of a home -------------------------------------------------------------------


def rotate_signing_key(registry: Registry, root: str) -> str:
    """Replaces the signing key, and puts a head by the new one at the end of every log and ledger
    into the store. Returns the new public key, 32 bytes in hex.

    From then on, no head by the old key counts in this store, except where it is behind the new
    one.

    Raises:
        RollbackError, LedgerMismatchError: the database is behind a head; nothing was changed.
        StorageError: see `HomeKeys.rotate_signing_key`; or the store rejects a head. Then the key
            is replaced, and heads by the old one count wherever the store has none by the new one.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    ledgers = [(tenant, dataset) for tenant in registry.audit_log.tenants()
               for dataset in registry.ledgers.datasets(tenant)]  # fmt: skip
    for tenant, dataset in ledgers:
        meet_ledger(registry, store, tenant, dataset)
    key = registry.home_keys.rotate_signing_key()
    for tenant, dataset in ledgers:
        sign_ledger_again(registry, store, tenant, dataset)
    # Last: a head of the log by the new key says that each ledger has one too; see `Heads.judge`.
    for tenant in registry.audit_log.tenants():
        keep_in(store, registry.audit_log.head(tenant))
    return key


def rotate_secret(registry: Registry, root: str, tenant: str, name: str) -> int:
    """Makes a fresh version of a secret; see `HomeKeys.rotate_secret`. Returns its number.

    Raises:
        InvalidRequestError: there is no secret of this name.
        RollbackError, StorageError: see `rollback.meet`; nothing was changed.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    version = registry.home_keys.rotate_secret(tenant, name)
    keep_newest(registry, store, tenant)
    return version


def retire_secret(registry: Registry, root: str, tenant: str, name: str) -> None:
    """Destroys the older versions of a secret; see `HomeKeys.retire_secret`.

    Raises:
        InvalidRequestError: there is no such secret, or its older versions are needed for ever.
        RollbackError, StorageError: see `rollback.meet`; nothing was changed.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    registry.home_keys.retire_secret(tenant, name)
    keep_newest(registry, store, tenant)
