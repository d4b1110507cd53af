"""Offers the functions of this package to the SDK, and imports each one when it is called.

`tg_tinker.backend.ActorsBackend` declares the interface. Every import is inside its method. So a
program that deletes an artifact loads no torch, and a program that looks for keys loads no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tg_tinker import backend
from tg_tinker.config import ResourceConfig, TrainingConfig
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.planning import PrivacyPlan
from tg_tinker.records.successions import Signers
from tg_tinker.types import ArtifactInfo, KeyUses, Orphan, RegistryAcceptance, RegistryCheck

if TYPE_CHECKING:
    from actors.registry.registry import Registry


def _registry(remote: backend.Registry) -> Registry:
    from actors.registry.registry import as_registry

    return as_registry(remote)


class Backend:
    """The implementation of `tg_tinker.backend.ActorsBackend`.

    The imported functions document what each method does.
    """

    def start_registry(
        self, namespace: str, database: str, keyring: str, audit_keys: str, sole: bool
    ) -> Any:
        from actors.registry.actor import start

        return start(namespace, database, keyring, audit_keys, sole)

    def start_training(
        self, namespace: str, tenant: str, run_id: str, epoch: int, config: str, store: str,
        home: str, registry: Any, capability: bytes, resume: str | None,
        resources: ResourceConfig,
    ) -> Any:  # fmt: skip
        from actors.training.actor import start

        return start(
            namespace, tenant, run_id, epoch, config, store, home, registry, capability, resume,
            resources,
        )  # fmt: skip

    def create_home(self, home: Path, keyring: str | None = None) -> bool:
        from actors.storage.home import create

        return create(home, keyring)

    def new_keyring(self, after: str | None = None) -> str:
        from actors.storage.key_providers import new_text

        return new_text(after)

    # --- artifacts ---------------------------------------------------------------------------

    def copy_artifact(
        self, registry: backend.Registry, store: str, tenant: str, artifact_id: str
    ) -> ArtifactInfo:
        from actors.artifacts.copies import copy

        return copy(_registry(registry), store, tenant, artifact_id)

    def reseal_artifact(
        self, registry: backend.Registry, store: str, tenant: str, artifact_id: str
    ) -> ArtifactInfo:
        from actors.artifacts.copies import reseal

        return reseal(_registry(registry), store, tenant, artifact_id)

    def delete_artifact(
        self, registry: backend.Registry, store: str, tenant: str, artifact_id: str,
        *, lost: bool = False,
    ) -> None:  # fmt: skip
        from actors.artifacts.delete import delete

        delete(_registry(registry), store, tenant, artifact_id, lost=lost)

    def shred_artifact(
        self, registry: backend.Registry, store: str, tenant: str, artifact_id: str
    ) -> list[str]:
        from actors.artifacts.delete import shred

        return shred(_registry(registry), store, tenant, artifact_id)

    def export_adapter(
        self, registry: backend.Registry, store: str, tenant: str, artifact_id: str, path: Path
    ) -> None:
        from actors.artifacts.adapters import export_adapter

        export_adapter(_registry(registry), store, tenant, artifact_id, path)

    # --- operations --------------------------------------------------------------------------

    def verify_artifacts(
        self, registry: backend.Registry, store: str, tenant: str, artifact_id: str | None = None
    ) -> backend.Outcomes:
        from actors.operations.verify import verify

        return verify(_registry(registry), store, tenant, artifact_id)

    def delete_expired(
        self, registry: backend.Registry, store: str, tenant: str
    ) -> backend.Outcomes:
        from actors.operations.expiry import delete_expired

        return delete_expired(_registry(registry), store, tenant)

    def sweep_store(
        self, registry: backend.Registry, store: str, tenant: str, min_age_s: float, dry_run: bool
    ) -> Iterator[Orphan]:
        from actors.operations.sweep import sweep_store

        return sweep_store(_registry(registry), store, tenant, min_age_s, dry_run)

    def key_uses(self, registry: backend.Registry, store: str) -> KeyUses:
        from actors.operations.keys import uses

        return uses(_registry(registry), store)

    def rotate_key(self, registry: backend.Registry, store: str, tenant: str) -> str:
        from actors.operations.keys import rotate

        return rotate(_registry(registry), store, tenant)

    def rewrap_keys(self, registry: backend.Registry, store: str) -> backend.Outcomes:
        from actors.operations.keys import rewrap

        return rewrap(_registry(registry), store)

    def retire_key(self, registry: backend.Registry, store: str, tenant: str, key_id: str) -> None:
        from actors.operations.keys import retire

        retire(_registry(registry), store, tenant, key_id)

    def rotate_signing_key(self, registry: backend.Registry, store: str) -> str:
        from actors.operations.keys import rotate_signing_key

        return rotate_signing_key(_registry(registry), store)

    def rotate_secret(
        self, registry: backend.Registry, store: str, tenant: str, name: str
    ) -> int:  # fmt: skip
        from actors.operations.keys import rotate_secret

        return rotate_secret(_registry(registry), store, tenant, name)

    def retire_secret(
        self, registry: backend.Registry, store: str, tenant: str, name: str
    ) -> None:  # fmt: skip
        from actors.operations.keys import retire_secret

        retire_secret(_registry(registry), store, tenant, name)

    def upgrade_registry(self, database: str, backup: Path) -> tuple[str, str]:
        from actors.registry.upgrade import upgrade

        return upgrade(database, backup)

    def backup_registry(self, database: str, path: Path) -> backend.Reached:
        from actors.registry.backup import backup

        return backup(database, path)

    def restore_registry(self, path: Path, database: str) -> backend.Reached:
        from actors.registry.backup import restore

        return restore(path, database)

    def check_registry(
        self, registry: backend.Registry, store: str, tenant: str, home: Path
    ) -> RegistryCheck:
        from actors.operations.restore import check

        return check(_registry(registry), store, tenant, home)

    def accept_registry(
        self, registry: backend.Registry, store: str, tenant: str, home: Path
    ) -> RegistryAcceptance:
        from actors.operations.restore import accept

        return accept(_registry(registry), store, tenant, home)

    def doctor(self, home: Path, keyring: str, store: str) -> Iterator[backend.Finding]:
        from actors.operations.doctor import examine

        return examine(home, keyring, store)

    def profile(
        self, config: TrainingConfig, cache: Path, *, rows: int, tokens: int, steps: int,
        progress: Callable[[str], None],
    ) -> dict[str, float]:  # fmt: skip
        from actors.operations.profile import profile_steps

        return profile_steps(
            config, cache, rows=rows, tokens=tokens, steps=steps, progress=progress
        )

    def plan_privacy(
        self, rows: int, epsilon: float, epochs: int, *, delta: float | None,
        batch_size: int | None, max_grad_norm: float, held_out_rows: int | None,
    ) -> PrivacyPlan:  # fmt: skip
        from actors.privacy.comparison import compare_contracts

        return compare_contracts(
            rows, epsilon, epochs, delta=delta, batch_size=batch_size,
            max_grad_norm=max_grad_norm, held_out_rows=held_out_rows,
        )  # fmt: skip

    def privacy_audit(
        self, *, progress: Callable[[str], None], canaries: int, epsilon: float
    ) -> backend.AuditReport:
        from actors.privacy.self_audit import run_audit

        return run_audit(progress=progress, canaries=canaries, epsilon=epsilon)

    def privacy_combinations(self) -> tuple[list[dict[str, Any]], str]:
        from actors.privacy.combinations import markdown, rows

        return rows(), markdown()

    # --- heads in the store ------------------------------------------------------------------

    def covered_change(
        self, registry: backend.Registry, store: str, tenant: str
    ) -> AbstractContextManager[None]:
        from actors.registry.rollback import covered

        return covered(_registry(registry), store, tenant)

    def audit_heads(self, store: str, tenant: str, signers: Signers) -> list[AuditHead]:
        from actors.registry.rollback import kept

        return kept(store, tenant, signers)

    def keep_audit_head(self, store: str, head: AuditHead) -> None:
        from actors.registry.rollback import keep

        keep(store, head)

    def meet_ledger(
        self, registry: backend.Registry, store: str, tenant: str, dataset: str,
        kept: Sequence[str],
    ) -> int:  # fmt: skip
        from actors.registry.rollback import meet_ledger
        from actors.storage.store import ArtifactStore

        return meet_ledger(_registry(registry), ArtifactStore(store), tenant, dataset, kept)

    def book_missing(
        self, registry: backend.Registry, store: str, tenant: str, dataset: str,
        kept: Sequence[str],
    ) -> int:  # fmt: skip
        from actors.registry.rollback import book_missing
        from actors.storage.store import ArtifactStore

        return book_missing(_registry(registry), ArtifactStore(store), tenant, dataset, kept)


_: type[backend.ActorsBackend] = Backend
"""For the type checker: it verifies that `Backend` has every method that the SDK may call."""
