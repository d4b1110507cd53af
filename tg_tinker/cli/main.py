"""The command `tg-tinker`. Each command is a thin shell over the SDK, which it imports late.

The object of the click context, if there is one, makes the service: tests pass a fake.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from tg_tinker.cli import (
    artifacts,
    audit_log,
    backup,
    clients,
    cluster,
    doctor,
    keys,
    profile,
    registry,
    sampling,
)
from tg_tinker.errors import TGTinkerError
from tg_tinker.storage.stores import shown, shown_lines

if TYPE_CHECKING:
    from tg_tinker.client.service import ServiceClient
    from tg_tinker.records.report import PrivacyReport

_INTERRUPTED = 130


class _Group(TyperGroup):
    """Ends every command alike: an error of ours is one line on stderr and status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TGTinkerError as error:
            console = Console(stderr=True)
            console.print(f"[red]error:[/] {escape(shown_lines(error.message))}", soft_wrap=True)
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
    this machine with differential privacy, shows what it says before and after,
    saves it encrypted and resumes it.

    Then bring your own model and text:

      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl --steps 200[/]

    and look at what there is:

      [cyan]tg-tinker runs[/]
      [cyan]tg-tinker artifacts list[/]
      [cyan]tg-tinker artifacts export ARTIFACT_ID my-adapter[/]
      [cyan]tg-tinker privacy report[/]
      [cyan]tg-tinker audit-log show[/]

    or let others use it:

      [cyan]tg-tinker serve[/]

    or keep a cluster running, which outlives your programs:

      [cyan]tg-tinker up[/]
      [cyan]tg-tinker status[/]

    or see whether this machine keeps what it promises:

      [cyan]tg-tinker doctor[/]

    All that lasts is in ~/.tg-tinker, or where TG_TINKER_HOME points; the keys
    may be elsewhere, see [cyan]tg-tinker keys[/], and so may the registry: its
    database is the one whose URL is in TG_TINKER_DATABASE.""",
)
privacy = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""What was spent of a data set's privacy budget, and proof of it.

    A data set is named by TrainingConfig.dataset_id; runs that name none use
    the one called default.

      [cyan]tg-tinker privacy report[/]
      [cyan]tg-tinker privacy certificate support-2026 > certificate.json[/]
      [cyan]tg-tinker privacy audit[/]""",
)
main.add_typer(privacy, name="privacy")
main.add_typer(clients.clients, name="clients")
main.add_typer(artifacts.artifacts, name="artifacts")
main.add_typer(audit_log.commands, name="audit-log")
main.add_typer(sampling.commands)
main.add_typer(cluster.commands)
main.add_typer(keys.keys, name="keys")
registry.commands.command()(backup.backup)
registry.commands.command()(backup.restore)
main.add_typer(registry.commands, name="registry")
main.command()(doctor.doctor)
main.command()(profile.profile)

_Dataset = Annotated[str, typer.Argument(help="As in TrainingConfig.dataset_id.")]


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
    epsilon: Annotated[
        float, typer.Option(help="Privacy budget of each row; smaller is more private.")
    ] = 8.0,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train on the same rows without privacy.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer step to train up to.")] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per step, on average where they are drawn.")
    ] = 64,
    learning_rate: Annotated[float, typer.Option(help="Rate of AdamW.")] = 2e-2,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; the rest is cut.")] = 64,
    output: Annotated[Path, typer.Option(help="Folder of the plot and the figures.")] = Path(
        "demo-output"
    ),
    resume: Annotated[
        str | None, typer.Option(metavar="ARTIFACT_ID", help="Go on from this artifact.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter and the order of rows.")] = 0,
) -> None:
    """Fine-tune a real model on this machine, privately, in a few minutes.

    Held-out loss and completions before and after, live progress with the
    privacy spent so far, an encrypted checkpoint, a resume, a plot and a
    privacy report. Each run has a privacy budget of its own, for its rows and
    steps. Ctrl-C at any moment saves a checkpoint and prints how to go on.

      [cyan]tg-tinker demo[/]
      [cyan]tg-tinker demo --epsilon 3[/]
      [cyan]tg-tinker demo --no-privacy --steps 50 --batch-size 8 --learning-rate 1e-3[/]
      [cyan]tg-tinker demo --model path/or/hub-id --data chats.jsonl --max-length 256[/]
      [cyan]tg-tinker demo --resume ARTIFACT_ID[/]
    """
    from tg_tinker.demo.options import DemoOptions
    from tg_tinker.demo.run import run_demo

    options = DemoOptions(
        model, data, epsilon, no_privacy, steps, batch_size, learning_rate, rank, max_length,
        output, resume, seed,
    )  # fmt: skip
    raise typer.Exit(run_demo(options, connect=connector(ctx, begins=True), program=_program()))


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
      [cyan]TG_TINKER_KEYRING=env:TENANT_KEYS tg-tinker init[/]
    """
    from tg_tinker.client.service import init_home

    typer.echo(f"Home: {init_home(home)}")


@main.command()
def runs(ctx: typer.Context) -> None:
    """List training runs, oldest first.

    [cyan]tg-tinker runs[/]
    """
    with connector(ctx)() as service:
        known = service.list_training_clients()
    rows = [
        (run.training_client_id, run.status, str(run.step), Path(run.model_ref).name,
         f"{run.created_at:%Y-%m-%d %H:%M}", run.last_artifact_id or "-")
        for run in known
    ]  # fmt: skip
    print_table(("run", "status", "step", "model", "created (UTC)", "last artifact"), rows)


@privacy.command()
def report(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Show a data set's epsilon, spent and left, and the runs that spent it.

    [cyan]tg-tinker privacy report support-2026[/]
    """
    typer.echo(shown_lines(str(_report(ctx, dataset_id))))


