"""Defines what the tests of stores share: an artifact, and how a store is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import pytest

from actors.storage.objects import Objects
from actors.storage.store import MANIFEST, ArtifactStore
from support.storage_servers import Server, abfss_store, gs_store, moto_store, s3_store
from tg_tinker.errors import NotFoundError

TENANT, ARTIFACT = "clinic", "art-1"
FILES = {"a.enc": b"a" * 5000, "b.enc": b"b" * 50, "c.enc": b""}
KEY, CONTENT_OF_MANIFEST = b"wrapped", b'{"files": "a b c"}'


def served(
    make: Callable[[Path], AbstractContextManager[Server]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    with make(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(s3_store, tmp_path_factory)


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(moto_store, tmp_path_factory)


@pytest.fixture(scope="module")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(gs_store, tmp_path_factory)


@pytest.fixture(scope="module")
def abfss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(abfss_store, tmp_path_factory)


def enter(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in server.environment.items():
        monkeypatch.setenv(variable, value)


PREFIXES = (f"p{number}" for number in count())
"""A new one for each test: no test sees the objects of another."""


def names(objects: Objects, folder: str = "") -> list[str]:
    return [info.name for info in objects.list_below(folder)]


def is_whole(store: ArtifactStore) -> bool:
    """Returns whether the artifact is there as it should be; False when it is not there at all."""
    try:
        manifest = store.read(TENANT, ARTIFACT, MANIFEST)
    except NotFoundError:
        return False
    assert manifest == CONTENT_OF_MANIFEST
    assert store.read_key(TENANT, ARTIFACT) == KEY
    assert {name: store.read(TENANT, ARTIFACT, name) for name in FILES} == FILES
    return True


def assert_nothing_chained(error: BaseException) -> None:
    """Checks that no traceback would print the text of pyarrow, which holds URLs."""
    assert error.__suppress_context__
    assert error.__cause__ is None


@pytest.fixture(params=["local", "s3", "gs", "abfss"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the location of an empty store, for each kind in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    server: Server = request.getfixturevalue(request.param)
    enter(server, monkeypatch)
    return f"{server.uri}/{next(PREFIXES)}"
