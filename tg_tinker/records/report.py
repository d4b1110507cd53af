"""Describes the privacy of a run and of a dataset: plain values, a report and a certificate.

    report = service.privacy_report("patients")    # the ledger, replayed and verified here
    print(report)
    report.certificate()                           # a JSON object

No value in this module is computed from training data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tg_tinker.config import TrainingConfig
from tg_tinker.errors import IntegrityError, NotFoundError, ServiceError
from tg_tinker.records.entries import Entry, place_of
from tg_tinker.records.ledger import Account, Ledger

DEFAULT_DATASET = "default"
"""The dataset of a private run that names none."""

UNITS = {
    "example": "one example: a distinct sequence of input tokens",
    "id": "all rows of one example_id",
}
OUTSIDE = (
    "Loss, gradient norms, num_clipped and gradient hashes: exact values for the data owner.",
    "Membership and number of units and their ids; without Poisson sampling also when each took"
    " part.",
    "Text that appears in several units: each unit is protected on its own.",
    "The base model, which saw other data before.",
    "An owner who gives one unit several identities.",
)
VOUCHED_BY = {
    "participation": "server: counted uses",
    "poisson": "server: drawn samples",
    "client_poisson": "owner: asserted samples",
    "worst_case": "nobody: worst case",
}
PRESUMED = (
    "The guarantee presumes that batches, hyper-parameters, stopping and the choice of checkpoint"
    " did not depend on losses, norms or clip counts of private data."
)
PRESUMED_OF_SAMPLES = (
    " It also presumes that the drawn samples stay secret: whoever knows which units took part in"
    " which step has the guarantee of a run without sampling."
)


def dataset_of(config: TrainingConfig) -> str:
    """Returns the dataset whose budget a private run spends."""
    return config.dataset_id or DEFAULT_DATASET


@dataclass(repr=False)
class Charge:
    """The registry's durable receipt for one step, which pays for one draw of noise.

    Attributes:
        dataset: the dataset whose ledger holds the charge.
        head, entry: the hash and the number of the ledger entry of this charge.
        epsilon_spent: the total epsilon after the charge minus the total before it.
        total_epsilon: the epsilon spent by all runs of the dataset together.
        count: the contract's count after this charge: uses of the most used unit, or steps.
    """

    charge_id: str
    dataset: str
    head: str
    entry: int
    sigma: float
    noised: bool
    epsilon_spent: float
    total_epsilon: float
    delta: float
    count: int
    spent: bool = False

    @property
    def place(self) -> str:
        """The position of the ledger's end after this charge, ``SEQ-HASH``."""
        return place_of(self.entry, self.head)

    def spend(self) -> float:
        """Returns the noise multiplier of the one draw that this charge pays for.

        Returns 0 for a step without noise.

        Raises:
            ServiceError: the charge was used before. A second draw would be a second release.
        """
        if self.spent:
            raise ServiceError("a charge pays for one draw of noise, and this one was used before")
        self.spent = True
        return self.sigma if self.noised else 0.0


@dataclass(frozen=True)
class PrivacyInfo:
    """The privacy of one run: its contract, what is left, and the epsilon of its dataset.

    Attributes:
        dataset_id: the dataset whose budget pays.
        contract: ``participation``, ``poisson``, ``client_poisson`` or ``worst_case``.
        unit: ``example`` or ``id``.
        noise_multiplier: sigma. The standard deviation of the noise is sigma x `max_grad_norm`.
        max_grad_norm: C, the bound of a unit's gradient norm.
        expected_batch: the public divisor of a step.
        used: the uses of the most used unit (participation), or the steps.
        limit: how many uses or steps the budget pays for; None means no limit.
        total_epsilon: the epsilon spent by all runs of the dataset.
        target_epsilon: the dataset's limit; infinite if it has none.
        delta: the delta of the dataset.
        accountant: the method that computes epsilon; ``exact`` for Gaussian contracts.
        message: what the contract allows, and how to get more from the budget.
    """

    dataset_id: str
    contract: str
    unit: str
    noise_multiplier: float
    max_grad_norm: float
    expected_batch: int
    used: int
    limit: int | None
    total_epsilon: float
    target_epsilon: float
    delta: float
    accountant: str
    message: str

    @property
    def left(self) -> int | None:
        """The uses of a unit, or the steps, that this run has left; None means no limit."""
        return None if self.limit is None else max(0, self.limit - self.used)


def describe_run(ledger: Ledger, run_id: str) -> PrivacyInfo:
    """Returns the privacy of one run, from the ledger of its dataset."""
    account = ledger.accounts[run_id]
    facts = account.facts
    return PrivacyInfo(
        dataset_id=ledger.registered["dataset"],
        contract=account.contract,
        unit=ledger.registered["unit"],
        noise_multiplier=account.sigma,
        max_grad_norm=facts["bound"],
        expected_batch=facts["batch"],
        used=account.count,
        limit=account.limit,
        total_epsilon=ledger.epsilon,
        target_epsilon=ledger.limit,
        delta=ledger.delta,
        accountant=account.accountant,
        message=facts["message"],
    )


