"""A training step of the engine beside the plain padded transformers + PEFT loop.

Run by `make bench`. Both do forward, backward and AdamW on the same rows, one after the other in
turns; printed are medians, the ratio of medians, and the spread between the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import padded
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.engine import Session
from actors.model import Base, use_threads
from tg_tinker import LoRAConfig, TrainingConfig
from tg_tinker.batch import normalise
from tg_tinker.demo import find_demo_model
from tg_tinker.service import init_home

Rows = list[tuple[list[int], list[int]]]
IGNORED = -100


def ragged(count: int = 8) -> Rows:
    """Rows of 32 to 256 tokens, the first 60 % of each masked."""
    generator = np.random.default_rng(0)
    rows = []
    for length in np.linspace(32, 256, count).astype(int):
        ids = generator.integers(3, 49_000, length).tolist()
        masked = int(0.6 * length)
        rows.append((ids, [IGNORED] * masked + ids[masked:]))
    return rows


def uniform(count: int = 8, length: int = 128) -> Rows:
    generator = np.random.default_rng(1)
    ids = generator.integers(3, 49_000, (count, length)).tolist()
    return [(row, row) for row in ids]


def engine_step(base: Base, config: TrainingConfig, rows: Rows) -> Callable[[], None]:
    session = Session(base, config)
    examples = normalise({"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]})

    def step() -> None:
        session.forward_backward(examples)
        session.optim_step()

    return step


def plain_step(directory: Path, rows: Rows) -> Callable[[], None]:
    """What a user would write: a rectangle of padded rows through PEFT's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(plain, LoraConfig(r=16, lora_alpha=32, target_modules=names)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch: dict[str, Any] = {k: torch.tensor(v) for k, v in padded(rows, "right").items()}
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, IGNORED)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} s ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per side (default 5)")
    parser.add_argument(
        "--model", default=str(find_demo_model()), help="as TrainingConfig takes it"
    )
    options = parser.parse_args()
    threads = use_threads(None)
    config = TrainingConfig(model_ref=options.model, lora_config=LoRAConfig(rank=16))
    cache = init_home() / "models"
    table = Table(
        "rows", "engine", "plain padded loop", "plain / engine", title=f"{threads} threads"
    )
    for name, rows in (
        ("ragged 8 x 32..256, 60 % masked", ragged()),
        ("uniform 8 x 128", uniform()),
    ):
        base = Base.load(options.model, cache=cache)
        ours, plain = engine_step(base, config, rows), plain_step(base.directory, rows)
        timed(ours), timed(plain)
        pairs = [(timed(ours), timed(plain)) for _ in track(range(options.repeats), name)]
        mine, theirs = [p[0] for p in pairs], [p[1] for p in pairs]
        ratio = statistics.median(theirs) / statistics.median(mine)
        table.add_row(name, spread(mine), spread(theirs), f"{ratio:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
