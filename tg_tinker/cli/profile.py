"""Defines the command `profile`, which measures the stages of a training step on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table


def profile(
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, Hugging Face directory or GGUF file; SmolLM2-135M if left out."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per row, all labeled.")] = 128,
    rank: Annotated[int, typer.Option(min=0, help="Adapter rank; 0 trains all weights.")] = 16,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Measure a step without clipping and noise.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after a warm-up.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; every core if left out.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print seconds by stage as JSON.")
    ] = False,
) -> None:
    """Measure a training step on random tokens and show how long each stage takes.

    The command runs the same step as a training client, in this process and
    without a cluster. It keeps nothing except a model that it had to convert.

    If the model's head is frozen, "head and loss" includes the head's backward
    pass.

      [cyan]tg-tinker profile[/]
      [cyan]tg-tinker profile --rows 1 --tokens 32 --steps 20[/]
      [cyan]tg-tinker profile --model path/or/hub-id --rank 0 --no-privacy[/]
    """
    from tg_tinker.backend import actors_backend
    from tg_tinker.client.home import init_home
    from tg_tinker.config import DPConfig, LoRAConfig, ResourceConfig, TrainingConfig
    from tg_tinker.demo.options import find_demo_model

    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
    config = TrainingConfig(
        model_ref=model or str(find_demo_model()),
        lora_config=LoRAConfig(rank=rank) if rank else None,
        dp_config=None if no_privacy else dp,
        batch_size=rows,
        resources=ResourceConfig(num_threads=threads),
    )
    say = Console(stderr=True).print
    found: dict[str, float] = actors_backend().profile(
        config, init_home() / "models", rows=rows, tokens=tokens, steps=steps, progress=say
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    total = sum(found.values())
    typer.echo(
        f"a step of {rows * tokens:,} tokens: {total:.3f} s, {rows * tokens / total:,.0f} tokens/s"
    )
    Console().print(_table(found, total))


def _table(found: dict[str, float], total: float) -> Table:
    table = Table("stage", Column("ms", justify="right"), Column("%", justify="right"))
    for stage, seconds in found.items():
        table.add_row(stage, f"{1e3 * seconds:,.1f}", f"{100 * seconds / total:.1f}")
    return table
