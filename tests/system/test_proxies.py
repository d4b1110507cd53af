"""Tests that a cluster of this machine sends nothing to the proxy that the environment names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.listener import Listener

PROGRAM = """
from tg_tinker import ServiceClient
with ServiceClient(address="local") as service:
    assert service.list_artifacts() == []
"""


@pytest.mark.program
@pytest.mark.usefixtures("forking")
def test_no_connection_of_ray_goes_through_a_proxy(tmp_path: Path) -> None:
    """gRPC trusts http_proxy and grpc_proxy by default, also for loopback addresses."""
    refusing = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with Listener(refusing) as proxy:
        names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        proxies = {form: proxy.url for name in names for form in (name, name.upper())}
        removed = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
        others = {name: value for name, value in os.environ.items() if name not in removed}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            env=others | proxies | {"TG_TINKER_HOME": str(tmp_path / "home")},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # What Ray asks is the metadata of the cloud that it may run in.
    lines = proxy.heard.decode().split("\r\n")
    assert [line for line in lines if line.startswith(("CONNECT", "POST", "PUT"))] == []
