"""Plans one private run: derives the values that a `DPConfig` leaves out from the remaining budget.

    plan = plan_run(dp, config, ledger)
    ledger.append(plan.entry(run_id))

A contract counts the uses of one unit (participation) or the steps (all other contracts). If the
noise multiplier or the count is missing, it follows from the other; if both are stated, they are
checked. `Ledger.epsilon_with` alone decides what fits, as it does for later charges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.privacy.accountants import epsilon_after, tabulate
from actors.privacy.noise import LEAST_SIGMA, RANGE
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
"""The uses of one unit for which the noise is calibrated if the config states neither."""

NAMES = {
    "participation": "Participation",
    "poisson": "Poisson sampling",
    "client_poisson": "Poisson sampling, as the owner asserts",
    "worst_case": "Worst case",
}

MOST_COUNTS = 10**7
"""The largest limit that the search considers."""

Table = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Plan:
    """The plan of one run: the `open` entry of the ledger, without the id of the run.

    Attributes:
        limit: the maximum number of uses of one unit, or of steps; None is without limit.
        planned: the number of uses or steps to reserve.
        message: what the contract allows, and what would allow more.
        facts: what the certificate also states; see `_Planner._facts`.
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
        """Returns the body of the `open` entry, as JSON. Its facts also hold the message."""
        return {
            "type": "open", "run": run, "contract": self.contract, "sigma": self.sigma,
            "rate": self.rate, "accountant": self.accountant,
            "table": [list(row) for row in self.table], "limit": self.limit,
            "planned": self.planned, "facts": self.facts | {"message": self.message},
        }  # fmt: skip


def plan_run(dp: DPConfig, config: TrainingConfig, ledger: Ledger) -> Plan:
    """Returns the plan of a run that is about to open on this dataset.

    Raises:
        InvalidRequestError: a value is missing, contradicts another value, or asks for more than
            the dataset was registered with.
        DPBudgetExceededError: the remaining budget cannot pay for the plan.
            `details["noise_multiplier"]` is the smallest one that the budget can pay for, or None
            if there is none.
    """
    return _Planner(dp, config, ledger).plan()


def calibrated_noise(dp: DPConfig, config: TrainingConfig, ledger: Ledger) -> float:
    """Returns the smallest noise multiplier with which the stated uses or steps fit.

    Raises:
        As `plan_run`.
    """
    return _Planner(dp, config, ledger).calibrated()


