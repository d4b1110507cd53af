"""Stores: one suite over all of them, URIs, and every failure of a disk, a network, a process."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from pyarrow import ArrowException

from actors import artifacts
from actors.filesystems import RetryPolicy, cause_of
from actors.home import DATABASE, KEYRING, create
from actors.objects import LocalFolder, Objects
from actors.registry import Registry
from actors.store import MANIFEST, ArtifactStore, open_objects
from tests.storage_servers import (
    BUCKET,
    FaultyNetwork,
    Server,
    abfss_store,
    answer,
    gs_store,
    moto_store,
    no_such_bucket,
    s3_store,
)
from tg_tinker import TrainingConfig
from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, StorageError

MIB = 2**20
SHORT = RetryPolicy(connect_s=1, request_s=1, attempts=2, deadline_s=20)
SECRET = "hunter2-XYZ"

TENANT, ARTIFACT = "clinic", "art-1"
FILES = {"a.enc": b"a" * 5000, "b.enc": b"b" * 50, "c.enc": b""}
KEY, CONTENT_OF_MANIFEST = b"wrapped", b'{"files": "a b c"}'


# --- the stores ------------------------------------------------------------------------------


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


@pytest.fixture(params=["local", "s3", "gs", "abfss"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store of each kind."""
    if request.param == "local":
        return str(tmp_path / "store")
    server: Server = request.getfixturevalue(request.param)
    enter(server, monkeypatch)
    return f"{server.uri}/{next(PREFIXES)}"


@pytest.fixture
def objects(root: str) -> Objects:
    return open_objects(root, RetryPolicy())


@pytest.fixture
def store(root: str) -> ArtifactStore:
    return ArtifactStore(root)


def names(objects: Objects, folder: str = "") -> list[str]:
    return [info.name for info in objects.list_below(folder)]


