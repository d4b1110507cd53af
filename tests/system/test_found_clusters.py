"""Tests clusters that this program does not fit: passed over if found, refused if named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2
from typer.testing import CliRunner

from tg_tinker import ClusterUnavailableError, ServiceClient
from tg_tinker.cli.main import main
from tg_tinker.cluster import connection, node
from tg_tinker.cluster.node import Node

OURS = dict(
    zip(("ray_version", "python_version"), ray._private.utils.compute_version_info(), strict=True)
)
TOKEN = "t" * 64
OTHER_RAY = OURS | {"ray_version": "2.9.3"}
OTHER_PYTHON = OURS | {"python_version": "3.9.1"}


class Gcs(grpc.GenericRpcHandler):
    """A GCS as far as it tells its versions, to those who have its token."""

    def __init__(self) -> None:
        self.token: str | None = TOKEN
        self.about: Any = OURS
        self.given: list[str] = []

    def service(self, details: Any) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        self.given.append(given)

        def answer(_: bytes, context: Any) -> bytes:
            if self.token is not None and given != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
            value = self.about if isinstance(self.about, bytes) else json.dumps(self.about).encode()
            reply: bytes = gcs_service_pb2.InternalKVGetReply(value=value).SerializeToString()
            return reply

        return grpc.unary_unary_rpc_method_handler(answer)


class Found:
    """A cluster that `ray start` has noted, and what `connect` made of it."""

    def __init__(self, gcs: Gcs, address: str, note: Path) -> None:
        self.gcs, self.address, self.note = gcs, address, note
        self.joined: list[str] = []


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Found]:
    gcs = Gcs()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[gcs])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    note = tmp_path / "ray/ray_current_cluster"
    note.parent.mkdir(mode=0o700)
    note.write_text(address)
    tmp_path.chmod(0o700)
    cluster = Found(gcs, address, note)
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(connection, "_SHARED", tmp_path / "shared")
    monkeypatch.setattr(connection, "require_token", lambda: None)
    monkeypatch.setattr(connection, "check_encrypted", lambda: None)
    monkeypatch.setattr(connection, "_start_embedded", lambda: cluster.joined.append("embedded"))
    monkeypatch.setattr(ray, "init", lambda address, **_: cluster.joined.append(address))
    connection._warn.cache_clear()
    yield cluster
    server.stop(None)


def wanted(found: Found, *, about: Any = OURS, token: str | None = TOKEN) -> None:
    found.gcs.about, found.gcs.token = about, token


WRONG = {
    "another Ray": ({"about": OTHER_RAY}, ["Ray 2.9.3 on Python", f"Ray {ray.__version__} on"]),
    "another Python": ({"about": OTHER_PYTHON}, [f"Ray {ray.__version__} on Python 3.9.1"]),
    "another token": ({"token": "u" * 64}, ["another token", "RAY_AUTH_TOKEN_PATH"]),
    "no token": ({"token": None}, ["requires no token"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_found_cluster_that_does_not_fit_is_passed_over_with_one_warning(
    name: str, found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    setting, parts = WRONG[name]
    wanted(found, **setting)
    assert connection.connect(None)
    assert connection.connect(None)
    assert found.joined == ["embedded"] * 2
    ((_, level, warned),) = caplog.record_tuples
    assert level == logging.WARNING
    for part in (*parts, found.address, f"`ray start` noted in {found.note.parent}"):
        assert part in warned
    assert TOKEN not in warned
    assert connection.running_cluster() == found.address  # `doctor` tells of it


@pytest.mark.parametrize("how", ["address", "RAY_ADDRESS", "auto"])
@pytest.mark.parametrize("name", ["another Ray", "another Python", "another token"])
def test_a_named_cluster_that_does_not_fit_is_refused_with_the_way_out(
    name: str, how: str, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, parts = WRONG[name]
    wanted(found, **setting)
    address = {"address": found.address, "RAY_ADDRESS": None, "auto": "auto"}[how]
    if how == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", found.address)
    with pytest.raises(ClusterUnavailableError) as refused:
        connection.connect(address)
    said = {"address": "named by `address`", "RAY_ADDRESS": "named by RAY_ADDRESS",
            "auto": "`ray start` noted"}[how]  # fmt: skip
    for part in (*parts, found.address, said, "address='local'"):
        assert part in refused.value.message
    assert found.joined == []


def test_a_cluster_of_up_that_does_not_fit_is_passed_over_too(
    found: Found, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an upgrade of Ray under a running cluster."""
    wanted(found, about=OTHER_RAY)
    monkeypatch.setattr(node, "read", lambda _: Node(found.address, "", 1, 1))
    assert connection.connect(None)
    assert "which `tg-tinker up` started" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [(["status"], "no cluster that this program can use"),
     (["down"], "End the cluster with all its training clients")],
)  # fmt: skip
def test_commands_about_a_cluster_start_none_beside_one_that_does_not_fit(
    words: list[str], said: str, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted(found, about=OTHER_RAY)
    ours = Node(found.address, "http://127.0.0.1:1", 1, 1)
    monkeypatch.setattr(node, "read", lambda _: ours)
    monkeypatch.setattr(node, "stop", lambda _: pytest.fail("it was ended without a question"))
    done = CliRunner().invoke(main, words, input="n\n")
    assert done.exit_code == 1
    assert said in done.output
    assert found.joined == []


def test_a_cluster_whose_service_refuses_this_program_can_be_ended(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of TG-Tinker under it: the refusal advises `tg-tinker down`."""
    wanted(found, about=OURS)
    ended = []
    monkeypatch.setattr(node, "read", lambda _: Node(found.address, "http://127.0.0.1:1", 1, 1))
    monkeypatch.setattr(node, "stop", ended.append)

    def refusing() -> ServiceClient:
        raise ClusterUnavailableError("the registry runs another release")

    done = CliRunner().invoke(main, ["down"], input="y\n", obj=refusing)
    assert "End the cluster with all its training clients" in done.output
    assert (done.exit_code, len(ended)) == (0, 1)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("about", [OURS, b"", b"\xff", b"[]", b"{}"])
def test_a_cluster_that_fits_or_tells_nothing_is_joined(
    named: bool, about: Any, found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not tell its versions, Ray itself judges."""
    wanted(found, about=about)
    assert not connection.connect(found.address if named else None)
    assert found.joined == [found.address]
    assert caplog.records == []
    assert found.gcs.given[0] == ""  # the token is given only to what requires one


def test_a_patch_of_python_counts_as_ray_counts_it(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted(found, about=OURS | {"python_version": "3.11.99"})
    monkeypatch.setattr(
        ray._private.utils, "compute_version_info", lambda: (ray.__version__, "3.11.1")
    )
    assert connection.connect(None)
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    assert not connection.connect(None)


def test_a_note_of_a_port_that_another_program_has_now_is_passed_over(
    found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    from support.listener import Listener

    with Listener(b"HTTP/1.1 200 OK\r\n\r\n") as other:
        found.note.write_text(f"127.0.0.1:{other.port}")
        assert connection.connect(None)
    assert "no Ray cluster answers" in caplog.text
