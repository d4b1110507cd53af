"""Tests saves, loads, deletions and sweeps at the same time, with their calls in any order.

Each operation runs in a thread that stops before every call of the store and of the registry, and
once in the middle of a write. Hypothesis decides which operation continues and which is killed.
Registry, SQLite and folder are the real ones; the clock of the store is the machine's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.artifacts import delete as delete_module
from actors.artifacts import fetch, publish
from actors.artifacts.publish import Draft
from actors.operations.sweep import sweep_store
from actors.registry.registry import PARTS, Registry
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.objects import LocalFolder, ObjectInfo, pieces_of
from actors.storage.store import ArtifactStore
from tg_tinker import NotFoundError, Orphan, StorageError, TrainingConfig

SOAK = "TG_TINKER_SOAK" in os.environ
TENANT = "clinic"
HOUR = 3600.0
IN_MEMORY = "/dev/shm" if os.path.ismount("/dev/shm") else None  # noqa: S108
"""Whether bytes are durable is not asked here, and an fsync there costs nothing."""

AT_ONCE = 4
"""Operations under way."""

SAVE_UNTIL = ["artifacts.publish", "artifacts.publish", "put", "written", "the end"]
SWEEP_UNTIL = ["orphans.bury", "the end", "orphans.bury", "catalogue.reachable", "delete_all"]
"""Calls before which they stop first; the others stop before any."""


class KilledError(BaseException):
    """Ends an operation. Every later call of its clean-up raises the error again."""


class Operation:
    """An operation in a thread that continues only when the test lets it."""

    local = threading.local()
    """Has the operation of the thread that opens a store."""

    def __init__(self, kind: str, artifact: str, work: Callable[[], Any]) -> None:
        self.kind, self.artifact, self._work = kind, artifact, work
        self.next, self.killed, self.done = "", False, False
        self.result: Any = None
        self.error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def pause(self, call: str) -> None:
        if not self.killed:
            self.next = call
            self._stopped.release()
            self._go.acquire()
        if self.killed:
            raise KilledError

    def advance(self) -> None:
        self._go.release()
        self._wait()

    def kill(self) -> None:
        self.killed = True
        self.advance()
        self._thread.join(60)

    def _wait(self) -> None:
        assert self._stopped.acquire(timeout=60), f"{self.kind} hangs after {self.next}"

    def _run(self) -> None:
        Operation.local.now = self
        try:
            self.pause("begin")
            self.result = self._work()
        except BaseException as error:
            self.error = error
        self.done = True
        self._stopped.release()


class Gated(LocalFolder):
    """A folder that stops before each call, and in `put` before the hidden file is made durable
    and renamed."""

    def __init__(self, root: Path, clock: Callable[[], datetime]) -> None:
        super().__init__(root)
        self._root, self._clock = root, clock
        operation: Operation | None = getattr(Operation.local, "now", None)
        self._pause = operation.pause if operation else lambda call: None

    def put(self, name: str, content: Any) -> int:
        self._pause("put")
        return super().put(name, self._pieces(name, content))

    def _pieces(self, name: str, content: Any) -> Iterator[Any]:
        yield from pieces_of(content)
        try:
            self._pause("written")
        except KilledError:  # as SIGKILL does, leave the hidden file there
            path = self._root / name
            path.with_name(f".{path.name}.0badf00d").write_bytes(b"part")
            raise

    def read(self, name: str, most: int | None = None) -> bytes:
        self._pause("read")
        return super().read(name, most)

    def list_below(self, folder: str = "") -> list[ObjectInfo]:
        self._pause("list_below")
        found, now = super().list_below(folder), self._clock()
        return [i._replace(modified=now) if i.name.endswith("/clock") else i for i in found]

    def delete(self, name: str) -> None:
        self._pause("delete")
        super().delete(name)

    def delete_all(self, folder: str) -> None:
        self._pause("delete_all")
        super().delete_all(folder)


class GatedPart:
    """A part of the registry that stops before each call, which it names `PART.METHOD`."""

    def __init__(self, registry: Registry, part: str) -> None:
        self._name, self._part = part, getattr(registry, part)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            Operation.local.now.pause(f"{self._name}.{name}")
            return getattr(self._part, name)(*arguments)

        return call


class GatedRegistry:
    def __init__(self, registry: Registry) -> None:
        for part in PARTS:
            setattr(self, part, GatedPart(registry, part))


class Artifacts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        home = self.folder / "home"
        create(home)
        self.root = str(home / "store")
        self.registry: Any = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
        self.gated: Any = GatedRegistry(self.registry)
        self.run = self.registry.runs.create(
            TENANT, TrainingConfig(model_ref="m").model_dump_json()
        )
        self.epoch = self.registry.runs.claim(self.run)
        self.capability = self.registry.data_keys.capability(TENANT, self.run, self.epoch)
        self.reader = self.registry.data_keys.reader(TENANT)
        self.now = datetime(2001, 1, 1, tzinfo=UTC)
        self.contents: dict[str, dict[str, bytes]] = {}  # of every draft
        self.deleting: set[str] = set()
        self.under_way: list[Operation] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("actors.storage.store.PARALLEL", 1)  # one call at a time
        opened = "actors.storage.store.open_objects"
        self.patch.setattr(opened, lambda root, policy: Gated(Path(root), lambda: self.now))

    # --- operations ------------------------------------------------------------------------------

    def _begin(self, kind: str, artifact: str, work: Callable[[], Any], until: str = "") -> None:
        operation = Operation(kind, artifact, work)
        self.under_way.append(operation)
        while until and not operation.done and operation.next != until:
            operation.advance()
        self._settle()

    @precondition(lambda self: len(self.under_way) < AT_ONCE)
    @rule(names=st.sampled_from([("a",), ("a", "b")]), until=st.sampled_from(SAVE_UNTIL))
    def save(self, names: tuple[str, ...], until: str) -> None:
        files = {name: os.urandom(20) for name in names}
        draft = Draft(self.registry, ArtifactStore(self.root), self.capability, files)
        self.contents[draft.artifact_id] = files

        def work() -> None:
            publish.publish(
                self.gated, ArtifactStore(self.root), draft, run_id=self.run, epoch=self.epoch,
                step=1, include_optimizer=False,
            )  # fmt: skip

        self._begin("save", draft.artifact_id, work, until)

    @precondition(lambda self: self.contents and len(self.under_way) < AT_ONCE)
    @rule(which=st.integers(0, 99))
    def load(self, which: int) -> None:
        artifact = [*self.contents][which % len(self.contents)]
        if artifact in self.published():
            self._begin("load", artifact, lambda: fetch.fetch(
                self.gated, ArtifactStore(self.root), self.reader, artifact
            ))  # fmt: skip

    @precondition(lambda self: self.contents and len(self.under_way) < AT_ONCE)
    @rule(which=st.integers(0, 99))
    def delete(self, which: int) -> None:
        artifact = [*self.contents][which % len(self.contents)]
        if artifact in self.published():
            self.deleting.add(artifact)
            self._begin("delete", artifact, lambda: delete_module.delete(
                self.gated, self.root, TENANT, artifact
            ))  # fmt: skip

    @precondition(lambda self: len(self.under_way) < AT_ONCE)
    @rule(
        noted=st.booleans(), later_h=st.sampled_from([1, 1, 0.5]),
        until=st.sampled_from(SWEEP_UNTIL),
    )  # fmt: skip
    def sweep(self, noted: bool, later_h: float, until: str) -> None:
        """Begins a sweep. With `noted`, another whole sweep has run some time before."""
        if noted:
            list(sweep_store(self.registry, self.root, TENANT, HOUR, False))
        self.now += timedelta(hours=later_h)

        def work() -> list[Orphan]:
            return [*sweep_store(self.gated, self.root, TENANT, HOUR, False)]

        self._begin("sweep", "", work, until)

    # --- what happens to them --------------------------------------------------------------------

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, AT_ONCE - 1), steps=st.integers(1, 6))
    def go_on(self, which: int, steps: int) -> None:
        operation = self._chosen(which)
        for _ in range(steps):
            if not operation.done:
                operation.advance()
        self._settle()

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, AT_ONCE - 1))
    def go_on_to_the_end(self, which: int) -> None:
        operation = self._chosen(which)
        while not operation.done:
            operation.advance()
        self._settle()

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, AT_ONCE - 1))
    def kill(self, which: int) -> None:
        self._chosen(which).kill()
        self._settle()

    def _chosen(self, which: int) -> Operation:
        return self.under_way[which % len(self.under_way)]

    def _settle(self) -> None:
        for operation in [one for one in self.under_way if one.done]:
            self.under_way.remove(operation)
            if not isinstance(operation.error, KilledError):
                getattr(self, f"ended_{operation.kind}")(operation)

    def ended_save(self, save: Operation) -> None:
        if save.error is None:
            assert save.artifact in self.published() | self.deleting
            return
        assert isinstance(save.error, StorageError), save.error
        assert self.registry.orphans.of(TENANT)[save.artifact].buried  # nothing else refuses here
        assert save.artifact not in self.published()
        assert [name for name in self.files() if save.artifact in name] == []

    def ended_load(self, load: Operation) -> None:
        if load.error is None:
            assert load.result == self.contents[load.artifact]
        else:
            assert isinstance(load.error, NotFoundError), load.error
            assert load.artifact in self.deleting

    def ended_delete(self, delete: Operation) -> None:
        assert delete.error is None or isinstance(delete.error, NotFoundError), delete.error

    def ended_sweep(self, sweep: Operation) -> None:
        assert sweep.error is None, sweep.error
        assert {orphan.state for orphan in sweep.result} <= {"waiting", "removed"}

    # --- what holds ------------------------------------------------------------------------------

    def published(self) -> set[str]:
        return {info.artifact_id for info in self.registry.catalogue.find(TENANT)}

    def files(self) -> set[str]:
        below = Path(self.root) / "t" / TENANT
        found = {p.relative_to(below).as_posix() for p in below.rglob("*") if p.is_file()}
        return {name for name in found if not name.startswith("audit/")}

    @invariant()
    def what_is_published_loads_and_nothing_else_does(self) -> None:
        published, store = self.published(), ArtifactStore(self.root)
        for artifact, files in self.contents.items():
            if artifact in published:
                assert fetch.fetch(self.registry, store, self.reader, artifact) == files
            else:
                with pytest.raises(NotFoundError):
                    fetch.fetch(self.registry, store, self.reader, artifact)

    def teardown(self) -> None:
        try:
            for operation in self.under_way:
                operation.kill()
            for _ in range(2):
                self.now += timedelta(hours=1)
                list(sweep_store(self.registry, self.root, TENANT, HOUR, False))
            self.what_is_published_loads_and_nothing_else_does()
            needed = {
                name
                for one in self.published()
                for name in (f"a/{one}/manifest.json", f"keys/{one}.json")
            } | {f"a/{one}/{n}.enc" for one in self.published() for n in self.contents[one]}
            assert self.files() == needed | {"clock"}
        finally:
            self.patch.undo()
            self.registry.database.engine.dispose()
            shutil.rmtree(self.folder)


TestArtifacts = Artifacts.TestCase
TestArtifacts.settings = settings(
    max_examples=1500 if SOAK else 20,
    stateful_step_count=60 if SOAK else 40,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)


@pytest.mark.parametrize("first", ["save", "sweep"])
def test_a_save_and_the_second_sweep_meet_at_every_pair_of_their_calls(first: str) -> None:
    """The save has reached call `i` when an earlier sweep sees its files, and the later sweep
    call `j`. Then one of the two runs to its end, and the other after it. The machine above
    seldom reaches these states."""
    pairs, i, through = 0, 0, False
    while not through:
        j, ended = 0, False
        while not ended:
            machine = Artifacts()
            machine.save(("a",), "")
            save = machine.under_way[-1]
            through = went(save, i)
            if not (SOAK or through or save.next in DECISIVE):
                machine.teardown()
                break
            machine.sweep(True, 1, "")
            sweep = machine.under_way[-1]
            ended = went(sweep, j)
            for operation in (save, sweep) if first == "save" else (sweep, save):
                went(operation, 1000)
                machine.what_is_published_loads_and_nothing_else_does()
            machine._settle()
            machine.teardown()
            j, pairs = j + 1, pairs + 1
        i += 1
    assert pairs > (100 if SOAK else 20)


DECISIVE = ("artifacts.publish", "audit_log.head")
"""Calls of a save before and after which it is entered; the others are met in `make soak`."""


def went(operation: Operation, calls: int) -> bool:
    """Lets an operation make some calls; returns whether it has ended."""
    for _ in range(calls):
        if not operation.done:
            operation.advance()
    return operation.done