class Reused:
    """Pieces that all lie in one buffer, as a sealer makes them; may be gone through again."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[memoryview]:
        buffer = bytearray(max(self.sizes))
        for number, size in enumerate(self.sizes):
            buffer[:size] = bytes([number % 256]) * size
            yield memoryview(buffer)[:size]

    def whole(self) -> bytes:
        return b"".join(map(bytes, self))


def failing(pieces: int, piece: bytes = b"x" * MIB) -> Iterator[bytes]:
    for _ in range(pieces):
        yield piece
    raise KeyError("the sealer")


# --- one suite over all stores ---------------------------------------------------------------


class TestEveryStore:
    @pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000])
    def test_an_object_comes_back_and_is_listed(self, objects: Objects, content: bytes) -> None:
        assert objects.put("t/a/one", content) == len(content)
        assert objects.read("t/a/one") == content
        assert objects.size("t/a/one") == len(content)
        (info,) = objects.list_below()
        assert (info.name, info.size) == ("t/a/one", len(content))
        assert abs(info.modified - datetime.now(UTC)) < timedelta(hours=1)  # UTC, not local time

    def test_what_is_not_there_is_not_found_and_deleting_it_is_fine(self, objects: Objects) -> None:
        objects.put("t/other", b"x")
        for missing in ("nothing", "t", "t/other/below", "t/othe"):
            with pytest.raises(NotFoundError, match=f"{missing} is not in the store"):
                objects.read(missing)
            with pytest.raises(NotFoundError):
                objects.size(missing)
        for missing in ("nothing", "t/othe", "u/v"):
            objects.delete(missing)
            objects.delete_all(missing)
            assert objects.list_below(missing) == []
        assert names(objects) == ["t/other"]

    @pytest.mark.parametrize("size", [3, 2 * MIB])
    def test_an_object_is_replaced_by_a_shorter_one(self, objects: Objects, size: int) -> None:
        objects.put("key", b"o" * size)
        objects.put("key", b"new")
        objects.put("key", b"new")
        assert objects.read("key") == b"new"
        assert names(objects) == ["key"]

    def test_large_objects_are_written_from_pieces_in_a_buffer_that_is_reused(
        self, objects: Objects
    ) -> None:
        """Above and below the 10 MiB at which pyarrow begins to upload in the background."""
        pieces = Reused([11 * MIB, 1, 0, 3 * MIB, 11 * MIB, 7])
        assert objects.put("large", pieces) == 25 * MIB + 8
        assert objects.size("large") == 25 * MIB + 8
        assert objects.read("large") == pieces.whole()

    def test_an_iterator_and_no_pieces_at_all_are_written(self, objects: Objects) -> None:
        assert objects.put("once", iter([b"ab", bytearray(b"cd"), memoryview(b"ef")])) == 6
        assert objects.read("once") == b"abcdef"
        assert objects.put("none", iter(())) == 0
        assert objects.read("none") == b""

    def test_no_more_is_read_than_an_object_may_have(self, objects: Objects) -> None:
        objects.put("t/head", b"12345")
        assert objects.read("t/head", 5) == b"12345"
        with pytest.raises(IntegrityError, match=r"t/head in the store is longer .* \(4 bytes"):
            objects.read("t/head", 4)
        objects.put("t/empty", b"")
        assert objects.read("t/empty", 0) == b""

    def test_an_object_exists_only_once_it_is_whole(self, objects: Objects) -> None:
        """Also where the first pieces are more than a store takes in one request."""
        seen = []

        def pieces() -> Iterator[bytes]:
            for _ in range(12):
                yield b"x" * MIB
            try:
                seen.append(objects.size("slow"))
            except NotFoundError:
                seen.append(None)

        objects.put("slow", pieces())
        assert seen in ([None], [0])  # on Azure an empty one is there at once
        assert objects.size("slow") == 12 * MIB

    @pytest.mark.parametrize("pieces", [0, 1, 12])
    def test_pieces_that_fail_leave_nothing_and_their_error_is_kept(
        self, objects: Objects, pieces: int
    ) -> None:
        """pyarrow publishes what it has so far; 12 MiB is more than one part of an upload."""
        with pytest.raises(KeyError, match="the sealer"):
            objects.put("t/a/large", failing(pieces))
        gc.collect()  # a stream that was only dropped would publish now
        assert objects.list_below() == []

    def test_the_ending_of_a_name_changes_nothing(self, objects: Objects) -> None:
        """pyarrow would compress and decompress by it."""
        for name in ("x.gz", "x.zst", "x.bz2", "x.lz4"):
            objects.put(name, b"as it is")
            assert objects.read(name) == b"as it is"
            assert objects.size(name) == 8

    def test_a_listing_is_of_one_folder_at_any_depth_in_order(self, objects: Objects) -> None:
        written = ["ab/c", "a/z", "a/b/d", "a/b/c", "a-b/c", "b"]
        for name in written:
            objects.put(name, name.encode())
        assert names(objects) == sorted(written)
        assert names(objects, "a") == ["a/b/c", "a/b/d", "a/z"]
        assert names(objects, "a/b") == ["a/b/c", "a/b/d"]
        assert [info.size for info in objects.list_below("a")] == [5, 5, 3]

    def test_folders_in_a_folder_are_listed_by_name(self, objects: Objects) -> None:
        for name in ("t/b/a/x", "t/a/x", "t/a-b/x", "t/file", "other/x"):
            objects.put(name, b"1")
        assert objects.list_folders("t") == ["a", "a-b", "b"]
        assert objects.list_folders("t/none") == []

    def test_a_folder_is_deleted_and_its_neighbours_stay(self, objects: Objects) -> None:
        for name in ("a/b/c", "a/b/d/e", "a/bc", "a/b-c/x"):
            objects.put(name, b"x")
        objects.delete_all("a/b")
        assert names(objects) == ["a/b-c/x", "a/bc"]
        objects.delete("a/bc")
        objects.put("a/b/c", b"again")
        assert names(objects) == ["a/b-c/x", "a/b/c"]

    def test_creating_leaves_what_is_there(self, objects: Objects) -> None:
        assert objects.create("t/first", b"mine")
        assert not objects.create("t/first", b"yours")
        assert objects.read("t/first") == b"mine"
        assert names(objects) == ["t/first"]

    @pytest.mark.parametrize(
        "name",
        ["", "/", "/etc", "a/", "a//b", "..", "a/../b", "a/..", ".hidden", "a\\b", "a\0b", "a\nb",
         "a\n", "a b", "a%2fb", "ä", "a:b", "x" * 201],
    )  # fmt: skip
    def test_names_that_could_lead_elsewhere_are_refused(self, objects: Objects, name: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: objects.put(name, b"x"),
            lambda: objects.put(name, iter([b"x"])),
            lambda: objects.create(name, b"x"),
            lambda: objects.read(name),
            lambda: objects.size(name),
            lambda: objects.delete(name),
            lambda: objects.delete_all(name),
        ]
        for call in calls + [lambda: objects.list_below(name)] * bool(name):
            with pytest.raises(InvalidRequestError, match="no name in a store"):
                call()
        assert objects.list_below() == []


class TestArtifactsInEveryStore:
    def test_an_artifact_comes_back_and_goes_whole(self, store: ArtifactStore) -> None:
        store.write_artifact(TENANT, "art-0", {"x": b"x"}, b"key", lambda: b"{}")
        for _ in range(2):  # again: it does no harm
            store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
            assert is_whole(store)
        assert len(store.objects.list_below()) == 3 + 5
        store.delete(TENANT, ARTIFACT)
        store.delete(TENANT, ARTIFACT)
        assert names(store.objects) == [
            f"t/{TENANT}/a/art-0/{name}" for name in (MANIFEST, "x")
        ] + [f"t/{TENANT}/keys/art-0.json"]
        with pytest.raises(NotFoundError, match=r"art-1: its file manifest\.json is not in the"):
            store.read(TENANT, ARTIFACT, MANIFEST)
        with pytest.raises(NotFoundError, match=r"art-1: its file art-1\.json is not in the store"):
            store.read_key(TENANT, ARTIFACT)

    def test_a_file_whose_pieces_fail_leaves_no_artifact(self, store: ArtifactStore) -> None:
        files = {**FILES, "z.enc": failing(2), **{f"more{n}": b"x" for n in range(9)}}
        with pytest.raises(KeyError, match="the sealer"):
            store.write_artifact(TENANT, ARTIFACT, files, KEY, lambda: CONTENT_OF_MANIFEST)
        assert store.objects.list_below() == []

    def test_files_of_several_segments_are_written_from_pieces(self, store: ArtifactStore) -> None:
        files = {f"{n}.enc": Reused([MIB, 17 + n]) for n in range(6)}
        store.write_artifact(TENANT, ARTIFACT, files, KEY, lambda: CONTENT_OF_MANIFEST)
        for name, pieces in files.items():
            assert store.read(TENANT, ARTIFACT, name) == pieces.whole()

    def test_an_artifact_of_the_registry_is_published_fetched_and_deleted(
        self, root: str, tmp_path: Path
    ) -> None:
        create(tmp_path / "home")
        registry = Registry(
            f"sqlite:///{tmp_path / 'home' / DATABASE}", tmp_path / "home" / KEYRING
        )
        run = registry.create_run(TENANT, TrainingConfig(model_ref="m").model_dump_json())
        files = {"weights": bytes(range(256)) * 9000, "state": b"{}"}
        epoch = registry.claim(run)
        capability = registry.capability(TENANT, run, epoch)
        draft = artifacts.Draft(registry, ArtifactStore(root), capability, files)
        size, _ = artifacts.publish(
            registry, ArtifactStore(root), draft, run_id=run, epoch=epoch, step=1,
            include_optimizer=False,
        )  # fmt: skip
        artifact = draft.artifact_id
        assert (
            artifacts.fetch(registry, ArtifactStore(root), registry.reader(TENANT), artifact)
            == files
        )
        stored = ArtifactStore(root).objects.list_below(f"t/{TENANT}/a")
        assert sum(info.size for info in stored) == size
        artifacts.delete(registry, root, TENANT, artifact)
        left = ArtifactStore(root).objects.list_below()
        assert len(left) == 2  # heads of the audit log, after the save and after the deletion
        assert all(head.name.startswith(f"t/{TENANT}/audit/") for head in left)


def is_whole(store: ArtifactStore) -> bool:
    """Whether the artifact is there as it should be; False when it is not there at all."""
    try:
        manifest = store.read(TENANT, ARTIFACT, MANIFEST)
    except NotFoundError:
        return False
    assert manifest == CONTENT_OF_MANIFEST
    assert store.read_key(TENANT, ARTIFACT) == KEY
    assert {name: store.read(TENANT, ARTIFACT, name) for name in FILES} == FILES
    return True


@pytest.mark.parametrize("bad", ["", "..", "a/b", "../x", ".x", "a\n"])
def test_tenant_artifact_and_file_are_one_component_each(tmp_path: Path, bad: str) -> None:
    store = ArtifactStore(str(tmp_path / "s"))
    for place in ((bad, "art"), ("t", bad)):
        with pytest.raises(InvalidRequestError):
            store.write_artifact(*place, {}, KEY, lambda: b"{}")
        for call in (store.delete, store.read_key):
            with pytest.raises(InvalidRequestError):
                call(*place)
    with pytest.raises(InvalidRequestError):
        store.read("t", "art", bad)
    for name in (bad, MANIFEST):
        with pytest.raises(InvalidRequestError):
            store.write_artifact("t", "art", {"good": b"x", name: b"x"}, KEY, lambda: b"{}")
    assert not (tmp_path / "s").exists()


# --- where a store is ------------------------------------------------------------------------


def test_a_folder_by_uri_is_the_folder(tmp_path: Path) -> None:
    ArtifactStore((tmp_path / "a b").as_uri()).objects.put("x", b"1")
    assert (tmp_path / "a b/x").read_bytes() == b"1"


def test_opening_a_store_loads_no_pyarrow() -> None:
    program = (
        "import sys; from actors.store import ArtifactStore; ArtifactStore('s3://b/p');"
        "print('pyarrow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("root", "variable", "value"),
    [
        ("s3://b", "AWS_ENDPOINT_URL", f"http://user:{SECRET}@host"),
        ("s3://b", "AWS_ENDPOINT_URL_S3", f"http://host/{SECRET}"),
        ("s3://b", "AWS_ENDPOINT_URL", f"host:80/{SECRET}"),
        ("abfss://b@a.dfs.core.windows.net", "AZURE_STORAGE_KEY", f"{SECRET}!"),
        ("abfss://b@a.dfs.core.windows.net", "AZURE_STORAGE_SERVICE_ENDPOINT", SECRET),
    ],
)
def test_a_malformed_variable_is_named_and_its_value_is_not(
    monkeypatch: pytest.MonkeyPatch, root: str, variable: str, value: str
) -> None:
    """An Azure key that is not base64 would end the process inside pyarrow."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidRequestError, match=rf"{variable} is ") as info:
        ArtifactStore(root).objects.read("x")
    assert SECRET not in str(info.value)


