"""What privacy costs: a private step beside the plain one, and beside Opacus on the same rows.

Run by `make bench`. Sides of a table run in turns; printed are medians, the spread between the
quartiles, ratios of medians, and peak memory of the process above what it held before the step.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import engine_step, spread, timed, uniform
from helpers import padded
from privacy_helpers import new_budget, registry
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.clipping import ClippedSum, privatise
from actors.model import Base, use_threads
from actors.private import PrivateSession
from tg_tinker import DPConfig, LoRAConfig, ResourceConfig, TrainingConfig
from tg_tinker.batch import normalise
from tg_tinker.demo import find_demo_model
from tg_tinker.service import init_home

Step = Callable[[], None]
DP = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def private_step(base: Base, config: TrainingConfig, rows: Any) -> Step:
    session = PrivateSession(base, config, new_budget(registry(), config))
    examples = normalise({"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]})

    def step() -> None:
        session.forward_backward(examples)
        session.optim_step()

    return step


def opacus_step(directory: Path, rows: Any, ghost: bool) -> Step:
    """Opacus' own pieces around PEFT's model: hooks that hold gradients, or ghost clipping."""
    import opacus.optimizers as optimizers
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(r=16, lora_alpha=32, target_modules=QKVO)).train()
    options: dict[str, Any] = {"loss_reduction": "sum", "strict": False}
    model = (
        GradSampleModuleFastGradientClipping(adapted, max_grad_norm=1.0, **options)
        if ghost
        else GradSampleModule(adapted, **options)
    )
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    kind = optimizers.DPOptimizerFastGradientClipping if ghost else optimizers.DPOptimizer
    optimizer = kind(
        inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(rows),
        loss_reduction="sum",
    )  # fmt: skip
    batch = {name: torch.tensor(values) for name, values in padded(rows, "right").items()}
    labels = batch.pop("labels")

    def step() -> None:
        logits = model(**batch).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        by_row = losses.view(len(labels), -1).mean(1)
        if ghost:
            DPTensorFastGradientClipping(model, optimizer, by_row, "sum").backward()
        else:
            by_row.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_megabytes(step: Step) -> float:
    """Peak resident memory of one step above what the process held before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def compare(title: str, sides: dict[str, Step], repeats: int) -> None:
    """Runs the sides in turns and prints each against the first."""
    for step in sides.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in track(range(repeats), title):
        for name, step in sides.items():
            times[name].append(timed(step))
    peaks = {name: [peak_megabytes(step) for _ in range(3)] for name, step in sides.items()}
    table = Table("step", "time", "of the first", "peak memory", "of the first", title=title)
    first = next(iter(sides))
    for name, taken in times.items():
        slower = statistics.median(taken) / statistics.median(times[first])
        peak = statistics.median(peaks[name])
        more = peak / statistics.median(peaks[first])
        table.add_row(name, spread(taken), f"{slower:.3f}x", f"{peak:,.0f} MB", f"{more:.3f}x")
    Console().print(table)


def against_plain(model: str, repeats: int) -> None:
    for checkpointing in (False, True):
        resources = ResourceConfig(activation_checkpointing=checkpointing)
        config = TrainingConfig(
            model_ref=model, lora_config=LoRAConfig(rank=16), resources=resources
        )
        private = config.model_copy(update={"dp_config": DP})
        cache, rows = init_home() / "models", uniform()
        sides = {
            "engine, not private": engine_step(Base.load(model, cache=cache), config, rows),
            "engine, private": private_step(Base.load(model, cache=cache), private, rows),
        }
        how = "with activation checkpointing" if checkpointing else "no checkpointing"
        compare(f"8 x 128 tokens, LoRA rank 16, {how}", sides, repeats)


def against_opacus(model: str, repeats: int) -> None:
    cache, rows = init_home() / "models", uniform()
    config = TrainingConfig(model_ref=model, lora_config=LoRAConfig(rank=16), dp_config=DP)
    base = Base.load(model, cache=cache)
    sides = {
        "engine, private": private_step(base, config, rows),
        "Opacus hooks": opacus_step(base.directory, rows, ghost=False),
        "Opacus ghost": opacus_step(base.directory, rows, ghost=True),
    }
    compare("8 x 128 tokens, LoRA rank 16, private", sides, repeats)


def on_the_critical_path(repeats: int = 30) -> None:
    """Charge (SQLite, durable) and noise of a LoRA step; counting the units of 1,024 rows."""
    table = Table("on the critical path of a step", "time", title="charge and noise")
    dp = DPConfig(noise_multiplier=10.0, target_epsilon=None, max_participations=10**6)
    config = TrainingConfig(model_ref="none", dp_config=dp)
    with tempfile.TemporaryDirectory() as folder:
        budget = new_budget(registry(Path(folder) / "home"), config)
        for count in (8, 1024):
            units = [secrets.token_bytes(16) for _ in range(count)]

            def charge(units: list[bytes] = units) -> None:
                budget.registry.charge(
                    "default", "default", budget.run_id, budget.epoch, secrets.token_hex(16),
                    units, True, [("sha256:a", "sha256:b")],
                )  # fmt: skip

            def admit(units: list[bytes] = units) -> None:
                budget.admit(units)

            for what, step in (("charge", charge), ("admit", admit)):
                times = [timed(step) * 1e3 for _ in range(repeats)]
                table.add_row(f"{what}, {count} units", spread(times).replace(" s", " ms"))
    for count in (1_843_200, 134_515_008):
        shapes = {f"p{i}": torch.zeros(count // 240) for i in range(240)}

        def noise(shapes: dict[str, torch.Tensor] = shapes) -> None:
            privatise(ClippedSum(dict(shapes), 1.0), sigma=1.0, divisor=8)

        few = repeats if count < 10**7 else 3
        times = [timed(noise) * 1e3 for _ in range(few)]
        table.add_row(f"noise, {count:,} parameters", spread(times).replace(" s", " ms"))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per side (default 5)")
    parser.add_argument(
        "--model", default=str(find_demo_model()), help="as TrainingConfig takes it"
    )
    parser.add_argument("--only", choices=("plain", "opacus", "path"), help="one of the parts")
    options = parser.parse_args()
    use_threads(None)
    if options.only in (None, "path"):
        on_the_critical_path()
    if options.only in (None, "plain"):
        against_plain(options.model, options.repeats)
    if options.only in (None, "opacus"):
        against_opacus(options.model, options.repeats)


if __name__ == "__main__":
    main()
