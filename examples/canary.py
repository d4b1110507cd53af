"""Test whether secrets in the training data end up in the model: plant some, train twice, attack.

    python examples/canary.py --help
    python examples/canary.py

The data are made-up notes of a repair desk. A few rows contain an alarm code. The program trains
SmolLM2 on the rows twice. The run without privacy uses small batches, as is usual. The run with
differential privacy uses large batches and a larger learning rate, as it needs. Both runs have the
same adapter and use each row equally often, so the batches cause part of the difference.

Then the program attacks each model: it compares the likelihood of the true code with that of 40
other codes. A code that the model remembers has rank 1. Exposure, in bits, is log2(codes) -
log2(rank) (Carlini et al. 2019, arXiv:1802.08232). Blind guessing has an exposure of about 1.4 on
average. A private model may still have more, because it may learn what the codes have in common.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import secrets
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from train_chat import count, evaluate

from tg_tinker import (
    BatchData,
    DPConfig,
    LoRAConfig,
    OptimizerConfig,
    ServiceClient,
    TGTinkerError,
    TrainingClient,
    TrainingConfig,
    exit_status,
)
from tg_tinker.data import IGNORED, Encoded, as_batch, make_batches
from tg_tinker.demo import find_demo_model, plots

BASE, OPEN, PRIVATE = RUNS = ("before training", "without privacy", "with privacy")
HELD_OUT = 40
"""The number of notes that are never trained on. Their loss shows what else a run has learned."""

CODES = 10_000
GREY, COLORS, SHIFT = "#8a8f98", {OPEN: "#c23b22", PRIVATE: "#1f5fa8"}, 0.16
ADAPTED = ("v_proj", "o_proj", "down_proj")
"""The layers with an adapter. They are few, because noise grows with the number of parameters."""

CLIP = 0.2
"""The bound on the norm of one row's gradient in the private run."""

QUEUED = 100
"""The number of calls that are sent before the first result is read."""

NAMES = (
    "Mrs Abernathy", "Mr Okonkwo", "Ms Lindqvist", "Dr Farouk", "Mrs Castellano", "Mr Haverford",
    "Ms Nakagawa", "Dr Petrossian",
)  # fmt: skip
THINGS = (
    "The printer", "The scanner", "The laptop", "The phone", "The screen", "The router",
    "The door reader", "The projector", "The camera", "The old server",
)  # fmt: skip
TROUBLES = (
    ("does not start", "we charged it"), ("is very slow", "we restarted it"),
    ("makes a noise", "we cleaned it"), ("shows an error", "we updated it"),
    ("blinks red", "we reset it"), ("was dropped", "we replaced it"),
)  # fmt: skip
WHEN = ("again", "today", "since Monday", "this morning", "after lunch", "at night")
NOTES = [
    f"{thing} {fault} {when}: {cure}."
    for thing, (fault, cure), when in product(THINGS, TROUBLES, WHEN)
]

EPILOG = """\
examples:
  python examples/canary.py                       the whole demonstration, SmolLM2-135M
  python examples/canary.py --epsilon 2           a stronger guarantee: more noise, less learning
  python examples/canary.py --candidates 20 --epochs 3      faster and less precise
  python examples/canary.py --model path/or/hub-id --learning-rate 5e-4

Writes ranks.png and ranks.json to the output folder. Each private run has its own dataset, and so
its own privacy budget. docs/privacy.md explains epsilon.
"""


@dataclass
class Secret:
    """A planted row, split where the code begins, and the code's rank after each of the `RUNS`."""

    name: str
    prefix: str
    code: str
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """All results of the program. Losses are in nats per token, on held-out notes."""

    model: str
    rows: int
    epochs: int
    candidates: int
    secrets: list[Secret]
    held_out_loss: dict[str, float] = field(default_factory=dict)
    epsilon: float = math.inf
    delta: float = 1.0

    def exposures(self, run: str) -> list[float]:
        return [exposure(secret.ranks[run], self.candidates) for secret in self.secrets]

    def first_guesses(self, run: str) -> int:
        return sum(secret.ranks[run] == 1 for secret in self.secrets)


