"""The commands `tg-tinker registry backup` and `restore`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

_Database = Annotated[
    str | None, typer.Option(help="Its URL; TG_TINKER_DATABASE or the home's if left out.")
]


def backup(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="One that does not exist yet.")],
    database: _Database = None,
) -> None:
    """Write the whole registry into one SQLite file, while it is in use.

    It holds no key, no weight and no training data, but names, settings and
    what was spent: keep it as safe as the registry. Keys are backed up apart.

      [cyan]tg-tinker registry backup monday.db[/]
    """
    from tg_tinker.backend import provided

    _print(provided("backup_registry")(_url(database), path))
    typer.echo(f"Wrote {path}")


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
    from tg_tinker.backend import provided

    _print(provided("restore_registry")(path, _url(database)))
    typer.echo(
        "Restored. Before anything trains: `tg-tinker registry check` compares these ledgers with"
        " the heads in the store, `tg-tinker audit-log verify` the log"
    )


def _url(database: str | None) -> str:
    from tg_tinker.client.service import home_directory
    from tg_tinker.storage.databases import check_database, default_database

    return check_database(database or default_database(home_directory()))


def _print(reached: Sequence[tuple[str, str, str]]) -> None:
    from tg_tinker.cli.main import print_table

    rows = [(tenant, what, place[:24]) for tenant, what, place in reached]
    print_table(("tenant", "chain", "reaches"), rows, "any chain")
