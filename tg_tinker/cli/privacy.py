"""The commands about privacy: what was spent, what may be claimed, an attack on all that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tg_tinker.cli.shared import connector
from tg_tinker.storage.stores import shown_lines

if TYPE_CHECKING:
    from tg_tinker.records.report import PrivacyReport


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


_Dataset = Annotated[str, typer.Argument(help="As in TrainingConfig.dataset_id.")]


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
    from tg_tinker.backend import actors_backend
    from tg_tinker.demo import plots

    plots.check_available()
    with Console(stderr=True).status("starting") as status:
        found = actors_backend().privacy_audit(
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


def _report(ctx: typer.Context, dataset_id: str) -> PrivacyReport:
    with connector(ctx)() as service:
        return service.privacy_report(dataset_id)