class _Planner:
    """A calculation of the plan for one config and one ledger."""

    def __init__(self, dp: DPConfig, config: TrainingConfig, ledger: Ledger) -> None:
        self.dp, self.config, self.ledger = dp, config, ledger
        self.contract: str = dp.sampling
        # After a drop, steps on samples of the server count as uses.
        dropped = dp.sampling == "poisson" and ledger.dropped > 0
        self.poisson = dp.sampling in POISSON and not dropped
        self.by_uses = dp.sampling == "participation" or dropped
        self.target = math.inf if dp.target_epsilon is None else dp.target_epsilon
        self.epsilon = min(self.target, ledger.limit)
        self.batch = config.batch_size * config.gradient_accumulation_steps
        self.stated = dp.max_participations if self.by_uses else config.max_steps
        self.wanted = self.stated or (USES if self.by_uses and not dp.noise_multiplier else 1)
        self._check_registration()
        self._check_noise()
        self.rate = self._rate() if dp.sampling in POISSON else 1.0
        accountant = dp.accountant_type.replace("moments", "rdp")
        self.accountant = accountant if self.poisson else "exact"

    def plan(self) -> Plan:
        sigma = self.dp.noise_multiplier or self.calibrated()
        account = self._account(sigma, self._table(sigma))
        limit = self._limit(account)
        # After a drop, only the dataset and the run's own target limit the uses of such a run.
        kept = None if self.by_uses and self.contract == "poisson" else limit
        return Plan(
            contract=self.contract, sigma=sigma, rate=self.rate, accountant=self.accountant,
            table=account.table, limit=kept, planned=self._planned(limit), facts=self._facts(),
            message=f"{self._allowed(account, limit)} {self._better(sigma, limit)}",
        )  # fmt: skip

    # --- what was asked ------------------------------------------------------------------------

    def _check_registration(self) -> None:
        limit, delta, unit = self.ledger.limit, self.ledger.delta, self.ledger.registered["unit"]
        if self.dp.target_epsilon is not None and self.target > limit:
            raise InvalidRequestError(
                f"target_epsilon {self.target:g} exceeds the {limit:g} of the dataset: lower it, or"
                " set it to None to use the dataset's epsilon"
            )
        if self.dp.target_delta > delta:
            raise InvalidRequestError(
                f"target_delta {self.dp.target_delta:g} exceeds the {delta:g} of the dataset: lower"
                " it"
            )
        if self.dp.unit not in (None, unit):
            raise InvalidRequestError(
                f"the dataset protects unit={unit!r}, not {self.dp.unit!r}: use the dataset's unit"
            )
        size, what = self.dp.dataset_size or self.batch, "dataset_size"
        # Without a size, the rows of a step are the least that the dataset can hold.
        if self.dp.dataset_size is None:
            what = "the rows of a step"
        if delta * size >= 1:
            raise InvalidRequestError(
                f"delta {delta:g} must be below 1 / {what} = {1 / size:.3g}, or the guarantee"
                " allows whole examples to leak: register the dataset with a smaller delta"
            )

    def _check_noise(self) -> None:
        sigma, least, most = self.dp.noise_multiplier, LEAST_SIGMA, SIGMA_RANGE[1]
        if sigma is not None and not least <= sigma <= most:
            raise InvalidRequestError(
                f"noise_multiplier {sigma:g} is outside {least:g} to {most:g}: use a value inside"
            )
        if sigma is None and math.isinf(self.epsilon):
            raise InvalidRequestError(
                "without a limit on epsilon the noise cannot be calibrated: give noise_multiplier"
                " or target_epsilon"
            )
        if sigma is None and not self.by_uses and self.stated is None:
            raise InvalidRequestError(
                f"sampling={self.contract!r} needs noise_multiplier, or max_steps to calibrate it:"
                " give one"
            )

    def _rate(self) -> float:
        size, stated = self.dp.dataset_size, self.dp.sample_rate
        if size is None:
            raise InvalidRequestError(
                f"sampling={self.contract!r} needs dataset_size: give the number of units"
            )
        rate = self.batch / size
        if rate > 1:
            raise InvalidRequestError(
                f"the expected batch of {self.batch} exceeds dataset_size={size}: lower batch_size"
                " or gradient_accumulation_steps"
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
        """Returns whether the dataset can pay, and the run alone stays within its own target."""
        if self.ledger.epsilon_with("", count, account) > self.ledger.limit:
            return False
        # The table of a Poisson run ends at the target.
        if self.poisson:
            return bool(account.table) and count <= account.table[-1][0]
        own = gaussian_epsilon(math.sqrt(count) / account.sigma, self.dp.target_delta)
        return own <= self.target

    def _table(self, sigma: float) -> Table:
        """Returns steps and epsilon of this run alone, up to its own target."""
        if not self.poisson:
            return ()
        # Noise that is calibrated for the stated steps allows no more steps. Without a limit on
        # epsilon, only the stated steps can end the table.
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
        """Returns the maximum number of uses or steps; None is without limit.

        A stated number of uses, or the number that the noise is calibrated for, is the limit.

        Raises:
            DPBudgetExceededError: the stated number, or else a single use or step, does not fit.
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
        """Returns how many uses or steps to reserve: 0 for a run that states no number."""
        steps = self.config.max_steps
        if not self.by_uses:
            return steps or 0
        if limit is None or not (self.stated or steps):
            return 0
        return min(limit, steps or limit)

    # --- noise that fits -----------------------------------------------------------------------

    def calibrated(self) -> float:
        sigma = self._smallest_sigma(self.wanted, self.accountant)
        if math.isinf(sigma):
            raise self._too_much(None)
        return sigma

    def _smallest_sigma(self, count: int, accountant: str) -> float:
        """Returns the smallest sigma, to 4 digits, at which `count` uses or steps fit.

        Returns infinity if no sigma is enough.
        """
        if not self.poisson:
            return smallest_sigma(lambda sigma: self._is_enough(sigma, count, accountant))
        cheap = smallest_sigma(lambda sigma: self._is_enough(sigma, count, "rdp"))
        if accountant == "rdp" or math.isinf(cheap):
            return cheap
        return _refined(cheap, lambda sigma: self._is_enough(sigma, count, accountant))

    def _is_enough(self, sigma: float, count: int, accountant: str) -> bool:
        if not LEAST_SIGMA <= sigma <= SIGMA_RANGE[1]:
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
        """Returns the error for a plan that does not fit.

        Args:
            account: the account that does not fit; None if no noise is enough.
        """
        spent, held = self.ledger.epsilon, self.ledger.epsilon_with("", 0)
        least = self._smallest_sigma(self.wanted, self.accountant) if account else math.inf
        possible = math.isfinite(least)
        return DPBudgetExceededError(
            f"epsilon {self.epsilon:g} (delta {self.dp.target_delta:g}) cannot pay for"
            f" {self._counted(self.wanted)}"
            + (f" at sigma {account.sigma:g}" if account else "")
            + (f": {spent:.4g} of {self.ledger.limit:g} is spent already" if spent else "")
            + (f", and open clients have reserved up to {held:.4g}" if held > spent else "")
            + (f". noise_multiplier={least:g} is the smallest that can" if possible else "")
            + ("" if possible else ". No noise is enough: train on data whose budget is not spent"),
            details={"noise_multiplier": least if possible else None, "spent": spent},
        )

    def _allowed(self, account: Account, limit: int | None) -> str:
        """Returns the first sentence of the message: what the contract pays for."""
        name, at = NAMES[self.contract], f"at sigma {account.sigma:g}"
        if self.by_uses and self.contract == "poisson":
            name += ", counted by uses because a draw of this dataset was dropped"
        if limit is None:
            return f"{name}: any number {at}, for epsilon has no limit here."
        total = self.ledger.epsilon_with("", limit, account)
        of = "" if math.isinf(self.ledger.limit) else f" of {self.ledger.limit:g}"
        can = f"each {self._unit()} may be used {limit} times"
        can = can if self.by_uses and limit > 1 else self._counted(limit)
        return f"{name}: {can} {at}, epsilon {total:.3g}{of} (delta {self.ledger.delta:g})."

    def _better(self, sigma: float, limit: int | None) -> str:
        """Returns the second sentence of the message: what would allow more."""
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
        """Returns how many Poisson steps the same noise would pay for, by the fast Renyi bound.

        Returns 0 if Poisson sampling is not possible.
        """
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
        return "example_id" if self.ledger.registered["unit"] == "id" else "example"

    def _facts(self) -> dict[str, Any]:
        """Returns what the certificate also states: values that do not depend on the data."""
        return {
            "bound": self.dp.max_grad_norm,
            "noise_range": RANGE,
            "clipping": self.dp.clipping,
            "batch": self.batch,
            "dataset_size": self.dp.dataset_size,
            "target_epsilon": self.dp.target_epsilon,
            "target_delta": self.dp.target_delta,
            "unit": self.ledger.registered["unit"],
            "metrics_shown": self.dp.show_private_metrics,
            "nonprivate_init": self.dp.allow_nonprivate_init,
        }


def _refined(high: float, holds: Callable[[float], bool]) -> float:
    """Returns the smallest number for which `holds` is true, searching downward from `high`.

    Every number that is tried has 4 significant digits, as has the result.
    """
    factor = 0.9
    while holds(low := float(f"{factor * high:.4g}")):
        factor, high = factor**2, low
    while high - low > 2e-3 * high:
        middle = float(f"{(low + high) / 2:.4g}")
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
