"""Defines the command `artifacts sweep`, which removes files that belong to no artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from tg_tinker.cli.shared import connector

if TYPE_CHECKING:
    from tg_tinker.types import Orphan


def sweep(
    ctx: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed; remove nothing.")
    ] = False,
    min_age: Annotated[
        float, typer.Option(min=0, help="Minimum time between the two sweeps, in hours.")
    ] = 1.0,
) -> None:
    """Remove files in the store that belong to no artifact, such as after a killed save.

    It takes two sweeps: the first notes such files as orphans, and a later one
    removes those that have not changed. Artifacts are never touched. Set
    --min-age to more hours than the upload of one file of a save takes. The
    exit status is 1 if the store refused something.

      [cyan]tg-tinker artifacts sweep[/]
      [cyan]tg-tinker artifacts sweep --dry-run --min-age 24[/]
    """
    with connector(ctx)() as service:
        outcomes = service.sweep_store(3600 * min_age, dry_run)
        found = list(track(outcomes, "sweeping", console=Console(stderr=True)))
    by_state: dict[str, list[Orphan]] = {
        state: [orphan for orphan in found if orphan.state == state]
        for state in ("due", "removed", "waiting", "unknown", "refused")
    }
    for orphan in by_state["due"]:
        typer.echo(f"would remove {orphan.name}: {_amount([orphan])}")
    for orphan in by_state["unknown"]:
        typer.echo(f"left alone, because TG-Tinker gives no such name: {orphan.name}")
    for orphan in by_state["refused"]:
        typer.echo(f"{orphan.name}: {orphan.problem}", err=True)
    done = by_state["due" if dry_run else "removed"]
    typer.echo(f"{'would remove' if dry_run else 'removed'} {len(done)} orphans ({_amount(done)})")
    if waiting := by_state["waiting"]:
        typer.echo(
            f"{len(waiting)} waiting ({_amount(waiting)}): a sweep {min_age:g} hours or more after"
            " the first removes those that have not changed"
        )
    raise typer.Exit(bool(by_state["refused"]))


def _amount(orphans: list[Orphan]) -> str:
    files = sum(orphan.files for orphan in orphans)
    return f"{files} files, {decimal(sum(orphan.size_bytes for orphan in orphans))}"
