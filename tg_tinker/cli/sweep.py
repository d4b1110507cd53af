"""The command `artifacts sweep`: files in the store that belong to no artifact."""

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
        bool, typer.Option("--dry-run", help="List what would be removed, remove nothing.")
    ] = False,
    min_age: Annotated[
        float, typer.Option(min=0, help="Hours between the two sweeps that find the same.")
    ] = 1.0,
) -> None:
    """Remove files in the store that belong to no artifact, such as of a killed save.

    It takes two sweeps: the first notes what it finds, a later one removes what
    is still the same. Artifacts are never touched. Give --min-age more hours
    than a file of a save takes to upload. Ends with status 1 if the store
    refused something.

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
        typer.echo(f"left alone, no name that TG-Tinker gives: {orphan.name}")
    for orphan in by_state["refused"]:
        typer.echo(f"{orphan.name}: {orphan.problem}", err=True)
    done = by_state["due" if dry_run else "removed"]
    typer.echo(f"{'would remove' if dry_run else 'removed'} {len(done)} orphans ({_amount(done)})")
    if waiting := by_state["waiting"]:
        typer.echo(
            f"{len(waiting)} waiting ({_amount(waiting)}): removed by a sweep that finds them the"
            f" same, {min_age:g} hours or more after the first"
        )
    raise typer.Exit(bool(by_state["refused"]))


def _amount(orphans: list[Orphan]) -> str:
    files = sum(orphan.files for orphan in orphans)
    return f"{files} files, {decimal(sum(orphan.size_bytes for orphan in orphans))}"
