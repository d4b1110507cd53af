"""`ServiceClient`: the entry point. Finds or starts a cluster, opens and lists runs.

with ServiceClient() as service:
    tc = service.create_training_client(TrainingConfig(model_ref="..."))
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from tg_tinker.backend import provided
from tg_tinker.client.artifacts import ArtifactCalls
from tg_tinker.client.records import RegistryCalls
from tg_tinker.client.runs import ClientCalls, with_absolute_path
from tg_tinker.cluster import node
from tg_tinker.cluster.cluster import Cluster
from tg_tinker.cluster.connection import running_cluster
from tg_tinker.cluster.ports import addresses, check_port
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.errors import (
    InvalidRequestError,
    NotFoundError,
    StorageError,
)
from tg_tinker.records.audit_log import AuditHead, AuditRow, empty, parse_rows, verify
from tg_tinker.records.files import KeptHead, keep_head, paged, read_head, read_public_key
from tg_tinker.records.report import DEFAULT_DATASET, PrivacyReport
from tg_tinker.storage.databases import check_database, database_file, default_database
from tg_tinker.storage.keyrings import audit_folder, default_place, place_of
from tg_tinker.storage.stores import as_text
from tg_tinker.types import ApiKeyInfo, ClusterStatus, KeyUses

MOST_AUDIT_ROWS = 10_000
"""Of one page of the audit log."""

_log = logging.getLogger("tg_tinker")


def home_directory() -> Path:
    """`TG_TINKER_HOME`, or `~/.tg-tinker`: registry, store, keyring and converted models."""
    return Path(os.environ.get("TG_TINKER_HOME") or "~/.tg-tinker").expanduser().absolute()


def check_home() -> None:
    """For who only looks: a home that is made for it would say that there is nothing.

    Raises:
        StorageError: there is none.
    """
    home = home_directory()
    if not database_file(home).exists():
        raise StorageError(
            f"there is no home of TG-Tinker at {home}: correct TG_TINKER_HOME, put a lost"
            f" {database_file(home).name} back, or run `tg-tinker init` to make a home"
        )


def init_home(home: Path | None = None, keyring: str | None = None) -> Path:
    """Makes the home directory where there is none: a keyring and an empty registry.

    Args:
        keyring: where the keyring is, as `ServiceClient` takes it.
    """
    home = home or home_directory()
    place = default_place(home) if keyring is None else place_of(keyring)
    if provided("home")(home, str(place)):
        _log.warning(
            "made a new home in %s: back up its keyring, it opens every artifact, and audit.key",
            home,
        )
    return home


def check_serving(model_ref: str, host: str, port: int) -> None:
    """What would stop `ServiceClient.serve_http`, told before a cluster is started for it.

    Raises:
        NotFoundError: no such path; whether the hub has a model is not asked.
        InvalidRequestError: a host without an address.
        ClusterUnavailableError: the port is taken.
    """
    _check_path(model_ref)
    addresses(host, port)
    if (os.environ.get("RAY_ADDRESS") or running_cluster() or "local") == "local":
        check_port(host, port)  # on a cluster that runs, its own Serve may have it


class ServiceClient(ClientCalls, ArtifactCalls, RegistryCalls):
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
            self._registry = self._cluster.registry(database, str(place), str(self._audit_keys))
            self._registry.key_info()  # a registry that cannot open its files says so now
        except BaseException:
            self._cluster.close()
            raise

    def cluster_status(self) -> ClusterStatus:
        """Machines of the cluster, what of them is free, and who trains there."""
        return self._cluster.status()

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
        if not isinstance(dataset_id, str):
            raise InvalidRequestError("dataset_id must be a string: the name of the data set")
        dp = DPConfig(target_epsilon=epsilon, target_delta=delta, unit=unit)
        checked = TrainingConfig(model_ref="any", dataset_id=dataset_id)
        self._meet(dataset_id)
        self._registry.register_dataset(
            self._tenant, checked.dataset_id, dp.target_epsilon, dp.target_delta, dp.unit
        )

    def privacy_report(self, dataset_id: str = DEFAULT_DATASET) -> PrivacyReport:
        """What was spent of a data set's budget, by whom, from its verified ledger.

        Raises:
            NotFoundError: no private run ever named this data set.
            IntegrityError: the stored ledger was changed.
            LedgerMismatchError: it is older than what the store or this home knows of it: what was
                spent since would be left out.
            StorageError: the store does not answer, so nobody knows.
        """
        entries = self._registry.ledger_entries(self._tenant, dataset_id)
        if not entries:
            known = ", ".join(self._registry.dataset_ids(self._tenant)) or "none yet"
            raise NotFoundError(f"data set {dataset_id!r} has no ledger; there are: {known}")
        self._meet(dataset_id)
        return PrivacyReport(entries)

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
        kept = KeptHead(self._home, self._tenant, dataset_id)
        booked: int = provided("book_missing")(
            self._registry, self._store, self._tenant, dataset_id, kept.lines
        )
        if not booked:
            self.privacy_report(dataset_id)  # whose ledger is there, and whole
        return booked

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
        _check_path(config.model_ref)
        addresses(host, port)
        self._cluster.serve_http(
            host, port, max_replicas, self._sampler_place(config),
            tenant=self._tenant, open=not self._registry.wants_api_keys(self._tenant),
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
        if days is not None and not 0 < days < 36_500:
            raise InvalidRequestError(f"days={days} is out of range: it must be in (0, 36500)")
        with provided("covered_change")(self._registry, self._store, self._tenant):
            made: tuple[str, ApiKeyInfo] = self._registry.create_api_key(
                self._tenant, label, list(models), days
            )
        return made

    def list_api_keys(self) -> list[ApiKeyInfo]:
        """All keys of this tenant that are not revoked, oldest first."""
        keys: list[ApiKeyInfo] = self._registry.api_keys(self._tenant)
        return keys

    def revoke_api_key(self, key_id: str) -> None:
        """Ends a key; servers notice within seconds. `NotFoundError` if there is none."""
        with provided("covered_change")(self._registry, self._store, self._tenant):
            self._registry.revoke_api_key(self._tenant, key_id)

    # --- keys --------------------------------------------------------------------------------

    def list_keys(self) -> KeyUses:
        """How many artifacts each key of the keyring opens, and which is the primary one."""
        found: KeyUses = provided("key_uses")(self._registry, self._store)
        return found

    def rotate_key(self) -> str:
        """Makes a fresh primary key and returns its id; then call `rewrap_keys`.

        Raises:
            InvalidRequestError: the keyring is in the environment: it is rotated where it comes
                from.
            RollbackError: the registry is an older copy; nothing was changed.
        """
        key_id: str = provided("rotate_key")(self._registry, self._store, self._tenant)
        return key_id

    def rewrap_keys(self) -> Iterator[tuple[str, str]]:
        """Wraps the data key of every artifact of all tenants under the primary key.

        No data is touched, and what is broken off is finished by the next call.

        Yields:
            An artifact's id, and what went wrong: empty where nothing did. Or a data set, whose key
            does not open.

        Raises:
            RollbackError: the registry is an older copy; nothing was changed.
        """
        yield from provided("rewrap_keys")(self._registry, self._store)

    def retire_key(self, key_id: str) -> None:
        """Destroys an older key.

        Raises:
            InvalidRequestError: it is the primary one, or still opens an artifact.
            IntegrityError: of an artifact nobody can tell which key opens it.
        """
        provided("retire_key")(self._registry, self._store, self._tenant, key_id)

    # --- audit log ---------------------------------------------------------------------------

    def audit_log(self, since: int = 0, limit: int = 1000) -> list[AuditRow]:
        """Rows of this tenant's audit log after row `since`, oldest first.

        Args:
            limit: at most so many, 1 to 10,000.

        Raises:
            IntegrityError: a stored row is not one. That the rows continue each other is for
                `verify_audit_log`.
        """
        if since < 0 or not 1 <= limit <= MOST_AUDIT_ROWS:
            raise InvalidRequestError(
                f"since={since}, limit={limit}: since must be 0 or more, limit in"
                f" [1, {MOST_AUDIT_ROWS}]"
            )
        return list(parse_rows(self._registry.audit_rows(self._tenant, since, limit), since))

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
        kept = self._home / f"audit-head-{self._tenant}"
        public_key = read_public_key(self._audit_keys / "audit.pub")
        own: list[AuditHead] = [read_head(kept)] if kept.exists() else []
        now: AuditHead = self._registry.audit_head(self._tenant)
        for one in (*own, now):
            one.check(public_key)
        own += provided("audit_heads")(self._store, self._tenant, public_key)
        known = [now] if head is None else [head, now]
        rows = paged(self.audit_log)
        found = verify(rows, since=empty(self._tenant), known=known, own=own, public_key=public_key)
        provided("keep_audit_head")(self._store, now)
        keep_head(kept, now)
        since = None if found.since is now else found.since
        return replace(now, since=since, accepted=found.accepted)

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


def _check_path(model_ref: str) -> None:
    """A model that is a path, or no hub id, must be here: replicas find out late."""
    path = Path(model_ref)
    with contextlib.suppress(RuntimeError):  # ~ of a user that there is not
        path = path.expanduser()
    if not path.exists() and (model_ref.startswith(("/", ".", "~")) or model_ref.count("/") != 1):
        raise NotFoundError(
            f"model_ref {model_ref!r}: there is no such path here, and it is no hub id such as"
            " 'org/name'"
        )


def _check_tenant(tenant: str) -> None:
    """A tenant's name becomes part of paths."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tenant):
        raise InvalidRequestError(
            f"tenant {tenant!r}: use 1 to 64 letters, digits, dashes and underscores"
        )
