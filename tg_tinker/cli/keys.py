"""Defines the commands about keys: those of the keyring, and those beside it."""

from __future__ import annotations

from typing import Annotated

import typer

from tg_tinker.cli.shared import connector, print_table, report
from tg_tinker.storage.keyrings import check_key_id
from tg_tinker.storage.stores import shown

keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""List, rotate and retire the tenant keys, which protect all artifacts.

    `rotate-audit`, `rotate-secret` and `retire-secret` are about the keys
    beside the keyring: the key that signs heads, and the secrets from which
    capabilities, the transport key, and names and seals of ledger heads are
    made.

    Each artifact is encrypted under a key of its own, its data key. A tenant
    key wraps these data keys. Tenant keys are in the file `keyring` of the home
    directory, or where TG_TINKER_KEYRING says: a path, or env:NAME for a
    variable that holds the text of a keyring, for example from a secret
    manager.

      [cyan]tg-tinker keys list[/]
      [cyan]tg-tinker keys rotate[/]
      [cyan]tg-tinker keys retire k1[/]
      [cyan]tg-tinker keys new | your-secret-manager put tenant-keys[/]""",
)


@keys.command("list")
def list_keys(ctx: typer.Context) -> None:
    """List the keys of the keyring and how many artifacts each opens, oldest first.

    The exit status is 1 if an artifact's key file is missing or damaged, or if
    the keyring is an older copy.

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
            " Restore the newest copy; if it is lost, continue with `tg-tinker keys rotate`",
            err=True,
        )
    raise typer.Exit(bool(found.unreadable or found.missing))


@keys.command()
def rotate(
    ctx: typer.Context,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted rotation; make no new key.")
    ] = False,
) -> None:
    """Make a new tenant key and wrap every artifact's data key under it.

    No data is encrypted again. If the command is interrupted, all artifacts
    open as before, and --resume continues. Rotation revokes nothing: whoever
    has the old keyring and a copy of the store can still read that copy. Back
    up the new keyring; then `retire` the old key.

    Rotate a keyring in the environment where it comes from: see `keys new`.

      [cyan]tg-tinker keys rotate[/]
      [cyan]tg-tinker keys rotate --resume[/]
    """
    with connector(ctx)() as service:
        if not resume:
            typer.echo(f"key {service.rotate_key()} is the primary one now")
        failed = report(service.rewrap_keys(), "wrapping keys")
    if failed:
        typer.echo("repair these, then run `tg-tinker keys rotate --resume`", err=True)
    raise typer.Exit(bool(failed))


@keys.command()
def retire(
    ctx: typer.Context,
    key_id: Annotated[str, typer.Argument(help="Name of the key, from `list`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Destroy an older key that opens nothing any more; backups that it opens are lost.

    [cyan]tg-tinker keys retire k1[/]
    """
    check_key_id(key_id)  # before the text is printed: it may be the key itself
    with connector(ctx)() as service:
        if not yes:
            typer.confirm(f"Destroy {key_id}? All that only this key opens is lost", abort=True)
        service.retire_key(key_id)
    typer.echo(f"{key_id} is gone")


@keys.command()
def new(
    after: Annotated[
        str | None,
        typer.Option(help="Keyring to extend, a path or env:NAME: a new primary key is added."),
    ] = None,
) -> None:
    """Print the text of a fresh keyring for a secret manager; nothing is changed.

    This text opens every artifact that will be saved under it: send it straight
    to the secret manager, and keep it out of logs and shell history. To rotate a
    keyring in the environment, print it with --after, store the output, restart
    the cluster with it, and run `tg-tinker keys rotate --resume`.

      [cyan]tg-tinker keys new | your-secret-manager put tenant-keys[/]
      [cyan]tg-tinker keys new --after env:TENANT_KEYS | your-secret-manager put tenant-keys[/]
    """
    from tg_tinker.backend import actors_backend

    typer.echo(actors_backend().new_keyring(after))


@keys.command("rotate-audit")
def rotate_audit(ctx: typer.Context) -> None:
    """Replace the key that signs heads; the old one endorses it and is destroyed.

    Exports and heads verify with the old audit.pub and with the new one. Back
    up audit.key, audit.pub, audit.chain and secrets.json, and give the new
    audit.pub to everyone who verifies exports. If the old key may be stolen,
    also run `keys rotate-secret` for each secret in a home that was made before
    the file secrets.json existed.

      [cyan]tg-tinker keys rotate-audit[/]
    """
    with connector(ctx)() as service:
        typer.echo(f"heads are signed by the key {service.rotate_audit_key()} now")


_Secret = Annotated[str, typer.Argument(help="capabilities, entries, pseudonyms or transport.")]


@keys.command("rotate-secret")
def rotate_secret(ctx: typer.Context, name: _Secret) -> None:
    """Make a fresh version of a secret, which all that is new is made from.

    Everything older stays valid and readable. `transport` takes effect when the
    cluster starts the next time, all others at once. Back up secrets.json.

      [cyan]tg-tinker keys rotate-secret capabilities[/]
    """
    with connector(ctx)() as service:
        typer.echo(f"version {service.rotate_secret(name)} of {shown(name)} is in use now")


@keys.command("retire-secret")
def retire_secret(ctx: typer.Context, name: _Secret) -> None:
    """Destroy older versions of `api-key-rows`, `capabilities` or `transport`.

    Training actors that started before the last rotation of `capabilities` can
    then neither save nor load: park or end their runs first. A cluster that
    started before the last rotation of `transport` must be started again. A
    backup of the database from before the last rotation of `api-key-rows` has
    no API key that opens.

      [cyan]tg-tinker keys retire-secret capabilities[/]
    """
    with connector(ctx)() as service:
        service.retire_secret(name)
    typer.echo(f"the older versions of {shown(name)} are gone")
