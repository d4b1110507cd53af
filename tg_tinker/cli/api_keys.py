"""Defines the commands about API keys of HTTP clients: `api-keys create`, `list` and `revoke`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tg_tinker.cli.shared import connected, print_table

if TYPE_CHECKING:
    from tg_tinker.client.service import ServiceClient


api_keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Create, list and revoke API keys for clients of `tg-tinker serve`.

    As soon as there is a key, every request needs one. Only hashes are stored, so
    a key is shown once, when it is created.

      [cyan]tg-tinker api-keys create --label laptop --days 30[/]
      [cyan]tg-tinker api-keys list[/]
      [cyan]tg-tinker api-keys revoke KEY_ID[/]""",
)


@api_keys.command("create")
def create_key(
    ctx: typer.Context,
    label: Annotated[str, typer.Option(help="Note for you, shown by `list`.")] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(help="Run or artifact that the key may use; repeatable. All if left out."),
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Days until the key expires.")] = 90,
) -> None:
    """Create a key and print it once.

    [cyan]tg-tinker api-keys create --label laptop --model ARTIFACT_ID[/]
    """
    with connected(ctx, begins=True) as service:
        token, info = service.create_api_key(label, model or None, days)
        unknown = set(model or ()) - _names(service)
    for name in sorted(unknown):
        typer.echo(f"warning: there is no run or artifact {name} yet: see `tg-tinker runs` and"
                   " `tg-tinker artifacts list`", err=True)  # fmt: skip
    typer.echo(token)
    typer.echo(f"key {info.key_id}, until {info.expires_at:%Y-%m-%d}: save it, it is not stored",
               err=True)  # fmt: skip


@api_keys.command("list")
def list_keys(ctx: typer.Context) -> None:
    """List the keys that are not revoked, oldest first.

    [cyan]tg-tinker api-keys list[/]
    """
    with connected(ctx) as service:
        known = service.list_api_keys()
    rows = [
        (key.key_id, key.label or "-", ", ".join(map(_short, key.models)) or "all",
         f"{key.expires_at:%Y-%m-%d}" if key.expires_at else "never")
        for key in known
    ]  # fmt: skip
    print_table(("key", "label", "models", "expires (UTC)"), rows, "`tg-tinker api-keys create`")


@api_keys.command("revoke")
def revoke_key(
    ctx: typer.Context, key_id: Annotated[str, typer.Argument(help="Key id, from `list`.")]
) -> None:
    """Revoke a key; servers stop accepting it within seconds.

    [cyan]tg-tinker api-keys revoke KEY_ID[/]
    """
    with connected(ctx) as service:
        service.revoke_api_key(key_id)
    typer.echo(f"revoked {key_id}")


def _names(service: ServiceClient) -> set[str]:
    """Returns the names that a key may be bound to: base, runs and artifacts."""
    runs = {run.training_client_id for run in service.list_training_clients()}
    return {"base"} | runs | {saved.artifact_id for saved in service.list_artifacts()}


def _short(model: str) -> str:
    return Path(model).name
