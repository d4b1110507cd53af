"""Continue a run that another process started and saved, exactly where it stopped.

    python examples/train_chat.py
    python examples/resume.py

`get_training_client` restores the run from its newest artifact, with its original configuration.
The data and the seed determine the rows and their order, so the next batch is the one that would
have followed.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice

from train_chat import count, encode, evaluate, load_rows, show_answer, train_and_save

from tg_tinker import ServiceClient, TGTinkerError, exit_status
from tg_tinker.data import make_batches

EPILOG = """\
examples:
  python examples/resume.py                              the newest run that saved something
  python examples/resume.py tc-0123456789abcdef --steps 50
  python examples/resume.py --data chats.jsonl           the same data as for train_chat.py

`tg-tinker runs` lists runs. Steps after the newest artifact are lost; a warning shows how many.
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continue a run of train_chat.py in a new process.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_id", nargs="?", help="id of the run (default: the newest run with an artifact)"
    )
    parser.add_argument(
        "--data", help="file that the run was trained on (default: the rows in train_chat.py)"
    )
    parser.add_argument("--steps", type=count, default=10, help="additional steps (default: 10)")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rows = load_rows(options.data)
    with ServiceClient() as service:
        run_id = options.run_id or newest_run(service)
        with service.get_training_client(run_id, print) as tc:
            print(f"run {tc.id} is at step {tc.step}")
            training, held_out = encode(tc, rows)
            print(f"held-out loss before: {evaluate(tc, held_out):.3f}")
            batches = make_batches(training, tc.config.batch_size, tc.config.seed)
            train_and_save(tc, islice(batches, tc.step, tc.step + options.steps))
            print(f"held-out loss after: {evaluate(tc, held_out):.3f}")
            show_answer(tc, rows[0])


def newest_run(service: ServiceClient) -> str:
    saved = [run for run in service.list_training_clients() if run.last_artifact_id]
    if not saved:
        sys.exit("error: no run has saved an artifact: first run python examples/train_chat.py")
    return saved[-1].training_client_id


if __name__ == "__main__":
    try:
        main()
    except TGTinkerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(exit_status(stop))