@dataclass(frozen=True, repr=False)
class PrivacyReport:
    """The ledger of a dataset, verified by replay.

    Attributes:
        entries: the whole ledger; `Ledger.replay(entries)` verifies it anywhere.
        ledger: the state that the entries lead to.
    """

    entries: Sequence[Entry]
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ledger", Ledger.replay(self.entries))

    @property
    def total_epsilon(self) -> float:
        return self.ledger.epsilon

    @property
    def target_epsilon(self) -> float:
        return self.ledger.limit

    def certificate(self) -> dict[str, Any]:
        """Returns a JSON object: what may be claimed about everything trained on this dataset."""
        ledger = self.ledger
        return {
            "format": "tg-tinker privacy certificate v1",
            "dataset": ledger.registered["dataset"],
            "registered": {"epsilon": ledger.registered["epsilon"], "delta": ledger.delta},
            "spent": {"epsilon": _number(ledger.epsilon), "delta": ledger.delta},
            "guarantee": not any(self._opt_outs()) and ledger.epsilon <= ledger.limit,
            "adjacency": "zero-out: one unit is replaced by a null example; the number of units,"
            " their ids, the schedule and the batch size are public",
            "unit": UNITS[ledger.registered["unit"]],
            "runs": {run: _run(account) for run, account in ledger.accounts.items()},
            "opt_outs": list(self._opt_outs()),
            "linked_datasets": sorted(ledger.linked),
            "ledger": {"birth": ledger.birth, "head": ledger.head, "entries": ledger.length},
            "presumes": PRESUMED + (PRESUMED_OF_SAMPLES if self.sampled else ""),
            "outside": list(OUTSIDE),
        }

    def check_head(self, head: str | None) -> None:
        """Checks that the ledger once ended with this head, the hash of an entry.

        Does nothing if `head` is None.

        Raises:
            IntegrityError: the ledger never had this head. Its end was cut off, or it is the ledger
                of another dataset.
        """
        if head is not None and head not in {entry["hash"] for entry in self.entries}:
            raise IntegrityError(
                f"the ledger never had the head {head!r}: its end was cut off, or it belongs to"
                " another dataset. Ask for the whole ledger of this dataset"
            )

    @property
    def sampled(self) -> bool:
        """Whether the accounting of any run relies on Poisson samples."""
        return any(account.poisson for account in self.ledger.accounts.values())

    def _opt_outs(self) -> Iterator[str]:
        """Yields the reasons why weights may be without the guarantee."""
        if self.ledger.unnoised:
            yield "a step was made without noise: epsilon is infinite from there on"
        for run, account in self.ledger.accounts.items():
            if account.facts.get("nonprivate_init"):
                yield f"{run} may start from weights that were trained without privacy"
            if account.refuted:
                yield (
                    f"{run} asserted Poisson samples that did not look drawn: it is counted by"
                    " participation, from its first step"
                )

    def __str__(self) -> str:
        ledger = self.ledger
        lines = [
            f"dataset {ledger.registered['dataset']}: epsilon {ledger.epsilon:.4g} of"
            f" {ledger.limit:g} spent, delta {ledger.delta:g}",
            f"unit: {UNITS[ledger.registered['unit']]}",
        ]
        for run, account in ledger.accounts.items():
            limit = "no limit" if account.limit is None else f"of {account.limit}"
            what = "uses of a unit" if account.contract == "participation" else "steps"
            lines.append(
                f"{run}: {account.contract}, sigma {account.sigma:g}, {account.steps} charges,"
                f" {account.count} {what} ({limit})"
            )
        lines += [f"no guarantee: {reason}" for reason in self._opt_outs()]
        return "\n".join([*lines, f"ledger head {ledger.head} ({ledger.length} entries)"])

    __repr__ = __str__


def read_ledger(path: Path) -> PrivacyReport:
    """Returns the verified report of a ledger file that `tg-tinker privacy ledger` wrote.

    Raises:
        NotFoundError: the file cannot be read.
        IntegrityError: the file is no ledger, or the ledger was changed.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        entries = [json.loads(line, object_pairs_hook=_once) for line in lines if line.strip()]
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path} is not a ledger of one JSON object per line") from None
    if not all(isinstance(entry, dict) for entry in entries):
        raise IntegrityError(f"{path} is not a ledger of one JSON object per line")
    if not entries:
        raise IntegrityError(f"{path} is empty: a ledger begins with its registration")
    return PrivacyReport(entries)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs as an object. Raises ValueError for a repeated key.

    Of a repeated key, one reader might take the first value and another reader the last.
    """
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


def _run(account: Account) -> Mapping[str, Any]:
    return {
        **account.facts,
        "contract": account.contract,
        "vouched_by": VOUCHED_BY[account.contract],
        "accountant": account.accountant,
        "noise_multiplier": account.sigma,
        "sample_rate": account.rate if account.poisson else None,
        "charges": account.steps,
        "counted": account.count,
        "limit": account.limit,
        "refuted": account.refuted,
    }


def _number(value: float) -> float | None:
    """Returns the value, or None if it is infinite: JSON has no infinity."""
    return None if math.isinf(value) else value
