"""The plan of one private run: what is missing in a `DPConfig` follows from what budget is left.

    plan = plan_run(dp, config, ledger)
    ledger.append(plan.entry(run_id))

A contract counts uses of one unit (participation) or steps (all others). Of the noise
multiplier and the count one is stated and the other follows, or both are checked. What fits is
decided by `Ledger.epsilon_with` alone, as when the ledger is charged later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.privacy.accountants import epsilon_after, tabulate
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError
from tg_tinker.records.accounting import (
    SIGMA_RANGE,
    gaussian_epsilon,
    largest_count,
    smallest_sigma,
)
from tg_tinker.records.entries import POISSON, Entry
from tg_tinker.records.ledger import Account, Ledger

USES = 3
"""Uses of one unit that noise is calibrated for where neither is stated."""

NAMES = {
    "participation": "Participation",
    "poisson": "Poisson sampling",
    "client_poisson": "Poisson sampling, as the owner asserts",
    "worst_case": "Worst case",
}

MOST_COUNTS = 10**7
"""Largest limit that is looked for."""

Table = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Plan:
    """What one run is going to agree to: the ledger's `open` entry without the run's id.

    Attributes:
        limit: most uses of one unit, or steps; None is without limit.
        planned: how many of them are reserved.
        message: what the contract allows, and how to do better.
        The others: see `tg_tinker.records.ledger.Account`.
    """

    contract: str
    sigma: float
    rate: float
    accountant: str
    table: Table
    limit: int | None
    planned: int
    facts: dict[str, Any]
    message: str

    def entry(self, run: str) -> Entry:
        """The body of the `open` entry, as JSON; its facts hold the message, too."""
        return {
            "type": "open", "run": run, "contract": self.contract, "sigma": self.sigma,
            "rate": self.rate, "accountant": self.accountant,
            "table": [list(row) for row in self.table], "limit": self.limit,
            "planned": self.planned, "facts": self.facts | {"message": self.message},
        }  # fmt: skip


def plan_run(dp: DPConfig, config: TrainingConfig, ledger: Ledger) -> Plan:
    """The plan of a run that is about to open on this data set.

    Raises:
        InvalidRequestError: a value is missing, contradicts another, or asks for more than the
            data set was registered with.
        DPBudgetExceededError: what is left cannot pay; `details["noise_multiplier"]` is the
            smallest that could, None if there is none.
    """
    return _Planner(dp, config, ledger).plan()


class _Planner:
    """One request, and the questions that a plan asks about it."""

    def __init__(self, dp: DPConfig, config: TrainingConfig, ledger: Ledger) -> None:
        self.dp, self.config, self.ledger = dp, config, ledger
        self.contract: str = dp.sampling
        self.poisson = dp.sampling in POISSON
        self.by_uses = dp.sampling == "participation"
        self.target = math.inf if dp.target_epsilon is None else dp.target_epsilon
        self.epsilon = min(self.target, ledger.limit)
        self.batch = config.batch_size * config.gradient_accumulation_steps
        self.stated = dp.max_participations if self.by_uses else config.max_steps
        self.wanted = self.stated or (USES if self.by_uses and not dp.noise_multiplier else 1)
        self._check_registration()
        self._check_noise()
        self.rate = self._rate() if self.poisson else 1.0
        accountant = dp.accountant_type.replace("moments", "rdp")
        self.accountant = accountant if self.poisson else "exact"

    def plan(self) -> Plan:
        sigma = self.dp.noise_multiplier or self._calibrated()
        account = self._account(sigma, self._table(sigma))
        limit = self._limit(account)
        return Plan(
            contract=self.contract, sigma=sigma, rate=self.rate, accountant=self.accountant,
            table=account.table, limit=limit, planned=self._planned(limit), facts=self._facts(),
            message=f"{self._allowed(account, limit)} {self._better(sigma, limit)}",
        )  # fmt: skip

    # --- what was asked ------------------------------------------------------------------------

    def _check_registration(self) -> None:
        limit, delta, unit = self.ledger.limit, self.ledger.delta, self.ledger.registered["unit"]
        if self.dp.target_epsilon is not None and self.target > limit:
            raise InvalidRequestError(
                f"target_epsilon {self.target:g} is more than the {limit:g} of the data set: ask"
                " for less, or for None to take what the data set has"
            )
        if self.dp.target_delta > delta:
            raise InvalidRequestError(
                f"target_delta {self.dp.target_delta:g} is more than the {delta:g} of the data set"
            )
        if self.dp.unit != unit:
            raise InvalidRequestError(f"the data set protects unit={unit!r}, not {self.dp.unit!r}")
        size, what = self.dp.dataset_size or self.batch, "dataset_size"
        if self.dp.dataset_size is None:  # at least a batch of units is there
            what = "the rows of a step"
        if delta * size >= 1:
            raise InvalidRequestError(
                f"delta {delta:g} must be below 1 / {what} = {1 / size:.3g}, or else whole"
                " examples may leak: register the data set with a smaller one"
            )

    def _check_noise(self) -> None:
        sigma, (least, most) = self.dp.noise_multiplier, SIGMA_RANGE
        if sigma is not None and not least <= sigma <= most:
            raise InvalidRequestError(
                f"noise_multiplier {sigma:g} is outside {least:g} to {most:g}"
            )
        if sigma is None and math.isinf(self.epsilon):
            raise InvalidRequestError(
                "without a limit on epsilon nothing says how much noise: give noise_multiplier,"
                " or target_epsilon"
            )
        if sigma is None and not self.by_uses and self.stated is None:
            raise InvalidRequestError(
                f"sampling={self.contract!r} needs noise_multiplier, or max_steps to calibrate it"
            )

    def _rate(self) -> float:
        size, stated = self.dp.dataset_size, self.dp.sample_rate
        if size is None:
            raise InvalidRequestError(f"sampling={self.contract!r} needs dataset_size")
        rate = self.batch / size
        if rate > 1:
            raise InvalidRequestError(
                f"the expected batch of {self.batch} is more than dataset_size={size}"
            )
        if stated is not None and abs(stated - rate) > 1e-9 * rate:
            raise InvalidRequestError(
                f"sample_rate {stated:.10g} is not batch_size x gradient_accumulation_steps /"
                f" dataset_size = {rate:.10g}: leave it out"
            )
        return rate

    # --- what fits -----------------------------------------------------------------------------

    def _account(self, sigma: float, table: Table = ()) -> Account:
        return Account(self.contract, sigma, self.rate, self.accountant, table, None, 0)

    def _fits(self, account: Account, count: int) -> bool:
        """Whether the data set can pay, and the run alone stays within its own target."""
        if self.ledger.epsilon_with("", count, account) > self.ledger.limit:
            return False
        if self.poisson:  # its table ends at the target
            return bool(account.table) and count <= account.table[-1][0]
        own = gaussian_epsilon(math.sqrt(count) / account.sigma, self.dp.target_delta)
        return own <= self.target

    def _table(self, sigma: float) -> Table:
        """Steps and epsilon of this run alone, as far as its own target."""
        if not self.poisson:
            return ()
        # Noise for a stated number of steps leaves room for no more; without a limit nothing ends.
        short = self.dp.noise_multiplier is None or math.isinf(self.epsilon)
        end = self.stated if short else None
        if self.dp.target_delta < self.ledger.delta and math.isfinite(self.target):
            own = self._tabulated(sigma, self.dp.target_delta, self.target, end)
            if not own:
                return ()
            end = own[-1][0]
        return self._tabulated(sigma, self.ledger.delta, self.epsilon, end)

    def _tabulated(self, sigma: float, delta: float, epsilon: float, end: int | None) -> Table:
        return tabulate(self.accountant, sigma, self.rate, delta, epsilon, end)

    def _limit(self, account: Account) -> int | None:
        """Most uses or steps; a stated number of uses, or one that noise was made for, is kept.

        Raises:
            DPBudgetExceededError: what was stated, or a single one, does not fit.
        """
        if math.isinf(self.epsilon):
            return self.stated if self.by_uses else None
        if not self._fits(account, self.wanted):
            raise self._too_much(account)
        kept = self.by_uses and (self.stated or self.dp.noise_multiplier is None)
        return self.wanted if kept else self._most(account)

    def _most(self, account: Account) -> int:
        end = (account.table[-1][0] if account.table else 0) if self.poisson else MOST_COUNTS
        return largest_count(lambda count: self._fits(account, count), end)

    def _planned(self, limit: int | None) -> int:
        """What to reserve: only for a run that says how far it will go."""
        steps = self.config.max_steps
        if not self.by_uses:
            return steps or 0
        if limit is None or not (self.stated or steps):
            return 0
        return min(limit, steps or limit)

    # --- noise that fits -----------------------------------------------------------------------

    def _calibrated(self) -> float:
        sigma = self._smallest_sigma(self.wanted, self.accountant)
        if math.isinf(sigma):
            raise self._too_much(None)
        return sigma

    def _smallest_sigma(self, count: int, accountant: str) -> float:
        """The least noise under which this many fit, to 4 digits; infinite if none is enough."""
        if not self.poisson:
            return smallest_sigma(lambda sigma: self._is_enough(sigma, count, accountant))
        cheap = smallest_sigma(lambda sigma: self._is_enough(sigma, count, "rdp"))
        if accountant == "rdp" or math.isinf(cheap):
            return cheap
        return _refined(cheap, lambda sigma: self._is_enough(sigma, count, accountant))

    def _is_enough(self, sigma: float, count: int, accountant: str) -> bool:
        if not SIGMA_RANGE[0] <= sigma <= SIGMA_RANGE[1]:
            return False
        if not self.poisson:
            return self._fits(self._account(sigma), count)
        alone = epsilon_after(accountant, sigma, self.rate, count, self.ledger.delta)
        own = alone
        if self.dp.target_delta < self.ledger.delta:
            own = epsilon_after(accountant, sigma, self.rate, count, self.dp.target_delta)
        return own <= self.target and self._fits(self._account(sigma, ((count, alone),)), count)

    # --- what to say ---------------------------------------------------------------------------

    def _too_much(self, account: Account | None) -> DPBudgetExceededError:
        """The refusal of what is wanted; without an account no noise at all was enough."""
        spent, held = self.ledger.epsilon, self.ledger.epsilon_with("", 0)
        least = self._smallest_sigma(self.wanted, self.accountant) if account else math.inf
        possible = math.isfinite(least)
        return DPBudgetExceededError(
            f"epsilon {self.epsilon:g} (delta {self.dp.target_delta:g}) cannot pay for"
            f" {self._counted(self.wanted)}"
            + (f" at sigma {account.sigma:g}" if account else "")
            + (f": {spent:.4g} of {self.ledger.limit:g} is spent before" if spent else "")
            + (f", and clients not closed reserved up to {held:.4g}" if held > spent else "")
            + (f". noise_multiplier={least:g} is the smallest that can" if possible else "")
            + ("" if possible else ". No noise is enough: train on data that is not spent"),
            details={"noise_multiplier": least if possible else None, "spent": spent},
        )

    def _allowed(self, account: Account, limit: int | None) -> str:
        """The first sentence of the message: what the contract pays for."""
        name, at = NAMES[self.contract], f"at sigma {account.sigma:g}"
        if limit is None:
            return f"{name}: any number {at}, for epsilon has no limit here."
        total = self.ledger.epsilon_with("", limit, account)
        of = "" if math.isinf(self.ledger.limit) else f" of {self.ledger.limit:g}"
        can = f"each {self._unit()} may be used {limit} times"
        can = can if self.by_uses and limit > 1 else self._counted(limit)
        return f"{name}: {can} {at}, epsilon {total:.3g}{of} (delta {self.ledger.delta:g})."

    def _better(self, sigma: float, limit: int | None) -> str:
        """The second sentence: what would allow more."""
        if math.isinf(self.epsilon):
            return "State target_epsilon, or register the data set with an epsilon, to have one."
        more = (limit or 1) + 1 if self.by_uses else 2 * (limit or 1)
        least = self._smallest_sigma(more, "rdp" if self.poisson else "exact")
        if math.isinf(least):
            return "Nothing allows more: the data set is nearly spent."
        hint = f"sigma {least:g} would allow {more} {'uses' if self.by_uses else 'steps'}"
        return f"{self._other_contract(sigma)}; {hint}."

    def _other_contract(self, sigma: float) -> str:
        if self.poisson:
            return "A smaller batch from as many examples would allow more steps"
        if not self.by_uses:
            return "sampling='participation' counts real uses, not steps"
        if self.dp.dataset_size is None:
            return "Poisson sampling (sampling='poisson', dataset_size) mostly allows more"
        steps = self._poisson_steps(sigma)
        return f"Poisson sampling would allow at least {steps} steps" if steps else "Use more noise"

    def _poisson_steps(self, sigma: float) -> int:
        """How many steps the same noise would pay for on drawn samples, by the cheap bound."""
        changes = {"sampling": "poisson", "accountant_type": "rdp", "noise_multiplier": sigma}
        drawn = self.dp.model_copy(update=changes | {"sample_rate": None})
        if self.batch > (drawn.dataset_size or 0):
            return 0
        other = _Planner(drawn, self.config, self.ledger)
        return other._most(other._account(sigma, other._table(sigma)))

    def _counted(self, count: int) -> str:
        plural = "" if count == 1 else "s"
        if not self.by_uses:
            return f"{count} step{plural}"
        return f"{count} use{plural} of each {self._unit()}"

    def _unit(self) -> str:
        return "example" if self.dp.unit == "example" else "example_id"

    def _facts(self) -> dict[str, Any]:
        """What the certificate states beside: nothing that depends on data."""
        return {
            "bound": self.dp.max_grad_norm,
            "batch": self.batch,
            "dataset_size": self.dp.dataset_size,
            "target_epsilon": self.dp.target_epsilon,
            "target_delta": self.dp.target_delta,
            "unit": self.dp.unit,
            "metrics_shown": self.dp.show_private_metrics,
            "nonprivate_init": self.dp.allow_nonprivate_init,
        }


def _refined(high: float, holds: Callable[[float], bool]) -> float:
    """Goes down from a number that is enough; each number tried has 4 digits, as the result."""
    low = float(f"{0.9 * high:.4g}")
    while holds(low):
        low, high = float(f"{0.9 * low:.4g}"), low
    while high - low > 2e-3 * high:
        middle = float(f"{(low + high) / 2:.4g}")
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
