"""Compares saving and loading with a plain copy of the same bytes; times staging and charges.

Files are below the working directory, because /tmp may be in memory. The goals are:

- a save takes at most 1.5x the time of a plain copy that is synchronized to disk
- a load takes at most 1.5x the time of reading and decrypting
- a LoRA adapter with Adam's state is staged in 30 ms
- a save needs at most 1.2x the staged bytes in memory
- a row of the ledger is durable in 1 ms
"""

from __future__ import annotations

import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from actors.artifacts.fetch import fetch
from actors.artifacts.publish import Draft, publish
from actors.engine.checkpoint import OPTIMIZER, STATE, WEIGHTS, staged
from actors.privacy.budget import Budget
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.store import ArtifactStore
from bench.child import resident
from bench.measure import Bench, Goal, Row, Run, Sheet, Spread, ratios, shown_progress, timed
from tg_tinker import DPConfig, TrainingConfig
from tg_tinker.storage.envelope import new_key, seal, unseal

TENANT = "default"
FULL = {f"layer{i}": (576, 7786) for i in range(30)}
"""The shapes of SmolLM2-135M: 538 MB in float32."""

LORA = {
    f"layer{i}.{name}.{half}": shape
    for i in range(30)
    for name, width in (("q", 576), ("k", 192), ("v", 192), ("o", 576))
    for half, shape in (("A", (16, 576)), ("B", (width, 16)))
}
"""The shapes of an adapter of rank 16 on the attention of SmolLM2-135M."""


