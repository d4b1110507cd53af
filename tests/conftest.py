"""Fixtures of all rooms: a tiny model, a home, a service on it, the databases."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import databases
from support.models import make_home, make_model
from tg_tinker import ServiceClient

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background job starts with SIGINT ignored; the tests of Ctrl-C need Python's own way.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted base models, kept for the whole session: the real one takes half a minute."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, converted_models: Path) -> Iterator[Path]:
    """A home directory of its own for one module."""
    path = make_home(tmp_path_factory.mktemp("home") / "tg", converted_models)
    before = os.environ.get("TG_TINKER_HOME")
    os.environ["TG_TINKER_HOME"] = str(path)
    yield path
    if before is None:
        del os.environ["TG_TINKER_HOME"]
    else:
        os.environ["TG_TINKER_HOME"] = before


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[ServiceClient]:
    """Keeps one embedded cluster alive, which every `ServiceClient()` of the module joins."""
    with ServiceClient(address="local") as client:
        yield client


@pytest.fixture(scope="session")
def postgres() -> Iterator[databases.Postgres]:
    with databases.postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def each_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module or test that asks for it runs on each database that `databases.url_of` names."""
    on_server = request.param == "postgresql"
    if on_server and request.node.get_closest_marker("sqlite_only"):
        pytest.skip("looks into the file of SQLite")
    with databases.all_on(request.getfixturevalue("postgres") if on_server else None):
        yield
