"""Defines the commands that list, show, park and close training clients."""

from __future__ import annotations

from typing import Annotated

import typer

from tg_tinker.cli.shared import connector, print_table
from tg_tinker.storage.stores import shown
from tg_tinker.types import CLOSED, NOT_STARTED

clients = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""List, show, park and close the training clients of the cluster.

    A training client trains one run in a process on the cluster, its actor. The
    actor keeps running when the program that created it ends.

      [cyan]tg-tinker clients list[/]
      [cyan]tg-tinker clients info tc-0123456789abcdef[/]
      [cyan]tg-tinker clients park tc-0123456789abcdef[/]
      [cyan]tg-tinker clients close tc-0123456789abcdef[/]""",
)

_Client = Annotated[str, typer.Argument(help="Training client, as `clients list` shows it.")]


@clients.command("list")
def show_all(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="List closed clients, too.")] = False,
) -> None:
    """List the clients that are not closed, oldest first.

    The last column says why a client has no actor.

    [cyan]tg-tinker clients list[/]
    [cyan]tg-tinker clients list --all[/]
    """
    with connector(ctx)() as service:
        known = service.list_training_clients()
    rows = [
        (run.training_client_id, run.status, str(run.step), str(run.epoch), run.reason or "-")
        for run in known
        if everything or run.reason not in (CLOSED, NOT_STARTED)
    ]
    print_table(("client", "status", "step", "epoch", "without actor"), rows)


@clients.command()
def info(ctx: typer.Context, client: _Client) -> None:
    """Show one client, without starting an actor for it.

    [cyan]tg-tinker clients info tc-0123456789abcdef[/]
    """
    with connector(ctx)() as service:
        found = service.describe_training_client(client)
    for name, value in (
        ("client", found.training_client_id), ("model", found.model_ref),
        ("status", found.status), ("without actor", found.reason or "-"), ("step", found.step),
        ("epoch", found.epoch), ("created (UTC)", f"{found.created_at:%Y-%m-%d %H:%M}"),
        ("last artifact", found.last_artifact_id or "-"),
    ):  # fmt: skip
        typer.echo(f"{name:14} {shown(str(value))}")


@clients.command()
def park(ctx: typer.Context, client: _Client) -> None:
    """Save a client and free its memory, CPUs and GPUs until its next call.

    This is refused while gradients wait for their optimizer step.

    [cyan]tg-tinker clients park tc-0123456789abcdef[/]
    """
    with connector(ctx)() as service:
        service.park_training_client(client)
    typer.echo(f"{client} is parked: its next call restores it")


@clients.command()
def close(
    ctx: typer.Context,
    client: _Client,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Close a client. Steps since its last artifact are lost; artifacts stay.

    [cyan]tg-tinker clients close tc-0123456789abcdef[/]
    """
    with connector(ctx)() as service:
        found = service.describe_training_client(client)
        question = f"Close {client} at step {found.step}, last artifact: {found.last_artifact_id}?"
        if not yes and not typer.confirm(question):
            raise typer.Exit(1)
        service.close_training_client(client)
    typer.echo(f"{client} is closed")
