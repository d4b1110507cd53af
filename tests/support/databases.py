"""Runs the registry's databases in tests: SQLite in a home, and a PostgreSQL server on this
machine.

The server runs as another user than root, on a free loopback port, fully synchronous as the
registry requires, and is ended by its process id. Where it is not installed, tests skip.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.registry.schema import METADATA
from support.processes import free_port
from tg_tinker.cluster.node import answers

_HOW = "apt-get install postgresql"
USER, PASSWORD = "tg", "pg-secret-4711"


@dataclass
class Postgres:
    """A server, and the assignment of its databases to homes."""

    folder: Path
    port: int
    binaries: Path = Path()
    process: subprocess.Popen[bytes] | None = None
    of_home: dict[Path, str] = field(default_factory=dict)
    spare: list[str] = field(default_factory=list)

    def url(self, name: str, user: str = USER) -> str:
        return (
            f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{name}"
            f"?passfile={self.folder / 'pass'}"
        )

    def start(self, **settings: str) -> None:
        options = [f"-c{name}={value}" for name, value in settings.items()]
        self.process = self.run("postgres", "-D", str(self.folder / "data"), *options)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server at once; what was committed is kept."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)

    def new_database(self, template: str = "template0") -> str:
        name = f"t{time.monotonic_ns()}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def empty(self) -> str:
        """Returns a database without a row. It may have the tables of an earlier test."""
        return self.spare.pop() if self.spare else self.new_database()

    def give_back(self) -> None:
        """Removes the rows from all databases of homes, because new databases take longer."""
        import psycopg

        tables = ", ".join(METADATA.tables)
        for name in self.of_home.values():
            with suppress(psycopg.Error):  # a test that dropped a table has spoiled its own
                self.execute(f"TRUNCATE {tables}", name)
                self.spare.append(name)
        self.of_home.clear()

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self._dsn(database), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return [*cursor.fetchall()] if cursor.description else []

    def make(self) -> None:
        """Makes the server's folder. Its one user needs a password."""
        (self.folder / "secret").write_text(PASSWORD)
        (self.folder / "pass").write_text(f"*:*:*:*:{PASSWORD}\n")
        (self.folder / "pass").chmod(0o600)
        self.folder.chmod(0o755)
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            (self.folder / "data").mkdir()
            os.chown(self.folder / "data", nobody.pw_uid, nobody.pw_gid)
        made = self.run(
            "initdb", "--no-sync", "-A", "scram-sha-256", "-U", USER, "-E", "UTF8",
            "--locale", "C.UTF-8", "--pwfile", str(self.folder / "secret"), "-D",
            str(self.folder / "data"),
        )  # fmt: skip
        assert made.wait(60) == 0, (self.folder / "log").read_text()

    def run(self, program: str | Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts one of the server's programs, or another by its path, as another user than
        root."""
        other: dict[str, Any] = {}
        if os.getuid() == 0:  # it refuses to run as root
            nobody = pwd.getpwnam("nobody")
            other = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [self.binaries / program, *arguments], stdout=log, stderr=log, cwd="/",
                stdin=subprocess.DEVNULL, env={"PATH": os.environ["PATH"], "TZ": "UTC"}, **other,
            )  # fmt: skip

    def _dsn(self, database: str) -> str:
        return (
            f"host=127.0.0.1 port={self.port} dbname={database} user={USER}"
            f" passfile={self.folder / 'pass'}"
        )

    def _answers(self) -> bool:
        import psycopg

        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason=f"psycopg is not installed: {_HOW}")
    folder = Path(tempfile.mkdtemp(prefix="tg-postgres-"))
    server = Postgres(folder, free_port())
    try:
        server.binaries = _binaries()
        server.make()
        server.start(
            port=str(server.port), listen_addresses="127.0.0.1", unix_socket_directories=""
        )
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@contextmanager
def pgbouncer(server: Postgres, mode: str, ignored: str = "options") -> Iterator[int]:
    """Yields the port of a pgbouncer in front of a server. Whoever connects is its one user.

    Args:
        mode: `transaction` or `session`.
        ignored: The settings of a connection that it drops without a word.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed: apt-get install pgbouncer")
    port, file = free_port(), server.folder / "pgbouncer.ini"
    file.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port} user={USER} password={PASSWORD}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        f"pool_mode = {mode}\nignore_startup_parameters = {ignored}\nunix_socket_dir =\n"
    )
    running = server.run(Path(program), str(file))
    try:
        deadline = time.monotonic() + 30
        while not answers(f"127.0.0.1:{port}"):
            assert running.poll() is None, (server.folder / "log").read_text()
            assert time.monotonic() < deadline, "pgbouncer does not start"
            time.sleep(0.05)
        yield port
    finally:
        running.terminate()
        running.wait(30)


def _binaries() -> Path:
    """Returns the folder of Debian's programs, which are not in the path, or else of those in
    the path."""
    for found in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (found / "postgres").exists():
            return found
    if beside := shutil.which("postgres"):
        return Path(beside).parent
    pytest.skip(f"PostgreSQL is not installed: {_HOW}")


_current: Postgres | None = None


@contextmanager
def all_on(server: Postgres | None) -> Iterator[None]:
    """Makes `url_of` return databases of this server inside the block."""
    global _current
    _current = server
    try:
        yield
    finally:
        _current = None
        if server is not None:
            server.give_back()


def url_of(home: Path) -> str:
    """Returns the database of a home: its SQLite file, or a database of its own on the server in
    use."""
    if _current is None:
        return f"sqlite:///{home / 'registry.db'}"
    if home not in _current.of_home:
        _current.of_home[home] = _current.empty()
    return _current.url(_current.of_home[home])
