"""What the upper packages offer to this one, which may not import them: two typed entry points.

    actors_backend().delete_artifact(registry, store, "default", "art-...")

`actors.backend` and `serve_app.backend` are one class each; installing the package names them as
entry points, and here is the only dynamic import. Both are held against these protocols by the
strict type checker, so a call with a wrong argument fails `make lint`.

`Registry` is what the SDK calls of the registry, wherever that lives: in its actor
(`cluster.remote_registry`) or, in tests, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from tg_tinker.config import ResourceConfig, TrainingConfig
from tg_tinker.errors import ClusterUnavailableError
from tg_tinker.records.entries import Entry
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.report import PrivacyInfo
from tg_tinker.types import (
    ApiKeyInfo,
    ArtifactInfo,
    ArtifactQuery,
    KeyUses,
    Orphan,
    RegistryAcceptance,
    RegistryCheck,
    TrainingClientInfo,
)

GROUP = "tg_tinker.backends"

Outcomes = Iterator[tuple[str, str]]
"""(an artifact's id or a name, what went wrong: empty where nothing did)."""

Reached = list[tuple[str, str, str]]
"""(tenant, ``ledger of NAME`` or ``audit log``, ``SEQ-HASH``): where each chain ends."""


# --- the registry, as the SDK calls it ----------------------------------------------------------


class Runs(Protocol):
    def create(self, tenant: str, config: str) -> str: ...
    def claim(self, run_id: str, after: int | None = None) -> int: ...
    def record(self, run_id: str, epoch: int, step: int, status: str) -> bool: ...
    def finish(self, run_id: str, epoch: int, status: str) -> None: ...
    def get(self, tenant: str, run_id: str) -> tuple[TrainingClientInfo, str]: ...
    def of(self, tenant: str) -> list[TrainingClientInfo]: ...
    def resume_point(self, tenant: str, run_id: str) -> tuple[str | None, int]: ...


class Catalogue(Protocol):
    def get(self, tenant: str, artifact_id: str) -> ArtifactInfo: ...
    def find(self, tenant: str, query: ArtifactQuery = ...) -> list[ArtifactInfo]: ...
    def set_labels(
        self, tenant: str, artifact_id: str, labels: Mapping[str, str]
    ) -> ArtifactInfo: ...
    def set_expiry(self, tenant: str, artifact_id: str, when: datetime | None) -> ArtifactInfo: ...


class Ledgers(Protocol):
    def register(
        self, tenant: str, dataset: str, epsilon: float | None, delta: float, unit: str
    ) -> None: ...
    def entries(self, tenant: str, dataset: str) -> list[Entry]: ...
    def datasets(self, tenant: str) -> list[str]: ...
    def privacy_info(self, tenant: str, dataset: str, run_id: str) -> PrivacyInfo: ...
    def release(self, tenant: str, dataset: str, run_id: str) -> None: ...


class AuditLog(Protocol):
    def rows(self, tenant: str, since: int, limit: int) -> list[str]: ...
    def head(self, tenant: str) -> AuditHead: ...


class ApiKeys(Protocol):
    def create(
        self, tenant: str, label: str, models: Sequence[str], days: float | None
    ) -> tuple[str, ApiKeyInfo]: ...
    def of(self, tenant: str) -> list[ApiKeyInfo]: ...
    def wanted(self, tenant: str) -> bool: ...
    def revoke(self, tenant: str, key_id: str) -> None: ...


class DataKeys(Protocol):
    def capability(self, tenant: str, run_id: str, epoch: int) -> Any: ...
    def key_info(self) -> tuple[str, str]: ...


class Registry(Protocol):
    """The parts of `actors.registry.registry.Registry` that the SDK calls; documented there."""

    @property
    def runs(self) -> Runs: ...
    @property
    def catalogue(self) -> Catalogue: ...
    @property
    def ledgers(self) -> Ledgers: ...
    @property
    def audit_log(self) -> AuditLog: ...
    @property
    def api_keys(self) -> ApiKeys: ...
    @property
    def data_keys(self) -> DataKeys: ...


# --- what the upper packages do for the SDK -----------------------------------------------------


class Finding(Protocol):
    """A line of the doctor."""

    @property
    def check(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def message(self) -> str: ...
    def _asdict(self) -> dict[str, Any]: ...


class Check(Protocol):
    """One attack of an audit."""

    @property
    def name(self) -> str: ...
    @property
    def passed(self) -> bool: ...
    @property
    def statement(self) -> str: ...


class AuditReport(Protocol):
    """What the attacks on the private step found."""

    @property
    def checks(self) -> Sequence[Check]: ...
    @property
    def scores_in(self) -> tuple[float, ...]: ...
    @property
    def scores_out(self) -> tuple[float, ...]: ...
    @property
    def sigma(self) -> float: ...
    @property
    def claimed_epsilon(self) -> float: ...
    @property
    def bound(self) -> float: ...
    @property
    def passed(self) -> bool: ...
    @property
    def verdict(self) -> str: ...
    @property
    def power(self) -> float: ...
    @property
    def power_half(self) -> float: ...
    def to_json(self) -> dict[str, Any]: ...


class Sampler(Protocol):
    """A sampling application: sealed bytes in and out."""

    def sample(self, sealed: bytes) -> bytes: ...
    def stream(self, sealed: bytes) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class ActorsBackend(Protocol):
    """What `actors.backend.Backend` offers. `store` is a root, as `storage.stores` has it."""

    # What runs: Ray's handles of actors are not typed.
    def start_registry(
        self, namespace: str, database: str, keyring: str, audit_keys: str, sole: bool
    ) -> Any: ...
    def start_training(
        self, namespace: str, tenant: str, run_id: str, epoch: int, config: str, store: str,
        home: str, registry: Any, capability: bytes, resume: str | None,
        resources: ResourceConfig,
    ) -> Any: ...  # fmt: skip

    # The home.
    def create_home(self, home: Path, keyring: str | None = None) -> bool: ...
    def new_keyring(self, after: str | None = None) -> str: ...

    # Artifacts.
    def copy_artifact(
        self, registry: Registry, store: str, tenant: str, artifact_id: str
    ) -> ArtifactInfo: ...
    def reseal_artifact(
        self, registry: Registry, store: str, tenant: str, artifact_id: str
    ) -> ArtifactInfo: ...
    def delete_artifact(
        self, registry: Registry, store: str, tenant: str, artifact_id: str, *, lost: bool = False
    ) -> None: ...
    def shred_artifact(
        self, registry: Registry, store: str, tenant: str, artifact_id: str
    ) -> list[str]: ...
    def export_adapter(
        self, registry: Registry, store: str, tenant: str, artifact_id: str, path: Path
    ) -> None: ...

    # An operator's work.
    def verify_artifacts(
        self, registry: Registry, store: str, tenant: str, artifact_id: str | None = None
    ) -> Outcomes: ...
    def delete_expired(self, registry: Registry, store: str, tenant: str) -> Outcomes: ...
    def sweep_store(
        self, registry: Registry, store: str, tenant: str, min_age_s: float, dry_run: bool
    ) -> Iterator[Orphan]: ...
    def key_uses(self, registry: Registry, store: str) -> KeyUses: ...
    def rotate_key(self, registry: Registry, store: str, tenant: str) -> str: ...
    def rewrap_keys(self, registry: Registry, store: str) -> Outcomes: ...
    def retire_key(self, registry: Registry, store: str, tenant: str, key_id: str) -> None: ...
    def upgrade_registry(self, database: str, backup: Path) -> tuple[str, str]: ...
    def backup_registry(self, database: str, path: Path) -> Reached: ...
    def restore_registry(self, path: Path, database: str) -> Reached: ...
    def check_registry(
        self, registry: Registry, store: str, tenant: str, home: Path
    ) -> RegistryCheck: ...
    def accept_registry(
        self, registry: Registry, store: str, tenant: str, home: Path
    ) -> RegistryAcceptance: ...
    def doctor(self, home: Path, keyring: str, store: str) -> Iterator[Finding]: ...
    def profile(
        self, config: TrainingConfig, cache: Path, *, rows: int, tokens: int, steps: int,
        progress: Callable[[str], None],
    ) -> dict[str, float]: ...  # fmt: skip
    def privacy_audit(
        self, *, progress: Callable[[str], None], canaries: int, epsilon: float
    ) -> AuditReport: ...

    # Heads of the audit log and of ledgers, in the store.
    def covered_change(
        self, registry: Registry, store: str, tenant: str
    ) -> AbstractContextManager[None]: ...
    def audit_heads(self, store: str, tenant: str, public_key: bytes) -> list[AuditHead]: ...
    def keep_audit_head(self, store: str, head: AuditHead) -> None: ...
    def meet_ledger(
        self, registry: Registry, store: str, tenant: str, dataset: str, kept: Sequence[str]
    ) -> int: ...
    def book_missing(
        self, registry: Registry, store: str, tenant: str, dataset: str, kept: Sequence[str]
    ) -> int: ...


class ServeBackend(Protocol):
    """What `serve_app.backend.Backend` offers."""

    def connect(self, embedded: bool, **where: Any) -> Sampler: ...
    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None: ...
    def config(
        self, model_ref: str, dtype: str, host: str, port: int, replicas: int, namespace: str
    ) -> str: ...
    def seal_http(self) -> None: ...


def actors_backend() -> ActorsBackend:
    """What `actors` offers. Raises ClusterUnavailableError where it is not installed."""
    return cast("ActorsBackend", _loaded("actors"))


def serve_backend() -> ServeBackend:
    """What `serve_app` offers. Raises ClusterUnavailableError where it is not installed."""
    return cast("ServeBackend", _loaded("serve_app"))


def _loaded(name: str) -> object:
    for entry in entry_points(group=GROUP, name=name):
        return entry.load()()
    raise ClusterUnavailableError(
        f"no installed package offers {name!r}: reinstall tg-tinker (pip install -e . in a clone)"
    )
