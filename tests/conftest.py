"""Defines fixtures that all rooms share: a tiny model, a home, a service on it, the databases."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from actors.process import spin_briefly
from support import clusters, databases
from support.models import make_home, make_model
from support.processes import SOAK
from tg_tinker import ServiceClient

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Else each program starts a worker ahead, which no actor with a runtime environment can use.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
spin_briefly()  # else idle threads of one process slow down the others
gc.disable()  # while the tests' modules are imported: a third of that time were collections
# A shell's background job starts with SIGINT ignored, and `nohup` with SIGHUP ignored; the tests of
# Ctrl-C and of lost terminals need what a program in the foreground has.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# A failure is there again in the next run. `make soak-examples` tries other examples each time.
settings.register_profile("repeatable", derandomize=True)
if not SOAK:
    settings.load_profile("repeatable")


SHARED = pytest.StashKey[set[Path]]()
"""The test files that use the embedded cluster of a test process."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, so that short ones fill the end of a run evenly.

    Files that share the embedded cluster of a process follow each other.
    """
    sharing = [item for item in items if "embedded" in getattr(item, "fixturenames", [])]
    programs = [item for item in items if item.get_closest_marker("program")]
    for item in sharing + programs:
        item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    shared = config.stash[SHARED] = {item.path for item in sharing}
    items.sort(key=lambda item: (item.path not in slow, item.path in shared))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _cluster_only_where_it_is_asked_for(request: pytest.FixtureRequest) -> None:
    """Ends the shared cluster before a module that does not use it."""
    if request.path not in request.config.stash[SHARED]:
        clusters.end()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of converted base models, which all processes of a run share.

    The conversion of the real model takes half a minute.
    """
    base = tmp_path_factory.getbasetemp()
    models = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models"
    models.mkdir(exist_ok=True)
    return models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, converted_models: Path) -> Iterator[Path]:
    """Returns a home directory that one module has for itself."""
    path = make_home(tmp_path_factory.mktemp("home") / "tg", converted_models)
    before = os.environ.get("TG_TINKER_HOME")
    os.environ["TG_TINKER_HOME"] = str(path)
    yield path
    if before is None:
        del os.environ["TG_TINKER_HOME"]
    else:
        os.environ["TG_TINKER_HOME"] = before


@pytest.fixture(scope="module")
def embedded(home: Path) -> Iterator[None]:
    """Keeps an embedded cluster, empty at first, which every `ServiceClient()` here joins."""
    clusters.keep()
    yield
    clusters.clear()


@pytest.fixture(scope="module")
def forking() -> Iterator[None]:
    """Lets the clusters and programs that a module starts itself fork their workers."""
    with clusters.forking():
        yield


@pytest.fixture(scope="module")
def service(embedded: None) -> Iterator[ServiceClient]:
    with ServiceClient(address="local") as client:
        yield client


@pytest.fixture(scope="session")
def postgres() -> Iterator[databases.Postgres]:
    with databases.postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def each_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module or test that requests it on each database that `databases.url_of` names."""
    on_server = request.param == "postgresql"
    if on_server and request.node.get_closest_marker("sqlite_only"):
        pytest.skip("looks into the file of SQLite")
    with databases.all_on(request.getfixturevalue("postgres") if on_server else None):
        yield
