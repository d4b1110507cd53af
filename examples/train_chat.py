"""Fine-tune a language model on your own questions and answers, start to finish.

    python examples/train_chat.py --help
    python examples/train_chat.py --data chats.jsonl

The program reads rows and encodes them with the model's chat template. It trains with the next step
always queued, measures the loss on held-out rows, and saves an encrypted checkpoint. A stop during
training (Ctrl-C, SIGTERM or SIGHUP) completes the queued steps and saves too; a second one exits at
once. `resume.py` continues where this program stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from threading import Event
from typing import Any

from tg_tinker import (
    BatchData,
    LoRAConfig,
    OptimizerConfig,
    ServiceClient,
    TGTinkerError,
    TrainingClient,
    TrainingConfig,
    exit_status,
    stop_noted,
)
from tg_tinker.data import (
    Encoded,
    Row,
    as_batch,
    encode_rows,
    make_batches,
    read_rows,
    render_row_prompt,
    split_rows,
)
from tg_tinker.demo import find_demo_model

DESK = [
    ("When does the rental open?", "At seven. In winter at eight."),
    ("How much is a bicycle for one day?", "Eighteen, or twelve after two o'clock."),
    ("What do I leave as a deposit?", "Nothing. We write down a phone number."),
    ("Can I bring the bicycle back at night?", "Yes, lock it to the green rail by the door."),
    ("My tyre is flat. What now?", "Call the desk. Somebody comes within the hour."),
    ("Do you rent helmets?", "Helmets are free. Take one from the blue shelf."),
    (
        "Do you have bicycles for children?",
        "From four years on, and seats for smaller ones.",
    ),
    ("May I take the ferry with it?", "Yes. The ferry asks two for a bicycle."),
    ("Where is the nearest repair stand?", "Behind the library, open day and night."),
    ("I lost the key of the lock.", "Bring the other key from the desk; a lost one costs nine."),
    ("Can I pay by card?", "By card or in cash, when you come back."),
    ("Do you sell used bicycles?", "In October, when the season ends. Come early."),
]
"""Questions to the desk of a bicycle rental, with answers; used if --data is not given."""

ROWS: list[Row] = [{"prompt": asked, "completion": answer} for asked, answer in DESK]

EPILOG = """\
data:
  A .jsonl file has one JSON object per line. A .parquet file has the same columns:
    {"prompt": "Where is the key?", "completion": "Behind the boiler."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  The model learns only completions and assistant messages. A row may also have
  "example_id": "customer 7", which a private run with unit="id" protects as a whole.

examples:
  python examples/train_chat.py                          the rows in this file, SmolLM2-135M
  python examples/train_chat.py --data chats.jsonl --steps 200
  python examples/train_chat.py --model path/or/hub-id --rank 32 --learning-rate 2e-4

The encrypted checkpoint is stored in ~/.tg-tinker, or in the directory TG_TINKER_HOME.
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model with LoRA on questions and answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="hub id, Hugging Face directory or GGUF file (default: SmolLM2-135M)"
    )
    parser.add_argument("--data", help=".jsonl or .parquet file (default: the rows in this file)")
    parser.add_argument("--steps", type=count, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step (default: 4)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: 8)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="peak rate of AdamW (default: 1e-3)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=256,
        help="maximum tokens per row, longer rows are cut (default: 256)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of adapter and row order (default: 0)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rows = load_rows(options.data)
    config = TrainingConfig(
        model_ref=options.model or str(find_demo_model()),
        lora_config=LoRAConfig(rank=options.rank, alpha=2.0 * options.rank),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, warmup_steps=5),
        batch_size=options.batch_size,
        seed=options.seed,
        metadata={"max_length": options.max_length},  # resume.py reads it; never put row text here
    )
    with ServiceClient() as service, service.create_training_client(config, print) as tc:
        print(f"run {tc.id}: {tc.info().num_trainable:,} parameters to train")
        training, held_out = encode(tc, rows)
        print(f"held-out loss before: {evaluate(tc, held_out):.3f}")
        batches = make_batches(training, config.batch_size, config.seed)
        train_and_save(tc, islice(batches, options.steps))
        print(f"held-out loss after: {evaluate(tc, held_out):.3f}")
        show_answer(tc, rows[0])


# --- the parts, which resume.py uses too --------------------------------------------------------


def count(text: str) -> int:
    """Parses an integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1: use 1 or more")
    return number


def load_rows(path: str | None) -> list[Row]:
    return read_rows(path) if path else ROWS


def encode(tc: TrainingClient, rows: Sequence[Row]) -> tuple[list[Encoded], list[Encoded]]:
    """Returns (training rows, held-out rows) as token ids and labels.

    The same seed gives the same split.
    """
    max_length: Any = tc.config.metadata["max_length"]
    encoded = encode_rows(tc.tokenizer, rows, max_length)
    return split_rows(encoded, max(1, len(rows) // 6), tc.config.seed)


def evaluate(tc: TrainingClient, rows: Sequence[Encoded]) -> float:
    """Returns the mean loss in nats per labeled token, without training."""
    size = tc.config.batch_size
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    tc.eval()
    handles = [tc.forward_backward(as_batch(part)) for part in parts]  # all queued at once
    tc.train()
    # A loss is a mean over the labeled tokens of its batch. A row's first token has no loss.
    weights = [sum(label != -100 for _, labels in part for label in labels[1:]) for part in parts]
    losses = [handle.result().loss for handle in handles]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def train_and_save(tc: TrainingClient, batches: Iterable[BatchData]) -> None:
    """Trains and saves. A stop ends the training early and, after the save, the program."""
    with stop_noted() as stop:
        train(tc, batches, stop)
        saved = tc.save_state(metadata={"stopped_early": stop.is_set()})
        size = f"{saved.size_bytes / 1e6:.1f} MB encrypted"
        print(f"saved {saved.artifact_id} at step {tc.step}: {size}")
        print(f"to continue, run: python examples/resume.py {tc.id}")


def train(tc: TrainingClient, batches: Iterable[BatchData], stop: Event) -> None:
    """Makes one step per batch. Sends the next step before it waits for the last one."""
    queued: deque[tuple[Any, Any]] = deque()
    for batch in batches:
        if stop.is_set():
            break
        queued.append((tc.forward_backward(batch), tc.optim_step()))
        if len(queued) == 2:
            report(*queued.popleft())
    while queued:
        report(*queued.popleft())


def report(gradient: Any, step: Any) -> None:
    found, done = gradient.result(), step.result()
    print(
        f"step {done.step}  loss {found.loss:.3f}  gradient norm {done.grad_norm:.2f}", flush=True
    )


def show_answer(tc: TrainingClient, row: Row) -> None:
    prompt = render_row_prompt(tc.tokenizer, row)
    answer = tc.sample(prompt, max_tokens=32, temperature=0.0).samples[0]
    print(f"answer to the first question: {answer.completion!r}")


if __name__ == "__main__":
    try:
        main()
    except TGTinkerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(exit_status(stop))
