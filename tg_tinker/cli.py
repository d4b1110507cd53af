"""The command `tg-tinker`. Each command is a thin shell over the SDK, which it imports late.

The object of the click context, if there is one, makes the service: tests pass a fake.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from tg_tinker.errors import TGTinkerError

if TYPE_CHECKING:
    from tg_tinker.service import ServiceClient

_INTERRUPTED = 130


class _Group(TyperGroup):
    """Ends every command alike: an error of ours is one line on stderr and status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TGTinkerError as error:
            console = Console(stderr=True)
            console.print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


main = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals may hold training data
    help="""Private fine-tuning of language models on your own Ray cluster.

    Start with [bold]tg-tinker demo[/]: it fine-tunes a small language model on
    this machine, shows what it says before and after, saves it encrypted and
    resumes it.

    Then bring your own model and text:

      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl --steps 200[/]

    and look at what there is:

      [cyan]tg-tinker runs[/]
      [cyan]tg-tinker artifacts list[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]

    All that lasts is in ~/.tg-tinker, or where TG_TINKER_HOME points.""",
)
artifacts = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""List, export and delete saved artifacts.

    They are encrypted; only an export writes weights in clear.

      [cyan]tg-tinker artifacts list[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]""",
)
main.add_typer(artifacts, name="artifacts")


@main.command()
def demo(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, Hugging Face directory or GGUF file; SmolLM2-135M if left out."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl or .parquet file of chats ({messages: [{role, content}, ...]}) or pairs"
            " ({prompt, completion}); Python's own documentation if left out."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer step to train up to.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; the rest is cut.")] = 256,
    output: Annotated[Path, typer.Option(help="Folder of the plot and the figures.")] = Path(
        "demo-output"
    ),
    resume: Annotated[
        str | None, typer.Option(metavar="ARTIFACT_ID", help="Go on from this artifact.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter and the order of rows.")] = 0,
) -> None:
    """Fine-tune a real model on this machine, in a few minutes.

    Held-out loss and completions before and after, live progress, an
    encrypted checkpoint, a resume and a plot. Ctrl-C at any moment saves a
    checkpoint and prints how to go on.

      [cyan]tg-tinker demo[/]
      [cyan]tg-tinker demo --steps 20 --batch-size 4[/]
      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl[/]
      [cyan]tg-tinker demo --resume ARTIFACT_ID --steps 120[/]
    """
    from tg_tinker.demo import DemoOptions, run_demo

    options = DemoOptions(
        model, data, steps, batch_size, learning_rate, rank, max_length, output, resume, seed
    )
    raise typer.Exit(run_demo(options, connect=_connector(ctx), program=_program()))


@main.command()
def init(
    home: Annotated[
        Path | None, typer.Option(help="TG_TINKER_HOME or ~/.tg-tinker if left out.")
    ] = None,
) -> None:
    """Make the home directory: keys, registry, artifacts.

    Needed once on the head node of a cluster; on a laptop it happens by
    itself. Keep a copy of the keyring: without it no artifact can be opened.

      [cyan]tg-tinker init[/]
    """
    from tg_tinker.service import init_home

    typer.echo(f"Home: {init_home(home)}")


@main.command()
def runs(ctx: typer.Context) -> None:
    """List training runs, oldest first.

    [cyan]tg-tinker runs[/]
    """
    with _connector(ctx)() as service:
        known = service.list_training_clients()
    rows = [
        (run.training_client_id, run.status, str(run.step), Path(run.model_ref).name,
         f"{run.created_at:%Y-%m-%d %H:%M}", run.last_artifact_id or "-")
        for run in known
    ]  # fmt: skip
    _print_table(("run", "status", "step", "model", "created (UTC)", "last artifact"), rows)


@artifacts.command("list")
def list_artifacts(ctx: typer.Context) -> None:
    """List saved artifacts, oldest first.

    [cyan]tg-tinker artifacts list[/]
    """
    with _connector(ctx)() as service:
        known = service.list_artifacts()
    rows = [
        (item.artifact_id, item.training_client_id, str(item.step),
         f"{item.size_bytes / 1e6:.1f} MB", "yes" if item.include_optimizer else "no",
         f"{item.created_at:%Y-%m-%d %H:%M}")
        for item in known
    ]  # fmt: skip
    _print_table(("artifact", "run", "step", "size", "optimizer", "created (UTC)"), rows)


@artifacts.command()
def export(
    ctx: typer.Context,
    artifact_id: Annotated[str, typer.Argument(help="See `tg-tinker artifacts list`.")],
    path: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Write an adapter, decrypted, as a folder that PEFT can load.

    [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
    """
    with _connector(ctx)() as service:
        service.export_adapter(artifact_id, path)
    typer.echo(f"Wrote {path}: not encrypted, load it with peft.PeftModel.from_pretrained")


@artifacts.command()
def delete(
    ctx: typer.Context,
    artifact_id: Annotated[str, typer.Argument(help="See `tg-tinker artifacts list`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an artifact and its key; nothing can bring it back.

    [cyan]tg-tinker artifacts delete ARTIFACT_ID --yes[/]
    """
    if not yes:
        typer.confirm(f"Delete {artifact_id} for good?", abort=True)
    with _connector(ctx)() as service:
        service.delete_artifact(artifact_id)
    typer.echo(f"Deleted {artifact_id}")


@main.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(f"tg-tinker {importlib.metadata.version('tg-tinker')}")


def _connector(ctx: typer.Context) -> Callable[[], ServiceClient]:
    from tg_tinker.service import ServiceClient

    return ctx.obj or ServiceClient


def _print_table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on a terminal; elsewhere the same, never cut to a width."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table if rows else "none yet: `tg-tinker demo` makes one")


def _program() -> str:
    """How this program was called: its name where the shell finds it, else its path."""
    return "tg-tinker" if shutil.which("tg-tinker") else sys.argv[0]