def random(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# --- saving and loading --------------------------------------------------------------------------


class Saves:
    """Whole saves and loads of one file, without Ray, and the bare work for comparison."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
        self._folder = folder
        self.registry, self.run, self.epoch = opened(folder / "home")
        self.store = ArtifactStore(str(folder / "store"))
        self.file = staged(random(shapes))
        self._key, self._ids = new_key(), [""]
        (folder / "sealed").write_bytes(seal(self._key, self.file, b""))

    def save(self) -> None:
        capability = self.registry.data_keys.capability(TENANT, self.run, self.epoch)
        draft = Draft(self.registry, self.store, capability, {WEIGHTS: self.file, STATE: b"{}"})
        publish(
            self.registry, self.store, draft, run_id=self.run, epoch=self.epoch, step=1,
            include_optimizer=False,
        )  # fmt: skip
        self._ids.append(draft.artifact_id)

    def copy(self) -> None:
        path = self._folder / f"copy{secrets.token_hex(4)}"
        with path.open("xb") as file:
            for start in range(0, len(self.file), 2**20):
                file.write(self.file[start : start + 2**20])
            file.flush()
            os.fsync(file.fileno())

    def load(self) -> None:
        fetch(self.registry, self.store, self.registry.data_keys.reader(TENANT), self._ids[-1])

    def decrypt(self) -> None:
        unseal(self._key, (self._folder / "sealed").read_bytes(), b"")

    def clean(self) -> None:
        """Removes the results of earlier works. Runs untimed before each work.

        It starts with a copy, so that every work gets memory that was in use before.
        """
        self.copy()
        for path in self._folder.glob("copy*"):
            path.unlink()
        for old in self._ids[1:-1]:
            self.store.delete(TENANT, old)
        del self._ids[1:-1]
        os.sync()


def saved_and_loaded(folder: Path, bench: Run) -> None:
    saves = Saves(folder, FULL)
    pairs = {"save": (saves.copy, saves.save), "load": (saves.decrypt, saves.load)}
    times: dict[str, list[list[float]]] = {name: [] for name in pairs}
    for _ in shown_progress(bench.times(7), "saves and loads"):
        for name, works in pairs.items():
            row: list[float] = []
            for work in works:
                saves.clean()
                row += spent(work)
            times[name].append(row)
    size = f"{len(saves.file) / 1e6:.0f} MB of weights"
    bare_names = {"save": "a synchronized copy", "load": "reading and decrypting"}
    for name, found in times.items():
        bare, bare_cpu, ours, cpu = zip(*found, strict=True)
        bench.rows.append(
            Row(
                name, f"{name}, {size}", bare_names[name], ratios(ours, bare),
                Goal(1.5, at_least=False), told(ours, cpu), told(bare, bare_cpu),
            )
        )  # fmt: skip


def told(clock: Sequence[float], cpu: Sequence[float]) -> str:
    return f"{Spread.of(clock).shown(' s')} ({statistics.median(cpu):.2f} s of CPU)"


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Returns seconds on the clock, and of this process's CPU, which other work disturbs less."""
    cpu = time.process_time()
    return timed(work), time.process_time() - cpu


# --- staging -------------------------------------------------------------------------------------


def staging(folder: Path, bench: Run) -> None:
    weights, moments = random(LORA), {}
    for moment in ("exp_avg", "exp_avg_sq"):
        moments |= {f"{name}.{moment}": torch.randn(shape) for name, shape in LORA.items()}
    times = 5 * bench.times(7)
    found = Spread.of(1e3 * timed(lambda: (staged(weights), staged(moments))) for _ in range(times))
    size = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
    what = f"LoRA with Adam, {size / 1e6:.1f} MB staged (goal: 30 ms)"
    title = "the time for which a save blocks training"
    bench.sheets.append(Sheet(title, ("what", "time"), [(what, found.shown(" ms", 1))]))
    bench.rows.append(
        Row(
            "save-memory", "peak memory of a save of all weights", "the staged bytes",
            Spread.of([peak(folder)]), Goal(1.2, at_least=False),
        )
    )  # fmt: skip


def peak(folder: Path) -> float:
    """Returns the peak memory of a whole save of all weights, over the staged bytes.

    The peak is the process's high-water mark above its resident memory at the start.
    """
    registry, run, epoch = opened(folder / "home2")
    store, tensors = ArtifactStore(str(folder / "store2")), random(FULL)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    file = staged(tensors)
    draft = Draft(
        registry,
        store,
        registry.data_keys.capability(TENANT, run, epoch),
        {WEIGHTS: file, OPTIMIZER: b"", STATE: b"{}"},
    )
    publish(registry, store, draft, run_id=run, epoch=epoch, step=1, include_optimizer=True)
    return (resident("VmHWM") - before) / len(file)


# --- the ledger ----------------------------------------------------------------------------------


BARE = "4 KiB and fdatasync"


def charges(folder: Path, bench: Run, count: int = 500) -> None:
    """Times charges and rows of the ledger. Each is durable when its call returns."""
    known, run, epoch = opened(folder / "home3")
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
    config = TrainingConfig(model_ref="m", dp_config=dp, dataset_id="bench")
    budget = Budget.planned(known, TENANT, run, epoch, config, "float32").open()
    units = [[secrets.token_bytes(32) for _ in range(8)] for _ in range(count)]
    works: dict[str, Callable[[int], object]] = {
        BARE: lambda i: synchronized(folder / "bare"),
        "a row of the ledger, with one of the audit log": lambda i: budget.link([f"other-{i}"]),
        "a charge of eight units, checked": lambda i: budget.charge(units[i], noised=True),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(count):
        for name, work in works.items():
            times[name].append(1e3 * timed(lambda work=work, i=i: work(i)))
    rows = []
    for name, found in times.items():
        p99 = statistics.quantiles(found, n=100)[98]
        p50 = statistics.median(found)
        of_bare = f"{p50 / statistics.median(times[BARE]):.1f}x"
        rows.append((name, f"{p50:.2f}", f"{p99:.2f}", of_bare))
    title = f"the ledger: {count} of each, interleaved (goal: 1 ms)"
    bench.sheets.append(Sheet(title, ("", "p50 ms", "p99 ms", "relative to bare"), rows))


def synchronized(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))
        file.flush()
        os.fdatasync(file.fileno())


def opened(home: Path) -> tuple[Registry, str, int]:
    """Returns a new registry with one run in it."""
    create(home)
    registry = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    run = registry.runs.create(TENANT, TrainingConfig(model_ref="m").model_dump_json())
    return registry, run, registry.runs.claim(run)


def run(bench: Run) -> None:
    for part in (charges, staging, saved_and_loaded):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            part(Path(folder), bench)


BENCH = Bench("storage", "saving, loading and staging against plain copies; the ledger", 1, run)
