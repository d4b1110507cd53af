"""Tests a server that begins after the first sample, as in a notebook."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from serve_app.http import listening
from support.http_calls import post
from support.processes import free_port
from tg_tinker import ClusterUnavailableError, LoRAConfig, ServiceClient, TrainingClient
from tg_tinker.config import TrainingConfig

pytestmark = pytest.mark.program

GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def tc(service: ServiceClient, tiny_model: Path) -> Iterator[TrainingClient]:
    """Yields a client that has sampled, which starts Serve without HTTP."""
    config = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2))
    with service.create_training_client(config) as client:
        client.sample("abc", max_tokens=1)
        yield client


def proxies() -> dict[str, Any]:
    controller: Any = ray.get_actor(listening.SERVE_CONTROLLER_NAME, listening.SERVE_NAMESPACE)
    found: dict[str, Any] = ray.get(controller.get_proxies.remote())
    return found


def test_a_port_that_is_taken_changes_nothing(
    tc: TrainingClient, service: ServiceClient, tiny_model: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterUnavailableError, match=f"cannot listen on port {port}"):
            service.serve_http(str(tiny_model), port=port)
    assert proxies() == {}
    assert tc.sample("abc", max_tokens=1).samples


def test_a_proxy_that_never_listens_is_told_and_taken_back(
    tc: TrainingClient, service: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TimeoutError

    made: list[Any] = []
    monkeypatch.setattr(listening, "_await", fail)
    monkeypatch.setattr(listening, "_set", lambda _, *options: made.append(options))
    with pytest.raises(ClusterUnavailableError, match="`serve shutdown` and serve before you"):
        service.serve_http(str(tiny_model), port=free_port())
    assert [location for _, _, location in made] == ["HeadOnly", None]
    assert made[1][:2] == (HTTPOptions().host, HTTPOptions().port)


def test_a_server_may_begin_after_samples_which_continue(
    tc: TrainingClient, service: ServiceClient, tiny_model: Path
) -> None:
    expected = tc.sample("abc", max_tokens=100, **GREEDY).samples[0].token_ids
    stream = tc.sample_stream("abc", max_tokens=100, **GREEDY)
    streamed = list(next(stream).token_ids)
    done, found, failed = threading.Event(), [], []

    def sample() -> None:
        while not done.is_set():
            try:
                found.append(tc.sample("abc", max_tokens=5, **GREEDY).samples[0].token_ids)
            except Exception as error:
                failed.append(error)

    beside = threading.Thread(target=sample)
    beside.start()
    port = free_port()
    url = service.serve_http(str(tiny_model), port=port)
    status, answer, _ = post(
        f"{url}/completions", None, {"model": tc.id, "prompt": "abc", "max_tokens": 5} | GREEDY
    )
    done.set()
    beside.join()
    assert status == 200, answer
    assert failed == []
    assert found
    assert {tuple(ids) for ids in found} == {tuple(expected[:5])}
    assert streamed + [token for chunk in stream for token in chunk.token_ids] == expected
    with pytest.raises(ClusterUnavailableError, match=f"at 127.0.0.1:{port} already, not at"):
        service.serve_http(str(tiny_model), port=free_port())
    assert service.serve_http(str(tiny_model), port=port) == url


def test_a_proxy_at_the_default_address_that_serves_nothing_is_moved(
    tc: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster, the first sample starts it there."""
    (old,) = proxies().values()
    applications = serve.status().applications
    monkeypatch.setattr(listening, "_is_unused", lambda _: True)
    port = free_port()
    listening.listen("127.0.0.1", port)
    (new,) = proxies().values()
    assert new != old
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    assert tc.sample("abc", max_tokens=1).samples
    assert serve.status().applications.keys() == applications.keys()
