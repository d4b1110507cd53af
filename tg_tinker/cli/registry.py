"""The commands of the registry's database: is it an older copy, going on from one, backups."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tg_tinker.cli.shared import connector, print_table

if TYPE_CHECKING:
    from tg_tinker.types import RegistryAcceptance, RegistryCheck

commands = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""The registry's database: whether it is the newest copy.

    The artifact store and the home keep signed heads of its audit log. Behind
    one of them nothing is opened, saved or removed.

      [cyan]tg-tinker registry check[/]
      [cyan]tg-tinker registry accept[/]
      [cyan]tg-tinker registry backup monday.db[/]
      [cyan]tg-tinker registry upgrade[/]""",
)
_SHOWN = 10
"""Heads that are named."""


_Tenant = Annotated[str, typer.Option(help="Whose audit log, ledgers and artifacts.")]


@commands.command()
def check(ctx: typer.Context, tenant: _Tenant = "default") -> None:
    """Hold the database against all that the store and this home know of it.

    Ends with status 1 if it is an older copy, or if a ledger is behind.

      [cyan]tg-tinker registry check[/]
    """
    with connector(ctx)(tenant=tenant) as service:
        found = service.check_registry()
    _tell(found)
    raise typer.Exit(not found.sound)


@commands.command()
def accept(
    ctx: typer.Context,
    tenant: _Tenant = "default",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Go on from an older copy of the database, when no newer one is left.

    It becomes a row of the audit log for ever. What was deleted after the copy
    was made opens again, if its files are there; what was saved since is left
    over, and a sweep removes it. Charges of a privacy budget are not accepted:
    tg-tinker privacy book-missing puts them back.

      [cyan]tg-tinker registry accept[/]
    """
    with connector(ctx)(tenant=tenant) as service:
        found = service.check_registry()
        _tell(found)
        if not (found.missing or found.accepted):
            typer.echo("nothing to accept")
            return
        asked = bool(found.missing) and not yes
        if asked and typer.prompt("Type accept to go on without what is lost") != "accept":
            typer.echo("nothing was accepted")
            raise typer.Exit(1)
        _tell_accepted(service.accept_registry())


def _tell(found: RegistryCheck) -> None:
    typer.echo(
        f"audit log: {found.rows} rows, {found.heads} heads known, the newest in the store of row"
        f" {found.stored}"
    )
    for row in found.accepted:
        typer.echo(f"an older copy was accepted at row {row}")
    for name, why in found.foreign.items():
        typer.echo(
            f"passed over: {name}: {why}. Remove it, or find out which registry put it there"
        )
    for name, why in found.damaged.items():
        typer.echo(
            f"PROBLEM: {name} is no head of this audit log: {why}. Put its backup back; if there is"
            " none, remove it, and `tg-tinker audit-log verify` keeps a new one"
        )
    if found.unfinished:
        typer.echo(
            "PROBLEM: the store did not take the head of the last acceptance: `tg-tinker registry"
            " accept` writes it"
        )
    missing = sorted(found.missing.items(), key=lambda item: -item[1])
    for name, row in missing[:_SHOWN]:
        typer.echo(f"not known: row {row}, {name}")
    if missing:
        more = f" ({len(missing) - _SHOWN} heads more)" if len(missing) > _SHOWN else ""
        typer.echo(
            f"PROBLEM: the database is an older copy, or another one was in use meanwhile{more}."
            " Nothing of this tenant is opened, saved or removed. Put the newest copy back; if it"
            " is lost, `tg-tinker registry accept` goes on without it"
        )
    for dataset, why in found.ledgers.items():
        typer.echo(f"PROBLEM: ledger {dataset}: {why}")
    if found.sound:
        typer.echo("ok: the database knows all that the store and this home know of it")


def _tell_accepted(accepted: RegistryAcceptance) -> None:
    if accepted.row:
        typer.echo(f"accepted at row {accepted.row} of the audit log")
    for artifact in accepted.openable:
        typer.echo(f"opens again: {artifact}")
    for artifact, why in accepted.lost.items():
        typer.echo(f"does not open: {artifact}: {why}")
    if accepted.lost:
        typer.echo(
            "Put back what these need, keys or files, and accept again. What is lost for good is"
            " forgotten by `tg-tinker artifacts delete --lost`; until then a sweep leaves alone"
            " what may be left of it"
        )
    typer.echo(
        "If some of these were deleted after the copy was made, delete them again: `tg-tinker"
        " artifacts delete`. What was saved since is not known any more, and `tg-tinker artifacts"
        " sweep` removes it. Charges are not accepted: `tg-tinker privacy book-missing` puts them"
        " back"
    )


_Database = Annotated[
    str | None, typer.Option(help="Its URL; TG_TINKER_DATABASE or the home's if left out.")
]


@commands.command()
def upgrade(
    database: _Database = None,
    backup: Annotated[
        Path | None,
        typer.Option(help="Where it is written as it was; a file in the home if left out."),
    ] = None,
) -> None:
    """Bring the database of an older release to this one, after a backup.

    Programs of the older release change nothing from then on: end them first.
    The home of an embedded cluster is upgraded by itself when it is next used.

      [cyan]tg-tinker registry upgrade[/]
      [cyan]tg-tinker registry upgrade --backup before.db[/]
    """
    from tg_tinker.backend import actors_backend
    from tg_tinker.storage.home import home_directory

    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = backup or home_directory() / f"registry-{stamp}.db"
    before, after = actors_backend().upgrade_registry(_url(database), path)
    if before == after:
        typer.echo(f"Nothing to do: the database has revision {after} already")
    else:
        typer.echo(f"Upgraded from revision {before} to {after}. As it was, it is in {path}")


@commands.command()
def backup(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="One that does not exist yet.")],
    database: _Database = None,
) -> None:
    """Write the whole registry into one SQLite file, while it is in use.

    It holds no key, no weight and no training data, but names, settings and
    what was spent: keep it as safe as the registry. Keys are backed up apart.

      [cyan]tg-tinker registry backup monday.db[/]
    """
    from tg_tinker.backend import actors_backend

    _print(actors_backend().backup_registry(_url(database), path))
    typer.echo(f"Wrote {path}")


@commands.command()
def restore(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `backup`.")],
    database: _Database = None,
) -> None:
    """Put a backup into an empty database, of either kind.

    What was charged after the backup is missing from it. So run `registry
    check` next: it compares the ledgers with the heads in the artifact store.

      [cyan]tg-tinker registry restore monday.db[/]
      [cyan]tg-tinker registry restore monday.db --database postgresql+psycopg://tg@db/tg[/]
    """
    from tg_tinker.backend import actors_backend

    _print(actors_backend().restore_registry(path, _url(database)))
    typer.echo(
        "Restored. Before anything trains: `tg-tinker registry check` compares these ledgers with"
        " the heads in the store, `tg-tinker audit-log verify` the log"
    )


def _url(database: str | None) -> str:
    from tg_tinker.storage.databases import check_database, default_database
    from tg_tinker.storage.home import home_directory

    return check_database(database or default_database(home_directory()))


def _print(reached: Sequence[tuple[str, str, str]]) -> None:
    rows = [(tenant, what, place[:24]) for tenant, what, place in reached]
    print_table(("tenant", "chain", "reaches"), rows, "any chain")
