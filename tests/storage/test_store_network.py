"""Tests stores behind a network that fails at any call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from pyarrow import ArrowException

from actors.storage.filesystems import RetryPolicy
from actors.storage.store import ArtifactStore, open_objects
from support.listener import Listener
from support.storage_servers import (
    FaultyNetwork,
    Server,
    answer,
    no_such_bucket,
)
from support.stores import (
    ARTIFACT,
    CONTENT_OF_MANIFEST,
    FILES,
    KEY,
    PREFIXES,
    TENANT,
    assert_nothing_chained,
    enter,
    is_whole,
    names,
)
from support.stores import abfss as abfss  # servers
from support.stores import gs as gs
from support.stores import s3 as s3
from tg_tinker.errors import NotFoundError, StorageError

MIB = 2**20
SHORT = RetryPolicy(connect_s=1, request_s=1, attempts=2, deadline_s=20)


@pytest.fixture
def network(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNetwork]:
    """Yields a network that all access by `s3://` goes through. The library repeats nothing."""
    enter(s3, monkeypatch)
    monkeypatch.setattr("actors.storage.filesystems.REQUESTS", 1)
    between = FaultyNetwork(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{between.port}")
    yield between
    between.close()


@pytest.fixture
def far(network: FaultyNetwork, s3: Server) -> ArtifactStore:
    return ArtifactStore(f"{s3.uri}/{next(PREFIXES)}", SHORT)


@pytest.fixture
def near(far: ArtifactStore, network: FaultyNetwork, s3: Server) -> ArtifactStore:
    """Returns the same store, reached directly."""
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
    reason = "busy" if fault == "503" else "unavailable"
    assert info.value.details == {"reason": reason, "attempts": 2}
    assert_nothing_chained(info.value)
    assert network.connections <= SHORT.attempts
    network.fail("")
    with pytest.raises(NotFoundError):
        far.objects.read("x")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_before_the_last_attempt_is_not_noticed(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork, fault: str
) -> None:
    """This includes a lost answer: the object exists, and writing it again does no harm."""
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
    """A second attempt would write only the pieces that are left."""
    far.objects.put("warm", b"")
    network.fail("cut")
    with pytest.raises(StorageError, match="attempts: 1"):
        far.objects.put("x", iter([b"x" * 200_000, b"y" * 200_000]))
    network.fail("")
    assert names(near.objects) == ["warm"]


def test_a_failed_replacement_of_a_small_object_keeps_the_old_or_the_new_one(
    far: ArtifactStore, near: ArtifactStore, network: FaultyNetwork
) -> None:
    """A wrapped key must never be lost while it is replaced."""
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
    with pytest.raises(StorageError, match=r"access denied, or .* without a reason; attempts: 1"):
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
    """A failed part of a large object does not end an attempt."""
    monkeypatch.setattr("actors.storage.filesystems.REQUESTS", 3)
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
    with pytest.raises(StorageError, match="not saved; training is not affected") as info:
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert f"may be left in t/{TENANT}/a/{ARTIFACT}" in str(info.value)
    network.fail("")
    assert not is_whole(store)
    store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    assert is_whole(store)


LOCAL = {
    "s3": ("s3://bucket", "AWS_ENDPOINT_URL_S3"),
    "gs": ("gs://bucket", "CLOUD_STORAGE_EMULATOR_ENDPOINT"),
    "abfss": ("abfss://bucket@account.dfs.core.windows.net", "AZURE_STORAGE_SERVICE_ENDPOINT"),
}


@pytest.mark.parametrize("exempt", [None, "", "intranet.example.org"])
@pytest.mark.parametrize("kind", LOCAL)
def test_a_store_on_this_machine_is_reached_without_the_proxy_of_the_environment(
    kind: str, exempt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries of gs and abfss trust http_proxy, also for a loopback address."""
    uri, variable = LOCAL[kind]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=canary")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    refusing = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with Listener(refusing) as proxy, Listener(refusing) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
            monkeypatch.setenv(name.upper(), proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("no_proxy", exempt or "")
        if exempt is None:
            monkeypatch.delenv("no_proxy")
        monkeypatch.setenv(variable, server.url)
        with pytest.raises(StorageError):
            ArtifactStore(f"{uri}/here", SHORT).tenants()
    assert server.heard
    assert proxy.heard == b""


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
    """Saves while some calls to pyarrow fail; returns the store, the error and the number of
    calls."""
    store = ArtifactStore(f"{server.uri}/{next(PREFIXES)}", RetryPolicy(attempts=attempts))
    real, made = store.objects._files, 0

    def count_one(_: str) -> None:
        nonlocal made
        made += 1
        if spoil(made):
            raise OSError("AWS Error NETWORK_CONNECTION during something")

    error = None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("actors.storage.store.PARALLEL", 1)
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
    """Opening an object of Azure for writing empties it, and a lost key is a lost artifact."""
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
        (
            ArrowException("Status(UNAUTHENTICATED"),
            {"reason": "unknown_credentials", "attempts": 1},
        ),
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
    """The calls of each object are open, write, close and size."""
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
