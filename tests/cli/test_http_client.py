"""Tests that the command line sends prompts and keys to its server alone, and warns of clear text.

The environment names a proxy that listens and keeps every byte it gets, as on a company's laptop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.listener import Listener
from support.processes import free_port
from tg_tinker.cli.http_client import Server
from tg_tinker.cli.main import main
from tg_tinker.errors import InvalidRequestError

CANARY, KEY = "the patient is called Canary", "tgt-4711canary"
COMMANDS = (["sample", CANARY], ["chat", "--system", CANARY])
"""Both send the canary; `chat` also sends the line that `call` types."""

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
ANSWER = STREAM + (
    b'data: {"choices": [{"text": "fine", "delta": {"content": "fine"}}]}\n\ndata: [DONE]\n\n'
)


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture
def server() -> Iterator[Listener]:
    with Listener(ANSWER) as listener:
        yield listener


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Yields the proxy that every variable of the environment names."""
    with Listener(answer("502 Bad Gateway")) as listener:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, listener.url)
            monkeypatch.setenv(name.upper(), listener.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield listener


def call(words: list[str], url: str) -> Any:
    return CliRunner().invoke(main, [*words, "--url", url, "--key", KEY], input=f"{CANARY}\n\n")


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_what_is_for_this_machine_never_goes_to_a_proxy(
    words: list[str], host: str, server: Listener, proxy: Listener
) -> None:
    found = call(words, f"http://{host}:{server.port}/v1")
    assert found.exit_code == 0, found.output
    assert "fine" in found.stdout
    assert found.stderr == ""
    assert CANARY.encode() in server.heard
    assert f"Authorization: Bearer {KEY}".lower().encode() in server.heard.lower()
    assert proxy.heard == b""


@pytest.mark.parametrize("words", COMMANDS)
def test_what_is_for_this_machine_over_ipv6_never_goes_to_a_proxy(
    words: list[str], proxy: Listener
) -> None:
    try:
        six = Listener(ANSWER, "::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with six:
        found = call(words, f"http://[::1]:{six.port}/v1")
    assert found.exit_code == 0, found.output
    assert (CANARY.encode() in six.heard, proxy.heard) == (True, b"")


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost.", "127.1"])
def test_no_server_on_this_machine_is_no_reason_to_ask_the_proxy(
    words: list[str], host: str, proxy: Listener
) -> None:
    """A resolver need not know the last two names."""
    found = call(words, f"http://{host}:{free_port()}/v1")
    assert found.exit_code == 1
    assert "no server answers" in found.stderr
    assert "warning" not in found.stderr
    assert proxy.heard == b""


@pytest.mark.parametrize("words", COMMANDS)
def test_clear_text_to_another_machine_is_warned_of_once(words: list[str], proxy: Listener) -> None:
    """`127.example.org` begins like a loopback address."""
    found = call(words, "http://127.example.org/v1")
    assert found.exit_code == 1  # the proxy refuses
    warning, error = found.stderr.splitlines()
    assert warning.startswith("warning: text and API key travel to 127.example.org in clear")
    assert error.startswith("error: status 502 without a reason")
    assert CANARY.encode() in proxy.heard  # the user was told
    assert CANARY not in found.stderr
    assert KEY not in found.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_a_proxy_of_an_encrypted_server_reads_nothing(words: list[str], proxy: Listener) -> None:
    found = call(words, "https://models.example.org/v1")
    assert found.exit_code == 1
    assert "warning" not in found.stderr
    assert proxy.heard.startswith(b"CONNECT models.example.org:443")
    assert CANARY.encode() not in proxy.heard
    assert KEY.encode() not in proxy.heard


def test_a_machine_that_the_environment_exempts_is_reached_without_the_proxy(
    proxy: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "example.invalid")
    found = call(["sample", CANARY], "http://models.example.invalid/v1")
    assert "no server answers" in found.stderr
    assert "in clear" in found.stderr
    assert proxy.heard == b""


@pytest.mark.parametrize(
    "value", ["socks5h://127.0.0.1:1", "nonsense://u:secret4711@host", "http://[::1"]
)
def test_a_proxy_that_cannot_be_used_is_told_and_not_repeated(
    value: str, server: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.upper(), value)
    found = call(["sample", CANARY], "http://models.example.org/v1")
    assert found.exit_code == 1
    assert "error: the proxy that the environment names cannot be used" in found.stderr
    assert "secret4711" not in found.output
    assert call(["sample", CANARY], f"{server.url}/v1").exit_code == 0  # it needs no proxy


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_neither_text_nor_key_along(
    words: list[str], status: int, proxy: Listener
) -> None:
    with Listener(ANSWER) as other:
        moved = answer(f"{status} Moved", f"Location: {other.url}/v1/completions")
        with Listener(moved) as server:
            found = call(words, f"{server.url}/v1")
    assert found.exit_code == 1
    assert "redirects to another address" in found.stderr
    assert (other.heard, proxy.heard) == (b"", b"")


def test_a_file_of_passwords_is_not_used(
    tmp_path: Path, server: Listener, proxy: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login me password secret4711\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    for asked, url in ((server, f"{server.url}/v1"), (proxy, "http://models.example.org/v1")):
        CliRunner().invoke(main, ["sample", CANARY, "--url", url])
        assert CANARY.encode() in asked.heard
        assert b"authorization" not in asked.heard.lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret4711@127.0.0.1/v1", "http://secret4711@127.0.0.1/v1",
        "https://h/v1?api_key=secret4711", "https://h/v1#secret4711", "ftp://secret4711",
        "http://127.0.0.1:99999/v1", "http://127.0.0.1:0/v1", "http://", "", "127.0.0.1:8000/v1",
        "http://secret\udcff/v1", "http://a%20b/v1", "http://127.0.0.1\n.example.org/v1",
    ],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^url: the server's address must") as caught:
        Server(url, KEY)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"", b"[1]", b'{"error": "x"}'])
