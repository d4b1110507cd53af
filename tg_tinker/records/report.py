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
from tg_tinker.records.figures import LEMMA, Figure, curve, gaussian_mu2, groups, noise_tail
from tg_tinker.records.ledger import Account, Ledger

DEFAULT_DATASET = "default"
"""The dataset of a private run that names none."""

UNIT = "example"
"""The unit of a dataset if nobody states another one."""

UNITS = {
    "example": "one example: a distinct sequence of input tokens",
    "id": "all rows of one example_id; the owner asserts whose rows have which id",
}
OUTSIDE = (
    "Loss, gradient norms, num_clipped and gradient hashes: exact values for the data owner.",
    "Membership and number of units and their ids; without Poisson sampling also when each took"
    " part.",
    "Equal rows of several people where the unit is one example: they are one unit, which is"
    " protected as a whole. One of these people alone has less under participation: mu times"
    " sqrt(2) if the labels are equal too, else at most mu times 2.",
    "Text that appears in several units: the units are protected one by one, not what they share.",
    "The base model, which saw other data before. An adapter without privacy that was merged into"
    " the base model outside this service is part of the base model here.",
    "An owner who gives one unit several identities.",
    "How often a step was paid and not taken, which charges and steps show together: where a crash"
    " depends on the rows, it is not covered by epsilon.",
)
VOUCHED_BY = {
    "participation": "server: counted uses",
    "poisson": "server: drawn samples (computational: by a secret key)",
    "client_poisson": "owner: asserted samples",
    "worst_case": "nobody: worst case",
}
TABLED = ("prv", "pld")
"""The accountants whose tables hold for a single run; see `tg_tinker.records.ledger`."""
PRESUMED = (
    "The guarantee presumes that batches, hyper-parameters, stopping and the choice of checkpoint"
    " did not depend on losses, norms or clip counts of private data."
)
PRESUMED_OF_STOPPING = (
    " The spent epsilon also presumes that the decision to stop did not depend on released weights."
    " epsilon_if_stopping_was_adaptive needs no such presumption: it covers choices from released"
    " weights and charged releases, but not choices from losses, metrics or who was drawn."
)
PRESUMED_OF_JOINED = (
    " If released weights decided whether a further run joined the sampled one, delta is twice the"
    " stated delta."
)
PRESUMED_OF_SAMPLES = (
    " It also presumes that the drawn samples stay secret: whoever knows which units took part in"
    " which step has the guarantee of a run without sampling. Samples that the server draws are"
    " pseudo-random: a key that stays in the registry decides who is drawn, so their secrecy is"
    " computational. And it presumes that no choice of the owner (stopping, rate, noise, giving up"
    " a draw) depended on who was drawn."
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
        counted: the number of distinct units that the registry knows of the dataset: trained on,
            registered for samples, or evaluated. None if it is not known, as for a ledger in a
            file.
        ledger: the state that the entries lead to.
    """

    entries: Sequence[Entry]
    counted: int | None = None
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
            "epsilon_if_stopping_was_adaptive": _number(ledger.limit),
            "guarantee": not any(self._opt_outs()) and ledger.epsilon <= ledger.limit,
            "adjacency": "zero-out: one unit is replaced by a null example; the number of units,"
            " their ids, the schedule and the batch size are public",
            "unit": UNITS[ledger.registered["unit"]],
            "runs": {run: _run(account) for run, account in ledger.accounts.items()},
            "opt_outs": list(self._opt_outs()),
            "delta_epsilon_curve": [_stated(figure) for figure in curve(ledger)],
            "groups": [_stated(figure) for figure in groups(ledger)],
            "rho": None if (mu2 := gaussian_mu2(ledger)) is None else mu2 / 2,
            "units": self.units,
            "delta_times_units": None if (units := self.units) is None else ledger.delta * units,
            "delta_of_bounded_noise": noise_tail(ledger),
            "draws_dropped": ledger.dropped,
            "cautions": list(self._cautions()),
            "linked_datasets": sorted(ledger.linked),
            "ledger": {"birth": ledger.birth, "head": ledger.head, "entries": ledger.length},
            "presumes": self._presumed,
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

    @property
    def units(self) -> int | None:
        """The number of units: the largest that a run stated or that was counted, or None."""
        stated = (account.facts.get("dataset_size") for account in self.ledger.accounts.values())
        return max((n for n in (self.counted, *stated) if n), default=None)

    @property
    def _presumed(self) -> str:
        tables = any(account.accountant in TABLED for account in self.ledger.accounts.values())
        joined = tables and len(self.ledger.accounts) > 1
        return (
            PRESUMED
            + PRESUMED_OF_STOPPING
            + (PRESUMED_OF_JOINED if joined else "")
            + (PRESUMED_OF_SAMPLES if self.sampled else "")
        )

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

    def _cautions(self) -> Iterator[str]:
        """Yields what makes the guarantee weaker than it looks, or adds to it for some people."""
        ledger, units = self.ledger, self.units
        if units is not None and ledger.delta * units >= 1:
            yield (
                f"delta x units is {ledger.delta * units:.3g}, which is 1 or more: such a delta"
                " allows the data of whole units to be released. Use a dataset with a smaller delta"
            )
        if (tail := noise_tail(ledger)) >= ledger.delta / 100:
            yield (
                f"the noise of earlier releases had a bounded range, which adds up to {tail:.2g} to"
                f" delta: claim delta {min(1.0, ledger.delta + tail):.3g}"
            )
        if ledger.linked:
            yield (
                "these weights were also trained on other datasets (linked_datasets): the epsilons"
                " and the deltas add for a person in both"
            )
        if ledger.dropped:
            yield (
                f"{ledger.dropped} Poisson draws were told and given up: from the first of them"
                " on, no advantage of sampling is claimed"
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
        lines += [f"caution: {reason}" for reason in self._cautions()]
        if not any(self._opt_outs()):
            lines += ["", "What this means:", *(f"- {line}" for line in self._meaning())]
        lines += ["", f"Presumed: {self._presumed}"]
        lines += ["", "Not covered:", *(f"- {line}" for line in OUTSIDE), ""]
        return "\n".join([*lines, f"ledger head {ledger.head} ({ledger.length} entries)"])

    def _meaning(self) -> Iterator[str]:
        """Yields the figures as sentences for a reader who knows no mathematics of privacy."""
        ledger, units = self.ledger, self.units
        yield (
            "A unit is what is protected as a whole. If the data of one unit were replaced by"
            " nothing, the probability of whatever was released would change by a factor of at most"
            f" e^{ledger.epsilon:.4g}{_factor(ledger.epsilon)} (epsilon), apart from a probability"
            f" of {ledger.delta:g} (delta)."
        )
        yield (
            "That is the epsilon spent so far. If somebody decided when to stop by looking at"
            f" released weights, claim {_claimable(ledger.limit)}."
        )
        yield f"The same at other deltas: {_listed(curve(ledger), 'at delta {0.delta:.3g}')}."
        yield (
            "A person whose data makes up several units, or several people together, are protected"
            f" less: {_listed(groups(ledger)[1:], '{0.units} units')}."
        )
        if units is None:
            yield (
                "The number of units is not known here. Delta protects people only if it is much"
                " smaller than 1 divided by this number."
            )
        else:
            yield (
                f"delta x units = {ledger.delta:g} x {units} = {ledger.delta * units:.3g}. It"
                " bounds the number of units, on average, whose protection may fail altogether: it"
                " must be far below 1."
            )

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


def _stated(figure: Figure) -> dict[str, Any]:
    return {
        "units": figure.units, "epsilon": _number(figure.epsilon), "delta": figure.delta,
        "how": figure.how,
    }  # fmt: skip


def _listed(figures: Sequence[Figure], name: str) -> str:
    """Returns figures as text: each epsilon with its name, and how they were computed."""
    shown = [
        f"{name.format(one)} epsilon {one.epsilon:.4g}"
        + (f" (at delta {one.delta:.3g})" if one.how == LEMMA else "")
        if math.isfinite(one.epsilon)
        else f"{name.format(one)} no bound"
        for one in figures
    ]
    return f"{', '.join(shown)} ({'; '.join(dict.fromkeys(one.how for one in figures))})"


def _factor(epsilon: float) -> str:
    return f" = {math.exp(epsilon):.4g}" if epsilon < 20 else ""


def _claimable(limit: float) -> str:
    if math.isinf(limit):
        return "no epsilon at all: this dataset was registered without a limit"
    return (
        f"the registered epsilon {limit:g} instead. It covers choices from released weights and"
        " charged releases, not choices from losses, metrics or who was drawn"
    )


def _number(value: float) -> float | None:
    """Returns the value, or None if it is infinite: JSON has no infinity."""
    return None if math.isinf(value) else value
