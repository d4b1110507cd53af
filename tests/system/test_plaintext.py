"""Tests that nothing is readable at rest: a program with secrets everywhere, and a search of all
it leaves.

`plaintext_program` does everything a user does. After each of its parts, while all of it still
runs, the test searches for the secrets: in the object store's memory, in every file that Ray ever
spilled, in Ray's session folder with its logs, in the home with registry and artifacts, in what the
program printed (errors included), in the metrics, and in the arguments and environment of every
process. Ray is configured to spill what it can, and freed objects keep their bytes until others
take their place.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support import plaintext_program as program
from support.models import make_model

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc"),
]

RAY = {
    "RAY_object_spilling_threshold": "0", "RAY_min_spilling_size": "0",
    "RAY_metrics_report_interval_ms": "1000",
}  # fmt: skip


def text_forms(text: str) -> list[bytes]:
    core = text[4:24]
    return [core.encode(), core.encode("utf-16-le"), core.encode().hex().encode()]


def id_forms(text: str) -> list[bytes]:
    """Returns the token ids of a text (`models.make_tokenizer`: a token is a byte), packed or
    printed."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [alphabet.index(c) for c in byte_level.pre_tokenize_str(text)[0][0]][4:20]
    packed = [struct.pack(f"{order}{len(ids)}{kind}", *ids) for order in "<>" for kind in "qih"]
    return packed + [separator.join(map(str, ids)).encode() for separator in (", ", ",", " ")]


def raw_forms(secret: bytes) -> list[bytes]:
    url_safe = base64.urlsafe_b64encode(secret)
    return [secret, secret.hex().encode(), base64.b64encode(secret), url_safe]


class Search:
    """The secrets to search for, and the places to search."""

    def __init__(self, folder: Path, home: Path, work: Path, leader: int) -> None:
        told = json.loads((folder / "secrets.json").read_text())
        self.session, self.metrics = Path(told["session"]), told["metrics"]
        self._folder, self._home, self._work, self._leader = folder, home, work, leader
        self.wanted = {
            "text": text_forms(program.TEXT), "ids": id_forms(program.TEXT),
            "example id": text_forms(program.EXAMPLE_ID), "metadata": text_forms(program.METADATA),
            "wrong key": text_forms(program.WRONG_KEY),
            "batch hash": text_forms(program.BATCH_HASH),
            "store": text_forms(program.STORE_SECRET), "api key": text_forms(told["api"]),
            "transport key": raw_forms(bytes.fromhex(told["transport"])),
        }  # fmt: skip
        for number, key in enumerate(tenant_keys(home)):
            self.wanted[f"tenant key {number}"] = raw_forms(key)

    def everywhere(self) -> set[tuple[str, str]]:
        for name in ("gradient", "weights"):  # once they are known
            if (self._folder / name).exists():
                self.wanted[name] = [(self._folder / name).read_bytes()]
        return self.within(self.files()) | self.within(self.living())

    def within(self, places: Iterable[tuple[str, bytes]]) -> set[tuple[str, str]]:
        return {(name, place) for place, content in places for name in self.in_bytes(content)}

    def in_bytes(self, content: bytes) -> set[str]:
        return {name for name, forms in self.wanted.items() if any(f in content for f in forms)}

    def files(self) -> Iterator[tuple[str, bytes]]:
        for folder in (self.session, self._home, self._work):
            for file in folder.rglob("*"):
                if file.is_file() and not file.is_symlink() and file.name not in ("keyring",):
                    yield f"{folder.name}/{file.relative_to(folder)}", read(file)

    def living(self) -> Iterator[tuple[str, bytes]]:
        """Yields shared memory of the object store, arguments and environments, and metrics."""
        seen = set()
        for pid in members(self._leader):
            for name in ("cmdline", "environ"):
                yield f"{name} of {pid}", read(Path(f"/proc/{pid}/{name}"))
            for link in links(pid):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    state, name = link.stat(), str(link.readlink())
                    if "plasma" in name and (state.st_dev, state.st_ino) not in seen:
                        found = read_data(link)
                        seen.add((state.st_dev, state.st_ino))
                        yield "object store", found
        for url in self.metrics:
            with urllib.request.urlopen(url, timeout=30) as answer:
                yield "metrics", answer.read()


def tenant_keys(home: Path) -> list[bytes]:
    keys = json.loads((home / "keyring").read_text())["keys"]
    return [base64.b64decode(key, validate=True) for key in keys.values()]


