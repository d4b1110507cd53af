"""Defines the program `tg-tinker`. Each command is a thin wrapper over the SDK and imports it late.

If the click context has an object, that object makes the service: tests pass a fake.
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
    help="""Fine-tune language models privately, on your own Ray cluster.

    Start with the demo. It fine-tunes a small model on this machine with
    differential privacy, shows answers before and after, saves an encrypted
    artifact and resumes from it:

      [cyan]tg-tinker demo[/]

    Then use your own model and text:

      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl --steps 200[/]

    Look at your runs, saved artifacts, privacy budgets and the audit log. A run
    is one training; an artifact is a saved state of a run:

      [cyan]tg-tinker runs[/]
      [cyan]tg-tinker artifacts list[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
      [cyan]tg-tinker privacy report[/]
      [cyan]tg-tinker audit-log show[/]

    Let others use a model over HTTP:

      [cyan]tg-tinker serve[/]

    Keep a cluster running after your programs end:

      [cyan]tg-tinker up[/]
      [cyan]tg-tinker status[/]

    Check keys, store, machine and cluster before you trust them with data:

      [cyan]tg-tinker doctor[/]

    All lasting state is in ~/.tg-tinker, or in the directory that TG_TINKER_HOME
    names. Keys may be elsewhere, see [cyan]tg-tinker keys[/]. The registry's
    database may be elsewhere, too: TG_TINKER_DATABASE holds its URL.""",
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
        float, typer.Option(help="Privacy budget epsilon of each row; smaller is more private.")
    ] = 8.0,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train on the same rows without privacy.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps in total, with those before --resume.")
    ] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per step; in a private run the average.")
    ] = 64,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 2e-2,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 1,
    max_length: Annotated[
        int, typer.Option(min=2, help="Maximum tokens of a row; longer rows are cut.")
    ] = 64,
    output: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path(
        "demo-output"
    ),
    resume: Annotated[
        str | None, typer.Option(metavar="ARTIFACT_ID", help="Artifact to continue from.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the adapter and the row order.")] = 0,
) -> None:
    """Fine-tune a real model on this machine, privately, in a few minutes.

    The demo shows held-out loss and answers before and after training, and live
    progress with the privacy spent so far. It saves an encrypted artifact,
    resumes from it, draws a plot and prints a privacy report. Each run has its
    own privacy budget. Ctrl-C, SIGTERM or SIGHUP at any moment saves an artifact
    and prints the command that continues the run.

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
        Path | None, typer.Option(help="Directory; TG_TINKER_HOME or ~/.tg-tinker if left out.")
    ] = None,
) -> None:
    """Create the home directory, with keys and an empty registry.

    Run it once on the head node of a cluster. On a laptop, commands that start
    something create the home themselves. Keep a backup of the keyring: without
    it no artifact can be opened.

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
    """Returns the name of this program if the shell finds it, else the path it was called by."""
    return "tg-tinker" if shutil.which("tg-tinker") else sys.argv[0]
