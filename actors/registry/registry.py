"""The registry: runs, artifacts and budgets in a database that outlives every Ray cluster.

The only owner of the tenant's keys. A plain class; its Ray shell is `registry_actor`. Every
change is one immediate transaction, and nothing lasting is kept in memory. Artifacts are in
`artifact_index`, ledgers in `budgets`, the door to the database in `database`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from actors.registry.api_keys import ApiKeys
from actors.registry.artifacts import ArtifactIndex, last_artifact, resume_point
from actors.registry.audit_log import ANYONE, SDK
from actors.registry.database import RUNS, check_epoch
from actors.registry.heads import HeadChecks
from actors.registry.key_names import KeyNames
from actors.registry.store_checks import StoreChecks
from actors.storage import signing
from actors.storage.capabilities import KEEPER, READER, RUN, Capability, Issuer
from actors.storage.key_providers import open_keyring
from actors.storage.manifest import DATA_KEY, Manifest
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import (
    AccessDeniedError,
    ActorLostError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
)
from tg_tinker.records.report import dataset_of
from tg_tinker.storage.envelope import context_of, new_key, unwrap_key, wrap_key
from tg_tinker.storage.keyrings import check_key_id
from tg_tinker.types import CLOSED, NOT_STARTED, PARKED, TrainingClientInfo

# Made once: SQLAlchemy takes longer to put a statement together than the database to run it.
_RUN = sa.select(RUNS).where(RUNS.c.id == sa.bindparam("run"))
_SET = RUNS.update().where(RUNS.c.id == sa.bindparam("run"))
_BECAME = {"active": "run.resume", "completed": "run.complete", "failed": "run.fail"}


class Registry(ArtifactIndex, HeadChecks, StoreChecks, ApiKeys, KeyNames):
    """Runs, the keys that open their artifacts, and by inheritance the index of artifacts,
    budgets, API keys and the audit log."""

    def __init__(
        self, database: str, keyring: str | os.PathLike[str], audit_keys: Path | None = None,
        *, sole: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            keyring: a path, or ``env:NAME``.
            audit_keys: folder of `audit.key` and `audit.pub`; beside a keyring file when None.
            sole: from now on registries that were opened earlier change nothing. Otherwise this
                one works beside them, which is as safe: no registry trusts its memory.
        """
        self._keyring = open_keyring(keyring)
        self._signing_key = signing.load(audit_keys or Path(keyring).parent)
        self._issuer = Issuer(self._signing_key)
        self._holding_key = new_key()
        super().__init__(database)
        if self._looks_only:
            self._compare_keys()
        else:
            self._recognise_keys()
        if sole:
            self._fence_others()

    # --- runs --------------------------------------------------------------------------------

    def create_run(self, tenant: str, config: str) -> str:
        """A new run id; its epoch is 0 until an actor claims it."""
        run_id = f"tc-{secrets.token_hex(8)}"
        with self._change() as tx:
            tx.execute(
                RUNS.insert().values(
                    id=run_id, tenant=tenant, config=config, status="active", epoch=0, step=0,
                    created_at=time.time(),
                )
            )  # fmt: skip
            self._note(tx, tenant, SDK, "run.create", run_id)
        return run_id

    def claim(self, run_id: str, after: int | None = None) -> int:
        """The next epoch of a run: from now on the actors of earlier ones can publish nothing, and
        the run is at the step that it comes back in.

        Args:
            after: the epoch that whoever claims has found without an actor. Of two that bring a
                run back at once, one gets it.

        Raises:
            ActorLostError: somebody else claimed it since, or its artifacts are gone.
        """
        this = RUNS.c.id == run_id
        with self._change() as tx:
            run = tx.execute(sa.select(RUNS).where(this)).one()
            if after is not None and run.epoch != after:
                raise ActorLostError(
                    f"{run_id} was taken over by somebody else: reach its new actor"
                )
            epoch, (_, step) = run.epoch + 1, resume_point(tx, run)
            tx.execute(RUNS.update().where(this).values(epoch=epoch, step=step, ended=None))
            self._note(tx, run.tenant, SDK, "run.claim", run_id, {"epoch": epoch})
            return int(epoch)

    def record(
        self, run_id: str, epoch: int, step: int, status: str,
        calls: Sequence[tuple[str, str]] | None = None, left_out: int = 0,
    ) -> bool:  # fmt: skip
        """Notes how far a run is; an actor of an earlier epoch is ignored, and so is a repeat.

        Args:
            calls: (batch hash, gradient hash) of each call of the step that was just completed;
                the audit log gets their HMACs. None where no step was made.
            left_out: steps just before this one that the actor has no hashes of any more.

        Returns:
            Whether it is the run's newest actor.
        """
        who = f"{run_id}@{epoch}"
        with self._change() as tx:
            run = tx.execute(_RUN, {"run": run_id}).one_or_none()
            if run is not None and run.epoch == epoch:
                tx.execute(_SET, {"run": run_id, "step": step, "status": status})
                if calls is not None and step != run.step:
                    details = self._step_details(run_id, step, calls)
                    details |= {"left_out": left_out} if left_out else {}
                    self._note(tx, run.tenant, who, "step", run_id, details)
                if status != run.status:
                    self._note(tx, run.tenant, who, _BECAME[status], run_id, {"step": step})
        if run is not None and run.epoch != epoch and calls is not None:
            self._note_refusal(run.tenant, who, "step", run_id, ActorLostError.code)
        return run is not None and run.epoch == epoch

    def park(self, run_id: str, epoch: int) -> None:
        """The run has no actor until it is asked for; the one that says so can do nothing more.
        Again it changes nothing.

        Raises:
            ActorLostError: the run has a newer actor.
        """
        this = RUNS.c.id == run_id
        with self._change() as tx:
            run = tx.execute(sa.select(RUNS).where(this)).one()
            if (run.epoch, run.ended) == (epoch + 1, PARKED):
                return  # only the answer was lost
            check_epoch(tx, run.tenant, run_id, epoch)
            tx.execute(RUNS.update().where(this).values(epoch=epoch + 1, ended=PARKED))
            self._note(tx, run.tenant, f"{run_id}@{epoch}", "run.park", run_id, {"step": run.step})

    def finish(self, run_id: str, epoch: int, status: str) -> None:
        """Ends a run as `completed` or `failed`; its last actor can note nothing more, and what it
        planned and has not used of a budget is free.

        Nothing happens to a run that is parked, or that a newer actor has taken over since.
        """
        this = (RUNS.c.id == run_id, RUNS.c.epoch == epoch)
        with self._change() as tx:
            run = tx.execute(sa.select(RUNS).where(*this)).one_or_none()
            if run is None:
                return
            ended = CLOSED if status == "completed" else NOT_STARTED
            values = {"status": status, "epoch": epoch + 1, "ended": ended}
            tx.execute(RUNS.update().where(*this).values(values))
            if status != run.status:
                self._note(tx, run.tenant, SDK, _BECAME[status], run_id, {"step": run.step})
            config = TrainingConfig.model_validate_json(run.config)
            if config.private:
                self._release(tx, run.tenant, dataset_of(config), run_id)

    def run(self, tenant: str, run_id: str) -> tuple[TrainingClientInfo, str]:
        """A run and its configuration as JSON.

        Raises:
            NotFoundError: this tenant has no such run.
        """
        with self._reading() as connection:
            row = _run(connection, tenant, run_id)
            return self._run_info(connection, row), row.config

    def resume_point(self, tenant: str, run_id: str) -> tuple[str | None, int]:
        """The artifact that a run without an actor comes back from, and its step; None is the base
        model with the seed of the run, where it began.

        Raises:
            NotFoundError: this tenant has no such run.
            ActorLostError: it cannot come back: its artifacts are gone, or it was closed, or never
                started, without one.
        """
        with self._reading() as connection:
            run = _run(connection, tenant, run_id)
            if run.ended is not None and run.resume_from is None:
                raise ActorLostError(
                    f"{run_id} was {run.ended} and saved no artifact: its {run.step} steps are"
                    " lost; create a new client",
                    details={"epoch": run.epoch, "lost_steps": run.step},
                )
            return resume_point(connection, run)

    def runs(self, tenant: str) -> list[TrainingClientInfo]:
        """All runs of a tenant, oldest first."""
        query = sa.select(RUNS).where(RUNS.c.tenant == tenant).order_by(RUNS.c.created_at)
        with self._reading() as connection:
            return [self._run_info(connection, row) for row in connection.execute(query)]

    def _run_info(self, connection: sa.Connection, row: Any) -> TrainingClientInfo:
        return TrainingClientInfo(
            training_client_id=row.id,
            status=row.status,
            step=row.step,
            epoch=row.epoch,
            model_ref=json.loads(row.config)["model_ref"],
            created_at=datetime.fromtimestamp(row.created_at, UTC),
            last_artifact_id=last_artifact(connection, row.id),
            reason=row.ended or "",
        )

    # --- keys --------------------------------------------------------------------------------

    def capability(self, tenant: str, run_id: str, epoch: int) -> Capability:
        """For the training actor that is started under an epoch just claimed.

        Raises:
            NotFoundError: this tenant has no such run.
            ActorLostError: it was claimed again since.
        """
        with self._reading() as connection:
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

    def new_data_key(self, shown: Capability, artifact_id: str, store: str) -> tuple[bytes, bytes]:
        """A fresh data key, and its wrapped form as stored beside an artifact to be.

        A keeper is also given one for an artifact that is there: it is to be sealed anew.

        Args:
            store: root of the store that it is for, which `audit_heads.meet` was called with.

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
                self.openable(shown.tenant, artifact_id)
            self._refuse_unmet(shown.tenant, store)
            key = new_key()
            wrapped = self._keyring.wrap(key, context_of(shown.tenant, artifact_id, DATA_KEY))
            return key, json.dumps(wrapped).encode()

    def open_data_key(
        self, shown: Capability, artifact_id: str, wrapped: bytes, store: str
    ) -> bytes:
        """The data key of an artifact that exists.

        Args:
            store: root of the store that it is in, which `audit_heads.meet` was called with.

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
            self.openable(tenant, artifact_id)
            self._refuse_unmet(tenant, store)
            context = context_of(tenant, artifact_id, DATA_KEY)
            key = self._keyring.unwrap(_stored(wrapped), context)
            with self._change() as tx:  # before the key is out
                self._note(tx, tenant, shown.who, "artifact.load", artifact_id)
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
        self._adopt(tenant, artifact_id, stored_as, size, manifest)

    @contextmanager
    def _admitted(self, shown: Capability, event: str, artifact_id: str) -> Iterator[str | None]:
        """Around what needs a genuine capability of today; a refusal inside is noted, too. Whose
        the artifact is, if it is or was one."""
        owner = self._tenant_of_artifact(artifact_id)
        if not self._issuer.genuine(shown):
            if (concerned := owner or self._known_tenant(shown.tenant)) is not None:
                self._note_stranger(concerned, event, artifact_id if owner else "")
            raise AccessDeniedError(
                "this capability was not issued here: data keys are given to the actor of a run"
                " and to readers that this registry knows"
            )
        # What a reader calls an artifact may be any text.
        subject = artifact_id if owner or shown.kind == RUN else ""
        with self._refusals_noted(shown.tenant, shown.who, event, subject):
            if shown.kind == RUN:
                run_id, _, epoch = shown.who.rpartition("@")
                with self._reading() as connection:
                    check_epoch(connection, shown.tenant, run_id, int(epoch))
            yield owner

    def _note_stranger(self, tenant: str | None, event: str, subject: str) -> None:
        with suppress(StorageError):  # the refusal itself is what the caller must learn
            self._note_refusal(str(tenant), ANYONE, event, subject, AccessDeniedError.code)

    def _known_tenant(self, tenant: str) -> str | None:
        """The tenant itself, if it has a run."""
        query = sa.select(RUNS.c.tenant).where(RUNS.c.tenant == tenant).limit(1)
        with self._reading() as connection:
            return connection.execute(query).scalar()

    def rotate_key(self, tenant: str, used: Sequence[str] = ()) -> str:
        """A fresh primary key of the keyring, for all that is wrapped from now on, the keys of
        data sets among it; its id, which no other key of this registry ever had, and none of
        `used`. `upkeep.rewrap` is for the artifacts."""
        name = self._keyring.rotate([*self._noted_keys(), *used])
        self.rewrap_unit_keys()
        with self._change() as tx:
            self._note(tx, tenant, SDK, "key.rotate", name)
        return name

    def rewrap_unit_keys(self) -> dict[str, str]:
        """The same, once all keys are noted: the keyring may have been rotated elsewhere."""
        self._recognise_keys()
        return super().rewrap_unit_keys()

    def rewrapped(self, tenant: str, artifact_id: str, wrapped: bytes) -> bytes | None:
        """The same data key under the primary key; None where it is already."""
        context = context_of(tenant, artifact_id, DATA_KEY)
        key = self._keyring.unwrap(_stored(wrapped), context)  # its name alone proves nothing
        if self.key_of(wrapped) == self._keyring.primary:
            return None
        return json.dumps(self._keyring.wrap(key, context)).encode()

    def held_key(self, tenant: str, artifact_id: str, wrapped: bytes) -> bytes:
        """The same data key for `rewrapped_held` of this registry alone, until it ends: not to be
        stored."""
        context = context_of(tenant, artifact_id, DATA_KEY)
        key = self._keyring.unwrap(_stored(wrapped), context)
        return wrap_key(self._holding_key, key, context)

    def rewrapped_held(
        self, tenant: str, artifact_id: str, held: bytes, under: str
    ) -> bytes | None:
        """What `held_key` gave under the primary key, though no other form of it may be left; None
        where that is `under`."""
        if under == self._keyring.primary:
            return None
        context = context_of(tenant, artifact_id, DATA_KEY)
        wrapped = self._keyring.wrap(unwrap_key(self._holding_key, held, context), context)
        return json.dumps(wrapped).encode()

    def retire_key(self, tenant: str, key_id: str, wrapped_under: Mapping[str, str]) -> None:
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
        with self._change() as tx:  # a save is entered before it, or finds the key gone
            if not wrapped_under.keys() >= {name for _, _, name in self.all_artifacts()}:
                raise InvalidRequestError(
                    f"an artifact was saved meanwhile, maybe under key {key_id!r}: it was not"
                    " retired; repeat the call"
                )
            self._note(tx, tenant, SDK, "key.retire", key_id)
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


class Onlooker(Registry):
    """A registry that changes nothing, for who promises so: neither rows nor tables, nor what keys
    are known. What would change something raises StorageError."""

    _looks_only = True


def _run(connection: sa.Connection, tenant: str, run_id: str) -> Any:
    """The row of a tenant's run."""
    row = connection.execute(_RUN, {"run": run_id}).one_or_none()
    if row is None or row.tenant != tenant:
        raise NotFoundError(
            f"no training client {run_id!r}: service.list_training_clients() names them"
        )
    return row


def _stored(wrapped: bytes) -> dict[str, str]:
    """A wrapped data key as the keyring takes it."""
    try:
        found = json.loads(wrapped)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or json.dumps(found).encode() != wrapped:
        raise IntegrityError("a stored data key is damaged: put its backup back")
    return found