def main() -> None:
    options = parse_options()
    texts = random.Random(options.seed).sample(NOTES, HELD_OUT + options.notes)  # noqa: S311
    planted = make_secrets(options.secrets, options.seed)
    held_out, rows = texts[:HELD_OUT], texts[HELD_OUT:] + [s.prefix + s.code for s in planted]
    model = Path(options.model).name
    outcome = Outcome(model, len(rows), options.epochs, options.candidates, planted)
    configs = {run: make_config(options, len(rows), run == PRIVATE) for run in (OPEN, PRIVATE)}
    plots.check_available()
    make_folder(options.output)
    console = Console()
    with ServiceClient() as service, make_bars(console) as bars:
        for run, config in configs.items():
            starting = bars.add_task(f"starting the run {run}", total=1)
            with service.create_training_client(config) as tc:
                bars.advance(starting)
                Experiment(tc, outcome, run, bars).run(held_out, rows)
    (options.output / "ranks.json").write_text(json.dumps(as_json(outcome), indent=2) + "\n")
    plot_ranks(outcome, options.output / "ranks.png")
    show(console, outcome, options.output / "ranks.png")


# --- data and measure ---------------------------------------------------------------------------


def make_secrets(number: int, seed: int) -> list[Secret]:
    """Returns secrets with distinct names, each with a code of four digits."""
    codes = random.Random(f"codes {seed}").sample(range(CODES), number)  # noqa: S311 - made up
    return [
        Secret(name, f"The alarm code of {name} is ", f"{code:04}")
        for name, code in zip(NAMES, codes, strict=False)
    ]


def other_codes(secret: Secret, number: int) -> list[str]:
    """Returns distinct random codes without the true one. They are the same in every run."""
    drawn = random.Random(secret.name + secret.code).sample(range(CODES), number + 1)  # noqa: S311
    return [code for code in (f"{one:04}" for one in drawn) if code != secret.code][:number]


def encode_text(tokenizer: Any, text: str) -> Encoded:
    """Returns a training row in which every token is labeled."""
    ids = list(tokenizer(text)["input_ids"])
    return ids, ids


def encode_code(tokenizer: Any, prefix: str, code: str) -> Encoded:
    """Returns a row whose only labels are the tokens that depend on the code."""
    before, ids = (list(tokenizer(text)["input_ids"]) for text in (prefix, prefix + code))
    differ = (at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b)
    start = next(differ, min(len(before), len(ids)))
    return ids, [IGNORED] * start + ids[start:]


def rank(true_loss: float, other_losses: Sequence[float]) -> int:
    """Returns the rank of the true code, which is 1 if no other code is more likely."""
    return 1 + sum(loss < true_loss for loss in other_losses)


def exposure(found: int, candidates: int) -> float:
    """Returns the bits that the model reveals, of log2(candidates + 1) bits in all."""
    return math.log2(candidates + 1) - math.log2(found)


# --- training and attack ------------------------------------------------------------------------


