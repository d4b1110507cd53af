"""Tests which hosts count as this machine."""

from __future__ import annotations

import pytest

from tg_tinker.hosts import is_loopback, stays_here


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.8.9.1", "127.1", "0x7f000001", "2130706433", "::1", "[::1]",
        "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "[::ffff:7f00:1]", "localhost", "localhost.",
        "LocalHost", "127.0.0.1.",
    ],
)  # fmt: skip
def test_a_loopback_address_in_any_form_is_loopback(host: str) -> None:
    assert is_loopback(host)
    assert stays_here(host)


@pytest.mark.parametrize(
    "host",
    [
        "127.example.org", "app.localhost", "127.0.0.1.example.org", "localhost.example.org",
        "notlocalhost",
        "128.0.0.1", "10.0.0.1", "::2", "::ffff:10.0.0.1", "1.127.0.0", "127", "", ".", "..",
        "a" * 300, "127.0.0.1/8", "127.0.0.1:80", "\u0131", "\udcff",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_loopback_address_is_not(host: str) -> None:
    assert not is_loopback(host)
    assert not stays_here(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0"])
def test_an_unspecified_address_is_this_machine_for_a_client_only(host: str) -> None:
    assert stays_here(host)
    assert not is_loopback(host)
