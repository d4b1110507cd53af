"""Defines the commands about saved artifacts: `artifacts list`, `export`, `copy`, `shred`, ..."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tg_tinker.cli.shared import connector, print_table, report
from tg_tinker.cli.sweep import sweep
from tg_tinker.errors import InvalidRequestError
from tg_tinker.storage.stores import shown

if TYPE_CHECKING:
    from rich.status import Status

    from tg_tinker.types import ArtifactInfo

artifacts = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Find, label, copy, export and delete saved artifacts.

    An artifact is the saved state of a run. Artifacts are encrypted; only an
    export writes weights in clear.

      [cyan]tg-tinker artifacts list --label stage=prod[/]
      [cyan]tg-tinker artifacts label ARTIFACT_ID stage=prod owner=anna[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
      [cyan]tg-tinker artifacts shred ARTIFACT_ID[/]""",
)

_Id = Annotated[str, typer.Argument(help="Artifact, from `tg-tinker artifacts list`.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
_Day = datetime | None


@artifacts.command("list")
def list_artifacts(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(help="Run that saved the artifact.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME=VALUE", help="Label of the artifact.")
    ] = None,
    newer_than: Annotated[_Day, typer.Option(help="Created after this time, UTC.")] = None,
    older_than: Annotated[_Day, typer.Option(help="Created before this time, UTC.")] = None,
    after: Annotated[
        str | None, typer.Option(metavar="ARTIFACT_ID", help="Artifact after which to start.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number; all if left out.")] = None,
) -> None:
    """List saved artifacts that fit all given options, oldest first.

    [cyan]tg-tinker artifacts list[/]
    [cyan]tg-tinker artifacts list --label stage=prod --older-than 2026-01-31[/]
    [cyan]tg-tinker artifacts list --limit 20 --after ARTIFACT_ID[/]
    """
    with connector(ctx)() as service:
        known = service.list_artifacts(
            run=run, label=label, newer_than=_utc(newer_than), older_than=_utc(older_than),
            after=after, limit=limit,
        )  # fmt: skip
    if not known and any((run, label, newer_than, older_than, after)):
        typer.echo("no artifact fits: leave out an option")
        return
    rows = [
        (item.artifact_id, item.training_client_id, str(item.step), _size(item),
         "yes" if item.include_optimizer else "no", f"{item.created_at:%Y-%m-%d %H:%M}",
         _expiry(item), _labels(item))
        for item in known
    ]  # fmt: skip
    columns = ("artifact", "run", "step", "size", "optimizer", "created (UTC)", "expires", "labels")
    print_table(columns, rows)


@artifacts.command()
def show(ctx: typer.Context, artifact_id: _Id) -> None:
    """Show one artifact without opening it.

    [cyan]tg-tinker artifacts show ARTIFACT_ID[/]
    """
    with connector(ctx)() as service:
        item = service.get_artifact(artifact_id)
    for name, value in {
        "artifact": item.artifact_id,
        "run": item.training_client_id,
        "step": item.step,
        "size": f"{_size(item)}, encrypted",
        "optimizer": "saved: resumes bit for bit" if item.include_optimizer else "not saved",
        "created": f"{item.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "expires": _expiry(item),
        "labels": _labels(item),
    }.items():
        typer.echo(f"{name:<10} {shown(str(value))}")


@artifacts.command()
def label(
    ctx: typer.Context,
    artifact_id: _Id,
    labels: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="New labels; without any, all are removed."),
    ] = None,
) -> None:
    """Replace all labels of an artifact by these.

    Labels are stored in the registry in clear: put nothing secret into them.

      [cyan]tg-tinker artifacts label ARTIFACT_ID stage=prod owner=anna[/]
      [cyan]tg-tinker artifacts label ARTIFACT_ID[/]
    """
    from tg_tinker.labels import parse_labels

    wanted = parse_labels(labels or [])
    with connector(ctx)() as service:
        item = service.set_labels(artifact_id, wanted)
    typer.echo(f"{artifact_id}: {shown(_labels(item))}")


@artifacts.command()
def expire(
    ctx: typer.Context,
    artifact_id: _Id,
    days: Annotated[float | None, typer.Option(min=0, max=36_500, help="Days from now.")] = None,
    at: Annotated[_Day, typer.Option(help="Time of expiry, UTC.")] = None,
    never: Annotated[bool, typer.Option("--never", help="Remove the expiry.")] = False,
) -> None:
    """Set the time until which an artifact may be opened.

    After this time nothing loads the artifact or samples from it. Its files
    stay until `delete --expired`. Before that, a later time or --never makes
    the artifact usable again.

      [cyan]tg-tinker artifacts expire ARTIFACT_ID --days 30[/]
      [cyan]tg-tinker artifacts expire ARTIFACT_ID --at 2027-01-31[/]
      [cyan]tg-tinker artifacts expire ARTIFACT_ID --never[/]
      [cyan]tg-tinker artifacts delete --expired[/]
    """
    if [days is not None, at is not None, never].count(True) != 1:
        raise InvalidRequestError("pass exactly one of --days N, --at DATE and --never")
    when = _utc(at) if days is None else datetime.now(UTC) + timedelta(days=days)
    with connector(ctx)() as service:
        item = service.set_expiry(artifact_id, when)
    typer.echo(f"{artifact_id} expires: {_expiry(item)}")


@artifacts.command()
def copy(ctx: typer.Context, artifact_id: _Id) -> None:
    """Copy an artifact under a new data key and print the id of the copy.

    [cyan]tg-tinker artifacts copy ARTIFACT_ID[/]
    """
    with connector(ctx)() as service, _working("copying"):
        item = service.copy_artifact(artifact_id)
    typer.echo(item.artifact_id)


