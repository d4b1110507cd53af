"""Defines an older copy of the database under newer heads."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from actors.artifacts import delete, fetch
from actors.operations import restore
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING
from actors.training.place import Place
from actors.training.worker import Worker
from support.artifacts import TENANT, Service
from support.artifacts import service as service
from support.audit import place as place
from tg_tinker import RegistryAcceptance, RegistryCheck, TrainingConfig
from tg_tinker.records.audit_log import AuditRow, parse_rows


@dataclass(frozen=True)
class Restored:
    """A service whose database, with its files, was restored to the state before a deletion.

    Attributes:
        service: on the old database, by a new process of the registry.
        newest: the same on the newest database.
        kept, deleted: artifacts; the old database knows both as living, and both have their files.
    """

    service: Service
    newest: Service
    kept: str
    deleted: str

    @property
    def root(self) -> str:
        return str(self.service.root)

    @property
    def registry(self) -> Registry:
        return self.service.registry

    def rows(self) -> list[AuditRow]:
        return [*parse_rows(self.registry.audit_log.rows(TENANT, 0, 1000))]

    def accept(self) -> RegistryAcceptance:
        return restore.accept(self.registry, self.root, TENANT, self.service.home)

    def check(self) -> RegistryCheck:
        return restore.check(self.registry, self.root, TENANT, self.service.home)


def old_copy(service: Service, path: Path) -> Path:
    with closing(sqlite3.connect(service.home / DATABASE)) as live:
        live.execute("VACUUM INTO ?", [str(path)])
    return path


def on(service: Service, database: Path) -> Service:
    """Returns the same home by a new process of the registry, on another database."""
    return replace(service, registry=Registry(f"sqlite:///{database}", service.home / KEYRING))


@pytest.fixture
def old(service: Service, tmp_path: Path) -> Restored:
    kept, deleted = service.publish(), service.publish()
    database = old_copy(service, tmp_path / "old.db")
    shutil.copytree(service.root, tmp_path / "store")
    delete.shred(service.registry, str(service.root), TENANT, deleted)
    shutil.copytree(tmp_path / "store", service.root, dirs_exist_ok=True)
    assert len(service.files_of(deleted)) == 5
    return Restored(on(service, database), on(service, service.home / DATABASE), kept, deleted)


def loaded(of: Service, artifact: str) -> None:
    fetch.fetch(of.registry, of.store, of.capability, artifact)


def train(of: Service) -> None:
    """Starts the actor of a new run, up to the point where it would load its model."""
    config = TrainingConfig(model_ref="no/such/model")
    run = of.registry.runs.create(TENANT, config.model_dump_json())
    shown = of.registry.data_keys.capability(TENANT, run, epoch := of.registry.runs.claim(run))
    place = Place(TENANT, run, epoch, str(of.root), of.home, shown)
    Worker(place, config, of.registry, lambda _: None)


def put_back(database: Path, service: Service) -> None:
    """Restores a copy of the database under the living registry."""
    with (
        closing(sqlite3.connect(database)) as source,
        closing(sqlite3.connect(service.home / DATABASE)) as live,
    ):
        source.backup(live)
