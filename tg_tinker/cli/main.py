"""The command `tg-tinker`. Each command is a thin shell over the SDK, which it imports late.

The object of the click context, if there is one, makes the service: tests pass a fake.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from tg_tinker.cli import (
    api_keys,
    artifacts,
    audit_log,
    clients,
    cluster,
    doctor,
    keys,
    profile,
    registry,
    sampling,
)
from tg_tinker.cli.privacy import privacy
from tg_tinker.cli.shared import OneLineErrors, connector, print_table

main = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals may hold training data
    help="""Private fine-tuning of language models on your own Ray cluster.

    Start with [bold]tg-tinker demo[/]: it fine-tunes a small language model on
    this machine with differential privacy, shows what it says before and after,
    saves it encrypted and resumes it.

    Then bring your own model and text:

      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl --steps 200[/]

    and look at what there is:

      [cyan]tg-tinker runs[/]
      [cyan]tg-tinker artifacts list[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
      [cyan]tg-tinker privacy report[/]
      [cyan]tg-tinker audit-log show[/]

    or let others use it:

      [cyan]tg-tinker serve[/]

    or keep a cluster running, which outlives your programs:

      [cyan]tg-tinker up[/]
      [cyan]tg-tinker status[/]

    or see whether this machine keeps what it promises:

      [cyan]tg-tinker doctor[/]

    All that lasts is in ~/.tg-tinker, or where TG_TINKER_HOME points; the keys
    may be elsewhere, see [cyan]tg-tinker keys[/], and so may the registry: its
    database is the one whose URL is in TG_TINKER_DATABASE.""",
)
main.add_typer(privacy, name="privacy")
main.add_typer(clients.clients, name="clients")
main.add_typer(artifacts.artifacts, name="artifacts")
main.add_typer(audit_log.commands, name="audit-log")
main.add_typer(sampling.commands)
main.add_typer(api_keys.api_keys, name="api-keys")
main.add_typer(cluster.commands)
main.add_typer(keys.keys, name="keys")
main.add_typer(registry.commands, name="registry")
main.command()(doctor.doctor)
main.command()(profile.profile)


@main.command()
def demo(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, Hugging Face directory or GGUF file; SmolLM2-135M if left out."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl or .parquet file of chats ({messages: [{role, content}, ...]}) or pairs"
            " ({prompt, completion}); Python's own documentation if left out."
        ),
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Privacy budget of each row; smaller is more private.")
    ] = 8.0,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train on the same rows without privacy.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer step to train up to.")] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per step, on average where they are drawn.")
    ] = 64,
    learning_rate: Annotated[float, typer.Option(help="Rate of AdamW.")] = 2e-2,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; the rest is cut.")] = 64,
    output: Annotated[Path, typer.Option(help="Folder of the plot and the figures.")] = Path(
        "demo-output"
    ),
    resume: Annotated[
        str | None, typer.Option(metavar="ARTIFACT_ID", help="Go on from this artifact.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter and the order of rows.")] = 0,
) -> None:
    """Fine-tune a real model on this machine, privately, in a few minutes.

    Held-out loss and completions before and after, live progress with the
    privacy spent so far, an encrypted checkpoint, a resume, a plot and a
    privacy report. Each run has a privacy budget of its own, for its rows and
    steps. Ctrl-C at any moment saves a checkpoint and prints how to go on.

      [cyan]tg-tinker demo[/]
      [cyan]tg-tinker demo --epsilon 3[/]
      [cyan]tg-tinker demo --no-privacy --steps 50 --batch-size 8 --learning-rate 1e-3[/]
      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl --max-length 256[/]
      [cyan]tg-tinker demo --resume ARTIFACT_ID[/]
    """
    from tg_tinker.demo.options import DemoOptions
    from tg_tinker.demo.run import run_demo

    options = DemoOptions(
        model, data, epsilon, no_privacy, steps, batch_size, learning_rate, rank, max_length,
        output, resume, seed,
    )  # fmt: skip
    raise typer.Exit(run_demo(options, connect=connector(ctx, begins=True), program=_program()))


@main.command()
def init(
    home: Annotated[
        Path | None, typer.Option(help="TG_TINKER_HOME or ~/.tg-tinker if left out.")
    ] = None,
) -> None:
    """Make the home directory: keys, registry, artifacts.

    Needed once on the head node of a cluster; on a laptop it happens by
    itself. Keep a copy of the keyring: without it no artifact can be opened.

      [cyan]tg-tinker init[/]
      [cyan]TG_TINKER_KEYRING=env:TENANT_KEYS tg-tinker init[/]
    """
    from tg_tinker.client.home import init_home

    typer.echo(f"Home: {init_home(home)}")


@main.command()
def runs(ctx: typer.Context) -> None:
    """List training runs, oldest first.

    [cyan]tg-tinker runs[/]
    """
    with connector(ctx)() as service:
        known = service.list_training_clients()
    rows = [
        (run.training_client_id, run.status, str(run.step), Path(run.model_ref).name,
         f"{run.created_at:%Y-%m-%d %H:%M}", run.last_artifact_id or "-")
        for run in known
    ]  # fmt: skip
    print_table(("run", "status", "step", "model", "created (UTC)", "last artifact"), rows)


@main.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(f"tg-tinker {importlib.metadata.version('tg-tinker')}")


def _program() -> str:
    """How this program was called: its name where the shell finds it, else its path."""
    return "tg-tinker" if shutil.which("tg-tinker") else sys.argv[0]