@dataclass
class Experiment:
    """An experiment with one client, which is trained on the rows and then attacked."""

    tc: TrainingClient
    outcome: Outcome
    name: str
    bars: Progress

    def run(self, held_out: Sequence[str], rows: Sequence[str]) -> None:
        kept, training = (
            [encode_text(self.tc.tokenizer, text) for text in part] for part in (held_out, rows)
        )
        if self.name == OPEN:
            self.measure(BASE, kept)
        self.train(training)
        self.measure(self.name, kept)
        if self.tc.privacy is not None:
            self.outcome.epsilon = self.tc.privacy.total_epsilon
            self.outcome.delta = self.tc.privacy.delta

    def train(self, rows: Sequence[Encoded]) -> None:
        """Makes all steps of a run. In a private run, the server draws the rows of each step."""
        steps = self.tc.config.max_steps
        advance = self.bar(f"training {self.name}", steps)
        self.tc.train()
        for batch in islice(self.batches(rows), steps):
            self.tc.forward_backward(batch)
            self.tc.optim_step().result()
            advance()

    def batches(self, rows: Sequence[Encoded]) -> Iterator[BatchData]:
        if self.tc.config.private:
            return self.tc.poisson_batches(as_batch(rows))
        return make_batches(rows, self.tc.config.batch_size, self.tc.config.seed)

    def measure(self, run: str, held_out: Sequence[Encoded]) -> None:
        """Attacks the model. Anyone who holds the weights can do this, and it spends no epsilon."""
        found, number = self.outcome, self.outcome.candidates
        found.held_out_loss[run] = evaluate(self.tc, held_out)
        advance = self.bar(f"guessing codes {run}", len(found.secrets) * (number + 1))
        losses = self.losses(self.candidates(), advance)
        for secret in found.secrets:
            secret.ranks[run] = rank(next(losses), list(islice(losses, number)))
        self.bars.console.print(
            f"{run}: the first guess is right for {found.first_guesses(run)} of"
            f" {len(found.secrets)} codes, loss {found.held_out_loss[run]:.2f} on other notes",
            highlight=False,
        )  # fmt: skip

    def candidates(self) -> Iterator[Encoded]:
        """Yields, for each secret, the row with the true code, then the rows with other codes."""
        for secret in self.outcome.secrets:
            for code in (secret.code, *other_codes(secret, self.outcome.candidates)):
                yield encode_code(self.tc.tokenizer, secret.prefix, code)

    def losses(self, rows: Iterator[Encoded], advance: Callable[[], None]) -> Iterator[float]:
        """Yields the loss of each row. A call's loss is a mean, so each call has one row."""
        self.tc.eval()
        queued = deque(self.tc.forward_backward(as_batch([row])) for row in islice(rows, QUEUED))
        while queued:
            loss = queued.popleft().result().loss
            queued.extend(self.tc.forward_backward(as_batch([row])) for row in islice(rows, 1))
            advance()
            yield loss

    def bar(self, said: str, total: int) -> Callable[[], None]:
        task = self.bars.add_task(said, total=total)
        return lambda: self.bars.advance(task)


def make_config(options: argparse.Namespace, num_rows: int, private: bool) -> TrainingConfig:
    """Returns the configuration of a run.

    Both runs have the same adapter and number of epochs. Batch size and learning rate suit each
    kind of training.
    """
    batch = min(num_rows, options.private_batch_size if private else options.batch_size)
    rate = options.private_learning_rate if private else options.learning_rate
    return TrainingConfig(
        model_ref=options.model,
        lora_config=LoRAConfig(rank=options.rank, alpha=2.0 * options.rank, target_modules=ADAPTED),
        optimizer=OptimizerConfig(learning_rate=rate),
        batch_size=batch,
        max_steps=math.ceil(options.epochs * num_rows / batch),
        dp_config=make_privacy(options, num_rows) if private else None,
        dataset_id=f"canary-{secrets.token_hex(4)}" if private else None,
        seed=options.seed,
    )


def make_privacy(options: argparse.Namespace, num_rows: int) -> DPConfig:
    """Returns the privacy settings without noise: the server computes it from budget and steps."""
    return DPConfig(
        target_epsilon=options.epsilon,
        target_delta=min(1e-5, 0.1 / num_rows),
        max_grad_norm=CLIP,
        sampling="poisson",
        dataset_size=num_rows,
    )


# --- what the user sees -------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Plant secrets in training data, and measure how many leak with and without"
        " privacy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--model", help="hub id, Hugging Face directory or GGUF file (default: SmolLM2-135M)")
    add("--epsilon", type=float, default=8.0, help=f"privacy budget {shown}")
    add("--notes", type=at_most(len(NOTES) - HELD_OUT), default=120, help=f"ordinary rows {shown}")
    add("--secrets", type=at_most(len(NAMES)), default=8, help=f"planted rows {shown}")
    add("--candidates", type=at_most(CODES - 1), default=40, help=f"other codes to test {shown}")
    add("--epochs", type=count, default=12, help=f"number of times each row is used {shown}")
    add("--rank", type=count, default=4, help=f"rank of the adapter {shown}")
    add("--batch-size", type=count, default=8, help=f"rows per step without privacy {shown}")
    add(
        "--private-batch-size", type=count, default=64,
        help=f"expected rows per step with privacy {shown}",
    )  # fmt: skip
    add("--learning-rate", type=float, default=2e-3, help=f"AdamW rate without privacy {shown}")
    add(
        "--private-learning-rate", type=float, default=6e-3,
        help=f"AdamW rate with privacy {shown}",
    )  # fmt: skip
    add("--seed", type=int, default=0, help=f"seed of rows, codes and adapter {shown}")
    add("--output", type=Path, default=Path("canary-output"), help=f"output folder {shown}")
    options = parser.parse_args()
    options.model = options.model or str(find_demo_model())
    return options


