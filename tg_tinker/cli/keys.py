"""The commands about keys: `keys list`, `rotate`, `retire` and `new`."""

from __future__ import annotations

from typing import Annotated

import typer

from tg_tinker.cli.shared import connector, print_table, report
from tg_tinker.storage.keyrings import check_key_id
from tg_tinker.storage.stores import shown

keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""The keys that all artifacts are encrypted under, through a key of each artifact.

    They are in the file `keyring` of the home directory, or where
    TG_TINKER_KEYRING says: a path, or env:NAME for a variable that holds the
    text of a keyring, as a secret manager puts it there.

      [cyan]tg-tinker keys list[/]
      [cyan]tg-tinker keys rotate[/]
      [cyan]tg-tinker keys retire k1[/]
      [cyan]tg-tinker keys new | your-secret-manager put tenant-keys[/]""",
)


@keys.command("list")
def list_keys(ctx: typer.Context) -> None:
    """List the keys of the keyring and how many artifacts each opens, oldest first.

    Ends with status 1 if an artifact's key file is gone or damaged, or if the
    keyring is an older copy.

      [cyan]tg-tinker keys list[/]
    """
    with connector(ctx)() as service:
        found = service.list_keys()
    rows = [(name, "primary" if name == found.primary else "older", str(count))
            for name, count in found.artifacts.items()]  # fmt: skip
    print_table(("key", "", "artifacts"), rows)
    for artifact_id, problem in found.unreadable.items():
        typer.echo(shown(f"{artifact_id}: {problem}"), err=True)
    if found.missing:
        typer.echo(
            f"PROBLEM: this keyring is an older copy, it lacks {shown(', '.join(found.missing))}."
            " Put the newest copy back; if it is lost, `tg-tinker keys rotate` goes on without it",
            err=True,
        )
    raise typer.Exit(bool(found.unreadable or found.missing))


@keys.command()
def rotate(
    ctx: typer.Context,
    resume: Annotated[
        bool, typer.Option("--resume", help="Make no new key: go on with one that was broken off.")
    ] = False,
) -> None:
    """Make a new key and wrap the key of every artifact under it; no data is touched.

    Broken off, all artifacts open as before; --resume goes on. It revokes
    nothing: who had the old keyring and a copy of the store can still read the
    copy. Back up the new keyring; then `retire` the old key.

    A keyring in the environment is rotated where it comes from: see `keys new`.

      [cyan]tg-tinker keys rotate[/]
      [cyan]tg-tinker keys rotate --resume[/]
    """
    with connector(ctx)() as service:
        if not resume:
            typer.echo(f"key {service.rotate_key()} is the primary one now")
        failed = report(service.rewrap_keys(), "wrapping keys")
    if failed:
        typer.echo("mend these, then `tg-tinker keys rotate --resume`", err=True)
    raise typer.Exit(bool(failed))


@keys.command()
def retire(
    ctx: typer.Context,
    key_id: Annotated[str, typer.Argument(help="As `list` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy an older key that opens nothing any more; backups it opens are lost.

    [cyan]tg-tinker keys retire k1[/]
    """
    check_key_id(key_id)  # before it is repeated: it may be the key itself
    with connector(ctx)() as service:
        if not yes:
            typer.confirm(f"Destroy {key_id}? What only it opens is lost", abort=True)
        service.retire_key(key_id)
    typer.echo(f"{key_id} is gone")


@keys.command()
def new(
    after: Annotated[
        str | None,
        typer.Option(help="A path or env:NAME: its keys stay, and a fresh primary one joins them."),
    ] = None,
) -> None:
    """Print the text of a fresh keyring, for a secret manager; nothing is changed.

    It opens every artifact that will be saved under it: send it where it
    belongs, and let no log or history keep it. To rotate a keyring that is in
    the environment, print it with --after, store that, restart the cluster
    with it, then `tg-tinker keys rotate --resume`.

      [cyan]tg-tinker keys new | your-secret-manager put tenant-keys[/]
      [cyan]tg-tinker keys new --after env:TENANT_KEYS | your-secret-manager put tenant-keys[/]
    """
    from tg_tinker.backend import actors_backend

    typer.echo(actors_backend().new_keyring(after))
