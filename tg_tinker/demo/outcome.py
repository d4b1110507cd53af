"""Prints and writes the results of the demo: answers, figures, a plot, and the privacy spent.

`Outcome.write` writes `history.json` and `loss.png` into the output folder. Everything else goes to
the console. `plots` draws the plot; `run` does the run itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tg_tinker.config import TrainingConfig
from tg_tinker.data.rows import Row
from tg_tinker.demo import plots
from tg_tinker.demo.meter import StepRecord
from tg_tinker.demo.options import DemoOptions, resume_command, unwritable
from tg_tinker.records.report import PrivacyReport, dataset_of
from tg_tinker.storage.files import new_file
from tg_tinker.types import SaveStateResult

_SHOWN_CHARS = 240


class Answers:
    """The model's answers to the same questions, at each moment so far."""

    def __init__(self) -> None:
        self._at: dict[str, list[str]] = {}

    def add(self, when: str, answers: list[str]) -> None:
        self._at[when] = answers

    def show(self, console: Console, rows: Sequence[Row]) -> None:
        """Prints a table of all answers, with the held-out row of each question."""
        table = Table.grid(
            Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2)
        )
        for i, row in enumerate(rows):
            question, held_out = _question_and_answer(row)
            table.add_row("asked", Text(_clipped(question), style="bold"))
            for moment, answers in self._at.items():
                table.add_row(moment, Text(_clipped(answers[i])))
            table.add_row("held-out row", Text(_clipped(held_out)))
            table.add_row()
        console.print("", table)


@dataclass(frozen=True)
class Outcome:
    """A finished run of the demo.

    Attributes:
        config: the configuration of the run.
        before, after: the held-out loss before and after training.
        saved: the last artifact of the run.
    """

    options: DemoOptions
    config: TrainingConfig
    history: Sequence[StepRecord]
    before: float
    after: float
    saved: SaveStateResult

    def write(self, model: str, budget: float | None) -> None:
        """Writes the figures and the plot.

        Args:
            model: the short name of the model.
            budget: the epsilon that may be spent; None without privacy.

        Raises:
            StorageError: the output folder cannot be written to.
        """
        record = {
            "model": model,
            "artifact_id": self.saved.artifact_id,
            "dataset_id": self.saved.metadata.get("dataset_id"),
            "held_out_loss_before": self.before,
            "held_out_loss_after": self.after,
            "steps": [_as_json(step) for step in self.history],
        }
        output = self.options.output
        try:
            with new_file(output / "history.json", replace=True) as file:
                file.write((json.dumps(record, indent=2) + "\n").encode())
            self._plot(f"{model}, LoRA rank {self.options.rank}", budget)
        except OSError as error:
            raise unwritable(output, error) from None

    def show_next(self, console: Console, program: str) -> None:
        """Prints the location of the plot, and commands to continue with."""
        console.print(
            f"Plot: [bold]{self.options.output / 'loss.png'}[/]; figures: history.json in the same"
            " folder.\nWhat to do next:"
        )
        for command in self._next_commands(program):
            show_command(console, command)

    def _plot(self, title: str, budget: float | None) -> None:
        losses = [(record.step, record.loss) for record in self.history]
        spent = [record.epsilon for record in self.history if record.epsilon is not None]
        plots.plot_training(
            losses, self.before, self.after, self.options.output / "loss.png", title, spent, budget
        )

    def _next_commands(self, program: str) -> Iterator[str]:
        artifact_id = self.saved.artifact_id
        if self.config.private:
            yield f"{program} privacy report {dataset_of(self.config)}"
            yield f"{program} privacy certificate {dataset_of(self.config)}"
            yield f"{program} demo --no-privacy"
        else:
            more = replace(self.options, steps=2 * self.options.steps)
            yield resume_command(more, artifact_id, program)
        yield f"{program} artifacts export {artifact_id} my-adapter"
        yield f"{program} demo --data my-chats.jsonl"


def show_privacy(console: Console, report: PrivacyReport, run_id: str) -> None:
    """Prints the privacy that a finished run has spent, from its verified ledger."""
    ledger, account = report.ledger, report.ledger.accounts[run_id]
    console.print(
        f"[bold]Privacy[/]: epsilon {report.total_epsilon:.3g} of {report.target_epsilon:g}"
        f" spent at delta {ledger.delta:g}, for each distinct row of dataset"
        f" {ledger.registered['dataset']}.\n"
        f"This paid for {account.steps} steps with noise {account.sigma:.3g}, each on a sample of"
        f" {account.rate:.2%} of the rows. All {ledger.length} ledger entries are verified.\n"
    )


def show_command(console: Console, command: str) -> None:
    console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)


def _as_json(record: StepRecord) -> dict[str, Any]:
    """Returns the record for JSON, which has no NaN: the loss of a step without rows is None."""
    return asdict(record) | {"loss": None if math.isnan(record.loss) else record.loss}


def _question_and_answer(row: Row) -> tuple[str, str]:
    """Returns the message before the row's first answer, and that answer."""
    if "prompt" in row:
        return row["prompt"], row["completion"]
    roles = [message["role"] for message in row["messages"]]
    at = roles.index("assistant")
    question = row["messages"][at - 1]["content"] if at else ""
    return question, row["messages"][at]["content"]


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
