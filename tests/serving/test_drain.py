"""Tests that a server that is stopped ends the answers that it has begun, and takes no new ones."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from serve_app import application
from support import clusters
from support.processes import assert_all_end, free_port
from support.serving import PROGRAM
from tg_tinker.cluster import cluster
from tg_tinker.cluster.cluster import Cluster


class Link(Cluster):
    """A connection without Ray."""

    def __init__(self, embedded: bool = True) -> None:
        self.namespace, self.embedded, self._open, self._samplers = "ns", embedded, True, []
        Cluster._embedded_users += embedded


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []

    class Backend:
        def serve_http(self, *_: Any) -> None: ...
        def end_http(self, within_s: float) -> None:
            found.append(within_s)

    class Ray:
        def is_initialized(self) -> bool:
            return True

        def shutdown(self) -> None: ...

        def __getattr__(self, name: str) -> Any:
            import ray

            return getattr(ray, name)

    monkeypatch.setattr(cluster, "serve_backend", Backend)
    monkeypatch.setattr(cluster, "lazy_ray", Ray)
    monkeypatch.setattr("tg_tinker.cluster.ray_calls.lazy_ray", Ray)
    monkeypatch.setattr(Cluster, "_embedded_users", 0)
    monkeypatch.setattr(Cluster, "_serves_http", False)
    return found


def test_the_last_connection_of_an_embedded_server_lets_its_answers_end(
    drained: list[float],
) -> None:
    first, last = Link(), Link()
    first.serve_http("127.0.0.1", 1, 1, {})
    for link in (first, last, last):
        link.end_http()
        link.close()
    assert drained == [8.0]
    never = Link()
    never.end_http()
    assert drained == [8.0]


def test_a_server_that_outlives_its_connection_goes_on(drained: list[float]) -> None:
    link = Link(embedded=False)
    link.serve_http("127.0.0.1", 1, 1, {})
    link.end_http()
    assert drained == []


def test_answers_get_their_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []

    class Serve:
        def status(self) -> Any:
            return type("Status", (), {"applications": {"tg-tinker-a": 0, "others": 0}})

        def delete(self, name: str, _blocking: bool) -> None:
            assert not _blocking
            deleted.append(name)

    monkeypatch.setattr(application, "serve", Serve())
    began = time.monotonic()
    application.end_http(0.3)
    assert deleted == ["tg-tinker-a"]
    assert time.monotonic() - began >= 0.3


@pytest.mark.program
def test_sigterm_ends_a_server_after_its_answers(tiny_model: Path, tmp_path: Path) -> None:
    port, home = free_port(), tmp_path / "home"
    with clusters.forking():
        environment = os.environ | {"TG_TINKER_HOME": str(home), "RAY_ADDRESS": "local"}
        server = subprocess.Popen(
            [str(PROGRAM), "serve", "--model", str(tiny_model), "--port", str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    killer = threading.Timer(200, server.kill)
    killer.daemon = True
    killer.start()
    assert server.stdout
    said = ""
    for line in server.stdout:
        said += line
        if "Metrics for" in line:
            break
    body = {"model": "base", "prompt": "abc", "max_tokens": 120, "stream": True, "n": 8,
            "temperature": 0}  # fmt: skip
    answers = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kind = {"Content-Type": "application/json"}
    answers.request("POST", "/v1/completions", json.dumps(body), kind)
    answer = answers.getresponse()
    assert answer.status == 200, answer.read()
    begun = answer.readline()
    server.send_signal(signal.SIGTERM)
    refused = threading.Event()

    def ask() -> None:
        while not refused.is_set():
            late = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                late.request("GET", "/v1/models")
                if late.getresponse().status == 503:
                    refused.set()
            except OSError:
                refused.set()
            time.sleep(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    rest = begun + answer.read()
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert len(re.findall(rb'"finish_reason": ?"(?:length|stop)"', rest)) == 8
    asking.join(60)
    assert refused.is_set()
    said += server.stdout.read()
    assert server.wait(60) == 143, said
    assert "***" not in said
    assert "Traceback" not in said
    killer.cancel()
    assert_all_end(server.pid, within_s=120)
