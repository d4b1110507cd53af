"""Defines tenants and times of audit logs in tests, and a service over a real registry without
Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING, STORE, create
from tg_tinker import ServiceClient, TrainingConfig
from tg_tinker.records.audit_log import AuditRow, empty, verify
from tg_tinker.records.files import read_rows

US, THEM = "clinic", "bank"


TIME = "2026-05-01T10:00:00.000000+00:00"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    create(tmp_path / "home")
    return tmp_path / "home"


class LocalService(ServiceClient):
    """The real client, with the registry in this process."""

    def __init__(self, home: Path, tenant: str = US) -> None:
        self._home, self._tenant = home, tenant
        self._store, self._audit_keys = str(home / STORE), home
        self._cluster: Any = None
        self._attach(open_registry(home))

    def close(self) -> None:
        pass


def rows_of(registry: Registry, tenant: str = US) -> list[AuditRow]:
    """Returns all rows, verified."""
    rows = [AuditRow.parse(line) for line in registry.audit_log.rows(tenant, 0, 10_000)]
    verify(rows, since=empty(tenant))
    return rows


def seen(registry: Registry, tenant: str = US) -> list[tuple[str, str, str, str]]:
    return [(row.who, row.event, row.subject, row.outcome) for row in rows_of(registry, tenant)]


def restored(service: LocalService, change: Callable[[], object]) -> None:
    """Makes a change, then restores the database from before it."""
    database = service._home / DATABASE
    service._registry.database.engine.dispose()
    shutil.copy(database, old := service._home / "old.db")
    change()
    service._registry.database.engine.dispose()
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    shutil.copy(old, database)
    service._attach(open_registry(service._home))


CONFIG = TrainingConfig(model_ref="some/model").model_dump_json()


def open_registry(place: Path, kind: type[Registry] = Registry) -> Registry:
    """Returns a registry that has been compared with a store without heads."""
    registry = kind(f"sqlite:///{place / DATABASE}", place / KEYRING)
    registry.heads.meet_store(US, STORE)
    return registry


@pytest.fixture
def registry(place: Path) -> Registry:
    return open_registry(place)


@pytest.fixture
def run(registry: Registry) -> str:
    return registry.runs.create(US, CONFIG)


VECTORS = Path(__file__).parents[1] / "vectors" / "audit"


def vector(name: str) -> Path:
    return VECTORS / f"{name}.jsonl"


def good() -> list[AuditRow]:
    return list(read_rows(vector("good")))
