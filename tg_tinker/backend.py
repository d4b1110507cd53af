"""Declares and loads two entry points: the functions of the upper packages that the SDK calls.

    actors_backend().delete_artifact(registry, store, "default", "art-...")

The SDK may not import the upper packages. `actors.backend` and `serve_app.backend` contain one
class each. The installed package names both classes as entry points, and this module contains the
only dynamic import. The strict type checker compares both classes with these protocols, so a call
with a wrong argument fails `make lint`.

`Registry` declares the part of the registry that the SDK calls. The registry lives in its actor
(`cluster.remote_registry`) or, in tests, in this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from importlib.metadata import entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from tg_tinker.config import ResourceConfig, TrainingConfig
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError
from tg_tinker.records.entries import Entry
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.planning import PrivacyPlan
from tg_tinker.records.report import PrivacyInfo
from tg_tinker.records.successions import Signers, Succession
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

PACKAGES = ("actors", "serve_app", "tg_tinker")
"""The packages of one installation, which stand side by side."""

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable by which Ray tells the program of a job how its workers run."""

Outcomes = Iterator[tuple[str, str]]
"""Pairs of an artifact id or another name, and the problem; the problem is empty on success."""

Reached = list[tuple[str, str, str]]
"""The end of each chain: (tenant, ``ledger of NAME`` or ``audit log``, ``SEQ-HASH``)."""


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
    def counted_units(self, tenant: str, dataset: str) -> int: ...
    def privacy_info(self, tenant: str, dataset: str, run_id: str) -> PrivacyInfo: ...
    def release(self, tenant: str, dataset: str, run_id: str) -> None: ...
    def drop(self, tenant: str, dataset: str, position: int) -> None: ...


class AuditLog(Protocol):
    def rows(self, tenant: str, since: int, limit: int) -> list[str]: ...
    def head(self, tenant: str) -> AuditHead: ...
    def successions(self, tenant: str) -> list[tuple[int, Succession]]: ...


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
    """The parts of `actors.registry.registry.Registry` that the SDK calls; see the class."""

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


# --- the functions of the upper packages --------------------------------------------------------


class Finding(Protocol):
    """One line in the report of the doctor."""

    @property
    def check(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def message(self) -> str: ...
    def _asdict(self) -> dict[str, Any]: ...


class Check(Protocol):
    """One attack of a privacy audit, with its result."""

    @property
    def name(self) -> str: ...
    @property
    def passed(self) -> bool: ...
    @property
    def statement(self) -> str: ...


class AuditReport(Protocol):
    """The results of the attacks on the private step."""

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
    """A sampling application, which takes and returns sealed bytes."""

    def sample(self, sealed: bytes) -> bytes: ...
    def stream(self, sealed: bytes) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class ActorsBackend(Protocol):
    """The methods of `actors.backend.Backend`; `store` is a root as in `storage.stores`."""

    # Actors; Ray does not type actor handles.
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

    # Operations.
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
    def rotate_signing_key(self, registry: Registry, store: str) -> str: ...
    def rotate_secret(self, registry: Registry, store: str, tenant: str, name: str) -> int: ...
    def retire_secret(self, registry: Registry, store: str, tenant: str, name: str) -> None: ...
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
    def plan_privacy(
        self, rows: int, epsilon: float, epochs: int, *, delta: float | None,
        batch_size: int | None, max_grad_norm: float, held_out_rows: int | None,
    ) -> PrivacyPlan: ...  # fmt: skip
    def privacy_audit(
        self, *, progress: Callable[[str], None], canaries: int, epsilon: float
    ) -> AuditReport: ...
    def privacy_combinations(self) -> tuple[list[dict[str, Any]], str]: ...

    # Heads of the audit log and of ledgers, in the store.
    def covered_change(
        self, registry: Registry, store: str, tenant: str
    ) -> AbstractContextManager[None]: ...
    def audit_heads(self, store: str, tenant: str, signers: Signers) -> list[AuditHead]: ...
    def keep_audit_head(self, store: str, head: AuditHead) -> None: ...
    def meet_ledger(
        self, registry: Registry, store: str, tenant: str, dataset: str, kept: Sequence[str]
    ) -> int: ...
    def book_missing(
        self, registry: Registry, store: str, tenant: str, dataset: str, kept: Sequence[str]
    ) -> int: ...


class ServeBackend(Protocol):
    """The methods of `serve_app.backend.Backend`."""

    def connect(self, embedded: bool, **where: Any) -> Sampler: ...
    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None: ...
    def end_http(self, within_s: float) -> None: ...
    def config(
        self, model_ref: str, dtype: str, host: str, port: int, replicas: int, namespace: str
    ) -> str: ...
    def seal_http(self) -> None: ...


def actors_backend() -> ActorsBackend:
    """Loads the backend of `actors`.

    Raises:
        ClusterUnavailableError: `actors` is not installed.
        InvalidRequestError: see `check_packages`.
    """
    return cast("ActorsBackend", _loaded("actors"))


def serve_backend() -> ServeBackend:
    """Loads the backend of `serve_app`.

    Raises:
        ClusterUnavailableError: `serve_app` is not installed.
        InvalidRequestError: see `check_packages`.
    """
    return cast("ServeBackend", _loaded("serve_app"))


def check_packages(environment: Mapping[str, str] = os.environ) -> None:
    """Checks that no other module has the name of one of our packages.

    Python, in this program and in Ray's workers, takes a file or folder beside the program before
    any installed package.

    Raises:
        InvalidRequestError: another module has the name; the message says where it is.
    """
    beside = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        for found in (*_found(name), *_in_job(name, environment)):
            if found != beside / name:
                raise InvalidRequestError(_taken(name, found))


def _found(name: str) -> list[Path]:
    """Returns the file or folder of the module that `import` gives under a name."""
    spec = None
    with suppress(ValueError):  # Something without a file is in `sys.modules`.
        spec = find_spec(name)
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder).resolve() for folder in spec.submodule_search_locations][:1]
    return [Path(spec.origin or name).resolve()]


def _in_job(name: str, environment: Mapping[str, str]) -> list[Path]:
    """Returns what has a name in the working directory of a job, which is the workers' too."""
    with suppress(ValueError, AttributeError):
        if json.loads(environment.get(_JOB, "")).get("runtime_env", {}).get("working_dir"):
            names = (f"{name}.py", f"{name}/__init__.py")
            found = [path.resolve() for path in map(Path.cwd().joinpath, names) if path.exists()]
            return [path.parent if path.name == "__init__.py" else path for path in found]
    return []


def _taken(name: str, found: Path) -> str:
    others = set(packages_distributions().get(name, ())) - {"tg-tinker"}
    of = next((one for one in sorted(others) if "site-packages" in found.parts), None)
    return f"the module {name} is {found}, which hides a package of TG-Tinker: " + (
        f"it belongs to {of}, so use an environment without this distribution"
        if of
        else "rename this file or folder, and imports of it"
    )


def _loaded(name: str) -> object:
    check_packages()
    for entry in entry_points(group=GROUP, name=name):
        return entry.load()()
    raise ClusterUnavailableError(
        f"no installed package offers {name!r}: reinstall tg-tinker (pip install -e . in a clone)"
    )
