"""The commands about saved artifacts: `artifacts list`, `show`, `export`, `copy`, `shred`, ..."""

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

    They are encrypted; only an export writes weights in clear.

      [cyan]tg-tinker artifacts list --label stage=prod[/]
      [cyan]tg-tinker artifacts label ARTIFACT_ID stage=prod owner=anna[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
      [cyan]tg-tinker artifacts shred ARTIFACT_ID[/]""",
)

_Id = Annotated[str, typer.Argument(help="See `tg-tinker artifacts list`.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
_Day = datetime | None


@artifacts.command("list")
def list_artifacts(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(help="Saved by this run.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME=VALUE", help="With this label.")
    ] = None,
    newer_than: Annotated[_Day, typer.Option(help="Made after this time, UTC.")] = None,
    older_than: Annotated[_Day, typer.Option(help="Made before this time, UTC.")] = None,
    after: Annotated[
        str | None, typer.Option(metavar="ARTIFACT_ID", help="Those that follow this one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many; else all.")] = None,
) -> None:
    """List saved artifacts, oldest first; more conditions list fewer.

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
        typer.echo("no artifact fits: leave out a condition")
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
    """Show what is known of one artifact without opening it.

    [cyan]tg-tinker artifacts show ARTIFACT_ID[/]
    """
    with connector(ctx)() as service:
        item = service.get_artifact(artifact_id)
    for name, value in {
        "artifact": item.artifact_id,
        "run": item.training_client_id,
        "step": item.step,
        "size": f"{_size(item)}, encrypted",
        "optimizer": "saved: resumes to the bit" if item.include_optimizer else "not saved",
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
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="None removes them all.")
    ] = None,
) -> None:
    """Give an artifact these labels, in place of those that it has.

    They lie in the registry in clear: nothing secret belongs here.

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
    days: Annotated[float | None, typer.Option(min=0, max=36_500, help="From now.")] = None,
    at: Annotated[_Day, typer.Option(help="At this time, UTC.")] = None,
    never: Annotated[bool, typer.Option("--never", help="Keep it for ever.")] = False,
) -> None:
    """Say until when an artifact may be opened; after that nothing loads it or samples from it.

    Its files stay until `delete --expired`; until then a later expiry, or
    --never, makes it open again.

      [cyan]tg-tinker artifacts expire ARTIFACT_ID --days 30[/]
      [cyan]tg-tinker artifacts expire ARTIFACT_ID --at 2027-01-31[/]
      [cyan]tg-tinker artifacts expire ARTIFACT_ID --never[/]
      [cyan]tg-tinker artifacts delete --expired[/]
    """
    if [days is not None, at is not None, never].count(True) != 1:
        raise InvalidRequestError("say one of --days N, --at DATE and --never")
    when = _utc(at) if days is None else datetime.now(UTC) + timedelta(days=days)
    with connector(ctx)() as service:
        item = service.set_expiry(artifact_id, when)
    typer.echo(f"{artifact_id} expires: {_expiry(item)}")


@artifacts.command()
def copy(ctx: typer.Context, artifact_id: _Id) -> None:
    """Make another artifact of the same content, under a key of its own; prints its id.

    [cyan]tg-tinker artifacts copy ARTIFACT_ID[/]
    """
    with connector(ctx)() as service, _working("copying"):
        item = service.copy_artifact(artifact_id)
    typer.echo(item.artifact_id)


@artifacts.command()
def reseal(ctx: typer.Context, artifact_id: _Id) -> None:
    """Encrypt an artifact anew under a fresh key; its id stays, the old files go.

    For when its key may have become known. `tg-tinker keys rotate` is for the
    key of all artifacts, and touches no data. Backups made before still open
    with the old key. Broken off, the artifact is whole: call it again.

      [cyan]tg-tinker artifacts reseal ARTIFACT_ID[/]
    """
    with connector(ctx)() as service, _working("encrypting anew"):
        service.reseal_artifact(artifact_id)
    typer.echo(f"{artifact_id} is under a fresh key")


@artifacts.command()
def export(
    ctx: typer.Context,
    artifact_id: _Id,
    path: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Write an adapter, decrypted, as a folder that PEFT can load.

    [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
    """
    with connector(ctx)() as service:
        service.export_adapter(artifact_id, path)
    typer.echo(f"Wrote {path}: not encrypted, load it with peft.PeftModel.from_pretrained")


@artifacts.command("import")
def import_adapter(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="A folder that PEFT's save_pretrained wrote.")],
    model: Annotated[
        str, typer.Option(help="The base model: hub id, Hugging Face directory or GGUF file.")
    ],
) -> None:
    """Take over a LoRA adapter from a PEFT folder; prints the id of its artifact.

    Names, shapes and settings must be those of a run on this base model.
    Nothing is known of its training data: a private run that starts from it
    has no guarantee, and must say allow_nonprivate_init.

      [cyan]tg-tinker artifacts import my-adapter --model path/or/hub-id[/]
    """
    with connector(ctx, begins=True)() as service, _working("starting") as status:
        item = service.import_adapter(path, model, progress=status.update)
    typer.echo(item.artifact_id)


@artifacts.command("verify")
def verify_artifacts(
    ctx: typer.Context,
    artifact_id: Annotated[str | None, typer.Argument(help="One alone; else all.")] = None,
) -> None:
    """Read and check artifacts again; ends with status 1 if one is damaged.

    Of all, those that have expired are left out.

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
    artifact_id: Annotated[str | None, typer.Argument(help="Or --expired.")] = None,
    expired: Annotated[
        bool, typer.Option("--expired", help="All whose time is over, instead of one.")
    ] = False,
    lost: Annotated[
        bool, typer.Option("--lost", help="Also if this store has no file of it any more.")
    ] = False,
    yes: _Yes = False,
) -> None:
    """Delete an artifact and its key; nothing can bring it back.

    [cyan]tg-tinker artifacts delete ARTIFACT_ID --yes[/]
    [cyan]tg-tinker artifacts delete --expired[/]
    """
    if (artifact_id is None) != expired:
        raise InvalidRequestError("name one artifact, or say --expired")
    if expired and lost:
        raise InvalidRequestError(
            "--lost is for one artifact that you name: what is nowhere any more is yours to confirm"
        )
    with connector(ctx)() as service:
        if artifact_id is not None:
            service.get_artifact(artifact_id)  # nobody is asked about what is not there
        if not yes:
            typer.confirm(f"Delete {artifact_id or 'all that have expired'} for good?", abort=True)
        if artifact_id is None:
            raise typer.Exit(bool(report(service.delete_expired(), "deleting artifacts")))
        service.delete_artifact(artifact_id, lost=lost)
    typer.echo(f"Deleted {artifact_id}")


@artifacts.command()
def shred(ctx: typer.Context, artifact_id: _Id, yes: _Yes = False) -> None:
    """Delete an artifact, its key first, and say what that does not reach.

    Without its key no copy of the files opens. Read what follows: backups,
    copies, exports and running clients are for you to end.

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
