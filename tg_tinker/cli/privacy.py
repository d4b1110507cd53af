"""Defines the commands about privacy: budgets, certificates, ledgers, and a self-audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tg_tinker.cli.shared import connector
from tg_tinker.storage.files import new_file, new_folder
from tg_tinker.storage.stores import shown_lines

if TYPE_CHECKING:
    from tg_tinker.records.report import PrivacyReport


privacy = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Report and certify what was spent of a dataset's privacy budget.

    TrainingConfig.dataset_id names the dataset of a private run; a run that
    names none uses the dataset "default". Each dataset has a ledger, a
    hash-chained list of all that its runs spent.

      [cyan]tg-tinker privacy report[/]
      [cyan]tg-tinker privacy certificate support-2026 > certificate.json[/]
      [cyan]tg-tinker privacy plan --rows 3692 --epsilon 8 --epochs 3[/]
      [cyan]tg-tinker privacy audit[/]""",
)


_Dataset = Annotated[str, typer.Argument(help="Dataset, as in TrainingConfig.dataset_id.")]


@privacy.command()
def report(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Show a dataset's epsilon, spent and registered, and the runs that spent it.

    The report explains its figures in sentences: what holds if somebody stopped
    by looking at released weights, for several people together, at other
    deltas, and what the guarantee presumes and does not cover.

    [cyan]tg-tinker privacy report support-2026[/]
    """
    typer.echo(shown_lines(str(_report(ctx, dataset_id))))


@privacy.command()
def certificate(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Print a JSON certificate of what may be claimed about training on a dataset.

    It is meant for an auditor and states the budget and the epsilon spent, the
    epsilon of other deltas and of groups, the adjacency, the unit, the contract
    of every run and who vouches for it, the ledger's head, and what the
    guarantee does not cover.

    [cyan]tg-tinker privacy certificate support-2026 > certificate.json[/]
    """
    typer.echo(json.dumps(_report(ctx, dataset_id).certificate(), indent=2))


@privacy.command()
def ledger(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Print the whole ledger of a dataset, one JSON object per line.

    The ledger holds nothing that depends on training data. Anyone who has it
    can verify it without this service, see `tg-tinker privacy verify`.

    [cyan]tg-tinker privacy ledger support-2026 > ledger.jsonl[/]
    """
    for entry in _report(ctx, dataset_id).entries:
        typer.echo(json.dumps(entry, sort_keys=True))


@privacy.command()
def drop(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Give up a Poisson draw that waits for its step.

    Use it if the step cannot be made any more and a run with other settings
    must go on. From then on all Poisson steps of the dataset count as uses of
    the rows that they draw, which costs much more. It cannot be undone.

      [cyan]tg-tinker privacy drop support-2026[/]
    """
    with connector(ctx)() as service:
        position = service.drop_draw(dataset_id)
    typer.echo(f"draw {position} was dropped: Poisson steps count as uses from here on")


@privacy.command("book-missing")
def book_missing(ctx: typer.Context, dataset_id: _Dataset = "default") -> None:
    """Restore charges that an older copy of the registry's database has lost.

    Use it if private runs are refused because the ledger is behind, and no
    newer copy of the database is left. The charges come from the heads in the
    artifact store and in this home, so no less is restored than was spent. Runs
    that made these charges may make no more; their artifacts load in new
    clients.

      [cyan]tg-tinker privacy book-missing support-2026[/]
    """
    with connector(ctx)() as service:
        booked = service.book_missing_charges(dataset_id)
    typer.echo(f"{booked} missing charges were restored" if booked else "nothing is missing")


@privacy.command()
def verify(
    file: Annotated[Path, typer.Argument(help="File from `tg-tinker privacy ledger`.")],
    head: Annotated[
        str | None, typer.Option(help="Head that you kept; the ledger must go through it.")
    ] = None,
) -> None:
    """Replay an exported ledger and check every rule; needs no service.

    The chain shows that no entry was changed, left out or moved. Only a head
    that you kept from a certificate shows that the end was not cut off.

      [cyan]tg-tinker privacy verify ledger.jsonl[/]
      [cyan]tg-tinker privacy verify ledger.jsonl --head 4f0c...[/]
    """
    from tg_tinker.records.report import read_ledger

    checked = read_ledger(file)
    checked.check_head(head)
    typer.echo(shown_lines(str(checked)))
    typer.echo("verified: every entry continues the chain, and every rule holds")
    if checked.sampled:
        typer.echo(
            "not verified: the epsilon tables of sampled runs, except that they rise from one"
            " step's epsilon or above"
        )


@privacy.command()
def combinations(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
) -> None:
    """Show what a private run may combine, and what is refused.

    Each row names the proof and the tests of some combinations of contract,
    clip rule, unit, trainable set and so on, or says why they are refused. A
    combination without a row is refused. The command needs no service.

      [cyan]tg-tinker privacy combinations[/]
      [cyan]tg-tinker privacy combinations --json[/]
    """
    from tg_tinker.backend import actors_backend

    rows, table = actors_backend().privacy_combinations()
    typer.echo(json.dumps(rows, indent=2) if as_json else table, nl=as_json)


@privacy.command()
def audit(
    output: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path(
        "audit-output"
    ),
    canaries: Annotated[
        int, typer.Option(min=1000, max=16_384, help="Canaries; more find smaller errors.")
    ] = 5000,
    epsilon: Annotated[
        float, typer.Option(min=0.1, max=2.0, help="Epsilon that the mechanism claims.")
    ] = 2.0,
) -> None:
    """Attack the privacy mechanism on this machine, in about a minute.

    The audit replays neighboring datasets, measures the noise, and plants
    synthetic canaries in real private steps to guess which ones took part. It
    reads none of your data and spends none of your budgets. The exit status is
    1 if a check finds a violation.

      [cyan]tg-tinker privacy audit[/]
      [cyan]tg-tinker privacy audit --canaries 15000[/]
    """
    from tg_tinker.backend import actors_backend
    from tg_tinker.demo import plots
    from tg_tinker.demo.options import unwritable

    plots.check_available()
    with Console(stderr=True).status("starting") as status:
        found = actors_backend().privacy_audit(
            progress=status.update, canaries=canaries, epsilon=epsilon
        )
    try:
        new_folder(output)
        with new_file(output / "audit.json", replace=True) as file:
            file.write((json.dumps(found.to_json(), indent=2) + "\n").encode())
        plots.plot_audit(
            found.scores_in, found.scores_out, sigma=found.sigma, claimed=found.claimed_epsilon,
            bound=found.bound, verdict=found.verdict, path=output / "audit.png",
        )  # fmt: skip
    except OSError as error:
        raise unwritable(output, error) from None
    for check in found.checks:
        typer.echo(f"{'held    ' if check.passed else 'VIOLATED'}  {check.name}: {check.statement}")
    typer.echo(f"\n{found.verdict}\nPlot and figures: {output}")
    raise typer.Exit(not found.passed)


@privacy.command()
def plan(
    rows: Annotated[int, typer.Option(min=1, help="Units of the dataset.")],
    epsilon: Annotated[float, typer.Option(help="Budget of the dataset.")] = 8.0,
    epochs: Annotated[int, typer.Option(min=1, help="Uses of each row, on average.")] = 1,
    delta: Annotated[
        float | None, typer.Option(help="1e-5, or 0.1 / rows if that is smaller.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Smallest batch; 2x, 4x and 8x follow.")
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="C, the bound of a gradient.")] = 1.0,
    held_out_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of private evaluations; a tenth of --rows.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file of noise by batch size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Compare what a privacy budget buys under each contract.

    The command shows noise, steps and epsilon by batch size, which contract
    fits the data, what twice the rows would buy, and how many private
    evaluations fit. It needs no cluster, reads no data and charges nothing.

      [cyan]tg-tinker privacy plan --rows 3692 --epsilon 8 --epochs 3[/]
      [cyan]tg-tinker privacy plan --rows 100000 --batch-size 512 --plot plan.png[/]
    """
    from tg_tinker.client.planning import plan_privacy
    from tg_tinker.demo import plots
    from tg_tinker.demo.options import unwritable

    if plot:
        plots.check_available()
    found = plan_privacy(
        rows, epsilon, epochs, delta=delta, batch_size=batch_size, max_grad_norm=max_grad_norm,
        held_out_rows=held_out_rows,
    )  # fmt: skip
    if plot:
        try:
            plots.plot_plan(found, plot)
        except OSError as error:
            raise unwritable(plot, error) from None
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))


def _report(ctx: typer.Context, dataset_id: str) -> PrivacyReport:
    with connector(ctx)() as service:
        return service.privacy_report(dataset_id)