def test_hdfs_without_its_library_says_what_to_install() -> None:
    """hdfs:// has never been run: there is no Hadoop here."""
    from pyarrow.fs import HadoopFileSystem

    try:
        HadoopFileSystem("127.0.0.1", 1)
    except OSError as error:
        if "Unable to load lib" not in str(error):
            pytest.skip("libhdfs is installed")
    with pytest.raises(StorageError, match="set JAVA_HOME, HADOOP_HOME") as info:
        ArtifactStore("hdfs://node:8020/a").objects.put("x", b"1")
    assert info.value.details == {"reason": "no_library", "attempts": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("AWS Error ACCESS_DENIED during HeadBucket operation: No response body.", "access_denied"),
        ("AWS Error UNKNOWN (HTTP status 403) during PutObject operation", "access_denied"),
        ("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation", "access_denied"),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", "no_bucket"),
        ("AWS Error UNKNOWN (HTTP status 503) during PutObject operation", "unavailable"),
        ("AWS Error SLOW_DOWN during PutObject operation", "unavailable"),
        ("google::cloud::Status(PERMISSION_DENIED: Permanent error", "access_denied"),
        ("Status(UNKNOWN: Could not create a OAuth2 access token to", "access_denied"),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted", "unavailable"),
        ("Azure Error: [AuthenticationFailed] 403 Server failed", "access_denied"),
        ("Azure Error: [ContainerNotFound] 404 The specified", "no_bucket"),
        ("Azure Error: [ServerBusy] 503 The server is busy", "unavailable"),
        ("key 'ACCESS_DENIED' 403: AWS Error NETWORK_CONNECTION during x", "unavailable"),
        ("something else", "unavailable"),
    ],
)
def test_what_pyarrow_says_is_understood(text: str, reason: str) -> None:
    cause = cause_of(OSError(text))
    assert cause.reason == reason
    assert cause.may_pass == (reason == "unavailable")
    assert "PutObject" not in cause.text


