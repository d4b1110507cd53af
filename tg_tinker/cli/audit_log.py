"""Defines the commands of the audit log. `verify FILE` needs no cluster: auditors run it alone."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tg_tinker.cli.shared import connector, print_table
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from tg_tinker.records.heads import AuditHead

commands = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Show and verify who did what with runs, artifacts, budgets and keys.

    Each event is a row, and the rows are chained by hashes. Whoever keeps a
    signed head, such as the last line of an export, can show later that no row
    up to it was changed.

      [cyan]tg-tinker audit-log show[/]
      [cyan]tg-tinker audit-log export audit.jsonl[/]
      [cyan]tg-tinker audit-log verify[/]""",
)

_Since = Annotated[
    Path | None,
    typer.Option(help="Earlier export, or a head you kept; the log must go through it."),
]


@commands.command()
def show(
    ctx: typer.Context,
    since: Annotated[int, typer.Option(min=0, help="Row after which to start.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of rows.")] = 1000,
) -> None:
    """List the rows of the audit log, oldest first.

    [cyan]tg-tinker audit-log show --since 120[/]
    """
    with connector(ctx)() as service:
        known = service.audit_log(since, limit)
    rows = [
        (str(row.seq), row.time[:19], row.who, row.event, row.subject or "-", row.outcome)
        for row in known
    ]
    print_table(("row", "time (UTC)", "who", "event", "about", "outcome"), rows, "any event")


@commands.command()
def verify(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="File from `export`; the service's log if left out.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="File audit.pub of the home that signed FILE.")
    ] = None,
    since: _Since = None,
) -> None:
    """Check every row, the signed head, and that the log goes through known heads.

    Without FILE, the command reads the service's log and knows the heads that
    this home and the artifact store keep. With FILE, it needs no service.

      [cyan]tg-tinker audit-log verify[/]
      [cyan]tg-tinker audit-log verify audit.jsonl --public-key audit.pub[/]
      [cyan]tg-tinker audit-log verify audit.jsonl --public-key audit.pub --since may.jsonl[/]
    """
    from tg_tinker.records.files import read_public_key, verify_export

    if (file is None) != (public_key is None):
        raise InvalidRequestError("FILE and --public-key go together: pass both or neither")
    if file is not None and public_key is not None:
        checked = verify_export(file, read_public_key(public_key), _head(since))
        typer.echo(f"verified: {checked}")
        return
    with connector(ctx)() as service:
        typer.echo(f"verified: {service.verify_audit_log(_head(since))}")


@commands.command()
def export(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="File to create; it must not exist yet.")],
) -> None:
    """Verify the log and write it as JSON lines: all rows, then the signed head.

    [cyan]tg-tinker audit-log export audit.jsonl[/]
    """
    from tg_tinker.records.files import paged, write_export

    with connector(ctx)() as service:
        head = service.verify_audit_log()
        rows = takewhile(lambda row: row.seq <= head.seq, paged(service.audit_log))
        write_export(path, rows, head)
    typer.echo(f"Wrote {path}: {head}")


def _head(path: Path | None) -> AuditHead | None:
    from tg_tinker.records.files import read_head

    return None if path is None else read_head(path)
