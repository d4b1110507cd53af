"""Saving and loading beside a plain copy of the same bytes; staging; a charge of the ledger.

Run by `make bench`, about a minute. Files lie below the working directory, since /tmp may be in
memory. Repeats are interleaved, and a ratio is the median over repeats with its quartiles, so that
a change of the machine's speed meets all rows. Goals: a save takes at most 1.5x of a plain copy
that is synchronised, a load at most 1.5x of reading and decrypting; a LoRA adapter with Adam's
state is staged in 30 ms, and a save needs at most 1.2x of the staged bytes in memory; a row of the
ledger is durable in 1 ms.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.artifacts import Draft, fetch, publish
from actors.budget import Budget
from actors.home import DATABASE, KEYRING, create
from actors.registry import Registry
from actors.staging import staged
from actors.state import OPTIMIZER, STATE, WEIGHTS
from actors.store import ArtifactStore
from tg_tinker import DPConfig, TrainingConfig
from tg_tinker.envelope import new_key, seal, unseal

TENANT = "default"
FULL = {f"layer{i}": (576, 7786) for i in range(30)}
"""Float32: the 538 MB of SmolLM2-135M."""

LORA = {
    f"layer{i}.{name}.{half}": shape
    for i in range(30)
    for name, width in (("q", 576), ("k", 192), ("v", 192), ("o", 576))
    for half, shape in (("A", (16, 576)), ("B", (width, 16)))
}
"""Rank 16 on the attention of SmolLM2-135M."""


def random(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- saving and loading --------------------------------------------------------------------------


class Saves:
    """Whole saves and loads of one file, without Ray, and what they are compared with."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
        self._folder = folder
        self.registry, self.run, self.epoch = opened(folder / "home")
        self.store = ArtifactStore(str(folder / "store"))
        self.file = staged(random(shapes))
        self._key, self._ids = new_key(), [""]
        (folder / "sealed").write_bytes(seal(self._key, self.file, b""))

    def save(self) -> None:
        capability = self.registry.capability(TENANT, self.run, self.epoch)
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
        fetch(self.registry, self.store, self.registry.reader(TENANT), self._ids[-1])

    def decrypt(self) -> None:
        unseal(self._key, (self._folder / "sealed").read_bytes(), b"")

    def clean(self) -> None:
        """Before each work, not timed; a copy more, so that all find memory that was in use."""
        self.copy()
        for path in self._folder.glob("copy*"):
            path.unlink()
        for old in self._ids[1:-1]:
            self.store.delete(TENANT, old)
        del self._ids[1:-1]
        os.sync()


def saved_and_loaded(folder: Path, repeats: int) -> Table:
    saves = Saves(folder, FULL)
    pairs = {"save": (saves.copy, saves.save), "load": (saves.decrypt, saves.load)}
    times: dict[str, list[list[float]]] = {name: [] for name in pairs}
    for _ in track(range(repeats), "repeats"):
        for name, works in pairs.items():
            row: list[float] = []
            for work in works:
                saves.clean()
                row += spent(work)
            times[name].append(row)
    table = Table(
        "", "s", "bare s", "ratio", "quartiles", "CPU s", "bare CPU s",
        title=f"{len(saves.file) / 1e6:.0f} MB of weights",
    )  # fmt: skip
    for name, found in times.items():
        low, middle, high = statistics.quantiles([row[2] / row[0] for row in found], n=4)
        bare, bare_cpu, ours, cpu = (
            statistics.median(column) for column in zip(*found, strict=True)
        )
        table.add_row(
            name, f"{ours:.2f}", f"{bare:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}",
            f"{cpu:.2f}", f"{bare_cpu:.2f}",
        )  # fmt: skip
    return table


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of this process's CPU, which others on the machine disturb less."""
    cpu = time.process_time()
    return seconds(work), time.process_time() - cpu


# --- staging -------------------------------------------------------------------------------------


def staging(folder: Path, repeats: int) -> Table:
    weights, moments = random(LORA), {}
    for moment in ("exp_avg", "exp_avg_sq"):
        moments |= {f"{name}.{moment}": torch.randn(shape) for name, shape in LORA.items()}
    found = [1e3 * seconds(lambda: (staged(weights), staged(moments))) for _ in range(5 * repeats)]
    size = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
    table = Table("", "", title="what a save holds up, and what it needs")
    quartiles = statistics.quantiles(found, n=4)
    table.add_row(
        f"LoRA with Adam, {size / 1e6:.1f} MB staged, ms",
        f"{quartiles[1]:.1f} ({quartiles[0]:.1f} to {quartiles[2]:.1f})",
    )
    table.add_row("peak memory of a save, of the staged bytes", f"{peak(folder):.2f}")
    return table


def peak(folder: Path) -> float:
    """Of a whole save of all weights: the process's high-water mark above where it began."""
    registry, run, epoch = opened(folder / "home2")
    store, tensors = ArtifactStore(str(folder / "store2")), random(FULL)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    file = staged(tensors)
    draft = Draft(
        registry,
        store,
        registry.capability(TENANT, run, epoch),
        {WEIGHTS: file, OPTIMIZER: b"", STATE: b"{}"},
    )
    publish(registry, store, draft, run_id=run, epoch=epoch, step=1, include_optimizer=True)
    return (memory("VmHWM") - before) / len(file)


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


# --- the ledger ----------------------------------------------------------------------------------


BARE = "4 KiB and fdatasync"


def charges(folder: Path, count: int = 500) -> Table:
    """Each is durable when it returns."""
    known, run, epoch = opened(folder / "home3")
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
    config = TrainingConfig(model_ref="m", dp_config=dp, dataset_id="bench")
    budget = Budget.planned(known, TENANT, run, epoch, config, "float32").open()
    units = [[secrets.token_bytes(32) for _ in range(8)] for _ in range(count)]
    works: dict[str, Callable[[int], object]] = {
        BARE: lambda i: synchronised(folder / "bare"),
        "a row of the ledger, with one of the audit log": lambda i: budget.link([f"other-{i}"]),
        "a charge of eight units, checked": lambda i: budget.charge(units[i], noised=True),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(count):
        for name, work in works.items():
            times[name].append(1e3 * seconds(lambda work=work, i=i: work(i)))
    table = Table("", "p50 ms", "p99 ms", "of bare", title=f"{count} each, interleaved")
    for name, found in times.items():
        p99 = statistics.quantiles(found, n=100)[98]
        p50 = statistics.median(found)
        table.add_row(
            name, f"{p50:.2f}", f"{p99:.2f}", f"{p50 / statistics.median(times[BARE]):.1f}x"
        )
    return table


def synchronised(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))
        file.flush()
        os.fdatasync(file.fileno())


def opened(home: Path) -> tuple[Registry, str, int]:
    """A registry of its own with a run in it."""
    create(home)
    registry = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    run = registry.create_run(TENANT, TrainingConfig(model_ref="m").model_dump_json())
    return registry, run, registry.claim(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    parts: list[Callable[[Path], Any]] = [
        charges, lambda folder: staging(folder, repeats),
        lambda folder: saved_and_loaded(folder, repeats),
    ]  # fmt: skip
    for part in parts:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            Console().print(part(Path(folder)))


if __name__ == "__main__":
    main()
