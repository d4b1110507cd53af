"""Holds what all commands share: the service that they call, tables, and errors in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from typer.core import TyperGroup

from tg_tinker.cluster.interrupts import exit_status, stops_raised
from tg_tinker.errors import TGTinkerError
from tg_tinker.storage.stores import shown, shown_lines

if TYPE_CHECKING:
    from tg_tinker.client.service import ServiceClient


class OneLineErrors(TyperGroup):
    """A command group that prints each of our errors as one line on stderr and exits with 1.

    Ctrl-C exits with status 130, SIGTERM with 143 and SIGHUP with 129.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            with stops_raised():
                return super().invoke(ctx)
        except TGTinkerError as error:
            console = Console(stderr=True)
            console.print(f"[red]error:[/] {escape(shown_lines(error.message))}", soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            raise typer.Exit(exit_status(stop)) from None
        except typer.Abort as abort:  # A question makes it of Ctrl-C, and of the end of its input.
            if isinstance(abort.__context__, KeyboardInterrupt):
                raise typer.Exit(exit_status(abort.__context__)) from None
            raise


def connector(ctx: typer.Context, *, begins: bool = False) -> Callable[..., ServiceClient]:
    """Returns the function that connects a command to the service.

    Args:
        begins: whether the command starts something new, and so may create a missing home.
    """
    from tg_tinker.client.home import check_home
    from tg_tinker.client.service import ServiceClient

    if ctx.obj:
        return cast("Callable[..., ServiceClient]", ctx.obj)
    if not begins:
        check_home()
    return ServiceClient


def print_table(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]], maker: str = "`tg-tinker demo`"
) -> None:
    """Prints a table, or, if there are no rows, that `maker` makes one.

    Outside a terminal, lines are not cut to a width. Control characters in cells are escaped,
    because anyone who can write to the database may have put them there.
    """
    console = Console() if sys.stdout.isatty() else Console(width=4000)
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(shown(cell)) for cell in row))
    console.print(table if rows else f"none yet: {maker} makes one")


def report(outcomes: Iterator[tuple[str, str]], title: str) -> int:
    """Shows progress, then prints each failure on stderr. Returns the number of failures.

    Args:
        outcomes: (name, problem) pairs; the problem is empty on success.
    """
    failed, console = [], Console(stderr=True)
    for name, problem in track(outcomes, title, console=console):
        if problem:
            failed.append((name, problem))
    for name, problem in failed:
        typer.echo(shown(f"{name}: {problem}"), err=True)
    return len(failed)


@contextlib.contextmanager
def connected(ctx: typer.Context, begins: bool = False) -> Iterator[ServiceClient]:
    """Yields the service, and shows a status line while the block runs."""
    connect = connector(ctx, begins=begins)
    with Console(stderr=True).status("opening the registry"), connect() as service:
        yield service
