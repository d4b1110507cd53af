"""Defines the command `doctor`, which finds problems before data is trusted to this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tg_tinker.storage.stores import shown_lines


def doctor(
    store: Annotated[
        str | None, typer.Option(help="Store, a folder or URI; the home's store if left out.")
    ] = None,
    keyring: Annotated[
        str | None,
        typer.Option(help="Path or env:NAME; TG_TINKER_KEYRING or the home's if left out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """Check keys, store, machine and cluster, and say how to repair problems.

    The command writes a small probe into the store and removes it again. It joins
    a running cluster to check each machine, but starts none. The exit status is 1
    if there is a problem; warnings alone give 0.

      [cyan]tg-tinker doctor[/]
      [cyan]tg-tinker doctor --store s3://bucket/prefix --keyring env:TENANT_KEYS[/]
      [cyan]tg-tinker doctor --json[/]
    """
    from tg_tinker.backend import actors_backend
    from tg_tinker.storage.home import home_directory
    from tg_tinker.storage.keyrings import default_place

    home = home_directory()
    where = keyring or str(default_place(home))
    findings = list(actors_backend().doctor(home, where, store or str(home / "store")))
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.status:8} {finding.check}: {shown_lines(finding.message)}")
    raise typer.Exit(any(finding.status == "problem" for finding in findings))
