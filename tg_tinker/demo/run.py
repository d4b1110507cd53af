"""Runs `tg-tinker demo`: a real, private fine-tune from start to finish, by the public API.

`Demo.run` shows all steps, and is a template for your own training loop. Every run is private and
has its own dataset, and so its own privacy budget. `no_privacy` trains on the same rows without
privacy. Ctrl-C, SIGTERM or SIGHUP at any moment cancels the queued calls, saves a checkpoint and
prints the command that continues. A second one exits without a checkpoint. `options` makes the
configuration, `docstrings` makes the text, and `outcome` prints and writes the results. The service
does all training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.text import Text

from tg_tinker.client.future import FutureHandle
from tg_tinker.client.service import ServiceClient
from tg_tinker.client.training import TrainingClient
from tg_tinker.cluster.interrupts import exit_status, stops_held_back
from tg_tinker.config import TrainingConfig
from tg_tinker.data.batch import IGNORED, BatchData
from tg_tinker.data.chat import encode_row, render_row_prompt
from tg_tinker.data.rows import Encoded, Row, as_batch, ids_of, make_batches, split_rows
from tg_tinker.demo.meter import Meter, StepRecord
from tg_tinker.demo.options import (
    DemoOptions,
    prepare,
    private_config,
    resume_command,
    short_name,
)
from tg_tinker.demo.outcome import Answers, Outcome, show_command, show_privacy
from tg_tinker.errors import (
    InternalError,
    InvalidRequestError,
    TGTinkerError,
)
from tg_tinker.records.report import PrivacyInfo, dataset_of
from tg_tinker.types import (
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
)

HELD_OUT = 48
"""The maximum number of rows that are held out. A small file holds out a fifth of its rows."""

SHOWN = 3
"""The number of held-out rows whose answers are shown."""

_FEW = 10  # with fewer rows per expected row of a step, noise hides what the model learns
_ANSWER_TOKENS = 40
_T = TypeVar("_T")


@dataclass(frozen=True)
class DemoData:
    """Encoded rows for training and for held-out loss, and the rows whose answers are shown."""

    training: list[Encoded]
    held_out: list[Encoded]
    shown: list[Row]

    @property
    def unit(self) -> Literal["example", "id"]:
        """What a private run protects: all rows of an id if the rows have ids, else each row."""
        return "example" if ids_of(self.training) is None else "id"

    @property
    def num_units(self) -> int:
        return len(set(ids_of(self.training) or range(len(self.training))))


def run_demo(
    options: DemoOptions,
    console: Console | None = None,
    connect: Callable[[], ServiceClient] = ServiceClient,
    program: str = "tg-tinker",
) -> int:
    """Runs the demo; returns the exit status: 0, or that of shells after a signal (130 for Ctrl-C).

    Args:
        options: see `DemoOptions`.
        console: the console to print to; the terminal if None.
        connect: returns the service.
        program: the name by which the user calls this program, for suggested commands.
    """
    console = console or Console()
    try:
        config, rows = prepare(options)
        with connect() as service:
            demo = Demo(options, config, service, console, program)
            try:
                demo.run(rows)
            except KeyboardInterrupt as stop:
                demo.leave()
                return exit_status(stop)
    except KeyboardInterrupt as stop:
        console.print("\nStopped.")
        return exit_status(stop)
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
        self._budget: float | None = None  # of epsilon, in a private run
        self._answers = Answers()
        self._in_flight: list[FutureHandle[Any]] = []

    def run(self, rows: Sequence[Row]) -> None:
        client, data = self._begin(rows)
        before = self._evaluate(client, data.held_out, "before training")
        self._complete(client, data.shown, "before training")
        history = self._train(client, data.training)
        after = self._evaluate(client, data.held_out, "after training")
        self._complete(client, data.shown, "after training")
        saved = self._save(client, after)
        self._check_resume(self._end(client), saved, after, data)
        outcome = Outcome(self._options, client.config, history, before, after, saved)
        outcome.write(short_name(self._config.model_ref), self._budget)
        self._report_privacy(client)
        outcome.show_next(self._console, self._program)

    def leave(self) -> None:
        """Cancels queued calls, saves a checkpoint, and prints the command that continues."""
        self._console.print("\n[bold]Stopping.[/] Ctrl-C again exits without a checkpoint.")
        try:
            if self._client is not None:
                # The newest call first, so that no step runs on half of its gradients.
                for handle in reversed(self._in_flight):
                    handle.cancel()
                self._artifact_id = self._save_state(self._client).artifact_id
        except TGTinkerError as error:
            self._console.print(Text(f"No checkpoint was saved: {error}", style="red"))
        if self._artifact_id is None:
            self._console.print("Nothing was trained yet.")
        else:
            self._console.print(f"Checkpoint: [bold]{self._artifact_id}[/]. Continue with")
            command = resume_command(self._options, self._artifact_id, self._program)
            show_command(self._console, command)

    # --- the parts of `run`, in order --------------------------------------------------------

    def _begin(self, rows: Sequence[Row]) -> tuple[TrainingClient, DemoData]:
        """Returns a client and its data.

        A new private run must state the number of its rows, so they are encoded before.
        """
        if self._options.no_privacy or self._artifact_id is not None:
            client = self._client = self._open(self._artifact_id)
            data = self._encode(client, rows)
        else:
            with self._create(self._config) as reader:  # trains nothing, only for its tokenizer
                data = self._encode(reader, rows)
            self._config = private_config(self._config, self._options, data.num_units, data.unit)
            client = self._client = self._open(None)
        privacy = client.privacy
        if privacy is not None:
            self._budget = privacy.target_epsilon
            self._explain(privacy, data.num_units)
        return client, data

    def _open(self, artifact_id: str | None) -> TrainingClient:
        """Returns a client of a new run, or of a run that continues from an artifact.

        A private artifact continues in its own run, which has the budget. Without privacy, a new
        run with the present options starts from the artifact.
        """
        if artifact_id is not None and not self._options.no_privacy:
            return self._take_up(artifact_id)
        client = self._create(self._config)
        if artifact_id is not None:
            self._refuse_private(self._load(client, artifact_id), artifact_id)
        return client

    def _create(self, config: TrainingConfig) -> TrainingClient:
        return self._starting(
            lambda said: self._service.create_training_client(config, progress=said)
        )

    def _take_up(self, artifact_id: str) -> TrainingClient:
        run = self._service.get_artifact(artifact_id).training_client_id
        client = self._starting(lambda said: self._service.get_training_client(run, said))
        if not client.config.private:
            client.close()
            raise InvalidRequestError(
                f"{artifact_id} was trained without privacy, and no later step can add it: continue"
                " with --no-privacy, or start a new run without --resume"
            )
        self._load(client, artifact_id)
        return client

    def _starting(self, start: Callable[[Callable[[str], None]], TrainingClient]) -> TrainingClient:
        with self._console.status("starting") as status:
            return start(lambda said: status.update(Text(said)))

    def _load(self, client: TrainingClient, artifact_id: str) -> LoadStateResult:
        with self._console.status("loading the checkpoint"):
            return client.load_state(artifact_id)

    def _refuse_private(self, loaded: LoadStateResult, artifact_id: str) -> None:
        dataset = loaded.metadata.get("dataset_id")
        if dataset is not None:
            raise InvalidRequestError(
                f"{artifact_id} was trained privately on dataset {dataset}, and steps without"
                " privacy would void its guarantee: leave out --no-privacy to continue, or --resume"
                " to start a new run"
            )

    def _explain(self, privacy: PrivacyInfo, num_units: int) -> None:
        """Prints the contract of the run, in words for a first-time reader."""
        unit = "example_id" if privacy.unit == "id" else "row"
        self._console.print(
            f"[bold]Private[/]: epsilon {privacy.target_epsilon:g} at delta {privacy.delta:g} for"
            f" each of {num_units:,} {unit}s. For each step the server draws about"
            f" {privacy.expected_batch} {unit}s, clips the gradient of each to norm"
            f" {privacy.max_grad_norm:g} and adds noise of {privacy.noise_multiplier:.3g} times"
            f" this norm. The budget pays for {privacy.limit} steps.\n"
        )
        if num_units < _FEW * privacy.expected_batch:
            self._console.print(
                "So few rows are hard to learn from privately: the noise must hide any single row,"
                " and is the same for a hundred rows as for a million. Expect little progress.\n",
                style="yellow",
            )

    def _encode(self, client: TrainingClient, rows: Sequence[Row]) -> DemoData:
        with self._console.status(f"encoding {len(rows):,} rows"):
            encoded, rows = self._encode_usable(client.tokenizer, rows)
            pairs = list(zip(encoded, rows, strict=True))
        # Without ids, the unit of privacy is a distinct row.
        if not self._options.no_privacy and ids_of(encoded) is None:
            pairs = list({tuple(pair[0][0]): pair for pair in reversed(pairs)}.values())[::-1]
        held_out = min(HELD_OUT, max(1, len(pairs) // 5))
        training, kept = split_rows(pairs, held_out, self._options.seed)
        self._console.print(
            f"Fine-tuning [bold]{short_name(self._config.model_ref)}[/] on {len(training):,} rows"
            f" with a LoRA adapter of {client.info().num_trainable:,} parameters; {len(kept)} rows"
            " are held out.\n"
        )
        return DemoData(
            [e for e, _ in training], [e for e, _ in kept], [row for _, row in kept[:SHOWN]]
        )

    def _encode_usable(
        self, tokenizer: Any, rows: Sequence[Row]
    ) -> tuple[list[Encoded], list[Row]]:
        """Returns the rows that have a labeled token within `max_length`, encoded and as they are.

        Prints how many other rows were left out, and why.
        """
        encoded, kept, problem = [], [], None
        for index, row in enumerate(rows):
            try:
                encoded.append(encode_row(tokenizer, row, self._options.max_length))
                kept.append(row)
            except InvalidRequestError as error:
                problem = problem or error.message.replace("the row", f"row {index}", 1)
        if problem is not None:
            self._console.print(
                Text(f"Left out {len(rows) - len(kept)} of {len(rows)} rows; {problem}"),
                style="yellow",
            )
        if not kept:
            raise InvalidRequestError(f"no row can be used; {problem}")
        return encoded, kept

    def _evaluate(self, client: TrainingClient, rows: Sequence[Encoded], when: str) -> float:
        """Returns and prints the mean loss per labeled token over held-out rows."""
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
        weights = [sum(_num_labeled(row) for row in part) for part in parts]
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    def _complete(self, client: TrainingClient, rows: Sequence[Row], when: str) -> None:
        """Prints the model's present answers, its earlier answers, and the held-out rows."""
        prompts = [render_row_prompt(client.tokenizer, row) for row in rows]
        with self._console.status(f"sampling {when}"):
            result = client.sample(prompts, max_tokens=_ANSWER_TOKENS, temperature=0.0)
        self._answers.add(when, [sample.completion for sample in result.samples])
        self._answers.show(self._console, rows)

    def _train(self, client: TrainingClient, rows: Sequence[Encoded]) -> list[StepRecord]:
        """Trains up to the wanted step and returns the records of the steps.

        Shows loss, epsilon, speed and time left.
        """
        history: list[StepRecord] = []
        first = client.step
        wanted = max(0, self._options.steps - first)
        with Meter(self._console, wanted, self._budget) as meter:
            for record in self._steps(client, islice(self._batches(client, rows), wanted)):
                history.append(record)
                meter.show(record)
        if not wanted:
            self._console.print(f"Step {first} is reached already: --steps sets a later end.")
        elif len(history) < wanted:
            self._console.print("The privacy budget pays for no further step.")
        return history

    def _batches(self, client: TrainingClient, rows: Sequence[Encoded]) -> Iterator[BatchData]:
        """Returns the batches that remain for this client.

        In a private run these are the server's draws, else shuffled epochs.
        """
        if client.config.private:
            return client.poisson_batches(as_batch(rows))
        batches = make_batches(rows, self._options.batch_size, self._options.seed)
        return islice(batches, client.step, None)

    def _steps(self, client: TrainingClient, batches: Iterator[BatchData]) -> Iterator[StepRecord]:
        """Yields the records of steps in order.

        Sends each step before it waits for the previous one, so that the actor never idles. In a
        private run the server draws a batch only after the previous step, so there is no queue.
        """
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
        found, done = self._wait(gradient), self._wait(step)
        return StepRecord(
            done.step, found.loss, found.num_tokens, time.perf_counter() - started,
            done.dp_metrics.total_epsilon if done.dp_metrics else None,
        )  # fmt: skip

    def _save(self, client: TrainingClient, held_out_loss: float) -> SaveStateResult:
        with self._console.status("saving"):
            saved = self._save_state(client, held_out_loss=held_out_loss)
        self._artifact_id = saved.artifact_id
        self._console.print(
            f"Saved [bold]{saved.artifact_id}[/]: {saved.size_bytes / 1e6:.1f} MB, encrypted with"
            f" {saved.encryption.algorithm}."
        )
        return saved

    def _save_state(self, client: TrainingClient, **notes: Any) -> SaveStateResult:
        if client.config.private:
            notes["dataset_id"] = dataset_of(client.config)
        return client.save_state(metadata=notes)

    def _end(self, client: TrainingClient) -> int:
        """Closes the client and returns its last step. Its GPU is free for the next client."""
        step, self._client = client.step, None
        client.close()
        return step

    def _check_resume(self, step: int, saved: SaveStateResult, loss: float, data: DemoData) -> None:
        """Resumes the checkpoint in a new client, compares the two, and takes one more step."""
        with self._open(saved.artifact_id) as client:
            resumed_step, resumed_loss = client.step, self._mean_loss(client, data.held_out)
            if step != resumed_step or not math.isclose(loss, resumed_loss, rel_tol=1e-5):
                raise InternalError(
                    f"the resumed run differs: step {resumed_step} instead of {step}, held-out"
                    f" loss {resumed_loss:.6f} instead of {loss:.6f}"
                )
            batches = islice(self._batches(client, data.training), 1)
            record = next(self._steps(client, batches), None)
        self._console.print(
            f"Resumed in a new client: step {resumed_step} and held-out loss {resumed_loss:.4f},"
            f" as saved. {_one_more(record)}\n"
        )

    def _report_privacy(self, client: TrainingClient) -> None:
        """Prints the privacy that the finished run has spent, from its ledger, verified here."""
        if not client.config.private:
            self._console.print(
                "Trained without privacy: nothing limits what the model remembers.\n"
            )
            return
        report = self._service.privacy_report(dataset_of(client.config))
        show_privacy(self._console, report, client.id)

    # --- inside ------------------------------------------------------------------------------

    def _send_batch(
        self, client: TrainingClient, batch: BatchData
    ) -> FutureHandle[ForwardBackwardResult]:
        return self._send(lambda: client.forward_backward(batch))

    def _send_step(self, client: TrainingClient) -> FutureHandle[OptimStepResult]:
        return self._send(client.optim_step)

    def _send(self, call: Callable[[], FutureHandle[_T]]) -> FutureHandle[_T]:
        with stops_held_back():
            handle = call()
            self._in_flight.append(handle)
        return handle

    def _wait(self, handle: FutureHandle[_T]) -> _T:
        result = handle.result()
        self._in_flight.remove(handle)
        return result


def _one_more(record: StepRecord | None) -> str:
    if record is None:
        return "The privacy budget pays for no further step."
    spent = "" if record.epsilon is None else f", epsilon {record.epsilon:.2f}"
    return f"Step {record.step} from there: loss {record.loss:.4f}{spent}."


def _num_labeled(row: Encoded) -> int:
    """Returns the number of labels that count in the loss: not that of a row's first token."""
    return sum(label != IGNORED for label in row[1][1:])
