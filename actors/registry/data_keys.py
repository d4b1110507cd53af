"""Data keys of artifacts: who is given one, and under which tenant key it is wrapped.

The only place where the keyring opens a data key. A capability says who asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import sqlalchemy as sa

from actors.registry.artifacts import adopt
from actors.registry.audit_log import ANYONE, SDK, AuditWriter
from actors.registry.book import Book
from actors.registry.catalogue import Catalogue, tenant_of_artifact
from actors.registry.database import Database
from actors.registry.heads import Heads
from actors.registry.key_names import KeyNames
from actors.registry.runs import check_epoch
from actors.registry.schema import RUNS
from actors.storage.capabilities import KEEPER, READER, RUN, Capability, Issuer
from actors.storage.key_providers import KeyProvider
from actors.storage.manifest import DATA_KEY, Manifest
from tg_tinker.errors import AccessDeniedError, IntegrityError, InvalidRequestError, StorageError
from tg_tinker.storage.envelope import context_of, new_key, unwrap_key, wrap_key
from tg_tinker.storage.keyrings import check_key_id


class DataKeys:
    """The part of the registry that gives out data keys, and keeps their wrappings."""

    def __init__(
        self, database: Database, writer: AuditWriter, book: Book, catalogue: Catalogue,
        heads: Heads, key_names: KeyNames, keyring: KeyProvider, signing_key: bytes,
    ) -> None:  # fmt: skip
        self._database, self._writer, self._book = database, writer, book
        self._catalogue, self._heads = catalogue, heads
        self._key_names, self._keyring = key_names, keyring
        self._issuer = Issuer(signing_key)
        self._holding_key = new_key()

    def capability(self, tenant: str, run_id: str, epoch: int) -> Capability:
        """For the training actor that is started under an epoch just claimed.

        Raises:
            NotFoundError: this tenant has no such run.
            ActorLostError: it was claimed again since.
        """
        with self._database.reading() as connection:
            check_epoch(connection, tenant, run_id, epoch)
        return self._issuer.issue(RUN, tenant, f"{run_id}@{epoch}")

    def reader(self, tenant: str, who: str = SDK) -> Capability:
        """For whoever only reads; `who` is how the audit log names it.

        Raises:
            InvalidRequestError: `who` has the form of an actor's name.
        """
        if "@" in who:
            raise InvalidRequestError("a reader does not call itself RUN@EPOCH: an actor does")
        return self._issuer.issue(READER, tenant, who)

    def keeper(self, tenant: str) -> Capability:
        """For whoever copies artifacts and seals them anew; reads, too."""
        return self._issuer.issue(KEEPER, tenant, SDK)

    def new(self, shown: Capability, artifact_id: str, store: str) -> tuple[bytes, bytes]:
        """A fresh data key, and its wrapped form as stored beside an artifact to be.

        A keeper is also given one for an artifact that is there: it is to be sealed anew.

        Args:
            store: root of the store that it is for, which `rollback.meet` was called with.

        Raises:
            AccessDeniedError: a reader's capability; or the artifact is there already; or the
                store was not met.
            ActorLostError: the run has a newer actor.
            NotFoundError: a keeper's artifact is deleted, expired, or of another tenant.
        """
        with self._admitted(shown, "artifact.save", artifact_id) as owner:
            if shown.kind == READER:
                raise AccessDeniedError("a reader makes no artifacts: the actor of a run does")
            if owner is not None:
                if shown.kind != KEEPER:
                    raise AccessDeniedError(
                        "there is an artifact of this id: a new one needs its own"
                    )
                self._catalogue.openable(shown.tenant, artifact_id)
            self._heads.refuse_unmet(shown.tenant, store)
            key = new_key()
            wrapped = self._keyring.wrap(key, context_of(shown.tenant, artifact_id, DATA_KEY))
            return key, json.dumps(wrapped).encode()

    def open(self, shown: Capability, artifact_id: str, wrapped: bytes, store: str) -> bytes:
        """The data key of an artifact that exists.

        Args:
            store: root of the store that it is in, which `rollback.meet` was called with.

        Raises:
            NotFoundError: the artifact is unknown, deleted, expired, or of another tenant.
            AccessDeniedError: the capability is forged, or the store was not met.
            ActorLostError: it is of a run that has a newer actor.
            IntegrityError: the wrapped key is of another artifact or keyring.
        """
        tenant = shown.tenant
        with self._admitted(shown, "artifact.load", artifact_id) as owner:
            if owner not in (None, tenant):  # its owner learns of it, the other learns nothing
                self._note_stranger(owner, "artifact.load", artifact_id)
            self._catalogue.openable(tenant, artifact_id)
            self._heads.refuse_unmet(tenant, store)
            context = context_of(tenant, artifact_id, DATA_KEY)
            key = self._keyring.unwrap(_stored(wrapped), context)
            with self._database.change() as tx:  # before the key is out
                self._writer.note(tx, tenant, shown.who, "artifact.load", artifact_id)
            return key

    def adopt(
        self, tenant: str, artifact_id: str, stored_as: str, manifest: bytes, wrapped: bytes
    ) -> None:
        """An artifact is from now on what lies under another name, which was resealed by a database
        that is lost. Only what the holder of its data key sealed counts: nobody who writes to the
        store can put another in its place, and all its sealings have one content.

        Raises:
            IntegrityError: it is none of this artifact's, or of no key of this keyring.
            NotFoundError: it is deleted.
        """
        parsed = Manifest.parse(manifest, tenant, artifact_id)
        context = context_of(tenant, artifact_id, DATA_KEY)
        parsed.verify(self._keyring.unwrap(_stored(wrapped), context))
        size = len(manifest) + sum(file.size for file in parsed.files.values())
        with self._database.change() as tx:
            adopt(tx, self._writer, tenant, artifact_id, stored_as, size, manifest)

    @contextmanager
    def _admitted(self, shown: Capability, event: str, artifact_id: str) -> Iterator[str | None]:
        """Around what needs a genuine capability of today; a refusal inside is noted, too.
        Yields the owner's tenant, or None if the artifact never existed."""
        with self._database.reading() as connection:
            owner = tenant_of_artifact(connection, artifact_id)
        if not self._issuer.genuine(shown):
            if (concerned := owner or self._known_tenant(shown.tenant)) is not None:
                self._note_stranger(concerned, event, artifact_id if owner else "")
            raise AccessDeniedError(
                "this capability was not issued here: data keys are given to the actor of a run"
                " and to readers that this registry knows"
            )
        # What a reader calls an artifact may be any text.
        subject = artifact_id if owner or shown.kind == RUN else ""
        with self._writer.refusals(shown.tenant, shown.who, event, subject):
            if shown.kind == RUN:
                run_id, _, epoch = shown.who.rpartition("@")
                with self._database.reading() as connection:
                    check_epoch(connection, shown.tenant, run_id, int(epoch))
            yield owner

    def _note_stranger(self, tenant: str | None, event: str, subject: str) -> None:
        with suppress(StorageError):  # the refusal itself is what the caller must learn
            self._writer.note_refusal(str(tenant), ANYONE, event, subject, AccessDeniedError.code)

    def _known_tenant(self, tenant: str) -> str | None:
        """The tenant itself, if it has a run."""
        query = sa.select(RUNS.c.tenant).where(RUNS.c.tenant == tenant).limit(1)
        with self._database.reading() as connection:
            return connection.execute(query).scalar()

    def rotate(self, tenant: str, used: Sequence[str] = ()) -> str:
        """A fresh primary key of the keyring, for all that is wrapped from now on, the keys of
        data sets among it; its id, which no other key of this registry ever had, and none of
        `used`. `operations.keys.rewrap` is for the artifacts."""
        name = self._keyring.rotate([*self._key_names.noted(), *used])
        self.rewrap_unit_keys()
        with self._database.change() as tx:
            self._writer.note(tx, tenant, SDK, "key.rotate", name)
        return name

    def rewrap_unit_keys(self) -> dict[str, str]:
        """Wraps the keys of all data sets under the primary key, once all keys of the keyring are
        noted: it may have been rotated elsewhere. Why some do not open, by name."""
        self._key_names.recognise()
        with self._database.change() as tx:
            return self._book.rewrap_unit_keys(tx)

    def rewrapped(self, tenant: str, artifact_id: str, wrapped: bytes) -> bytes | None:
        """The same data key under the primary key; None where it is already."""
        context = context_of(tenant, artifact_id, DATA_KEY)
        key = self._keyring.unwrap(_stored(wrapped), context)  # its name alone proves nothing
        if self.key_of(wrapped) == self._keyring.primary:
            return None
        return json.dumps(self._keyring.wrap(key, context)).encode()

    def held(self, tenant: str, artifact_id: str, wrapped: bytes) -> bytes:
        """The same data key for `rewrapped_held` of this registry alone, until it ends: not to be
        stored."""
        context = context_of(tenant, artifact_id, DATA_KEY)
        key = self._keyring.unwrap(_stored(wrapped), context)
        return wrap_key(self._holding_key, key, context)

    def rewrapped_held(
        self, tenant: str, artifact_id: str, held: bytes, under: str
    ) -> bytes | None:
        """What `held` gave under the primary key, though no other form of it may be left; None
        where that is `under`."""
        if under == self._keyring.primary:
            return None
        context = context_of(tenant, artifact_id, DATA_KEY)
        wrapped = self._keyring.wrap(unwrap_key(self._holding_key, held, context), context)
        return json.dumps(wrapped).encode()

    def retire(self, tenant: str, key_id: str, wrapped_under: Mapping[str, str]) -> None:
        """Forgets a key that nothing needs.

        Args:
            wrapped_under: id of the tenant key that opens it, by the name in the store of every
                artifact of all tenants, as whoever calls has just read them there.

        Raises:
            InvalidRequestError: it is in use, the primary one, or unknown; or an artifact was
                saved since the keys were read.
            IntegrityError: the key of a data set does not open: its keyring may need this one.
        """
        check_key_id(key_id)
        in_use = [*wrapped_under.values()].count(key_id)
        if in_use and key_id != self._keyring.primary:
            raise InvalidRequestError(
                f"key {key_id!r} still opens {in_use} artifacts: `tg-tinker keys rotate"
                " --resume` wraps them under the primary key"
            )
        if problems := self.rewrap_unit_keys():
            raise IntegrityError(
                f"nobody can tell which key opens that of {', '.join(problems)}: put the newest"
                " keyring, or the database's backup, back; nothing was changed"
            )
        with self._database.change() as tx:  # a save is entered before it, or finds the key gone
            if not wrapped_under.keys() >= {name for _, _, name in self._catalogue.all()}:
                raise InvalidRequestError(
                    f"an artifact was saved meanwhile, maybe under key {key_id!r}: it was not"
                    " retired; repeat the call"
                )
            self._writer.note(tx, tenant, SDK, "key.retire", key_id)
            self._keyring.retire(key_id)  # last: where it fails there is no row

    def key_ids(self) -> list[str]:
        """Of the keyring, oldest first."""
        return self._keyring.key_ids

    def key_of(self, wrapped: bytes) -> str:
        """Id of the key that a stored data key is wrapped under."""
        return str(_stored(wrapped).get("key_id"))

    def key_info(self) -> tuple[str, str]:
        """Id of the wrapping key, and its provider."""
        return self._keyring.primary, self._keyring.provider

    def missing_keys(self) -> list[str]:
        """See `KeyNames.missing`: the keyring is an older copy."""
        return self._key_names.missing()


def _stored(wrapped: bytes) -> dict[str, str]:
    """A wrapped data key as the keyring takes it."""
    try:
        found = json.loads(wrapped)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or json.dumps(found).encode() != wrapped:
        raise IntegrityError("a stored data key is damaged: put its backup back")
    return found
