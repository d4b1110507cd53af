"""Measures what a private run learns at one epsilon, and which choices make it learn more.

The study trains on the demo's task with one loaded model in one process. A side is a choice, such
as `freeze_a`. Each setting that a side tries is trained once, with a seed that no result uses. The
best one is then trained with fresh seeds. Sides are paired: under one seed, all of them get the
same rows in each step, and those of equal adapters get the same noise. That noise has a seed, so
these runs protect nobody. Their accounts are real.

Results are written to bench-output/utility.json after each run, and a study that was stopped goes
on from there if its task and commit are the same. The workload `demo` runs the demo itself, without
privacy and with two budgets. "Gap closed" is the fall of the held-out loss with privacy, divided by
the fall without privacy.
"""

from __future__ import annotations

import copy
import json
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from actors.engine.model import Base, use_threads
from actors.engine.session import Session
from actors.privacy.session import PrivateSession
from actors.registry.registry import Registry
from bench import machine
from bench.measure import SCREEN, Bench, Run, Sheet, Spread
from bench.workloads import OUTPUT
from support.privacy_helpers import planned_budget, registry
from tg_tinker import DPConfig, LoRAConfig, OptimizerConfig, ServiceClient, TrainingConfig
from tg_tinker.client.home import init_home
from tg_tinker.data.batch import Example, normalize
from tg_tinker.data.chat import encode_rows
from tg_tinker.data.rows import as_batch, split_rows
from tg_tinker.data.text import load_tokenizer
from tg_tinker.demo.docstrings import docstring_rows
from tg_tinker.demo.options import ADAPTED, DemoOptions, adapted_layers, find_demo_model
from tg_tinker.demo.run import run_demo
from tg_tinker.storage.files import new_file

EPSILON, DELTA = 8.0, 1e-5
ROWS, BATCH, STEPS, HELD_OUT, MAX_LENGTH = 500, 32, 32, 64, 64
TUNING_SEED, SEEDS = 0, (1, 2, 3)
EMA_DECAY = 0.8
RESULTS = OUTPUT / "utility.json"
LAST = "last"
DEMO_EPSILONS = (8.0, 3.0)


@dataclass(frozen=True)
class Side:
    """A choice, and the settings to find its best one among.

    Attributes:
        lora, optimizer, dp: what the choice sets in the three configurations.
        tried: (learning rate, C) of each setting. With Adam and normalized clipping C only scales
            gradient and noise together, so there the rate alone is tuned.
        private: False trains without noise, for the gap.
    """

    name: str
    tried: tuple[tuple[float, float], ...]
    lora: dict[str, Any] = field(default_factory=lambda: {"rank": 1})
    optimizer: dict[str, Any] = field(default_factory=dict)
    dp: dict[str, Any] = field(default_factory=dict)
    private: bool = True