def test_a_page_of_a_proxy_is_no_answer(body: bytes) -> None:
    for status in ("200 OK", "407 Proxy Authentication Required", "503 Unavailable"):
        with Listener(answer(status, "Content-Type: text/html", body=body)) as listener:
            found = call(["sample", "a"], f"{listener.url}/v1")
        assert found.exit_code == 1
        assert "proxy" in found.stderr
        assert "sign in" not in found.output


def test_separators_of_lines_within_a_text_are_text() -> None:
    r"""JSON may hold U+2028 or U+0085 as they are; only \n and \r separate lines of an answer."""
    text = "a\u2028b\u0085c\x0bd"
    event = '{"choices": [{"text": "a\u2028b\u0085c\\u000bd"}]}'
    with Listener(STREAM + f"data: {event}\n\ndata: [DONE]\n\n".encode()) as listener:
        assert call(["sample", "a"], f"{listener.url}/v1").stdout == f"{text}\n"


def test_an_answer_that_ends_within_a_chunk_broke_off() -> None:
    head = STREAM.replace(b"Connection: close", b"Transfer-Encoding: chunked")
    with Listener(head + b"20\r\ndata: {") as listener:
        found = call(["sample", "a"], f"{listener.url}/v1")
    assert "broke off" in found.stderr


def test_an_answer_is_shown_while_it_arrives() -> None:
    """Otherwise a client that collects lines into large blocks would pass all other tests."""
    first = b'data: {"choices": [{"text": "soon"}]}\n\n'
    read = threading.Event()
    with Listener(STREAM + first, keep_open_until=read) as listener:
        events = Server(f"{listener.url}/v1", None).stream("completions", {})
        assert next(events)["choices"][0]["text"] == "soon"
        read.set()
        events.close()  # type: ignore[attr-defined]
