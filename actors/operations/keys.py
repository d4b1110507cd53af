"""Tenant keys: rotated, their wrappings renewed, retired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest, meet_all
from actors.storage.keyring import names_in
from actors.storage.store import ArtifactStore
from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, TGTinkerError
from tg_tinker.storage.stores import is_component
from tg_tinker.types import KeyUses


def rotate(registry: Registry, root: str, tenant: str) -> str:
    """See `DataKeys.rotate`. What is in the store counts as well: database and keyring may both
    be older copies, and a second key of one name would hide the first.

    Raises:
        RollbackError, StorageError: see `rollback.meet`; nothing was changed.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    key_id = registry.data_keys.rotate(tenant, _named_in(store))
    keep_newest(registry, store, tenant)
    return key_id


def _named_in(store: ArtifactStore) -> list[str]:
    """Ids of tenant keys that the key files of all tenants name, truly or not."""
    named = set[str]()
    for tenant in store.tenants():
        for stored_as in filter(is_component, store.with_key(tenant)):
            with suppress(NotFoundError, IntegrityError):
                named |= names_in(store.read_key(tenant, stored_as))
    return sorted(named)


def rewrap(registry: Registry, root: str) -> Iterator[tuple[str, str]]:
    """Wraps the data key of every artifact under the primary key; (id, what is wrong) of each.
    First those of the data sets, of which only what is wrong is told: a keyring that is read-only
    was rotated elsewhere.

    Only key files are written, each in one step: broken off anywhere, every artifact opens as
    before, and the next call finds what is left.

    Raises:
        RollbackError, StorageError: see `rollback.meet`: an older database could put old key
            files in the place of new ones. Nothing was changed.
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
            store.delete_key(tenant, stored_as)  # deleted meanwhile: it must not come back
            return
        # Written late, it may have replaced a newer file, and its key and that of `wrapped` be
        # destroyed. Only a key that is no more the primary one can be, or is about to be.
        again = registry.data_keys.rewrapped_held(
            tenant, artifact_id, held, registry.data_keys.key_of(again)
        )


def uses(registry: Registry, root: str) -> KeyUses:
    """How many artifacts each key opens, those of which nobody can tell, and keys that are lost."""
    wrapped, unreadable = _wrapped_under(registry, root)
    counts = dict.fromkeys(registry.data_keys.key_ids(), 0) | Counter(wrapped.values())
    missing = tuple(registry.data_keys.missing_keys())
    return KeyUses(registry.data_keys.key_info()[0], counts, unreadable, missing)


def _wrapped_under(registry: Registry, root: str) -> tuple[dict[str, str], dict[str, str]]:
    """Ids of tenant keys, by the name in the store of what each opens; and what is wrong with the
    key files that do not say, by artifact."""
    store = ArtifactStore(root)
    wrapped, unreadable = {}, {}
    for tenant, artifact_id, stored_as in registry.catalogue.all():
        try:
            stored = store.read_key(tenant, stored_as)
            # Opens it: a name proves nothing.
            registry.data_keys.rewrapped(tenant, artifact_id, stored)
            wrapped[stored_as] = registry.data_keys.key_of(stored)
        except (NotFoundError, IntegrityError) as error:
            unreadable[artifact_id] = error.message
    return wrapped, unreadable


def retire(registry: Registry, root: str, tenant: str, key_id: str) -> None:
    """Destroys a key that opens nothing any more.

    Raises:
        InvalidRequestError: it is the primary one, or opens an artifact still; or one was saved
            meanwhile.
        IntegrityError: of an artifact nobody can tell which key opens it.
        RollbackError, StorageError: see `rollback.meet`: what an older database has lost may
            need it.
    """
    store = ArtifactStore(root)
    meet_all(registry, store)
    if (
        key_id == registry.data_keys.key_info()[0]
    ):  # before files are read: `_rewrap_one` relies on it
        raise InvalidRequestError(
            f"key {key_id!r} is the primary one, which cannot be retired: rotate first"
        )
    wrapped, unreadable = _wrapped_under(registry, root)
    if unreadable:  # the backup of such a file may need the very key
        raise IntegrityError(
            f"nobody can tell which key opens {', '.join(sorted(unreadable)[:5])}"
            f" ({len(unreadable)} in all): put their key files back from a backup of the store, or"
            " delete these artifacts; nothing was changed"
        )
    registry.data_keys.retire(tenant, key_id, wrapped)
    keep_newest(registry, store, tenant)
