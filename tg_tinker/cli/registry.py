"""Defines the commands of the registry's database: check, accept, upgrade, backup, restore."""

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
    help="""Check, upgrade, back up and restore the registry's database.

    The database holds runs, artifacts, privacy ledgers and the audit log. The
    artifact store and the home keep signed heads of the audit log. If the
    database is behind one of these heads, nothing is opened, saved or removed.

      [cyan]tg-tinker registry check[/]
      [cyan]tg-tinker registry accept[/]
      [cyan]tg-tinker registry backup monday.db[/]
      [cyan]tg-tinker registry upgrade[/]""",
)
_SHOWN = 10
"""The maximum number of missing heads that are printed by name."""


_Tenant = Annotated[str, typer.Option(help="Owner of audit log, ledgers and artifacts.")]


@commands.command()
def check(ctx: typer.Context, tenant: _Tenant = "default") -> None:
    """Compare the database with all heads that the store and this home keep of it.

    The exit status is 1 if the database is an older copy, if a ledger is behind,
    or if the row of an API key is not as the registry wrote it.

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
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Continue from an older copy of the database, if no newer copy is left.

    The audit log keeps a row about this for ever. Artifacts that were deleted
    after the copy was made open again if their files are still there. Artifacts
    that were saved since are unknown, and a sweep removes their files. Charges
    of a privacy budget are not accepted: tg-tinker privacy book-missing
    restores them.

      [cyan]tg-tinker registry accept[/]
    """
    with connector(ctx)(tenant=tenant) as service:
        found = service.check_registry()
        _tell(found)
        if not (found.missing or found.accepted):
            typer.echo("nothing to accept")
            return
        asked = bool(found.missing) and not yes
        if asked and typer.prompt("Type accept to continue without what is lost") != "accept":
            typer.echo("nothing was accepted")
            raise typer.Exit(1)
        _tell_accepted(service.accept_registry())


def _tell(found: RegistryCheck) -> None:
    typer.echo(
        f"audit log: {found.rows} rows, {found.heads} heads known; the newest head in the store is"
        f" of row {found.stored}"
    )
    for row in found.accepted:
        typer.echo(f"an older copy was accepted at row {row}")
    for name, why in found.foreign.items():
        typer.echo(f"ignored: {name}: {why}. Remove it, or find out which registry put it there")
    for name, why in found.damaged.items():
        typer.echo(
            f"PROBLEM: {name} is not a head of this audit log: {why}. Restore its backup; if there"
            " is none, remove it, and `tg-tinker audit-log verify` keeps a new one"
        )
    if found.unfinished:
        typer.echo(
            "PROBLEM: the store does not have the head of the last acceptance: run `tg-tinker"
            " registry accept` to write it"
        )
    missing = sorted(found.missing.items(), key=lambda item: -item[1])
    for name, row in missing[:_SHOWN]:
        typer.echo(f"not known to the database: row {row}, {name}")
    if missing:
        more = f" ({len(missing) - _SHOWN} more heads)" if len(missing) > _SHOWN else ""
        typer.echo(
            f"PROBLEM: the database is an older copy, or another one was in use meanwhile{more}."
            " Nothing of this tenant is opened, saved or removed. Restore the newest copy; if it is"
            " lost, `tg-tinker registry accept` continues without it"
        )
    for dataset, why in found.ledgers.items():
        typer.echo(f"PROBLEM: ledger {dataset}: {why}")
    for key, why in found.api_keys.items():
        typer.echo(
            f"PROBLEM: API key {key}: {why}. It opens nothing: find out who writes to the database,"
            f" and remove the row with `tg-tinker api-keys revoke {key}`"
        )
    if found.sound:
        typer.echo("ok: the database goes through all heads that the store and this home keep")


def _tell_accepted(accepted: RegistryAcceptance) -> None:
    if accepted.row:
        typer.echo(f"accepted at row {accepted.row} of the audit log")
    for artifact in accepted.openable:
        typer.echo(f"opens again: {artifact}")
    for artifact, why in accepted.lost.items():
        typer.echo(f"does not open: {artifact}: {why}")
    if accepted.lost:
        typer.echo(
            "Restore the keys or files that these artifacts need, and accept again. If an artifact"
            " is lost for good, remove its entry with `tg-tinker artifacts delete --lost`; until"
            " then a sweep leaves the rest of its files alone"
        )
    typer.echo(
        "If some of these artifacts were deleted after the copy was made, delete them again with"
        " `tg-tinker artifacts delete`. Artifacts that were saved since are not known any more, and"
        " `tg-tinker artifacts sweep` removes their files. Charges are not accepted: `tg-tinker"
        " privacy book-missing` restores them"
    )


_Database = Annotated[
    str | None, typer.Option(help="Database URL; TG_TINKER_DATABASE or the home's if left out.")
]


@commands.command()
def upgrade(
    database: _Database = None,
    backup: Annotated[
        Path | None,
        typer.Option(help="File for the backup; a new file in the home if left out."),
    ] = None,
) -> None:
    """Upgrade the database of an older release to this release, after a backup.

    End programs of the older release first: they can change nothing afterwards.
    The home of an embedded cluster is upgraded automatically at its next use.

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
        typer.echo(f"Upgraded from revision {before} to {after}. The backup is {path}")


@commands.command()
def backup(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File that must not exist yet.")],
    database: _Database = None,
) -> None:
    """Write the whole registry into one SQLite file, even while it is in use.

    The file holds no key, no weight and no training data, but it holds names,
    settings and what was spent: protect it like the registry. Back up keys
    separately.

      [cyan]tg-tinker registry backup monday.db[/]
    """
    from tg_tinker.backend import actors_backend

    _print(actors_backend().backup_registry(_url(database), path))
    typer.echo(f"Wrote {path}")


@commands.command()
def restore(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File from `registry backup`.")],
    database: _Database = None,
) -> None:
    """Restore a backup into an empty database, SQLite or PostgreSQL.

    Charges after the backup are missing from it. So run `registry check` next:
    it compares the ledgers with the heads in the artifact store.

      [cyan]tg-tinker registry restore monday.db[/]
      [cyan]tg-tinker registry restore monday.db --database postgresql+psycopg://tg@db/tg[/]
    """
    from tg_tinker.backend import actors_backend

    _print(actors_backend().restore_registry(path, _url(database)))
    typer.echo(
        "Restored. Before anything trains, run `tg-tinker registry check` to compare the ledgers"
        " with the heads in the store, and `tg-tinker audit-log verify` to check the log"
    )


def _url(database: str | None) -> str:
    from tg_tinker.storage.databases import check_database, default_database
    from tg_tinker.storage.home import home_directory

    return check_database(database or default_database(home_directory()))


def _print(reached: Sequence[tuple[str, str, str]]) -> None:
    rows = [(tenant, what, place[:24]) for tenant, what, place in reached]
    print_table(("tenant", "chain", "reaches"), rows, "any chain")
