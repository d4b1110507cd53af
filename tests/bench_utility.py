"""How much of what a run learns is left under privacy, on the demo's own task.

Run by `make bench-utility`. The demo runs three times, without privacy and with two budgets, with
the same adapter, rows, steps, batch and learning rate. "Gap closed" is the fall of the held-out
loss with privacy over the fall without.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tg_tinker import ServiceClient
from tg_tinker.demo import DemoOptions, run_demo


@dataclass(frozen=True)
class Found:
    """Losses in nats per token on rows held out; `facts` are in the ledger of a private run."""

    before: float
    after: float
    facts: str = ""

    @property
    def fall(self) -> float:
        return self.before - self.after


def run(options: DemoOptions) -> Found:
    if run_demo(options) != 0:
        raise SystemExit("stopped")
    history = json.loads((options.output / "history.json").read_text())
    found = history["held_out_loss_before"], history["held_out_loss_after"]
    if options.no_privacy:
        return Found(*found)
    with ServiceClient() as service:
        ledger = service.privacy_report(history["dataset_id"]).ledger
    (account,) = ledger.accounts.values()
    return Found(*found, f"sigma {account.sigma:.3g}, q {account.rate:.2%}, {account.steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=DemoOptions.steps)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 3.0])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        plain = run(DemoOptions(no_privacy=True, steps=chosen.steps, output=output))
        private = {
            epsilon: run(DemoOptions(epsilon=epsilon, steps=chosen.steps, output=output))
            for epsilon in chosen.epsilon
        }
    title = f"{DemoOptions.batch_size} rows a step, {chosen.steps} steps"
    table = Table("run", "before", "after", "gap closed", "noise", title=title)
    table.add_row("no privacy", f"{plain.before:.3f}", f"{plain.after:.3f}", "", "")
    for epsilon, found in private.items():
        closed = f"{found.fall / plain.fall:.0%}"
        losses = f"{found.before:.3f}", f"{found.after:.3f}"
        table.add_row(f"epsilon {epsilon:g}", *losses, closed, found.facts)
    Console().print(table)


if __name__ == "__main__":
    main()