@artifacts.command()
def reseal(ctx: typer.Context, artifact_id: _Id) -> None:
    """Encrypt an artifact again under a fresh data key and remove the old files.

    Use it if the artifact's data key may have become known. The id stays the
    same. `tg-tinker keys rotate` replaces the tenant key of all artifacts
    instead, and touches no data. Backups made before still open with the old
    key. If the command is interrupted, the artifact stays whole: run the
    command again.

      [cyan]tg-tinker artifacts reseal ARTIFACT_ID[/]
    """
    with connector(ctx)() as service, _working("encrypting again"):
        service.reseal_artifact(artifact_id)
    typer.echo(f"{artifact_id} is under a fresh key")


@artifacts.command()
def export(
    ctx: typer.Context,
    artifact_id: _Id,
    path: Annotated[Path, typer.Argument(help="Folder to create; it must not exist yet.")],
) -> None:
    """Write the LoRA adapter of an artifact, decrypted, as a folder that PEFT can load.

    [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
    """
    with connector(ctx)() as service:
        service.export_adapter(artifact_id, path)
    typer.echo(f"Wrote {path}: not encrypted, load it with peft.PeftModel.from_pretrained")


@artifacts.command("import")
def import_adapter(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="Folder that PEFT's save_pretrained wrote.")],
    model: Annotated[
        str, typer.Option(help="Base model: hub id, Hugging Face directory or GGUF file.")
    ],
) -> None:
    """Import a LoRA adapter from a PEFT folder and print the id of its artifact.

    Names, shapes and settings must be those of a run on this base model.
    TG-Tinker knows nothing of the adapter's training data: a private run that
    starts from it has no privacy guarantee, and must set allow_nonprivate_init.

      [cyan]tg-tinker artifacts import my-adapter --model path/or/hub-id[/]
    """
    with connector(ctx, begins=True)() as service, _working("starting") as status:
        item = service.import_adapter(path, model, progress=status.update)
    typer.echo(item.artifact_id)


@artifacts.command("verify")
def verify_artifacts(
    ctx: typer.Context,
    artifact_id: Annotated[
        str | None, typer.Argument(help="Artifact; all that have not expired if left out.")
    ] = None,
) -> None:
    """Read and check one artifact, or all artifacts.

    The exit status is 1 if an artifact is damaged.

    [cyan]tg-tinker artifacts verify[/]
    [cyan]tg-tinker artifacts verify ARTIFACT_ID[/]
    """
    with connector(ctx)() as service:
        all_of_them = service.list_artifacts() if artifact_id is None else []
        failed = report(service.verify_artifacts(artifact_id), "checking artifacts")
    count = sum(not item.expired for item in all_of_them) if artifact_id is None else 1
    typer.echo(f"{count - failed} of {count} artifacts are whole")
    raise typer.Exit(bool(failed))


@artifacts.command()
def delete(
    ctx: typer.Context,
    artifact_id: Annotated[
        str | None, typer.Argument(help="Artifact to delete, or pass --expired.")
    ] = None,
    expired: Annotated[
        bool, typer.Option("--expired", help="Delete all artifacts that have expired.")
    ] = False,
    lost: Annotated[
        bool, typer.Option("--lost", help="Delete it even if this store has no file of it.")
    ] = False,
    yes: _Yes = False,
) -> None:
    """Delete an artifact with its key and files; only a backup could restore it.

    [cyan]tg-tinker artifacts delete ARTIFACT_ID --yes[/]
    [cyan]tg-tinker artifacts delete --expired[/]
    """
    if (artifact_id is None) != expired:
        raise InvalidRequestError("name one artifact, or pass --expired")
    if expired and lost:
        raise InvalidRequestError(
            "--lost needs one named artifact: you must confirm for each that its files are gone"
        )
    with connector(ctx)() as service:
        if artifact_id is not None:
            service.get_artifact(artifact_id)  # first: raises if the artifact does not exist
        if not yes:
            typer.confirm(f"Delete {artifact_id or 'all that have expired'} for good?", abort=True)
        if artifact_id is None:
            raise typer.Exit(bool(report(service.delete_expired(), "deleting artifacts")))
        service.delete_artifact(artifact_id, lost=lost)
    typer.echo(f"Deleted {artifact_id}")


@artifacts.command()
def shred(ctx: typer.Context, artifact_id: _Id, yes: _Yes = False) -> None:
    """Delete an artifact, its key first, and print what this does not reach.

    Without the key no copy of the files opens. Read the printed list: you must
    remove backups, copies and exports, and close running clients, yourself.

      [cyan]tg-tinker artifacts shred ARTIFACT_ID[/]
    """
    with connector(ctx)() as service:
        service.get_artifact(artifact_id)
        if not yes:
            typer.confirm(f"Destroy {artifact_id} and its key for good?", abort=True)
        not_reached = service.shred_artifact(artifact_id)
    typer.echo(f"{artifact_id} and its key are gone. This does not reach:")
    for sentence in not_reached:
        typer.echo(f"- {sentence}")


def _working(what: str) -> Status:
    from rich.console import Console

    return Console(stderr=True).status(what)


def _utc(when: datetime | None) -> datetime | None:
    return None if when is None else when.replace(tzinfo=UTC)


def _size(item: ArtifactInfo) -> str:
    return f"{item.size_bytes / 1e6:.1f} MB"


def _expiry(item: ArtifactInfo) -> str:
    if item.expires_at is None:
        return "never"
    return f"{item.expires_at:%Y-%m-%d %H:%M}{' (over)' if item.expired else ''}"


def _labels(item: ArtifactInfo) -> str:
    return " ".join(f"{name}={value}" for name, value in item.labels.items()) or "-"


artifacts.command()(sweep)
