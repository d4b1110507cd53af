"""Provides `ServiceClient`, the entry point, which finds or starts a cluster.

    with ServiceClient() as service:
        tc = service.create_training_client(TrainingConfig(model_ref="..."))

This module documents each method. `runs`, `artifacts`, `keys` and `records` (ledgers, the audit
log, older copies of the database) do the work. `home` finds and creates the home directory.
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
from tg_tinker.texts import check_text
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

    All lasting state is in the home directory, or in the locations that the arguments name. No
    lasting state is in the cluster.

    Args:
        address: ``host:port`` of a Ray cluster, or ``"local"`` for an embedded cluster. None uses
            `RAY_ADDRESS`, else a cluster that `tg-tinker up` or `ray start` left running here, else
            an embedded cluster.
        namespace: the Ray namespace of the service's actors.
        tenant: a label of 1 to 64 letters, digits, dashes and underscores. It keeps runs and
            artifacts apart, but is not a security boundary.
        store: the folder of the encrypted artifacts, or a URI such as ``s3://bucket/prefix``. None
            uses a folder in the home directory. Credentials come from the environment of the
            actors, never from the URI.
        database: the location of the registry's database: ``sqlite:///FILE`` or
            ``postgresql+psycopg://USER@HOST:PORT/NAME``. None uses TG_TINKER_DATABASE, else a file
            in the home directory. A password comes from the environment of the head node, never
            from this argument.
        keyring: the file with the tenant keys, or ``env:NAME`` for a variable in the environment of
            the cluster that holds the text of the keyring. None uses TG_TINKER_KEYRING, else a file
            in the home directory.

    Raises:
        InvalidRequestError: the tenant is not a valid name; the store is neither a folder nor a URI
            without credentials; or the database is not a valid location or contains a secret.
            Nothing was started.
        StorageError: the cluster is not embedded and there is no home directory.
        ClusterUnavailableError: the cluster does not answer, or does not accept this process.
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
        check_text(namespace, "namespace")
        self._home = home_directory()
        self._tenant = tenant
        # Before Ray starts, because Ray may store and show its arguments.
        self._store = as_text(str(store or self._home / "store"))
        database = check_database(database or default_database(self._home))
        place = place_of(keyring) if keyring else default_place(self._home)
        self._audit_keys = audit_folder(place, self._home)
        self._cluster = Cluster(address, namespace)
        try:
            if self._cluster.embedded:
                init_home(self._home, str(place))
            elif not self._home.exists():
                raise StorageError(
                    f"there is no home at {self._home}: run `tg-tinker init` once on the head node"
                )
            registry = self._cluster.registry(database, str(place), str(self._audit_keys))
            # A registry that cannot open its files fails here.
            registry.data_keys.key_info()
        except BaseException:
            self._cluster.close()
            raise
        self._attach(registry)

    def _attach(self, registry: RemoteRegistry) -> None:
        """Sends all later requests to this registry."""
        self._registry = registry
        at = registry, self._store, self._tenant
        self._artifacts = Artifacts(*at)
        self._keys = Keys(*at)
        self._records = Records(*at, self._home, self._audit_keys)
        self._placement = Placement(self._cluster, self._home, self._store)
        recovery = Recovery(*at, self._home, self._cluster, self._records, self._placement)
        self._runs = Runs(registry, self._tenant, self._cluster, self._placement, recovery)

    def cluster_status(self) -> ClusterStatus:
        """Returns the machines of the cluster, its free resources, and its training clients."""
        return self._cluster.status()

    # --- runs --------------------------------------------------------------------------------

    def create_training_client(
        self,
        config: TrainingConfig,
        progress: Progress | None = None,
        recover: Recover = "auto",
    ) -> TrainingClient:
        """Starts a new run on its own actor, and returns its client when the model is loaded.

        Args:
            config: the configuration of the run.
            progress: receives a message for each stage while the model is found, converted and
                loaded; None logs the messages to `tg_tinker` as INFO.
            recover: what happens after a call has raised `ActorLostError`. With ``auto`` the next
                call recovers the run from its last artifact; with ``manual`` the run waits for
                `TrainingClient.recover`.

        Raises:
            InvalidRequestError: the configuration does not fit the model or the dataset.
            NotFoundError: the model does not exist.
            PlacementError: the cluster has no room for the run.
            DPBudgetExceededError: the privacy budget cannot pay for the planned steps.
            LedgerMismatchError: the ledger is behind one of its known heads, or has forked.
        """
        return self._runs.create(config, progress, recover)

    def get_training_client(
        self,
        training_client_id: str,
        progress: Progress | None = None,
        recover: Recover = "auto",
    ) -> TrainingClient:
        """Returns a client of an existing run, from any process.

        A run whose actor is gone is recovered under a new epoch, from the artifact that it saved or
        loaded last. A Python warning reports the number of lost steps. A run without an artifact
        starts again from its beginning. If the recovery fails, the warning is issued together with
        the error, and not again when the call is repeated.

        Args:
            training_client_id: the id of the run.
            progress: see `create_training_client`.
            recover: see `create_training_client`.

        Raises:
            NotFoundError: the run does not exist.
            ActorLostError: the run cannot be recovered: its artifacts are gone, it was closed
                without an artifact, or its model is still loading after three minutes.
            PlacementError: see `create_training_client`.
            LedgerMismatchError: see `create_training_client`.
        """
        return self._runs.get(training_client_id, progress, recover)

    def list_training_clients(self) -> list[TrainingClientInfo]:
        """Returns all runs of this tenant, oldest first."""
        return self._runs.all()

    def describe_training_client(self, training_client_id: str) -> TrainingClientInfo:
        """Returns the description of one run, and does not recover the run.

        Raises:
            NotFoundError: the run does not exist.
        """
        return self._runs.describe(training_client_id)

    def park_training_client(self, training_client_id: str) -> None:
        """Saves a run and frees the resources of its actor; see `TrainingClient.park`.

        Raises:
            NotFoundError: the run does not exist.
            InvalidRequestError: pending gradients wait for an `optim_step`; nothing was changed.
            ActorLostError: the run has no actor.
        """
        self._runs.park(training_client_id)

    def close_training_client(self, training_client_id: str) -> None:
        """Ends a run as `TrainingClient.close` does, and does not recover the run.

        Raises:
            NotFoundError: the run does not exist.
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
        """Imports a LoRA adapter from a PEFT directory as the artifact of a new, closed run.

        The training data of the adapter is unknown, so its lineage has no privacy guarantee.

        Args:
            path: the directory with `adapter_config.json` and `adapter_model.safetensors`.
            model_ref, dtype: the base model and its dtype, as in `TrainingConfig`.
            progress: see `create_training_client`.

        Returns:
            The description of the new artifact.

        Raises:
            InvalidRequestError: the adapter is a pickle, is damaged, has values that are not
                finite, or is not a plain LoRA adapter.
            ArtifactMismatchError: a setting, name or shape differs from the settings, names and
                shapes of a run on this model.
            NotFoundError: the directory, a file or the model does not exist.
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
        """Returns the saved artifacts of this tenant that meet all conditions, oldest first.

        Args:
            run: the id of the training client that saved the artifacts.
            label: a label in the form ``name=value``.
            newer_than, older_than: exclusive bounds on `created_at`, with a time zone.
            after: the last artifact id of the previous page; it may be deleted by now.
            limit: the maximum number of artifacts, 1 to 10,000; None returns all.

        Raises:
            InvalidRequestError: a value is out of range or has another form.
            NotFoundError: an artifact with the id `after` never existed.
        """
        return self._artifacts.find(run, label, newer_than, older_than, after, limit)

    def get_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Returns the description of one artifact.

        Raises:
            NotFoundError: no artifact has this id.
        """
        return self._artifacts.get(artifact_id)

    def set_labels(self, artifact_id: str, labels: Mapping[str, str]) -> ArtifactInfo:
        """Replaces the labels of an artifact; `{}` removes all labels.

        Labels help to find artifacts (`list_artifacts(label="stage=prod")`). The registry stores
        labels in clear: put secret information into `save_state(metadata=...)`.

        Returns:
            The changed description of the artifact.

        Raises:
            InvalidRequestError: there are more than 16 labels, or a name or value has another form.
            NotFoundError: no artifact has this id.
        """
        return self._artifacts.set_labels(artifact_id, labels)

    def set_expiry(self, artifact_id: str, when: datetime | None) -> ArtifactInfo:
        """Sets the time from which an artifact may no longer be opened; None means no expiry.

        The clock of the registry decides. After this time, loading, sampling, copying, resealing
        and exporting the artifact raise `NotFoundError` with the code `artifact_expired`, and no
        run is recovered from the artifact. The artifact stays in the list and its files stay in the
        store until `delete_expired`. Until then another expiry opens the artifact again.

        Returns:
            The changed description of the artifact.

        Raises:
            InvalidRequestError: the time is in the past or has no time zone.
            NotFoundError: no artifact has this id.
        """
        return self._artifacts.set_expiry(artifact_id, when)

    def delete_expired(self) -> Iterator[tuple[str, str]]:
        """Deletes all expired artifacts of this tenant, while the caller iterates.

        Yields:
            The artifact id, and the problem; the problem is empty on success.
        """
        return self._artifacts.delete_expired()

    def copy_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Copies an artifact into a new artifact of the same content, run and step.

        The copy has its own data key, no labels and no expiry. A run is still recovered from the
        artifact that it saved last, not from a later copy of an earlier artifact.

        Returns:
            The description of the copy.

        Raises:
            NotFoundError: no artifact has this id, or the artifact has expired.
            IntegrityError: the stored bytes differ from the saved bytes; there is no copy.
        """
        return self._artifacts.copy(artifact_id)

    def reseal_artifact(self, artifact_id: str) -> ArtifactInfo:
        """Encrypts an artifact again under a new data key, and removes its old files and key.

        Use this method if a data key may have become known. The id of the artifact stays. If the
        call is interrupted at any point, the artifact is still complete. Anyone who kept a copy of
        the old files and wrapped key, and has the keyring, can still read the copy.

        Returns:
            The description of the artifact.

        Raises:
            NotFoundError: no artifact has this id, or the artifact has expired.
            IntegrityError: the stored bytes differ from the saved bytes, or the store does not
                return the written bytes; nothing was changed.
            InvalidRequestError: another caller resealed the artifact or rotated the tenant key at
                the same time.
            StorageError: the store refused. The message says if the artifact is resealed and only
                old files are left; otherwise nothing was changed.
        """
        return self._artifacts.reseal(artifact_id)

    def delete_artifact(self, artifact_id: str, *, lost: bool = False) -> None:
        """Deletes an artifact permanently: its entry, its wrapped key and its files.

        Args:
            lost: True also deletes the entry of an artifact that has no file in this store. False
                refuses this, because the files might be in another store and would stay there.

        Raises:
            NotFoundError: no artifact has this id; or, unless `lost`, this store has no file of the
                artifact.
        """
        self._artifacts.delete(artifact_id, lost)

    def shred_artifact(self, artifact_id: str) -> list[str]:
        """Deletes an artifact and destroys its wrapped data key first.

        The call removes the same data as `delete_artifact`. It differs in three ways: if the call
        is interrupted after its first change, nothing opens the artifact any more; the audit log
        records `artifact.shred`; and the call returns the limits of the deletion.

        Returns:
            Sentences about data that the call does not reach, such as backups and copies.

        Raises:
            NotFoundError: no artifact has this id, or this store has no file of the artifact.
        """
        return self._artifacts.shred(artifact_id)

    def export_adapter(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """Writes the adapter of a LoRA artifact, decrypted, as a PEFT directory.

        The adapter names its base model, so `AutoPeftModelForCausalLM` finds it: the run's hub id,
        or its directory if that exists on this machine.

        Args:
            path: the directory to write; it must be new or empty.

        Returns:
            The path of the directory.

        Raises:
            InvalidRequestError: the directory is not empty, or the artifact is not of a LoRA run.
            NotFoundError: no artifact has this id, or the artifact has expired.
            IntegrityError: the stored bytes differ from the saved bytes.
        """
        return self._artifacts.export_adapter(artifact_id, Path(path))

    def verify_artifacts(self, artifact_id: str | None = None) -> Iterator[tuple[str, str]]:
        """Reads stored artifacts of this tenant and checks them as `load_state` would.

        Args:
            artifact_id: the id of one artifact. None checks all artifacts that have not expired.

        Yields:
            The artifact id, and the problem; the problem is empty if the artifact is intact.

        Raises:
            NotFoundError: no artifact has this id.
        """
        return self._artifacts.verify(artifact_id)

    def sweep_store(self, min_age_s: float = 3600.0, dry_run: bool = False) -> Iterator[Orphan]:
        """Removes files of this tenant that belong to no artifact, while the caller iterates.

        A sweep records the files that it finds, and a later sweep removes them if they are
        unchanged. A sweep never touches an artifact. If it removes the files of a save that is
        still running, that save fails with `StorageError` and leaves no files.

        Args:
            min_age_s: the minimum time between the two sweeps, in seconds, by the store's clock. It
                must be longer than the upload of any file of a save.
            dry_run: True only reports what a sweep would do.

        Yields:
            Each group of files, after the sweep has handled it.

        Raises:
            IntegrityError: the registry is an older copy, or another registry uses the store.
        """
        return self._artifacts.sweep(min_age_s, dry_run)

    # --- privacy -----------------------------------------------------------------------------

    def register_dataset(
        self, dataset_id: str, epsilon: float | None, delta: float = 1e-5, unit: str = "example"
    ) -> None:
        """Registers the privacy budget of a dataset, for all runs that will ever train on it.

        The first private run that names an unregistered dataset registers its own target. To
        register the same budget again changes nothing.

        Args:
            dataset_id: the name of the dataset, as in `TrainingConfig`.
            epsilon: the budget; None means no limit and no privacy guarantee.
            delta: the delta of the guarantee, less than 1 / the number of units.
            unit: the protected unit, ``example`` or ``id``.

        Raises:
            InvalidRequestError: a value is out of range, or the dataset has another budget.
            LedgerMismatchError: the ledger is behind one of its known heads, or has forked.
        """
        self._records.register_dataset(dataset_id, epsilon, delta, unit)

    def privacy_report(self, dataset_id: str = DEFAULT_DATASET) -> PrivacyReport:
        """Returns a report of a dataset's spent budget and of the runs that spent it.

        The report is computed from the ledger, which is verified in this process.

        Raises:
            NotFoundError: the dataset has no ledger: it was never registered, and no private run
                named it.
            IntegrityError: the stored ledger was changed.
            LedgerMismatchError: the ledger is behind a head in the store or in this home, or has
                forked. The report would omit later charges.
            StorageError: the store does not answer, so the ledger cannot be compared.
        """
        return self._records.privacy_report(dataset_id)

    def drop_draw(self, dataset_id: str = DEFAULT_DATASET) -> int:
        """Gives up the Poisson draw of a dataset that was told to a run and waits for its step.

        Use it if that step cannot be made any more and a run with other settings must go on. From
        then on nobody can say that draws were not chosen: all later Poisson steps of the dataset
        count as uses of the units that they draw, which costs much more. It cannot be undone.

        Returns:
            The position of the draw in the dataset's stream.

        Raises:
            NotFoundError: the dataset has no ledger.
            InvalidRequestError: no draw waits for its step; nothing was changed.
            LedgerMismatchError: the ledger is behind one of its known heads, or has forked.
        """
        return self._records.drop_draw(dataset_id)

    def book_missing_charges(self, dataset_id: str = DEFAULT_DATASET) -> int:
        """Restores the ledger entries that an older copy of the registry's database has lost.

        The entries come from the heads in the artifact store and in this home. The runs that made
        the lost charges may not charge again, because the database has lost how often they used
        each unit. New clients can load the artifacts of these runs.

        Returns:
            The number of restored charges; 0 if no charge was missing.

        Raises:
            NotFoundError: the dataset has no ledger.
            LedgerMismatchError: no head contains a missing entry, or the ledger has forked from an
                earlier entry; nothing was changed.
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
        """Serves samples over HTTP from a base model, and from the runs and artifacts on it.

        The method returns when the server answers; `docs/sampling.md` describes the routes. If this
        tenant has never created an API key, anyone who can reach the address may sample. This is
        allowed only on a loopback address.

        Args:
            model_ref, dtype: the base model and its dtype, as in `TrainingConfig`.
            host, port: the address to listen on.
            max_replicas: the maximum number of replicas; with more than 1, replicas start when
                requests wait.
            max_tokens: the maximum number of generated tokens of one request, summed over its
                completions.
            max_concurrent: the maximum number of simultaneous requests of one API key.
            deadline_s: the maximum duration of one request, in seconds.

        Returns:
            The base URL, such as ``http://127.0.0.1:8000/v1``.

        Raises:
            InvalidRequestError: the host has no address, or other machines can reach the host and
                the tenant has no API key.
            NotFoundError: the model does not exist.
            ClusterUnavailableError: the port is taken, Ray Serve answers at another address
                already, or the model does not start.
            PlacementError: the cluster has no room for the model.
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
        """Returns the URLs of the samplers' Prometheus metrics, one for each node.

        The metrics contain only numbers; `docs/grafana-sampling.json` is a dashboard for them.
        """
        return self._cluster.metrics_urls()

    def create_api_key(
        self, label: str = "", models: Sequence[str] | None = None, days: float | None = 90
    ) -> tuple[str, ApiKeyInfo]:
        """Creates an API key for HTTP and returns its text together with its description.

        Keep the text: it is returned only here, and the registry stores only its hash.

        Args:
            label: a note for you.
            models: the runs and artifacts that the key may sample from, beside the base model;
                None means all that the tenant has or will have.
            days: the days until the key expires, in (0, 36500); None means never.

        Raises:
            InvalidRequestError: `days` is out of range, or `models` is empty or no list of names.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        return self._keys.create_api_key(label, models, days)

    def list_api_keys(self) -> list[ApiKeyInfo]:
        """Returns all API keys of this tenant that are not revoked, oldest first."""
        return self._keys.api_keys()

    def revoke_api_key(self, key_id: str) -> None:
        """Revokes an API key; servers refuse it within five seconds.

        Raises:
            NotFoundError: the tenant has no such key.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        self._keys.revoke_api_key(key_id)

    # --- keys --------------------------------------------------------------------------------

    def list_keys(self) -> KeyUses:
        """Returns the primary key of the keyring, and how many artifacts each key opens."""
        return self._keys.uses()

    def rotate_key(self) -> str:
        """Creates a new primary key and returns its id; call `rewrap_keys` next.

        Raises:
            InvalidRequestError: the keyring is in the environment; rotate it at its source.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        return self._keys.rotate()

    def rewrap_keys(self) -> Iterator[tuple[str, str]]:
        """Wraps the data key of every artifact of all tenants with the primary key.

        No data is encrypted again. If the iteration is interrupted, every artifact still opens, and
        the next call completes the work.

        Yields:
            The artifact id, and the problem; the problem is empty on success. A dataset is yielded
            only if its own key does not open.

        Raises:
            RollbackError: the registry is an older copy; nothing was changed.
        """
        return self._keys.rewrap()

    def retire_key(self, key_id: str) -> None:
        """Destroys an older key of the keyring.

        Backups that only this key opens are lost.

        Raises:
            InvalidRequestError: the key is the primary key, it still opens an artifact, or an
                artifact was saved at the same time.
            IntegrityError: the key file of an artifact does not show which key opens it.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        self._keys.retire(key_id)

    def rotate_audit_key(self) -> str:
        """Replaces the key that signs heads, and destroys the old one. Returns the new public key.

        Each audit log gets a row in which the old key endorses the new one. So exports verify for
        whoever has the old `audit.pub` or the new one.

        Raises:
            RollbackError, LedgerMismatchError: the registry is an older copy; nothing was changed.
            StorageError: see the message, which says whether the key was replaced.
        """
        return self._keys.rotate_audit()

    def rotate_secret(self, name: str) -> int:
        """Makes a fresh version of a secret of the home and returns its number.

        Args:
            name: `api-key-rows`, `capabilities`, `entries`, `pseudonyms` or `transport`.

        Raises:
            InvalidRequestError: there is no secret of this name.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        return self._keys.rotate_secret(name)

    def retire_secret(self, name: str) -> None:
        """Destroys the older versions of a secret: what they made is refused from now on.

        Args:
            name: `api-key-rows`, `capabilities` or `transport`.

        Raises:
            InvalidRequestError: the older versions of this secret are needed for ever.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        self._keys.retire_secret(name)

    # --- audit log ---------------------------------------------------------------------------

    def audit_log(self, since: int = 0, limit: int = 1000) -> list[AuditRow]:
        """Returns the rows of this tenant's audit log after row `since`, oldest first.

        The rows are not verified as a chain; `verify_audit_log` does that.

        Args:
            since: the number of a row; 0 starts at the beginning.
            limit: the maximum number of rows, 1 to 10,000.

        Raises:
            InvalidRequestError: `since` or `limit` is out of range.
            IntegrityError: a stored row has an invalid form.
        """
        return self._records.audit_log(since, limit)

    def verify_audit_log(self, head: AuditHead | None = None) -> AuditHead:
        """Verifies the complete audit log, including that it contains every known head.

        The known heads are the head that this home saw last, the signed heads in the artifact
        store, and `head`. The method then keeps the verified head in this home and in the store. A
        head of the home or the store may be missing if its loss was accepted (`accept_registry`).

        Args:
            head: a head that you kept; None compares only with the other heads.

        Returns:
            The signed head at the end of the log. Its `since` is the oldest known head that was
            compared, and its `accepted` lists the rows that accepted an older copy of the database.

        Raises:
            IntegrityError: a row or a head does not fit; the message names the first one. Or the
                key that was pinned at init did not sign a head; the message names the object if the
                head is in the store.
            NotFoundError: there is no `audit.pub` beside the keyring file or in the home directory.
            StorageError: the store does not answer.
        """
        return self._records.verify_audit_log(head)

    # --- an older copy of the database -------------------------------------------------------

    def check_registry(self) -> RegistryCheck:
        """Compares the database with all heads that the store and this home keep of this tenant.

        Raises:
            StorageError: the store does not answer, so the database cannot be compared.
            NotFoundError: the database and the store know other tenants, and not this tenant.
        """
        return self._records.check_registry()

    def accept_registry(self) -> RegistryAcceptance:
        """Accepts an older copy of the database, for the case that no newer copy exists.

        A row of the audit log records the loss permanently. It names the heads of the lost rows,
        and these heads then count as known. Deletions that were made after the copy are forgotten,
        and files of artifacts that were saved after the copy belong to no artifact. The loss of
        ledger entries is not accepted: see `book_missing_charges`.

        Raises:
            StorageError: the store does not answer. Either nothing was accepted, or the message
                says that the row is written and that another call completes the acceptance.
        """
        return self._records.accept_registry()

    # --- end of the connection ---------------------------------------------------------------

    def close(self) -> None:
        """Leaves the cluster; artifacts stay.

        An embedded cluster and its training clients end with its last `ServiceClient`. Its HTTP
        server then takes no new request, and the answers that it has begun have 8 seconds to end.
        """
        try:
            self._cluster.end_http()
            if self._cluster.connected:
                self._registry.settle(whole=self._cluster.embedded)
        finally:
            self._cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_tenant(tenant: str) -> None:
    """Checks a tenant's name, which becomes part of paths."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tenant):
        raise InvalidRequestError(
            f"tenant {tenant!r} is invalid: use 1 to 64 letters, digits, dashes and underscores"
        )