def members(leader: int) -> list[int]:
    """Returns the processes of a session, in the sense of setsid."""
    out = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in out.stdout.splitlines()[1:]]
    return [int(pid) for pid, session in rows if int(session) == leader]


def links(pid: int) -> list[Path]:
    try:
        return [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists()]
    except OSError:
        return []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended, or was removed
        return b""


def read_data(path: Path) -> bytes:
    """Returns the content of a file without its holes."""
    found, end = [], 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # no more of it
                return b"".join(found)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append(os.pread(file.fileno(), end - start, start))


class Seen(NamedTuple):
    """The findings in each part, as (secret, place), and those after all processes had ended."""

    found: dict[str, set[tuple[str, str]]]
    spilled: int  # bytes, before the controls
    after: set[tuple[str, str]]


TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder, work = tmp_path_factory.mktemp("told"), tmp_path_factory.mktemp("work")
    home = tmp_path_factory.mktemp("parent") / "home"
    model = make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)
    with (work / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, program.__file__, str(model), str(folder)],
            env=os.environ | RAY | {"TG_TINKER_HOME": str(home), "PYTHONPATH": TESTS},
            cwd=work, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    try:
        assert process.stdout
        parts = (line.strip() for line in process.stdout)
        assert next(parts, None) == "start", (work / "stderr").read_text()[-3000:]
        search = Search(folder, home, work, process.pid)
        with spilled_files(search.session) as kept:
            found: dict[str, set[tuple[str, str]]] = {}
            for part in itertools.chain(["start"], parts):
                if part == program.CONTROL:
                    size = sum(file.stat().st_size for file in kept.iterdir())
                    await_controls(search)
                found[part] = search.everywhere()
                print(file=process.stdin, flush=True)
            assert process.wait(timeout=120) == 0, (work / "stderr").read_text()[-3000:]
            yield Seen(found, size, search.within(search.files()))
    finally:
        process.kill()


@contextlib.contextmanager
def spilled_files(session: Path) -> Iterator[Path]:
    """Gives every file that Ray spills a second name, because Ray removes a file when it is
    read."""
    kept, stop = session / "kept", threading.Event()
    kept.mkdir()

    def keep() -> None:
        while not stop.wait(0.005):
            for file in session.glob("ray_spilled_objects*/*"):
                with contextlib.suppress(OSError):
                    (kept / file.name).hardlink_to(file)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield kept
    finally:
        stop.set()
        thread.join()
        shutil.rmtree(kept)


PLACES = {
    "object store": "^object store$", "spilled": "/kept/", "log": "/logs/worker-",
    "registry": r"^home/registry\.db", "artifacts": "^home/store/",
    "printed": "^work[0-9]*/stderr$", "metrics": "^metrics$", "process": "^environ of",
}  # fmt: skip
"""Where a control lies."""


def missed(found: set[tuple[str, str]]) -> list[str]:
    places = [place for secret, place in found if secret == "text"]
    return [name for name, form in PLACES.items() if not any(re.search(form, p) for p in places)]


def await_controls(search: Search) -> None:
    """Waits until the controls are found: Ray spills, and reports metrics, after some seconds."""
    deadline = time.monotonic() + 180
    while missed(search.everywhere()) and time.monotonic() < deadline:
        time.sleep(0.5)


def test_no_secret_lies_in_the_clear(seen: Seen) -> None:
    parts = {part: found for part, found in seen.found.items() if part != program.CONTROL}
    assert len(parts) == 11
    assert {part: found for part, found in parts.items() if found} == {}


def test_what_lies_in_the_clear_is_found_in_every_place(seen: Seen) -> None:
    assert missed(seen.found[program.CONTROL]) == []
    assert {secret for secret, _ in seen.found[program.CONTROL] | seen.after} == {"text"}


def test_batches_were_spilled(seen: Seen) -> None:
    assert seen.spilled > 1e6


@pytest.mark.parametrize("form", [*text_forms(program.TEXT), *id_forms(program.TEXT)])
def test_every_form_is_found(form: bytes) -> None:
    search = object.__new__(Search)
    search.wanted = {"text": text_forms(program.TEXT), "ids": id_forms(program.TEXT)}
    assert search.in_bytes(b"some log line " + form + b" and more")
    assert not search.in_bytes(form[:-1])