def at_most(most: int) -> Callable[[str], int]:
    """Returns a function that parses an integer from 1 to `most`, for argparse."""

    def number(text: str) -> int:
        if count(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}: use a smaller number")
        return int(text)

    return number


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot write to {path} ({error.strerror}): choose another --output")


def make_bars(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console)


def as_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome) | {"exposure_bits": {run: outcome.exposures(run) for run in RUNS}}


def show(console: Console, outcome: Outcome, picture: Path) -> None:
    total = outcome.candidates + 1
    table = Table(title=f"Rank of the true code among {total} (rank 1: the model remembers it)")
    table.add_column("alarm code of")
    for run in RUNS:
        table.add_column(run, justify="right")
    for secret in outcome.secrets:
        table.add_row(secret.name, *(str(secret.ranks[run]) for run in RUNS))
    table.add_section()
    means = [statistics.mean(outcome.exposures(run)) for run in RUNS]
    table.add_row(f"mean exposure (of {math.log2(total):.1f} bits)", *(f"{x:.1f}" for x in means))
    losses = [outcome.held_out_loss[run] for run in RUNS]
    table.add_row("loss on held-out notes", *(f"{x:.2f}" for x in losses))
    console.print(table, in_words(outcome), sep="\n", highlight=False)
    console.print(f"Written: {picture}, and ranks.json in the same folder.", soft_wrap=True)


def in_words(outcome: Outcome) -> str:
    number, losses = len(outcome.secrets), outcome.held_out_loss
    return (
        f"Without privacy {outcome.first_guesses(OPEN)} of {number} codes are the model's first"
        f" guess. With epsilon {outcome.epsilon:.2f} spent (delta {outcome.delta:g}),"
        f" {outcome.first_guesses(PRIVATE)} of {number} are.\n"
        f"The loss on held-out notes is {losses[BASE]:.2f} before training, {losses[OPEN]:.2f}"
        f" without privacy, {losses[PRIVATE]:.2f} with privacy."
    )


def plot_ranks(outcome: Outcome, path: Path) -> None:
    """Draws one line per secret and run, from the rank before training to the rank after it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for run, shift in ((OPEN, -SHIFT), (PRIVATE, SHIFT)):
        draw_run(axes, outcome, run, shift)
    before = [secret.ranks[BASE] for secret in outcome.secrets]
    style = {"facecolors": "white", "edgecolors": GREY, "zorder": 3, "label": BASE}
    axes.scatter(before, range(len(before)), s=60, **style)
    middle = outcome.candidates / 2 + 1
    axes.axvline(middle, color=GREY, linewidth=1, linestyle=":", label="blind guess, on average")
    dress(axes, outcome)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def draw_run(axes: Any, outcome: Outcome, run: str, shift: float) -> None:
    for row, secret in enumerate(outcome.secrets):
        ranks = [secret.ranks[BASE], secret.ranks[run]]
        axes.plot(ranks, [row, row + shift], color=COLORS[run], linewidth=1.4, alpha=0.6, zorder=1)
    after = [secret.ranks[run] for secret in outcome.secrets]
    label = run if run == OPEN else f"{run}, epsilon {outcome.epsilon:.2g}"
    rows = [row + shift for row in range(len(after))]
    axes.scatter(after, rows, s=70, color=COLORS[run], zorder=4, label=label, clip_on=False)


def dress(axes: Any, outcome: Outcome) -> None:
    total = outcome.candidates + 1
    axes.set_xscale("log")
    axes.set_xlim(0.9, total * 1.1)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000) if tick <= total]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(outcome.secrets)), [secret.name for secret in outcome.secrets])
    axes.invert_yaxis()
    axes.set_xlabel(f"rank of the true code among {total}: at rank 1 the model reveals it")
    axes.set_title("What a model remembers of its training data", loc="left", fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    try:
        main()
    except TGTinkerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print("Stopped. Nothing was written.", file=sys.stderr)
        sys.exit(exit_status(stop))
