"""Gives out the data keys of artifacts, and wraps them under tenant keys.

The keyring opens data keys only for this module. A capability names the client that asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from actors.registry.artifacts import adopt
from actors.registry.audit_log import SDK, AuditWriter
from actors.registry.book import Book
from actors.registry.catalogue import Catalogue
from actors.registry.database import Database
from actors.registry.heads import Heads
from actors.registry.key_names import KeyNames
from actors.registry.lookups import ANYONE, exists, owned
from actors.registry.request_rows import Request
from actors.registry.runs import check_epoch
from actors.registry.schema import ARTIFACTS, RUNS
from actors.storage.capabilities import KEEPER, READER, RUN, Capability, Issuer
from actors.storage.key_providers import KeyProvider
from actors.storage.keyring import parse_wrapped
from actors.storage.manifest import DATA_KEY, Manifest
from actors.storage.secrets import Secrets
from tg_tinker.errors import AccessDeniedError, IntegrityError, InvalidRequestError
from tg_tinker.storage.envelope import context_of, new_key, unwrap_key, wrap_key
from tg_tinker.storage.keyrings import check_key_id


class DataKeys:
    """The part of the registry that gives out data keys, and wraps them."""

    def __init__(
        self, database: Database, writer: AuditWriter, book: Book, catalogue: Catalogue,
        heads: Heads, key_names: KeyNames, keyring: KeyProvider, secrets: Secrets,
    ) -> None:  # fmt: skip
        self._database, self._writer, self._book = database, writer, book
        self._catalogue, self._heads = catalogue, heads
        self._key_names, self._keyring = key_names, keyring
        self._issuer = Issuer(secrets)
        self._holding_key = new_key()

    def capability(self, tenant: str, run_id: str, epoch: int) -> Capability:
        """Returns the capability of the training actor that starts in an epoch that was just
        claimed.

        Raises:
            NotFoundError: The tenant has no such run.
            ActorLostError: The run was claimed again since.
        """
        with self._database.reading() as connection:
            check_epoch(connection, tenant, run_id, epoch)
        return self._issuer.issue(RUN, tenant, f"{run_id}@{epoch}")

    def reader(self, tenant: str, who: str = SDK) -> Capability:
        """Returns the capability of a client that only reads. The audit log names the client `who`.

        Raises:
            InvalidRequestError: `who` has the form of an actor's name.
        """
        if "@" in who:
            raise InvalidRequestError(
                "the name of a reader contains no @: RUN@EPOCH names an actor"
            )
        return self._issuer.issue(READER, tenant, who)

    def keeper(self, tenant: str) -> Capability:
        """Returns the capability of a client that copies and reseals artifacts; it may read,
        too."""
        return self._issuer.issue(KEEPER, tenant, SDK)

    def new(self, shown: Capability, artifact_id: str, store: str) -> tuple[bytes, bytes]:
        """Returns a fresh data key for a new artifact, and its wrapped form as stored beside the
        artifact.

        A keeper may also ask for an existing artifact, in order to reseal it.

        Args:
            store: The root of the artifact's store, with which `Heads.meet_store` was called.

        Raises:
            AccessDeniedError: The capability is forged or is a reader's; or the artifact exists
                already; or the log was not compared with the store.
            ActorLostError: The run has a newer actor.
            NotFoundError: A keeper's artifact is deleted, expired, or of another tenant.
        """
        with self._admitted(shown, "artifact.save", artifact_id) as exists:
            if shown.kind == READER:
                raise AccessDeniedError("a reader makes no artifacts: only the actor of a run does")
            if exists:
                if shown.kind != KEEPER:
                    raise AccessDeniedError(
                        "there is an artifact of this id: a new artifact needs a new id"
                    )
                self._catalogue.openable(shown.tenant, artifact_id)
            self._heads.refuse_unmet(shown.tenant, store)
            key = new_key()
            wrapped = self._keyring.wrap(key, context_of(shown.tenant, artifact_id, DATA_KEY))
            return key, json.dumps(wrapped).encode()

    def open(self, shown: Capability, artifact_id: str, wrapped: bytes, store: str) -> bytes:
        """Returns the data key of an artifact that exists.

        Args:
            store: The root of the artifact's store, with which `Heads.meet_store` was called.

        Raises:
            NotFoundError: The artifact is unknown, deleted, expired, or of another tenant.
            AccessDeniedError: The capability is forged, or the log was not compared with the store.
            ActorLostError: The capability is of a run that has a newer actor.
            IntegrityError: The wrapped key belongs to another artifact or keyring.
        """
        tenant = shown.tenant
        with self._admitted(shown, "artifact.load", artifact_id):
            self._catalogue.openable(tenant, artifact_id)
            self._heads.refuse_unmet(tenant, store)
            context = context_of(tenant, artifact_id, DATA_KEY)
            key = self._keyring.unwrap(parse_wrapped(wrapped), context)
            # Recorded before the key is given out.
            with self._database.change() as tx:
                self._writer.note(tx, tenant, shown.who, "artifact.load", artifact_id)
            return key

    def adopt(
        self, tenant: str, artifact_id: str, stored_as: str, manifest: bytes, wrapped: bytes
    ) -> None:
        """Switches an artifact to files under another name, which a lost database had resealed.
        Only files that the holder of the artifact's data key sealed are accepted. A person who can
        only write to the store cannot put other files in their place, and all sealings of an
        artifact have the same content.

        Raises:
            IntegrityError: The files are not this artifact's, or no key of this keyring opens them.
            NotFoundError: The artifact is deleted.
        """
        key, _ = self._opened(tenant, artifact_id, wrapped)
        parsed = Manifest.parse(manifest, tenant, artifact_id)
        parsed.verify(key)
        size = len(manifest) + sum(file.size for file in parsed.files.values())
        with self._database.change() as tx:
            adopt(tx, self._writer, tenant, artifact_id, stored_as, size, manifest)

    @contextmanager
    def _admitted(self, shown: Capability, event: str, artifact_id: str) -> Iterator[bool]:
        """Admits an operation only with a genuine capability that is still valid, and records a
        refusal that is raised inside. Yields whether an artifact of this id exists or existed."""
        with self._database.reading() as connection:
            new = event == "artifact.save"
            mine = owned(connection, ARTIFACTS, shown.tenant, artifact_id, new=new) is not None
            there = mine or exists(connection, ARTIFACTS, artifact_id)
        if not self._issuer.genuine(shown):
            if mine or self._known_tenant(shown.tenant):
                subject, code = artifact_id if mine else "", AccessDeniedError.code
                self._database.requests.ask(Request(shown.tenant, ANYONE, event, subject, code))
            raise AccessDeniedError(
                "this capability was not issued here: this registry gives data keys only to"
                " actors and readers with a capability that it issued"
            )
        # A reader may name any text as an artifact, so an unknown id is not recorded.
        subject = artifact_id if there or shown.kind == RUN else ""
        with self._writer.refusals(shown.tenant, shown.who, event, subject):
            if shown.kind == RUN:
                run_id, _, epoch = shown.who.rpartition("@")
                with self._database.reading() as connection:
                    check_epoch(connection, shown.tenant, run_id, int(epoch))
            yield there

    def _known_tenant(self, tenant: str) -> bool:
        """Returns whether a tenant has a run."""
        query = sa.select(RUNS.c.tenant).where(RUNS.c.tenant == tenant).limit(1)
        with self._database.reading() as connection:
            return connection.execute(query).first() is not None

    def _opened(self, tenant: str, artifact_id: str, wrapped: bytes) -> tuple[bytes, bytes]:
        """Returns a data key of an artifact, and the context that it is wrapped in. The artifact
        may have been deleted meanwhile."""
        with self._database.reading() as connection:
            owned(connection, ARTIFACTS, tenant, artifact_id)
        context = context_of(tenant, artifact_id, DATA_KEY)
        return self._keyring.unwrap(parse_wrapped(wrapped), context), context

    def rotate(self, tenant: str, used: Sequence[str] = ()) -> str:
        """Makes a fresh primary key for everything that is wrapped from now on, and rewraps the
        keys of datasets. Returns its id, which no other key of this registry ever had and which is
        not in `used`. `operations.keys.rewrap` rewraps the keys of artifacts."""
        name = self._keyring.rotate([*self._key_names.noted(), *used])
        self.rewrap_unit_keys()
        with self._database.change() as tx:
            self._writer.note(tx, tenant, SDK, "key.rotate", name)
        return name

    def rewrap_unit_keys(self) -> dict[str, str]:
        """Wraps the keys of all datasets under the primary key, after recording all keys of the
        keyring, which may have been rotated elsewhere. Returns, by name, the reasons why some
        cannot be unwrapped."""
        self._key_names.recognize()
        with self._database.change() as tx:
            return self._book.rewrap_unit_keys(tx)

    def rewrapped(self, tenant: str, artifact_id: str, wrapped: bytes) -> bytes | None:
        """Returns the same data key wrapped under the primary key; None if it is wrapped under it
        already."""
        # Unwrapped in any case: the key id alone proves nothing.
        key, context = self._opened(tenant, artifact_id, wrapped)
        if self.key_of(wrapped) == self._keyring.primary:
            return None
        return json.dumps(self._keyring.wrap(key, context)).encode()

    def held(self, tenant: str, artifact_id: str, wrapped: bytes) -> bytes:
        """Returns the same data key in a form that only `rewrapped_held` of this registry object
        opens, as long as it lives. Do not store it."""
        key, context = self._opened(tenant, artifact_id, wrapped)
        return wrap_key(self._holding_key, key, context)

    def rewrapped_held(
        self, tenant: str, artifact_id: str, held: bytes, under: str
    ) -> bytes | None:
        """Returns a data key from `held`, wrapped under the primary key, even if no other form of
        it is left. Returns None if `under` is the primary key."""
        with self._database.reading() as connection:
            owned(connection, ARTIFACTS, tenant, artifact_id)
        if under == self._keyring.primary:
            return None
        context = context_of(tenant, artifact_id, DATA_KEY)
        wrapped = self._keyring.wrap(unwrap_key(self._holding_key, held, context), context)
        return json.dumps(wrapped).encode()

    def retire(self, tenant: str, key_id: str, wrapped_under: Mapping[str, str]) -> None:
        """Forgets a tenant key that nothing needs.

        Args:
            wrapped_under: The id of the tenant key that opens each artifact, by its name in the
                store, for all artifacts of all tenants. The caller has just read these ids in the
                store.

        Raises:
            InvalidRequestError: The key is in use, primary or unknown; or an artifact was saved
                after the ids were read.
            IntegrityError: The key of a dataset cannot be unwrapped, so it may need this tenant
                key.
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
                f"it is unknown which tenant key opens the key of {', '.join(problems)}: restore"
                " the newest keyring, or a backup of the database; nothing was changed"
            )
        # In this transaction: a save is recorded before it, or finds that the key is gone.
        with self._database.change() as tx:
            if not wrapped_under.keys() >= {name for _, _, name in self._catalogue.all()}:
                raise InvalidRequestError(
                    f"an artifact was saved meanwhile, maybe under key {key_id!r}: the key was not"
                    " retired; repeat the call"
                )
            self._writer.note(tx, tenant, SDK, "key.retire", key_id)
            # Last, so that no row is written if it fails.
            self._keyring.retire(key_id)

    def key_ids(self) -> list[str]:
        """Returns the ids of the keyring's keys, oldest first."""
        return self._keyring.key_ids

    def key_of(self, wrapped: bytes) -> str:
        """Returns the id of the tenant key that a stored data key names as its wrapping key."""
        return parse_wrapped(wrapped)["key_id"]

    def key_info(self) -> tuple[str, str]:
        """Returns the id of the primary key, and its provider."""
        return self._keyring.primary, self._keyring.provider

    def missing_keys(self) -> list[str]:
        """Returns the keys that an older copy of the keyring lacks; see `KeyNames.missing`."""
        return self._key_names.missing()
