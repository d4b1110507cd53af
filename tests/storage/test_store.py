"""Tests stores: one suite over all of them, URIs, and what is refused for good."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from actors.artifacts import delete, fetch, publish
from actors.registry.registry import Registry
from actors.storage.answers import cause_of
from actors.storage.filesystems import RetryPolicy
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.objects import Objects
from actors.storage.store import MANIFEST, ArtifactStore, open_objects
from support.storage_servers import (
    BUCKET,
    Server,
)
from support.stores import (
    ARTIFACT,
    CONTENT_OF_MANIFEST,
    FILES,
    KEY,
    TENANT,
    assert_nothing_chained,
    enter,
    is_whole,
    names,
)
from support.stores import abfss as abfss  # servers
from support.stores import gs as gs
from support.stores import moto as moto
from support.stores import root as root  # a fixture
from support.stores import s3 as s3
from tg_tinker import TrainingConfig
from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, StorageError

MIB = 2**20
SECRET = "hunter2-XYZ"


# --- the stores ------------------------------------------------------------------------------


@pytest.fixture
def objects(root: str) -> Objects:
    return open_objects(root, RetryPolicy())


@pytest.fixture
def store(root: str) -> ArtifactStore:
    return ArtifactStore(root)


class Reused:
    """Pieces that all lie in one buffer, as a sealer makes them. They can be iterated again."""

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
        """The sizes are above and below the 10 MiB at which pyarrow begins to upload in the
        background."""
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
        """This also holds where the first pieces are more than a store takes in one request."""
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
        """pyarrow would compress and decompress by the ending."""
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

    def test_a_folder_is_deleted_and_its_neighbors_stay(self, objects: Objects) -> None:
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
            with pytest.raises(InvalidRequestError, match="not a valid name in a store"):
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
        run = registry.runs.create(TENANT, TrainingConfig(model_ref="m").model_dump_json())
        files = {"weights": bytes(range(256)) * 9000, "state": b"{}"}
        epoch = registry.runs.claim(run)
        capability = registry.data_keys.capability(TENANT, run, epoch)
        draft = publish.Draft(registry, ArtifactStore(root), capability, files)
        size, _ = publish.publish(
            registry, ArtifactStore(root), draft, run_id=run, epoch=epoch, step=1,
            include_optimizer=False,
        )  # fmt: skip
        artifact = draft.artifact_id
        assert (
            fetch.fetch(registry, ArtifactStore(root), registry.data_keys.reader(TENANT), artifact)
            == files
        )
        stored = ArtifactStore(root).objects.list_below(f"t/{TENANT}/a")
        assert sum(info.size for info in stored) == size
        delete.delete(registry, root, TENANT, artifact)
        left = ArtifactStore(root).objects.list_below()
        assert len(left) == 2  # heads of the audit log, after the save and after the deletion
        assert all(head.name.startswith(f"t/{TENANT}/audit/") for head in left)


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
        "import sys; from actors.storage.store import ArtifactStore; ArtifactStore('s3://b/p');"
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
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", "no_bucket"),
        ("AWS Error UNKNOWN (HTTP status 500) during PutObject operation", "unavailable"),
        ("google::cloud::Status(PERMISSION_DENIED: Permanent error", "access_denied"),
        ("Status(UNKNOWN: Could not create a OAuth2 access token to", "unknown_credentials"),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted", "unavailable"),
        ("Azure Error: [ContainerNotFound] 404 The specified", "no_bucket"),
        ("Azure Error: [OperationTimedOut] 500 The operation", "unavailable"),
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


def test_wrong_credentials_are_refused_at_once(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(s3, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = ArtifactStore(f"{s3.uri}/denied")
    with pytest.raises(StorageError, match=r"signature .* attempts: 1.*check the secret") as info:
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert info.value.details == {"reason": "wrong_secret", "attempts": 1}
    assert SECRET not in str(info.value)
    assert_nothing_chained(info.value)
    for call in (store.objects.list_below, lambda: store.objects.delete("x")):
        with pytest.raises(StorageError, match="signature of the request is wrong"):
            call()


def test_wrong_credentials_are_refused_by_azure_too(
    abfss: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(abfss, monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_KEY", "d3Jvbmc=")
    with pytest.raises(StorageError, match="access denied, or"):
        ArtifactStore(f"{abfss.uri}/denied").objects.put("x", b"1")


@pytest.mark.parametrize("kind", ["s3", "moto", "gs", "abfss"])
def test_a_missing_bucket_is_refused_by_every_operation_and_not_created(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This SeaweedFS would create the bucket on the first upload."""
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