@privacy.command()
def certificate(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Print what may be claimed about all that was trained on it, as JSON.

    For an auditor: budget and epsilon, adjacency, unit, the contract of every
    run and who vouches for it, the ledger's head, and what is not covered.

    [cyan]tg-tinker privacy certificate support-2026 > certificate.json[/]
    """
    typer.echo(json.dumps(_report(ctx, dataset_id).certificate(), indent=2))


@privacy.command()
def ledger(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Print the whole ledger, one JSON object per line.

    It holds nothing that depends on training data. Whoever has it can verify
    it, without this service.

    [cyan]tg-tinker privacy ledger support-2026 > ledger.jsonl[/]
    """
    for entry in _report(ctx, dataset_id).entries:
        typer.echo(json.dumps(entry, sort_keys=True))


@privacy.command("book-missing")
def book_missing(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Put back charges that an older copy of the registry's database has lost.

    For when private runs are refused because the ledger is behind, and no
    newer copy of the database is left. The charges come from the heads in the
    artifact store and in this home, so no less is booked than was spent. Runs
    that made them may make no more; their artifacts load in new clients.

      [cyan]tg-tinker privacy book-missing support-2026[/]
    """
    with connector(ctx)() as service:
        booked = service.book_missing_charges(dataset_id)
    typer.echo(f"{booked} charges were missing and are booked" if booked else "nothing is missing")


@privacy.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Written by `tg-tinker privacy ledger`.")],
    head: Annotated[
        str | None, typer.Option(help="A head you kept: the ledger must reach it.")
    ] = None,
) -> None:
    """Replay an exported ledger by every rule; needs no service.

    The chain shows that no entry was changed, left out or moved. That the end
    was not cut off shows only a head that you kept from a certificate.

      [cyan]tg-tinker privacy verify ledger.jsonl[/]
      [cyan]tg-tinker privacy verify ledger.jsonl --head 4f0c...[/]
    """
    from tg_tinker.records.report import read_ledger

    checked = read_ledger(file)
    checked.check_head(head)
    typer.echo(shown_lines(str(checked)))
    typer.echo("verified: every entry follows from the one before, and every rule held")
    if checked.sampled:
        typer.echo("taken as stated: the epsilon tables of sampled runs, above that of one step")


@privacy.command()
def audit(
    output: Annotated[Path, typer.Option(help="Folder of the plot and the figures.")] = Path(
        "audit-output"
    ),
    canaries: Annotated[
        int, typer.Option(min=1000, max=16_384, help="More find smaller errors, more slowly.")
    ] = 5000,
    epsilon: Annotated[
        float, typer.Option(min=0.1, max=2.0, help="What the attacked mechanism claims.")
    ] = 2.0,
) -> None:
    """Attack the privacy mechanism on this machine, in about a minute.

    Replays neighbouring data sets, measures the noise, and plants synthetic
    canaries in real private steps to guess which took part. It reads no data
    of yours and spends none of your budgets. Exit status 1 is a violation.

      [cyan]tg-tinker privacy audit[/]
      [cyan]tg-tinker privacy audit --canaries 15000[/]
    """
    from tg_tinker.backend import provided
    from tg_tinker.demo import plots

    plots.check_available()
    with Console(stderr=True).status("starting") as status:
        found = provided("privacy_audit")(
            progress=status.update, canaries=canaries, epsilon=epsilon
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / "audit.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")
    plots.plot_audit(
        found.scores_in, found.scores_out, sigma=found.sigma, claimed=found.claimed_epsilon,
        bound=found.bound, verdict=found.verdict, path=output / "audit.png",
    )  # fmt: skip
    for check in found.checks:
        typer.echo(f"{'held    ' if check.passed else 'VIOLATED'}  {check.name}: {check.statement}")
    typer.echo(f"\n{found.verdict}\nPlot and figures: {output}")
    raise typer.Exit(not found.passed)


@main.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(f"tg-tinker {importlib.metadata.version('tg-tinker')}")


def _report(ctx: typer.Context, dataset_id: str) -> PrivacyReport:
    with connector(ctx)() as service:
        return service.privacy_report(dataset_id)


def connector(ctx: typer.Context, *, begins: bool = False) -> Callable[..., ServiceClient]:
    """What connects a command to the service.

    Args:
        begins: it begins something, so it may make a home where there is none.
    """
    from tg_tinker.client.service import ServiceClient, check_home

    if ctx.obj:
        return cast("Callable[..., ServiceClient]", ctx.obj)
    if not begins:
        check_home()
    return ServiceClient


def print_table(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]], maker: str = "`tg-tinker demo`"
) -> None:
    """A table on a terminal; elsewhere the same, never cut to a width. No cell commands the
    terminal: whoever writes to the database may have put it there."""
    console = Console() if sys.stdout.isatty() else Console(width=4000)
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(shown(cell)) for cell in row))
    console.print(table if rows else f"none yet: {maker} makes one")


def _program() -> str:
    """How this program was called: its name where the shell finds it, else its path."""
    return "tg-tinker" if shutil.which("tg-tinker") else sys.argv[0]
