"""Measures how much a run still learns under privacy, on the task of the demo.

The demo runs three times, without privacy and with two budgets. All runs have the same adapter,
rows, steps, batch and learning rate. "Gap closed" is the fall of the held-out loss with privacy,
divided by the fall without privacy.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Bench, Run, Sheet
from tg_tinker import ServiceClient
from tg_tinker.demo.options import DemoOptions
from tg_tinker.demo.run import run_demo

EPSILONS = (8.0, 3.0)


@dataclass(frozen=True)
class Found:
    """Losses in nats per token on held-out rows; `facts` come from the ledger of a private run."""

    before: float
    after: float
    facts: str = ""

    @property
    def fall(self) -> float:
        return self.before - self.after


def demo(options: DemoOptions) -> Found:
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


def run(bench: Run) -> None:
    steps = bench.repeats or DemoOptions.steps
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        plain = demo(DemoOptions(no_privacy=True, steps=steps, output=output))
        private = {
            epsilon: demo(DemoOptions(epsilon=epsilon, steps=steps, output=output))
            for epsilon in EPSILONS
        }
    rows = [("no privacy", f"{plain.before:.3f}", f"{plain.after:.3f}", "", "")]
    for epsilon, found in private.items():
        losses = f"{found.before:.3f}", f"{found.after:.3f}"
        closed = f"{found.fall / plain.fall:.0%}"
        rows.append((f"epsilon {epsilon:g}", *losses, closed, found.facts))
    title = f"{DemoOptions.batch_size} rows per step, {steps} steps"
    bench.sheets.append(Sheet(title, ("run", "before", "after", "gap closed", "noise"), rows))


BENCH = Bench("utility", "the demo with and without privacy (--repeats: its steps)", 20, run)
