"""Defines a registry, a store and a checkpoint without Ray, which the tests of saved artifacts
share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.artifacts import fetch, publish
from actors.artifacts.publish import Draft
from actors.engine.checkpoint import Checkpoint, SessionState, from_files, to_files
from actors.engine.lineage import Lineage
from actors.registry.registry import Registry
from actors.storage.capabilities import Capability
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.store import ArtifactStore
from tg_tinker import TrainingConfig

TENANT = "clinic"


NOTE = "the patient in bed 7"


TENSOR = "model.layers.0.self_attn.q_proj.lora_A.weight"


ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


WHEN = datetime(2025, 3, 4, 5, 6, 7, 891011, tzinfo=UTC)


def checkpoint(size: int = 4, **changes: Any) -> Checkpoint:
    state = SessionState(
        weights={TENSOR: torch.arange(2.0 * size).view(2, size), "b": torch.tensor(1.5)},
        optimizer={f"{TENSOR}.exp_avg": torch.ones(2, size)},
        step=3,
        geometry={"rank": 2, "base": "sha256:00"},
        plan={"threads": 2},
        adapter_config=ADAPTER,
        lineage=Lineage("sha256:00", "private"),
    )
    return Checkpoint(replace(state, **changes), {"note": NOTE, "deep": [1, {"a": None}]}, WHEN)


@dataclass(frozen=True)
class Service:
    """A home with one run and its living actor, without Ray."""

    home: Path
    registry: Registry
    store: ArtifactStore
    run: str
    epoch: int
    capability: Capability

    @property
    def root(self) -> Path:
        return self.home / "store"

    def publish(self, saved: Checkpoint | None = None, **changes: Any) -> str:
        saved = saved or checkpoint()
        values = {
            "run_id": self.run, "epoch": self.epoch, "step": saved.state.step,
            "include_optimizer": saved.state.optimizer is not None,
        } | changes  # fmt: skip
        draft = Draft(self.registry, self.store, self.capability, to_files(saved))
        publish.publish(self.registry, self.store, draft, **values)
        return draft.artifact_id

    def fetch(self, artifact: str, tenant: str = TENANT) -> Checkpoint:
        return from_files(
            fetch.fetch(self.registry, self.store, self.registry.data_keys.reader(tenant), artifact)
        )

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def files_of(self, artifact: str) -> list[Path]:
        return [path for path in self.files() if artifact in str(path)]


@pytest.fixture
def service(tmp_path: Path) -> Service:
    home = tmp_path / "home"
    create(home)
    registry = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    run = registry.runs.create(TENANT, TrainingConfig(model_ref="some/model").model_dump_json())
    epoch = registry.runs.claim(run)
    capability = registry.data_keys.capability(TENANT, run, epoch)
    return Service(home, registry, ArtifactStore(str(home / "store")), run, epoch, capability)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.metadata, one.timestamp) == (other.metadata, other.timestamp)
    a, b = one.state, other.state
    for name in ("step", "geometry", "plan", "adapter_config"):
        assert getattr(a, name) == getattr(b, name)
    for mine, theirs in ((a.weights, b.weights), (a.optimizer or {}, b.optimizer or {})):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name])
    assert (a.optimizer is None) == (b.optimizer is None)
