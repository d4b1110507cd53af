"""Tests that Ray requires its token, of whichever version and with whatever settings it starts."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Iterator
from concurrent import futures
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray._raylet import AuthenticationMode, Config, get_authentication_mode

from support.listener import Listener
from tg_tinker import ClusterUnavailableError, InvalidRequestError
from tg_tinker.cluster import authentication, connection, node
from tg_tinker.cluster.authentication import TESTED_RAY, check_authenticated, require_token
from tg_tinker.cluster.cluster import Cluster

ROOT = Path(__file__).parents[2]


class Head(grpc.GenericRpcHandler):
    """A GCS that answers with one status, and keeps what it is asked."""

    def __init__(self, status: grpc.StatusCode) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._status = status

    def service(self, details: Any) -> Any:
        self.asked.append((details.method, dict(details.invocation_metadata)))

        def answer(_: bytes, context: Any) -> bytes:
            if self._status is not grpc.StatusCode.OK:
                context.abort(self._status, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, Head]]:
    found = Head(getattr(grpc.StatusCode, request.param))
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[found])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", found
    server.stop(None)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names a proxy that hears of no question, and leaves Ray's mode as it was."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Listener(b"") as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, proxy.url)
        yield
    assert proxy.heard == b""


@pytest.mark.parametrize("head", ["UNAUTHENTICATED"], indirect=True)
def test_a_cluster_that_wants_its_token_passes_and_gets_none(head: tuple[str, Head]) -> None:
    check_authenticated(head[0])
    ((method, metadata),) = head[1].asked
    assert method == "/ray.rpc.NodeInfoGcsService/CheckAlive"
    assert "authorization" not in metadata


@pytest.mark.parametrize("head", ["OK"], indirect=True)
def test_a_cluster_that_answers_to_everyone_is_refused_before_it_gets_anything(
    head: tuple[str, Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "check_token", lambda: True)
    monkeypatch.setattr(connection, "lazy_ray", lambda: pytest.fail("Ray was loaded"))
    monkeypatch.setattr(node, "_launched", lambda *_: pytest.fail("Ray was started"))
    for enter in (
        lambda: check_authenticated(head[0]),
        lambda: connection.connect(head[0]),
        lambda: node.start(tmp_path, join=head[0]),
    ):
        with pytest.raises(InvalidRequestError, match=r"requires no token.*RAY_AUTH_MODE=token"):
            enter()
    assert all("authorization" not in metadata for _, metadata in head[1].asked)


@pytest.mark.parametrize("head", ["OK"], indirect=True)
def test_a_head_of_up_that_wants_no_token_ends_at_once(
    head: tuple[str, Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen(["sleep", "100"], start_new_session=True)
    monkeypatch.setattr(node, "_launched", lambda *_: started)
    monkeypatch.setattr(node, "_await_start", lambda *_: "127.0.0.1")
    monkeypatch.setattr(node, "_check_free", lambda *_: None)
    with pytest.raises(InvalidRequestError, match="requires no token"):
        node.start(tmp_path, port=int(head[0].partition(":")[2]))
    assert started.wait(20) != 0
    assert not (tmp_path / "node.json").exists()


@pytest.mark.parametrize("head", ["OK"], indirect=True)
def test_a_cluster_of_the_programs_own_ray_init_is_refused(
    head: tuple[str, Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve_app import deploy
    from tg_tinker.cluster import cluster

    context = SimpleNamespace(gcs_address=head[0])
    connected = SimpleNamespace(
        is_initialized=lambda: True, get_runtime_context=lambda: context, nodes=list
    )
    for module in (cluster, connection):
        monkeypatch.setattr(module, "lazy_ray", lambda: connected)
    with pytest.raises(InvalidRequestError, match="requires no token"):
        Cluster(None, "tests")
    monkeypatch.setattr(deploy, "actors_backend", lambda: pytest.fail("it went on"))
    with pytest.raises(InvalidRequestError, match="requires no token"):
        deploy.app(deploy.Settings(model_ref="m"))


@pytest.mark.parametrize("head", ["UNIMPLEMENTED", "PERMISSION_DENIED", "INTERNAL"], indirect=True)
def test_what_does_not_answer_as_ray_does_is_no_cluster(head: tuple[str, Head]) -> None:
    with pytest.raises(ClusterUnavailableError, match="no Ray cluster answers"):
        check_authenticated(head[0])


def test_another_program_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener(b"HTTP/1.1 200 OK\r\n\r\n") as other:
        for address in (f"127.0.0.1:{other.port}", "127.0.0.1:1"):
            with pytest.raises(ClusterUnavailableError, match="no Ray cluster answers"):
                check_authenticated(address)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(InvalidRequestError, match="RAY_TLS_CA_CERT"):
        check_authenticated("127.0.0.1:1")


@pytest.fixture
def _mode() -> Iterator[None]:
    before = os.environ.get("RAY_AUTH_MODE")
    yield
    os.environ.pop("RAY_AUTH_MODE", None)
    if before is not None:
        os.environ["RAY_AUTH_MODE"] = before
    Config.initialize("")


@pytest.mark.usefixtures("_mode")
@pytest.mark.parametrize("mode", ["disabled", "", None])
def test_the_mode_is_ours_to_set_after_ray_was_loaded_too(mode: str | None) -> None:
    os.environ.pop("RAY_AUTH_MODE", None)
    if mode is not None:
        os.environ["RAY_AUTH_MODE"] = mode
    if mode != "":
        Config.initialize("")
        assert get_authentication_mode() == AuthenticationMode.DISABLED
    require_token()
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.usefixtures("_mode")
@pytest.mark.parametrize("lacks", ["Config", "get_authentication_mode", "AuthenticationMode"])
def test_a_ray_that_cannot_require_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    core = {
        "Config": Config, "AuthenticationMode": AuthenticationMode,
        "get_authentication_mode": get_authentication_mode,
    }  # fmt: skip
    del core[lacks]
    old = SimpleNamespace(_raylet=SimpleNamespace(**core), __version__="2.51.0")
    monkeypatch.setattr(authentication, "lazy_ray", lambda: old)
    with pytest.raises(ClusterUnavailableError, match=r"Ray 2\.51\.0 does not require its token"):
        require_token()


@pytest.mark.usefixtures("_mode")
def test_an_embedded_cluster_that_wants_no_token_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ended = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)

    def answered(address: str) -> None:
        raise InvalidRequestError(f"{address} requires no token")

    monkeypatch.setattr(connection, "check_authenticated", answered)
    with pytest.raises(InvalidRequestError, match=r"127\.0\.0\.1:1 requires no token"):
        connection.connect("local")
    assert ended == [True]


def test_no_older_ray_is_allowed_than_the_tested_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [one for one in project["dependencies"] if one.startswith("ray[")]
    assert bound.endswith(f">={TESTED_RAY},<3")
    tested, installed = ([int(n) for n in v.split(".")[:2]] for v in (TESTED_RAY, version("ray")))
    assert tested >= [2, 60]
    assert installed >= tested