# --- permanent refusals ----------------------------------------------------------------------


def assert_nothing_chained(error: BaseException) -> None:
    """No traceback would print the text of pyarrow, which holds URLs."""
    assert error.__suppress_context__
    assert error.__cause__ is None


def test_wrong_credentials_are_refused_at_once(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(s3, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = ArtifactStore(f"{s3.uri}/denied")
    with pytest.raises(StorageError, match=r"access denied; attempts: 1.*check the cred") as info:
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert info.value.details == {"reason": "access_denied", "attempts": 1}
    assert SECRET not in str(info.value)
    assert_nothing_chained(info.value)
    for call in (store.objects.list_below, lambda: store.objects.delete("x")):
        with pytest.raises(StorageError, match="access denied"):
            call()


def test_wrong_credentials_are_refused_by_azure_too(
    abfss: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(abfss, monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_KEY", "d3Jvbmc=")
    with pytest.raises(StorageError, match="access denied; attempts: 1"):
        ArtifactStore(f"{abfss.uri}/denied").objects.put("x", b"1")


@pytest.mark.parametrize("kind", ["s3", "moto", "gs", "abfss"])
def test_a_missing_bucket_is_refused_by_every_operation_and_not_created(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This SeaweedFS would create it on the first upload."""
    server: Server = request.getfixturevalue(kind)
    enter(server, monkeypatch)
    store = ArtifactStore(server.uri.replace(BUCKET, "nosuch") + "/prefix")
    calls: list[Callable[[], Any]] = [
        lambda: store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST),
        lambda: store.objects.put("x", b"1"),
        lambda: store.objects.put("x", iter([b"1"])),
        lambda: store.objects.create("x", b"1"),
        lambda: store.read(TENANT, ARTIFACT, MANIFEST),
        lambda: store.objects.size("x"),
        lambda: store.objects.list_below(),
        lambda: store.objects.delete("x"),
        lambda: store.objects.delete_all("x"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"no such bucket; attempts: 1.*create it") as info:
            call()
        assert info.value.details["reason"] == "no_bucket"


# --- a network that fails --------------------------------------------------------------------


@pytest.fixture
def network(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNetwork]:
    """All that the test stores by `s3://` goes through it, and the library repeats nothing."""
    enter(s3, monkeypatch)
    monkeypatch.setattr("actors.filesystems.REQUESTS", 1)
    between = FaultyNetwork(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{between.port}")
    yield between
    between.close()


@pytest.fixture
def far(network: FaultyNetwork, s3: Server) -> ArtifactStore:
    return ArtifactStore(f"{s3.uri}/{next(PREFIXES)}", SHORT)


@pytest.fixture
def near(far: ArtifactStore, network: FaultyNetwork, s3: Server) -> ArtifactStore:
    """The same place by the direct way."""
    assert far.objects.list_below() == []  # opened, through the network
    network.fail("")
    with pytest.MonkeyPatch.context() as direct:
        direct.setenv("AWS_ENDPOINT_URL_S3", s3.environment["AWS_ENDPOINT_URL"])
        near = ArtifactStore(f"s3://{far.objects._location.root}")
        assert near.objects.list_below() == []
    assert network.connections == 0
    return near


BUSY = answer("503 Slow Down")
FAULTS = {"reset": "reset", "hang": "hang", "503": BUSY, "500": answer("500 x"), "deaf": "deaf"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_never_answers_gets_few_requests_and_is_a_typed_error(
    far: ArtifactStore, network: FaultyNetwork, fault: str
) -> None:
    network.fail(FAULTS[fault])
    with pytest.raises(StorageError, match=r"refused to read x \(.*; attempts: 2\)") as info:
        far.objects.read("x")
    assert info.value.details == {"reason": "unavailable", "attempts": 2}
    assert_nothing_chained(info.value)
    assert network.connections <= SHORT.attempts
    network.fail("")
    with pytest.raises(NotFoundError):
        far.objects.read("x")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_before_the_last_attempt_is_not_noticed(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork, fault: str
) -> None:
    """Also a lost answer: the object is there, and writing it again does no harm."""
    network.fail(FAULTS[fault], times=1)
    assert far.objects.put("x", b"content") == 7
    assert network.connections > 1
    assert near.objects.read("x") == b"content"


def test_half_an_upload_is_tried_again_and_is_whole(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork
) -> None:
    content = bytes(range(256)) * 4000
    far.objects.put("warm", b"")
    network.fail("cut", times=1)
    far.objects.put("x", content)
    assert near.objects.read("x") == content


def test_half_an_answer_is_never_taken_for_the_whole(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork
) -> None:
    content = bytes(range(256)) * 4000
    near.objects.put("x", content)
    network.fail("cut", times=1)
    assert far.objects.read("x") == content
    network.fail("cut")
    try:
        assert far.objects.read("x") == content  # in parts, over many connections
    except StorageError as error:
        assert error.details["reason"] == "unavailable"  # noqa: PT017


def test_pieces_that_come_once_have_one_attempt(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork
) -> None:
    """A second one would write what is left of them."""
    far.objects.put("warm", b"")
    network.fail("cut")
    with pytest.raises(StorageError, match="attempts: 1"):
        far.objects.put("x", iter([b"x" * 200_000, b"y" * 200_000]))
    network.fail("")
    assert names(near.objects) == ["warm"]


def test_a_failed_replacement_of_a_small_object_keeps_the_old_or_the_new_one(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork
) -> None:
    """A wrapped key must never be lost on the way to the next one."""
    far.objects.put("key", b"old" * 100_000)
    network.fail("cut")
    with pytest.raises(StorageError):
        far.objects.put("key", b"new" * 100_000)
    network.fail("")
    assert near.objects.read("key") == b"old" * 100_000


@pytest.mark.parametrize("status", ["403 Forbidden", "401 Unauthorized"])
def test_a_refusal_in_the_middle_is_not_tried_again(
    far: ArtifactStore, network: FaultyNetwork, status: str
) -> None:
    far.objects.put("x", b"1")
    network.fail(answer(status))
    with pytest.raises(StorageError, match="access denied; attempts: 1"):
        far.objects.size("x")


def test_a_bucket_that_goes_away_is_named_as_missing(
    far: ArtifactStore, network: FaultyNetwork
) -> None:
    far.objects.put("x", b"1")
    network.fail(no_such_bucket())
    with pytest.raises(StorageError, match="no such bucket; attempts: 1"):
        far.objects.put("x", b"2")


def test_the_library_repeats_each_request_a_few_times_and_no_more(
    network: FaultyNetwork, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a large object that fails is not the end of an attempt."""
    monkeypatch.setattr("actors.filesystems.REQUESTS", 3)
    store = ArtifactStore(s3.uri, RetryPolicy(attempts=1))
    network.fail(BUSY, times=2)
    assert not store.objects.list_below("nothing")
    network.fail(BUSY)
    with pytest.raises(StorageError):
        store.objects.list_below("nothing")
    assert network.connections == 3


def test_no_attempt_begins_after_the_deadline(network: FaultyNetwork, s3: Server) -> None:
    network.fail("reset")
    store = ArtifactStore(s3.uri, RetryPolicy(attempts=1000, deadline_s=1.0, request_s=1))
    with pytest.raises(StorageError) as info:
        store.objects.read("x")
    assert info.value.details["attempts"] < 10


@pytest.mark.parametrize("fault", ["reset", "hang"])
def test_a_save_that_fails_says_what_is_left_and_leaves_no_artifact(
    network: FaultyNetwork, s3: Server, fault: str
) -> None:
    store = ArtifactStore(f"{s3.uri}/{next(PREFIXES)}", RetryPolicy(request_s=1, attempts=1))
    store.objects.put("warm", b"")
    network.fail(fault)
    with pytest.raises(StorageError, match="not saved, training is not affected") as info:
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert f"may be left in t/{TENANT}/a/{ARTIFACT}" in str(info.value)
    network.fail("")
    assert not is_whole(store)
    store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert is_whole(store)


class Spoiled:
    """A filesystem or stream of which every call of interest counts, and may fail."""

    def __init__(self, real: Any, spoil: Callable[[str], None]) -> None:
        self._real, self._spoil = real, spoil

    def __getattr__(self, name: str) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._spoil(name)
            result = getattr(self._real, name)(*arguments, **options)
            return Spoiled(result, self._spoil) if name == "open_output_stream" else result

        return counted


def saves_far(
    server: Server, attempts: int, spoil: Callable[[int], bool]
) -> tuple[ArtifactStore, Exception | None, int]:
    """A save of which some calls to pyarrow fail; how many calls it made."""
    store = ArtifactStore(f"{server.uri}/{next(PREFIXES)}", RetryPolicy(attempts=attempts))
    real, made = store.objects._files, 0

    def count_one(_: str) -> None:
        nonlocal made
        made += 1
        if spoil(made):
            raise OSError("AWS Error NETWORK_CONNECTION during something")

    error = None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("actors.store.PARALLEL", 1)
        monkeypatch.setitem(vars(store.objects), "_files", Spoiled(real, count_one))
        try:
            store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
        except StorageError as caught:
            error = caught
    return store, error, made


@pytest.mark.parametrize("kind", ["s3", "gs", "abfss"])
def test_replacing_a_key_that_fails_at_any_call_keeps_the_old_or_the_new_one(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening an object of Azure for writing empties it: a lost key is a lost artifact."""
    server: Server = request.getfixturevalue(kind)
    enter(server, monkeypatch)
    objects = open_objects(f"{server.uri}/{next(PREFIXES)}", RetryPolicy(attempts=1))
    objects.put("key", b"old")
    real = objects._files
    for k in count(1):
        calls = count(1)

        def spoil(name: str, calls: Iterator[int] = calls, k: int = k) -> None:
            # Below 1 MiB a write reaches memory only, but on Azure the object is there by then.
            if (name != "write" or kind == "abfss") and next(calls) == k:
                raise OSError

        with pytest.MonkeyPatch.context() as spoiled:
            spoiled.setitem(vars(objects), "_files", Spoiled(real, spoil))
            with suppress(StorageError):
                objects.put("key", b"newer")
        assert objects.read("key") in (b"old", b"newer"), k
        if next(calls) <= k:
            break
        objects.put("key", b"old")
    assert k > 3


def test_an_object_that_came_short_is_noticed(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Spoiled):
        def write(self, piece: bytes) -> None:
            self._real.write(bytes(piece)[:-1])

        def open_output_stream(self, *arguments: Any, **options: Any) -> Short:
            return Short(self._real.open_output_stream(*arguments, **options), self._spoil)

    enter(s3, monkeypatch)
    store = ArtifactStore(f"{s3.uri}/{next(PREFIXES)}", RetryPolicy(attempts=2))
    real = store.objects._files
    monkeypatch.setitem(vars(store.objects), "_files", Short(real, lambda _: None))
    with pytest.raises(StorageError, match=r"another number of bytes.*attempts: 2") as info:
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert info.value.details["reason"] == "size_differs"
    assert store.objects.list_below() == []


@pytest.mark.parametrize(
    ("error", "details"),
    [
        (FileNotFoundError(2, "x"), {"reason": "no_bucket", "attempts": 1}),  # of gs
        (ArrowException("Status(UNAUTHENTICATED"), {"reason": "access_denied", "attempts": 1}),
        (OSError("x"), {"reason": "unavailable", "attempts": 2}),
    ],
)
def test_every_kind_of_error_of_an_upload_is_a_typed_one(
    s3: Server, monkeypatch: pytest.MonkeyPatch, error: Exception, details: dict[str, Any]
) -> None:
    def spoil(_: str) -> None:
        raise error

    enter(s3, monkeypatch)
    objects = open_objects(s3.uri, RetryPolicy(attempts=2))
    monkeypatch.setitem(vars(objects), "_files", Spoiled(None, spoil))
    with pytest.raises(StorageError) as info:
        objects.put("x", b"1")
    assert info.value.details == details


@pytest.mark.parametrize("mode", ["once", "from then on", "once, tried again"])
def test_a_store_that_fails_at_any_call_leaves_no_artifact_or_a_whole_one(
    s3: Server, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Each object: open, write, close, size."""
    enter(s3, monkeypatch)
    attempts, onwards = 1 + (mode == "once, tried again"), mode == "from then on"
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    total = saves_far(s3, 1, lambda _: False)[2]
    assert total == 4 * 5
    for k in range(1, total + 1):
        store, error, _ = saves_far(
            s3, attempts, lambda call, k=k: call == k or (onwards and call > k)
        )
        if attempts == 2:
            assert error is None
            assert is_whole(store), k
        elif onwards:
            assert "may be left" in str(error)
            assert not is_whole(store) or k == total, k  # lost is only that the manifest is there
        else:
            assert error is not None
            assert store.objects.list_below() == [], k


# --- a disk that fails -----------------------------------------------------------------------


class Calls:
    """Counts the calls to the system that a save makes, and spoils some of them."""

    POINTS = (
        (Path, "open"), (Path, "mkdir"), (Path, "replace"), (os, "fsync"), (os, "open"),
    )  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], None]) -> None:
        self.made = 0
        self._spoil = spoil
        for owner, name in self.POINTS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        opened = Path.open

        def open_(path: Path, mode: str = "r", **options: Any) -> Any:
            file = opened(path, mode, **options)
            return Counted(file, self) if mode == "xb" else file

        monkeypatch.setattr(Path, "open", open_)

    def count(self) -> None:
        self.made += 1
        self._spoil(self.made)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count()
            return call(*arguments, **options)

        return counted


class Counted:
    """A file whose writes count too; a spoiled one has written half."""

    def __init__(self, file: Any, calls: Calls) -> None:
        self._file, self._calls = file, calls

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._calls.count()
        return half + int(self._file.write(content[half:]))


def saves(folder: Path, spoil: Callable[[int], None]) -> tuple[ArtifactStore, Exception | None]:
    """A save of which some calls to the system are spoiled."""
    store = ArtifactStore(str(folder))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("actors.store.PARALLEL", 1)
        Calls(monkeypatch, spoil)
        try:
            store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
        except Exception as error:
            return store, error
    return store, None


def calls_of_a_save(folder: Path) -> int:
    made = 0

    def spoil(number: int) -> None:
        nonlocal made
        made = number

    saves(folder, spoil)
    return made


def test_a_save_makes_calls_that_can_be_spoiled(tmp_path: Path) -> None:
    """Five files at least: open, write, fsync, rename, open and fsync of the folder."""
    assert calls_of_a_save(tmp_path / "s") >= 5 * 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
def test_an_error_of_the_disk_at_any_call_leaves_nothing(
    tmp_path: Path, number: int, onwards: bool
) -> None:
    for k in range(1, calls_of_a_save(tmp_path / "whole") + 1):

        def spoil(call: int, k: int = k) -> None:
            if call == k or (onwards and call > k):
                raise OSError(number, os.strerror(number))

        store, error = saves(tmp_path / str(k), spoil)
        assert isinstance(error, StorageError), k
        assert os.strerror(number) in str(error)
        assert error.details["errno"] == number
        assert not is_whole(store), k
        if "may be left" in str(error):  # the disk refused to make the removal durable
            assert onwards
        else:
            assert store.objects.list_below() == [], k
    assert saves(tmp_path / str(k), lambda _: None)[1] is None  # the disk is fine again
    assert is_whole(store)


def test_a_process_killed_at_any_call_leaves_no_artifact_or_a_whole_one(tmp_path: Path) -> None:
    total = calls_of_a_save(tmp_path / "counted")
    whole = []
    for k in range(1, total + 1):
        folder = tmp_path / str(k)
        child = os.fork()
        if not child:
            saves(
                folder, lambda call, k=k: os.kill(os.getpid(), signal.SIGKILL) if call == k else 0
            )
            os._exit(1)  # it should be dead
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        store = ArtifactStore(str(folder))
        whole.append(is_whole(store))
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
        assert is_whole(store)
        store.delete(TENANT, ARTIFACT)
        left = [name for name in names(store.objects) if "/keys/." not in name]
        assert left == []
    assert whole == sorted(whole)  # once it is there it stays
    assert True in whole
    assert False in whole


def test_what_a_killed_write_left_is_listed_and_goes_with_its_folder(tmp_path: Path) -> None:
    objects = LocalFolder(tmp_path)
    objects.put("a/b/x", b"1")
    (tmp_path / "a/b/.y.0badf00d").write_bytes(b"part")
    assert names(objects, "a") == ["a/b/.y.0badf00d", "a/b/x"]
    objects.delete_all("a/b")
    assert names(objects) == []
    assert not (tmp_path / "a/b").exists()


def special(folder: Path) -> Iterator[Path]:
    """What a file may be that is none."""
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    yield folder / "pipe"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    yield folder / "socket"
    with suppress(PermissionError):  # a container may make none
        os.mknod(folder / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
        yield folder / "zero"


def test_what_is_no_plain_file_is_no_object_and_holds_nobody_up(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path)
    for path in special(tmp_path / "t"):
        name = f"t/{path.name}"
        for read in (store.read, store.size):
            with pytest.raises(NotFoundError, match=f"{name} is not in the store"):
                read(name)
    assert store.list_below() == []
    store.delete_all("t")
    assert [*tmp_path.iterdir()] == []


def test_a_head_or_key_without_end_is_refused_before_memory_is(tmp_path: Path) -> None:
    """A file with a hole costs whoever puts it there nothing."""
    store = ArtifactStore(str(tmp_path))
    store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    store.write_audit_head(TENANT, "1-ff", "{}")
    folder = tmp_path / f"t/{TENANT}"
    for path in (folder / "audit/1-ff.json", folder / f"keys/{ARTIFACT}.json",
                 folder / f"a/{ARTIFACT}/{MANIFEST}", folder / f"a/{ARTIFACT}/a.enc"):  # fmt: skip
        os.truncate(path, 2**40)
    assert store.read_head(f"t/{TENANT}/audit/1-ff.json") == ""
    calls: list[Callable[[], bytes]] = [
        lambda: store.read_key(TENANT, ARTIFACT),
        lambda: store.read(TENANT, ARTIFACT, MANIFEST),
        lambda: store.read(TENANT, ARTIFACT, "a.enc", 5000),
    ]
    for call in calls:
        with pytest.raises(IntegrityError, match="longer than what was put there"):
            call()


def test_names_that_a_stranger_gave_are_listed_as_text(tmp_path: Path) -> None:
    """Not as what a terminal obeys, and not as bytes that are no text."""
    folder = tmp_path / "t" / TENANT / "audit"
    folder.mkdir(parents=True)
    for name in (
        b"\x1b[2J\x1b]0;owned\x07.json",
        b"\xff.json",
        "a\u202eb".encode(),
        "\u00e4".encode(),
    ):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).touch()
    store = ArtifactStore(str(tmp_path))
    found = [info.name for info in store.objects.list_below()]
    assert len(found) == 4
    assert all(name.isprintable() for name in found)
    assert f"t/{TENANT}/audit/\\x1b[2J\\x1b]0;owned\\x07.json" in found
    assert f"t/{TENANT}/audit/\u00e4" in found
    assert [store.read_head(name) for name in store.audit_heads(TENANT)] == [""] * 4


def test_folders_are_for_their_owner_only(tmp_path: Path) -> None:
    ArtifactStore(str(tmp_path / "new/store")).objects.put("a/b/c", b"x")
    for folder in ("new", "new/store", "new/store/a", "new/store/a/b"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


def test_every_new_name_is_made_durable_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    objects = LocalFolder(tmp_path / "s")
    objects.put("a/b", b"x")
    order = [path.relative_to(tmp_path).as_posix() for path in synced]
    assert [*order[:2], order[3]] == [".", "s", "s/a"]
    assert order[2].startswith("s/a/.b.")
    synced.clear()
    objects.delete("a/b")
    assert synced == [tmp_path / "s/a"]


def test_creating_has_one_winner_on_a_local_folder(tmp_path: Path) -> None:
    objects = LocalFolder(tmp_path)
    contents = [b"%d" % number for number in range(8)]
    for name in map(str, range(20)):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(objects.create, [name] * 8, contents))
        assert won.count(True) == 1
        assert objects.read(name) == contents[won.index(True)]


def test_files_are_written_together_and_a_failure_waits_for_all(tmp_path: Path) -> None:
    """What is still under way after a failed save would come back after its removal."""
    together, go_on = Barrier(3, timeout=30), Event()

    def pieces(fails: bool) -> Iterator[bytes]:
        together.wait()
        if fails:
            raise KeyError("first")
        go_on.wait(1)  # still writing when the other has failed
        yield b"late"

    files = {"fails": pieces(True), "late": pieces(False), "later": pieces(False)}
    store = ArtifactStore(str(tmp_path))
    with pytest.raises(KeyError, match="first"):
        store.write_artifact(TENANT, ARTIFACT, files, KEY, lambda: CONTENT_OF_MANIFEST)
    go_on.set()
    assert store.objects.list_below() == []
