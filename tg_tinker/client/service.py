"""`ServiceClient`: the entry point. Finds or starts a cluster, and names all that can be asked.

    with ServiceClient() as service:
        tc = service.create_training_client(TrainingConfig(model_ref="..."))

Each method says here what it promises; a part of the service does it: `runs`, `artifacts`, `keys`,
`records` (ledgers, audit log, an older database). `home` finds and makes the home directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self

from tg_tinker.client.artifacts import Artifacts
from tg_tinker.client.home import init_home
from tg_tinker.client.keys import Keys
from tg_tinker.client.placement import Placement, with_absolute_path
from tg_tinker.client.records import Records
from tg_tinker.client.recovery import Progress, Recover, Recovery
from tg_tinker.client.runs import Runs
from tg_tinker.client.serving import check_model
from tg_tinker.client.training import TrainingClient
from tg_tinker.cluster import node
from tg_tinker.cluster.cluster import Cluster
from tg_tinker.cluster.ports import addresses
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import InvalidRequestError, StorageError
from tg_tinker.records.audit_log import AuditRow
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.report import DEFAULT_DATASET, PrivacyReport
from tg_tinker.storage.databases import check_database, default_database
from tg_tinker.storage.home import home_directory
from tg_tinker.storage.keyrings import audit_folder, default_place, place_of
from tg_tinker.storage.stores import as_text
from tg_tinker.types import (
    ApiKeyInfo,
    ArtifactInfo,
    ClusterStatus,
    KeyUses,
    Orphan,
    RegistryAcceptance,
    RegistryCheck,
    TrainingClientInfo,
)


class ServiceClient:
    """A connection to TG-Tinker on a Ray cluster, or on one started inside this process.

    Args:
        address: ``host:port`` of a Ray cluster or ``"local"``. None: `RAY_ADDRESS`, else the
            cluster that `ray start` left running here, else an embedded one.
        namespace: Ray namespace of the service's actors.
        tenant: a label that keeps runs and artifacts apart; not a security boundary.
        store: folder of the sealed artifacts, or a URI such as ``s3://bucket/prefix``; in the home
            directory when None. Credentials come from the environment of the actors, never from it.
        database: where the registry keeps its state, ``sqlite:///FILE`` or
            ``postgresql+psycopg://USER@HOST:PORT/NAME``. None: TG_TINKER_DATABASE, else in the home
            directory. A password comes from the environment of the head node, never from here.
        keyring: file with the tenant's keys, or ``env:NAME`` for a variable that holds its text in
            the environment of the cluster. None: TG_TINKER_KEYRING, else in the home directory.

    All lasting state is in the home directory (or where these point), none in the cluster.

    Raises:
        InvalidRequestError: a tenant's name that is none, a store that is neither a folder nor a
            URI without credentials, or a database that is none or names a secret; nothing was
            started.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: str = "tg_tinker",
        tenant: str = "default",
        store: str | os.PathLike[str] | None = None,
        database: str | None = None,
        keyring: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_tenant(tenant)
        self._home = home_directory()
        self._tenant = tenant
        # Here, for what Ray is given it may keep and show.
        self._store = as_text(str(store or self._home / "store"))
        database = check_database(database or default_database(self._home))
        place = place_of(keyring) if keyring else default_place(self._home)
        self._audit_keys = audit_folder(place, self._home)
        self._cluster = Cluster(_found(address, self._home), namespace)
        try:
            if self._cluster.embedded:
                init_home(self._home, str(place))
            elif not self._home.exists():
                raise StorageError(
                    f"there is no home at {self._home}: run `tg-tinker init` on the head node once"
                )
            registry = self._cluster.registry(database, str(place), str(self._audit_keys))
            registry.data_keys.key_info()  # a registry that cannot open its files says so now
        except BaseException:
            self._cluster.close()
            raise
        self._attach(registry)

    def _attach(self, registry: RemoteRegistry) -> None:
        """From now on all that is asked is asked of this registry."""
        self._registry = registry
        at = registry, self._store, self._tenant
        self._artifacts = Artifacts(*at)
        self._keys = Keys(*at)
        self._records = Records(*at, self._home, self._audit_keys)
        self._placement = Placement(self._cluster, self._home, self._store)
        recovery = Recovery(*at, self._home, self._cluster, self._records, self._placement)
        self._runs = Runs(registry, self._tenant, self._cluster, self._placement, recovery)

    def cluster_status(self) -> ClusterStatus:
        """Machines of the cluster, what of them is free, and who trains there."""
        return self._cluster.status()

    # --- runs --------------------------------------------------------------------------------

    def create_training_client(
        self,
        config: TrainingConfig,
        progress: Progress | None = None,
        recover: Recover = "auto",
    ) -> TrainingClient:
        """A new run on an actor of its own; returns when its model is loaded.

        Args:
            config: what to train and how.
            progress: told what is going on while the model is found, converted and loaded; None
                logs it to `tg_tinker` as INFO.
            recover: once a call has raised `ActorLostError`, ``auto`` lets the next one bring the
                run back from its last artifact, ``manual`` waits for `TrainingClient.recover`.

        Raises:
            InvalidRequestError: the configuration does not fit the model.
            NotFoundError: no such model.
            PlacementError: no room on the cluster.
            DPBudgetExceededError: the privacy budget cannot pay for what is planned.
            LedgerMismatchError: the ledger is older than what is known of it, or another one.
        """
        return self._runs.create(config, progress, recover)

    def get_training_client(
        self,
        training_client_id: str,
        progress: Progress | None = None,
        recover: Recover = "auto",
    ) -> TrainingClient:
        """A client of an existing run, from any process.

        A run whose actor is gone comes back from what it saved or loaded last under a new epoch,
        with a warning that says how many steps were lost; without an artifact from its beginning.
        Where that fails, the warning comes with the error, and not again when it is repeated.

        Args:
            recover: see `create_training_client`.

        Raises:
            NotFoundError: no such run.
            ActorLostError: it cannot come back: its artifacts are gone, or it was closed without
                one.
            LedgerMismatchError: see `create_training_client`.
        """
        return self._runs.get(training_client_id, progress, recover)

    def list_training_clients(self) -> list[TrainingClientInfo]:
        """All runs of this tenant, oldest first."""
        return self._runs.all()

    def describe_training_client(self, training_client_id: str) -> TrainingClientInfo:
        """One of them, whether it has an actor or not.

        Raises:
            NotFoundError: no such run.
        """
        return self._runs.describe(training_client_id)

    def park_training_client(self, training_client_id: str) -> None:
        """Saves a run and frees its actor; see `TrainingClient.park`.

        Raises:
            NotFoundError: no such run.
            InvalidRequestError: gradients wait for their step; nothing was changed.
            ActorLostError: it has no actor.
        """
        self._runs.park(training_client_id)

    def close_training_client(self, training_client_id: str) -> None:
        """Ends a run, as `TrainingClient.close` does, without bringing it back.

        Raises:
            NotFoundError: no such run.
            StorageError: see `TrainingClient.close`.
        """
        self._runs.close(training_client_id)

    def import_adapter(
        self,
        path: str | os.PathLike[str],
        model_ref: str,
        *,
        dtype: str = "auto",
        progress: Progress | None = None,
    ) -> ArtifactInfo:
        """Takes over a LoRA adapter from a PEFT directory as the artifact of a closed run.

        Nobody knows what it was trained on: its lineage is without a guarantee.

        Args:
            path: holds `adapter_config.json` and `adapter_model.safetensors`.
            model_ref, dtype: the base model, as in `TrainingConfig`.
            progress: as in `create_training_client`.

        Raises:
            InvalidRequestError: a pickle, damaged, not finite, or no plain LoRA.
            ArtifactMismatchError: a setting, name or shape that a run on this model would not have.
            NotFoundError: no such directory, file or model.
        """
        return self._runs.import_adapter(Path(path), model_ref, dtype, progress)

    # --- artifacts ---------------------------------------------------------------------------

    def list_artifacts(
        self,
        *,
        run: str | None = None,
        label: str | None = None,
        newer_than: datetime | None = None,
        older_than: datetime | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> list[ArtifactInfo]:
        """Saved artifacts of this tenant that fit all that is asked, oldest first.

        Args:
            run: the id of the training client that saved them.
            label: ``name=value``.
            newer_than, older_than: by `created_at`, with a time zone.
            after: the last id of the page before; it may have been deleted since.
            limit: at most so many, 1 to 10,000; all when None.

        Raises:
            InvalidRequestError: a value out of range or of another form.
            NotFoundError: there never was an artifact `after`.
        """
        return self._artifacts.find(run, label, newer_than, older_than, after, limit)

    def get_artifact(self, artifact_id: str) -> ArtifactInfo:
        """One artifact; `NotFoundError` if there is none of this id."""
        return self._artifacts.get(artifact_id)

    def set_labels(self, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        """Gives an artifact these labels in place of those that it has.

        They are for finding it again (`list_artifacts(label="stage=prod")`) and lie in the registry
        in clear: what is secret belongs into `save_state(metadata=...)`.

        Raises:
            InvalidRequestError: more than 16, or a name or value of another form.
        """
        return self._artifacts.set_labels(artifact_id, labels)

    def set_expiry(self, artifact_id: str, when: datetime | None) -> ArtifactInfo:
        """Until when an artifact may be opened, by the registry's clock; None is for ever.

        From then on loading, sampling, copying and exporting it raise `NotFoundError` with the
        code `artifact_expired`, and a run does not come back from it. It is listed, and its files
        stay, until `delete_expired`; until then another expiry makes it open again.

        Raises:
            InvalidRequestError: a time that is past, or without a time zone.
        """
        return self._artifacts.set_expiry(artifact_id, when)

    def delete_expired(self) -> Iterator[tuple[str, str]]:
        """Deletes all artifacts of this tenant whose time is over.

        Yields:
            An artifact's id, and what went wrong: empty where nothing did.
        """
        return self._artifacts.delete_expired()

    def copy_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Another artifact of the same content, run and step, under a key of its own.

        It has neither labels nor an expiry. A run still comes back from what it saved last.

        Raises:
            NotFoundError: there is none of this id, or it has expired.
            IntegrityError: it is not what was saved; there is no copy.
        """
        return self._artifacts.copy(artifact_id)

    def reseal_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Encrypts an artifact anew under a fresh key; its id stays, the old files and key go.

        For when a data key may have become known. Broken off anywhere, the artifact is whole. Who
        kept a copy of the old files and the keyring can still read the copy.

        Raises:
            NotFoundError: there is none of this id, or it has expired.
            IntegrityError: it is not what was saved; nothing was changed.
            InvalidRequestError: somebody else resealed it or rotated the tenant key meanwhile.
        """
        return self._artifacts.reseal(artifact_id)

    def delete_artifact(self, artifact_id: str, *, lost: bool = False) -> None:
        """Deletes an artifact for good: its entry, its key, its files.

        Args:
            lost: also if this store has no file of it any more. Else that is refused, as the files
                of an artifact in another store would stay.

        Raises:
            NotFoundError: there is none of this id, or no file of it in this store.
        """
        self._artifacts.delete(artifact_id, lost)

    def shred_artifact(self, artifact_id: str) -> list[str]:
        """Deletes an artifact, its key first; returns what that does not reach, as sentences.

        The same is gone as after `delete_artifact`. The difference is in the order, broken off
        anywhere nothing opens it any more, in the audit log's `artifact.shred`, and in the answer.
        """
        return self._artifacts.shred(artifact_id)

    def export_adapter(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """Writes a LoRA artifact, decrypted, as a PEFT directory that must not exist yet."""
        return self._artifacts.export_adapter(artifact_id, Path(path))

    def verify_artifacts(self, artifact_id: str | None = None) -> Iterator[tuple[str, str]]:
        """Reads artifacts of this tenant again and checks them as `load_state` would.

        Args:
            artifact_id: one alone. None is all but those that have expired.

        Yields:
            Its id, and what is wrong with it: empty where nothing is.

        Raises:
            NotFoundError: there is no artifact of this id.
        """
        return self._artifacts.verify(artifact_id)

    def sweep_store(self, min_age_s: float = 3600.0, dry_run: bool = False) -> Iterator[Orphan]:
        """Removes files of this tenant that belong to no artifact, as they are gone through.

        What a sweep finds is noted, and removed by a later one that finds it unchanged. An artifact
        is never touched; a save that is still under way then fails typed, and leaves nothing.

        Args:
            min_age_s: seconds between the two sweeps, by the store's clock; longer than any file
                of a save takes to upload.
            dry_run: only tell what would be done.

        Yields:
            What was found, once it is dealt with.

        Raises:
            IntegrityError: the registry is an older copy, or another one uses the store.
        """
        return self._artifacts.sweep(min_age_s, dry_run)

    # --- privacy -----------------------------------------------------------------------------

    def register_dataset(
        self, dataset_id: str, epsilon: float | None, delta: float = 1e-5, unit: str = "example"
    ) -> None:
        """Gives a data set its privacy budget, for all runs that will ever train on it.

        The first private client that names a data set does the same with its own target.

        Args:
            epsilon: the budget; None is without limit, and without a promise.
            delta: less than one over the number of units.
            unit: what is protected, ``example`` or ``id``.

        Raises:
            InvalidRequestError: a value out of range, or it is registered with another budget.
            LedgerMismatchError: the registry has lost what is known of its ledger.
        """
        self._records.register_dataset(dataset_id, epsilon, delta, unit)

    def privacy_report(self, dataset_id: str = DEFAULT_DATASET) -> PrivacyReport:
        """What was spent of a data set's budget, by whom, from its verified ledger.

        Raises:
            NotFoundError: no private run ever named this data set.
            IntegrityError: the stored ledger was changed.
            LedgerMismatchError: it is older than what the store or this home knows of it: what was
                spent since would be left out.
            StorageError: the store does not answer, so nobody knows.
        """
        return self._records.privacy_report(dataset_id)

    def book_missing_charges(self, dataset_id: str = DEFAULT_DATASET) -> int:
        """Puts back what an older copy of the registry's database has lost of a ledger.

        From the heads in the artifact store and in this home. Runs that made these charges may
        make no more: how often they used which unit is lost. Their artifacts load in new clients.

        Returns:
            How many charges were put back; 0 where none was missing.

        Raises:
            LedgerMismatchError: an entry is in none of the heads, or the ledger went on from an
                earlier one; nothing was changed.
        """
        return self._records.book_missing_charges(dataset_id)

    # --- HTTP --------------------------------------------------------------------------------

    def serve_http(
        self,
        model_ref: str,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        dtype: str = "auto",
        max_replicas: int = 1,
        max_tokens: int = 16_384,
        max_concurrent: int = 32,
        deadline_s: float = 300.0,
    ) -> str:
        """Samples over HTTP from a base model, and from the runs and artifacts on it.

        Returns when it answers; `docs/sampling.md` has the routes. Without an API key of this
        tenant everyone who reaches the address may sample, which a loopback address only allows.

        Args:
            model_ref, dtype: the base model, as in `TrainingConfig`.
            max_replicas: copies of the model; more start when requests wait.
            max_tokens: of one request, times its completions.
            max_concurrent: requests of one key at a time.
            deadline_s: of one request.

        Returns:
            The address, such as ``http://127.0.0.1:8000/v1``.

        Raises:
            InvalidRequestError: a host without an address, or one that others reach, and no API
                key.
            NotFoundError: no such model.
            ClusterUnavailableError: the port is taken, Serve runs at another address, or the model
                does not start.
            PlacementError: the cluster has no room for it.
        """
        config = with_absolute_path(TrainingConfig(model_ref=model_ref, dtype=dtype))
        check_model(config.model_ref)
        addresses(host, port)
        self._cluster.serve_http(
            host, port, max_replicas, self._placement.of_sampler(config),
            tenant=self._tenant, open=not self._keys.wants_api_keys(),
            most_tokens=max_tokens, most_at_once=max_concurrent, deadline_s=deadline_s,
        )  # fmt: skip
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def metrics_urls(self) -> list[str]:
        """Where Prometheus finds what samplers count and time, an address for each node.

        Numbers only; `docs/grafana-sampling.json` draws them.
        """
        return self._cluster.metrics_urls()

    def create_api_key(
        self, label: str = "", models: Sequence[str] = (), days: float | None = 90
    ) -> tuple[str, ApiKeyInfo]:
        """A key for HTTP. Its text is told here and stored nowhere: keep it.

        Args:
            label: a note for you.
            models: runs and artifacts it may sample from, beside the base model; all when empty.
            days: until it expires; None is never.
        """
        return self._keys.create_api_key(label, models, days)

    def list_api_keys(self) -> list[ApiKeyInfo]:
        """All keys of this tenant that are not revoked, oldest first."""
        return self._keys.api_keys()

    def revoke_api_key(self, key_id: str) -> None:
        """Ends a key; servers notice within seconds. `NotFoundError` if there is none."""
        self._keys.revoke_api_key(key_id)

    # --- keys --------------------------------------------------------------------------------

    def list_keys(self) -> KeyUses:
        """How many artifacts each key of the keyring opens, and which is the primary one."""
        return self._keys.uses()

    def rotate_key(self) -> str:
        """Makes a fresh primary key and returns its id; then call `rewrap_keys`.

        Raises:
            InvalidRequestError: the keyring is in the environment: it is rotated where it comes
                from.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        return self._keys.rotate()

    def rewrap_keys(self) -> Iterator[tuple[str, str]]:
        """Wraps the data key of every artifact of all tenants under the primary key.

        No data is touched, and what is broken off is finished by the next call.

        Yields:
            An artifact's id, and what went wrong: empty where nothing did. Or a data set, whose key
            does not open.

        Raises:
            RollbackError: the registry is an older copy; nothing was changed.
        """
        return self._keys.rewrap()

    def retire_key(self, key_id: str) -> None:
        """Destroys an older key.

        Raises:
            InvalidRequestError: it is the primary one, or still opens an artifact.
            IntegrityError: of an artifact nobody can tell which key opens it.
        """
        self._keys.retire(key_id)

    # --- audit log ---------------------------------------------------------------------------

    def audit_log(self, since: int = 0, limit: int = 1000) -> list[AuditRow]:
        """Rows of this tenant's audit log after row `since`, oldest first.

        Args:
            limit: at most so many, 1 to 10,000.

        Raises:
            IntegrityError: a stored row is not one. That the rows continue each other is for
                `verify_audit_log`.
        """
        return self._records.audit_log(since, limit)

    def verify_audit_log(self, head: AuditHead | None = None) -> AuditHead:
        """Reads the whole log and checks that it goes through every head that is known.

        Known are the head that this home last saw, the signed heads in the artifact store, and
        `head`, if you kept one. The verified head is then kept in both places. Of the first two,
        those may be missing whose loss was accepted (`accept_registry`).

        Returns:
            Where the log ends, signed; its `since` is the oldest head it was held against, its
            `accepted` the rows that accepted an older copy of the database.

        Raises:
            IntegrityError: names the first row, or the head, that does not fit; or a head was not
                signed by the key that was pinned at init: then the object, if it is in the store.
        """
        return self._records.verify_audit_log(head)

    # --- an older copy of the database -------------------------------------------------------

    def check_registry(self) -> RegistryCheck:
        """Holds the database against all that the store and this home know of this tenant.

        Raises:
            StorageError: the store does not answer, so nobody knows.
        """
        return self._records.check_registry()

    def accept_registry(self) -> RegistryAcceptance:
        """Goes on from an older copy of the database, for when no newer one is left.

        The loss becomes a row of the audit log, which names the heads of what is lost; from then
        on they count as known. What was deleted after the copy was made is no longer deleted, what
        was saved since is left over. Ledgers are not accepted: see `book_missing_charges`.

        Raises:
            StorageError: the store does not answer. Either nothing was accepted, or, as the message
                then says, another call goes on.
        """
        return self._records.accept_registry()

    # --- life --------------------------------------------------------------------------------

    def close(self) -> None:
        """Leaves the cluster. An embedded one ends, and its clients with it; artifacts stay."""
        self._cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _found(address: str | None, home: Path) -> str | None:
    """The cluster that `tg-tinker up` left running from this home, where no other one is named."""
    running = node.read(home)
    named = address or os.environ.get("RAY_ADDRESS")
    if running is None or named not in (None, "auto", running.address):
        return address
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # as it was started, before Ray reads it
    return running.address


def _check_tenant(tenant: str) -> None:
    """A tenant's name becomes part of paths."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tenant):
        raise InvalidRequestError(
            f"tenant {tenant!r}: use 1 to 64 letters, digits, dashes and underscores"
        )