BASIS = Side("LoRA", ((2e-2, 0.2), (1e-2, 0.2), (4e-2, 0.2), (2e-2, 0.1), (2e-2, 0.4)))
SIDES = (
    BASIS,
    # As many values with noise as rank 1 has in A and B together.
    Side(
        "freeze_a, rank 4", ((8e-2, 0.2), (2e-2, 0.2), (4e-2, 0.2), (16e-2, 0.2)),
        lora={"rank": 4, "freeze_a": True},
    ),
    Side(
        "normalise", ((2e-2, 0.2), (1e-2, 0.2), (4e-2, 0.2)), dp={"clipping": "normalise"}
    ),
    Side(
        "noise_correction", ((1e-2, 0.2), (5e-3, 0.2), (2e-2, 0.2)),
        optimizer={"noise_correction": True},
    ),
    Side("without privacy", ((2e-2, 0.2), (1e-2, 0.2)), private=False),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What all runs of a study share."""

    model: str
    steps: int
    seeds: tuple[int, ...]
    held_out: int
    commit: str
    rows: int = ROWS
    batch: int = BATCH
    epsilon: float = EPSILON
    delta: float = DELTA


@dataclass(frozen=True)
class Found:
    """A run: the held-out losses in nats per token, and its account.

    Attributes:
        after: the loss with the last weights, and with each average of the weights.
        epsilon, sigma: what the steps have spent, and their noise; 0 without privacy.
    """

    before: float
    after: dict[str, float]
    epsilon: float = 0.0
    sigma: float = 0.0


class Paired(PrivateSession):
    """A private session whose noise follows from seed and step, the same for all sides."""

    def _noise(self, count: int) -> torch.Tensor:  # type: ignore[override]
        generator = torch.Generator().manual_seed(10_000 * self.config.seed + self.step)
        return torch.randn(count, dtype=torch.float64, generator=generator)


class Study:
    """The runs of a task, made or read from the results of a study that was stopped."""

    def __init__(self, task: Task, known: Registry, results: Path = RESULTS) -> None:
        self._task, self._known, self._results = task, known, results
        self._runs = self._kept()
        self._base: Base | None = None
        self._training: list[Example] = []
        self._held_out: list[Example] = []

    def best(self, side: Side, tried: tuple[tuple[float, float], ...]) -> tuple[float, float]:
        """Returns the setting with the lowest loss of the last weights under the tuning seed."""
        losses = {each: self.run(side, each, TUNING_SEED).after[LAST] for each in tried}
        return min(losses, key=losses.__getitem__)

    def run(self, side: Side, setting: tuple[float, float], seed: int) -> Found:
        rate, bound = setting
        name = f"{side.name}, rate {rate:g}, C {bound:g}, seed {seed}"
        if name not in self._runs:
            self._runs[name] = found = self._trained(side, rate, bound, seed)
            self._write()
            SCREEN.print(f"{name}: {found.before:.3f} to {found.after[LAST]:.3f}", highlight=False)
        return self._runs[name]

    # --- inside ------------------------------------------------------------------------------

    def _trained(self, side: Side, rate: float, bound: float, seed: int) -> Found:
        config = self._config(side, rate, bound, seed)
        session = self._session(config)
        before = self._loss(session)
        spent = None
        for rows in self._samples(seed):
            if rows or side.private:
                session.forward_backward(rows)
                spent = session.optim_step().dp_metrics
        kinds = {kind: session.averaged_state(kind).weights for kind in ("ema", "tail")}  # type: ignore[arg-type]
        after = {LAST: self._loss(session)}
        for kind, averaged in kinds.items():
            with torch.no_grad():
                for name, parameter in session._parameters.items():
                    parameter.copy_(averaged[name])
            after[kind] = self._loss(session)
        if spent is None or not isinstance(session, PrivateSession):
            return Found(before, after)
        entries = self._known.ledgers.entries("default", str(config.dataset_id))
        sigma = next(entry["sigma"] for entry in entries if entry["type"] == "open")
        return Found(before, after, spent.total_epsilon, sigma)

    def _config(self, side: Side, rate: float, bound: float, seed: int) -> TrainingConfig:
        task = self._task
        averaged = {"ema_decay": EMA_DECAY, "tail_from": task.steps // 2 + 1}
        dp = DPConfig(
            target_epsilon=task.epsilon, target_delta=task.delta, max_grad_norm=bound,
            sampling="client_poisson", dataset_size=task.rows, **side.dp,
        )  # fmt: skip
        targets = adapted_layers() if task.model == str(find_demo_model()) else (ADAPTED,)
        lora = {"alpha": 2.0 * side.lora["rank"], "target_modules": targets} | side.lora
        return TrainingConfig(
            model_ref=task.model, lora_config=LoRAConfig(**lora),
            optimizer=OptimizerConfig(learning_rate=rate, **averaged, **side.optimizer),
            dp_config=dp if side.private else None, batch_size=task.batch, max_steps=task.steps,
            dataset_id=f"study-{secrets.token_hex(4)}", seed=seed,
        )  # fmt: skip

    def _session(self, config: TrainingConfig) -> Session:
        base = self._loaded()
        # The layers are copies, which get adapters, and the weights in them are the loaded ones.
        shared = {id(tensor): tensor for tensor in base.model.parameters()}
        base = replace(base, model=copy.deepcopy(base.model, shared))
        if not config.private:
            return Session(base, config)
        return Paired(base, config, planned_budget(self._known, config))

    def _loaded(self) -> Base:
        """Returns the model; the first call loads it and encodes the rows."""
        if self._base is None:
            use_threads(None)
            self._base = Base.load(self._task.model, cache=init_home() / "models")
            tokenizer = load_tokenizer(self._base.tokenizer_files())
            training, held_out = split_rows(docstring_rows(), self._task.held_out, seed=0)
            for rows, kept in (
                (training[: self._task.rows], self._training), (held_out, self._held_out)
            ):  # fmt: skip
                kept += normalize(as_batch(encode_rows(tokenizer, rows, MAX_LENGTH)))
        return self._base

    def _samples(self, seed: int) -> Iterator[list[Example]]:
        generator = torch.Generator().manual_seed(seed)
        rate = self._task.batch / len(self._training)
        for _ in range(self._task.steps):
            drawn = torch.rand(len(self._training), generator=generator) < rate
            yield [self._training[at] for at in drawn.nonzero().flatten().tolist()]

    def _loss(self, session: Session) -> float:
        return session.forward_backward(self._held_out, train=False).loss

    def _kept(self) -> dict[str, Found]:
        if not self._results.exists():
            return {}
        kept = json.loads(self._results.read_text())
        if kept["task"] != json.loads(json.dumps(asdict(self._task))):
            return {}
        return {name: Found(**found) for name, found in kept["runs"].items()}

    def _write(self) -> None:
        self._results.parent.mkdir(exist_ok=True)
        found = {"task": asdict(self._task), "runs": {n: asdict(f) for n, f in self._runs.items()}}
        with new_file(self._results, replace=True) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())


def study(bench: Run) -> Iterator[Sheet]:
    """Yields the results: each side beside the first one, and the averages beside last weights."""
    few = bench.quick
    task = Task(
        model=bench.model, steps=bench.repeats or (2 if few else STEPS),
        seeds=SEEDS[:1] if few else SEEDS, held_out=8 if few else HELD_OUT,
        commit=machine.described()["commit"],
    )  # fmt: skip
    found: dict[str, list[Found]] = {}
    settings: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = Study(task, registry(Path(folder) / "home"))
        for side in SIDES:
            tried = side.tried[:1] if few else side.tried
            settings[side.name] = best = made.best(side, tried) if len(tried) > 1 else tried[0]
            found[side.name] = [made.run(side, best, seed) for seed in task.seeds]
    titled = f"{task.rows} rows, {task.batch} per step, {task.steps} steps, seeds {task.seeds}"
    yield Sheet(f"held-out loss: {titled}", HEADINGS, [*sides(found, settings)])
    yield Sheet(f"averaged weights: {titled}", AVERAGED, [*averages(found)])


HEADINGS = (
    "side", "rate", "C", "epsilon", "sigma", "seeds", "before", "after", "against LoRA, paired",
    "gap closed",
)  # fmt: skip
AVERAGED = ("side", "epsilon", "seeds", "last", "ema", "ema - last", "tail", "tail - last")


def sides(
    found: dict[str, list[Found]], settings: dict[str, tuple[float, float]]
) -> Iterator[tuple[str, ...]]:
    plain = [run.before - run.after[LAST] for run in found["without privacy"]]
    basis = [run.after[LAST] for run in found[BASIS.name]]
    for name, runs in found.items():
        rate, bound = settings[name]
        private = bool(runs[0].sigma)
        after = [run.after[LAST] for run in runs]
        falls = [run.before - run.after[LAST] for run in runs]
        yield (
            name, f"{rate:g}", f"{bound:g}" if private else "",
            f"{max(run.epsilon for run in runs):.2f}" if private else "none",
            f"{runs[0].sigma:.3g}" if private else "", str(len(runs)),
            Spread.of(run.before for run in runs).shown(digits=3),
            Spread.of(after).shown(digits=3),
            Spread.of(a - b for a, b in zip(after, basis, strict=True)).shown(digits=3),
            Spread.of(100 * a / b for a, b in zip(falls, plain, strict=True)).shown(" %", 0),
        )  # fmt: skip


def averages(found: dict[str, list[Found]]) -> Iterator[tuple[str, ...]]:
    for name, runs in found.items():
        cells = [Spread.of(run.after[LAST] for run in runs).shown(digits=3)]
        for kind in ("ema", "tail"):
            cells.append(Spread.of(run.after[kind] for run in runs).shown(digits=3))
            less = Spread.of(run.after[kind] - run.after[LAST] for run in runs)
            cells.append(less.shown(digits=3))
        spent = max(run.epsilon for run in runs)
        yield (name, f"{spent:.2f}" if spent else "none", str(len(runs)), *cells)


# --- the demo itself -------------------------------------------------------------------------


def demo(options: DemoOptions) -> tuple[Found, str]:
    """Runs the demo; returns its result, and its noise in words."""
    if run_demo(options) != 0:
        raise SystemExit("stopped")
    history = json.loads((options.output / "history.json").read_text())
    found = Found(history["held_out_loss_before"], {LAST: history["held_out_loss_after"]})
    if options.no_privacy:
        return found, ""
    with ServiceClient() as service:
        ledger = service.privacy_report(history["dataset_id"]).ledger
    (account,) = ledger.accounts.values()
    return found, f"sigma {account.sigma:.3g}, q {account.rate:.2%}, {account.steps} steps"


def demos(bench: Run) -> Sheet:
    steps = bench.repeats or DemoOptions.steps
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        runs = {"no privacy": demo(DemoOptions(no_privacy=True, steps=steps, output=output))}
        for epsilon in DEMO_EPSILONS:
            options = DemoOptions(epsilon=epsilon, steps=steps, output=output)
            runs[f"epsilon {epsilon:g}"] = demo(options)
    plain, _ = runs["no privacy"]
    rows = []
    for name, (found, noise) in runs.items():
        closed = (found.before - found.after[LAST]) / (plain.before - plain.after[LAST])
        losses = f"{found.before:.3f}", f"{found.after[LAST]:.3f}"
        rows.append((name, *losses, f"{closed:.0%}", noise))
    title = f"{DemoOptions.batch_size} rows per step, {steps} steps"
    return Sheet(title, ("run", "before", "after", "gap closed", "noise"), rows)


def run(bench: Run) -> None:
    if bench.only:
        bench.sheets.append(demos(bench))
        return
    bench.sheets += study(bench)


BENCH = Bench(
    "utility",
    "what a private run learns at epsilon 8, by choice (--repeats: steps of a run); the demo",
    55,
    run,
    workloads=("demo",),
)
