"""Defines the privacy ledger of a dataset: an append-only, hash-chained list, and its rules.

    ledger = Ledger.replay(entries)     # raises IntegrityError unless every rule held
    ledger.epsilon, ledger.head

These are pure rules: no database, no clock, no numerical accountant. The registry decides about an
entry and stores what `append` returns in one transaction. Anyone who holds an exported ledger
replays it with the same code. Entries hold only values that do not depend on training data.

An entry is a JSON object with `seq`, `prev` (the hash of the entry before), `type` and the fields
below. Its `hash` is SHA-256 over its canonical JSON (keys sorted, no spaces) without `hash`.

    register   version, dataset, epsilon (null: unlimited), delta, unit, order, born
    open       run, contract, sigma, rate, accountant, table, limit, planned, facts
    charge     run, epoch, charge, count
    fall_back  run, count, limit: an asserted Poisson sample was refuted; the run counts by uses
    unnoised   run, epoch, charge, count: a step without noise; epsilon is infinite from here on
    release    run: the rest of its reservation is free again
    link       run, datasets: the run took over weights that were also trained on these datasets
    book       runs: their entries before this one were restored from heads; the uses of each unit
               are lost with the database, so these runs charge nothing any more

`count` is the number that a contract counts: uses of the most used unit (participation) or steps
(all other contracts). Composition: Gaussian contracts add up mu^2 = count / sigma^2 over all runs.
This sum is an upper bound of the sum of every single unit, and the epsilon of mu is exact. A single
run under Poisson sampling has the epsilon of its table if that is less than the filter's. All other
combinations use a Renyi filter at the order that was fixed at registration (Feldman and Zrnic 2021,
arXiv:2008.11193). The filter is valid even if later steps were chosen in the light of earlier
results.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import DPBudgetExceededError, IntegrityError, LedgerMismatchError
from tg_tinker.records.accounting import (
    MAX_ORDER,
    SIGMA_RANGE,
    gaussian_epsilon,
    rdp_epsilon,
    subsampled_gaussian_epsilon,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.entries import (
    CHAIN,
    GAUSSIAN,
    GENESIS,
    POISSON,
    REFUSALS,
    VERSION,
    Entry,
    canonical,
    check_table,
    entry_hash,
    is_text,
    parse_place,
    place_of,
    real,
    whole,
)


@dataclass
class Account:
    """The account of one run: its contract, and the counts that it has used.

    Attributes:
        contract: the contract, as in `DPConfig.sampling`; `participation` after a fall-back.
        sigma: the noise multiplier, fixed for the run.
        rate: the probability q that a unit is in a Poisson sample; 1 for other contracts.
        accountant: prv, pld or rdp; exact for Gaussian contracts.
        table: ascending (steps, epsilon) of this run alone; empty for Gaussian contracts.
        limit: the highest count that the run may reach; None means no limit.
        reserved: the count that is reserved for the run while it lives.
        count: the count that the run has used.
        steps: the number of charges.
        facts: further values for the certificate (C, batch size, dtype, ...).
        refuted: whether the run asserted Poisson samples that did not look drawn.
        closed: whether the run may charge nothing any more.
    """

    contract: str
    sigma: float
    rate: float
    accountant: str
    table: tuple[tuple[int, float], ...]
    limit: int | None
    reserved: int
    count: int = 0
    steps: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    refuted: bool = False
    closed: bool = False

    @property
    def poisson(self) -> bool:
        return self.contract in POISSON

    def tabulated(self, count: int) -> float:
        """Returns the epsilon of this run alone after `count` steps.

        It is the epsilon of the first table row with at least `count` steps, or infinite if the
        table has no such row.
        """
        at = bisect_left(self.table, count, key=lambda row: row[0])
        return self.table[at][1] if at < len(self.table) else math.inf


class Ledger:
    """The state of one dataset's budget. Only `append` changes it."""

    def __init__(self) -> None:
        self.head, self.birth, self.length = GENESIS, "", 0
        self.registered: Entry = {}
        self.accounts: dict[str, Account] = {}
        self.unnoised = False
        self.linked: set[str] = set()
        self.hashes: list[str] = []  # one for each entry
        self._paid: set[str] = set()  # ids of charges; each pays for one draw of noise

    @classmethod
    def replay(cls, entries: Iterable[Mapping[str, Any]]) -> Ledger:
        """Returns the ledger that these entries describe.

        Raises:
            IntegrityError: an entry was changed, left out, added or moved, or breaks a rule.
        """
        ledger = cls()
        for entry in entries:
            place = f"entry {ledger.length} of the ledger"
            try:
                again = ledger.append({k: v for k, v in entry.items() if k not in CHAIN})
            except REFUSALS:
                raise IntegrityError(f"{place} breaks a rule of the ledger") from None
            if again != dict(entry):
                raise IntegrityError(f"{place} does not continue the chain: it was changed")
        return ledger

    # --- what there is -----------------------------------------------------------------------

    @property
    def limit(self) -> float:
        """The registered epsilon; infinite for an unlimited dataset."""
        epsilon = self.registered["epsilon"]
        return math.inf if epsilon is None else float(epsilon)

    @property
    def delta(self) -> float:
        return float(self.registered["delta"])

    @property
    def at(self) -> str:
        """The position of the last entry, ``SEQ-HASH``."""
        return place_of(self.length - 1, self.head)

    def goes_through(self, place: str) -> bool:
        """Returns whether the ledger has an entry at this position, ``SEQ-HASH``."""
        seq, found = parse_place(place)
        return seq < self.length and self.hashes[seq] == found

    def check_place(self, place: str, dataset: str) -> None:
        """Checks that the ledger goes through a position that somebody knows of it.

        Args:
            place: the known position, ``SEQ-HASH``.
            dataset: the name of the dataset, which an empty ledger does not hold.

        Raises:
            LedgerMismatchError: the ledger ends before this position, or has forked.
        """
        if self.goes_through(place):
            return
        seq, _ = parse_place(place)
        behind = seq >= self.length
        reason = (
            f"has {self.length} entries, but entry {seq} is known: an older copy replaced the"
            " registry's database"
            if behind
            else f"forked: its entry {seq} differs from the known one. Two copies of the database"
            " were changed separately, or this is another database"
        )
        raise LedgerMismatchError(
            f"the ledger of dataset {dataset!r} {reason}. Nothing was charged or changed: restore"
            f" the newest copy of the database or, if it is lost, run `tg-tinker privacy"
            f" book-missing {dataset}`",
            details={"dataset": dataset, "entries": self.length, "known": seq, "behind": behind},
        )

    def usable(self, run: str) -> Account:
        """Returns the account of a run that may still charge.

        Raises:
            DPBudgetExceededError: the account is closed.
        """
        account = self.accounts[run]
        if account.closed:
            raise DPBudgetExceededError(
                "this run may make no more steps: its charges were restored after the database was"
                " lost, and its uses of each unit are not known any more. Load one of its artifacts"
                " in a new client, which starts a new count",
                details={"limit": account.count, "epsilon": self.epsilon},
            )
        return account

    @property
    def epsilon(self) -> float:
        """The epsilon spent by everything released so far."""
        return self._compose({run: account.count for run, account in self.accounts.items()})

    @property
    def released(self) -> tuple[float, list[Account]]:
        """What `epsilon` composes: mu^2 of all Gaussian releases together, and the accounts of the
        runs that made steps on Poisson samples."""
        used = [account for account in self.accounts.values() if account.count]
        gaussian = (one.count / one.sigma**2 for one in used if not one.poisson)
        return math.fsum(gaussian), [account for account in used if account.poisson]

    def epsilon_with(self, run: str, count: int, account: Account | None = None) -> float:
        """Returns the epsilon if `run` reached `count` and all other runs used their reservations.

        `account` is the account of a run that is not open yet.
        """
        accounts = dict(self.accounts) | ({run: account} if account else {})
        counts = {r: max(a.count, a.reserved) for r, a in accounts.items()}
        return self._compose(counts | {run: count}, accounts)

    # --- how it changes ----------------------------------------------------------------------

    def append(self, body: Mapping[str, Any]) -> Entry:
        """Checks an entry against the rules, applies it, and returns it chained.

        Raises:
            DPBudgetExceededError: the budget cannot pay for the entry. Nothing has changed.
            ValueError, TypeError, KeyError: the entry is malformed or breaks a rule. Nothing has
                changed.
        """
        rules: dict[str, Callable[..., None]] = {
            "register": self._register,
            "open": self._open,
            "charge": self._charge,
            "fall_back": self._fall_back,
            "unnoised": self._unnoised,
            "release": self._release,
            "link": self._link,
            "book": self._book,
        }
        rule = rules[body["type"]]
        if (body["type"] == "register") != (self.length == 0):
            raise ValueError("the first entry, and no other, must register the dataset")
        if not set(body).isdisjoint(CHAIN):
            raise ValueError("the body must not hold seq, prev or hash: append adds them")
        # First, because the rule changes the state: a body that is no JSON must change nothing.
        entry: Entry = json.loads(canonical(dict(body) | {"seq": self.length, "prev": self.head}))
        entry["hash"] = entry_hash(entry)
        rule(**{key: entry[key] for key in body if key != "type"})
        self.head = entry["hash"]
        self.birth = self.birth or self.head
        self.hashes.append(self.head)
        self.length += 1
        return entry

    def _register(
        self, version: int, dataset: str, epsilon: float | None, delta: float, unit: str,
        order: int, born: str,
    ) -> None:  # fmt: skip
        known = unit in ("example", "id") and is_text(dataset) and isinstance(born, str)
        if version != VERSION or not 0 < real(delta) < 1 or not known:
            raise ValueError("not a registration of this version")
        if not 2 <= whole(order) <= MAX_ORDER:
            raise ValueError("the Renyi order is out of range")
        if epsilon is not None and not real(epsilon) > 0:
            raise ValueError("epsilon must be positive")
        self.registered = {
            "dataset": dataset, "epsilon": epsilon, "delta": delta, "unit": unit, "order": order,
            "born": born,
        }  # fmt: skip

    def _open(
        self, run: str, contract: str, sigma: float, rate: float, accountant: str,
        table: Iterable[Iterable[float]], limit: int | None, planned: int, facts: Entry,
    ) -> None:  # fmt: skip
        if run in self.accounts or contract not in POISSON + GAUSSIAN:
            raise ValueError("the run is open already, or its contract is unknown")
        rows = tuple((whole(n), real(epsilon)) for n, epsilon in table)
        if not SIGMA_RANGE[0] <= real(sigma) <= SIGMA_RANGE[1] or not 0 < real(rate) <= 1:
            raise ValueError("the noise multiplier or the rate is out of range")
        if not (isinstance(facts, dict) and is_text(run) and is_text(accountant)):
            raise ValueError("facts must be an object, and names must be text")
        if contract not in POISSON and (rate != 1 or rows):
            raise ValueError("only a Poisson sample has a rate and a table")
        check_table(rows, subsampled_gaussian_epsilon(sigma, rate, self.delta))
        if whole(planned) > (planned if limit is None else whole(limit)):
            raise ValueError("more is planned than allowed")
        account = Account(contract, sigma, rate, accountant, rows, limit, planned, facts=facts)
        self._afford(run, planned, account)
        self.accounts[run] = account

    def _charge(self, run: str, epoch: int, charge: str, count: int) -> None:
        account = self.usable(run)
        self._check_count(account, count)
        self._check_unpaid(charge)
        if account.limit is not None and count > account.limit:
            raise DPBudgetExceededError(
                f"the run has used all {account.limit} {_counted(account)} that its budget pays"
                f" for: epsilon {self.epsilon:.4g} of {self.limit:g} is spent. The weights are"
                " unchanged, and save_state still works",
                details={"limit": account.limit, "epsilon": self.epsilon},
            )
        self._afford(run, count, account)
        account.count, account.steps = count, account.steps + 1
        self._paid.add(charge)

    def _fall_back(self, run: str, count: int, limit: int | None) -> None:
        account = self.usable(run)
        if account.contract != "client_poisson" or not whole(count) <= account.steps:
            raise ValueError("only an asserted Poisson sample falls back")
        account.contract, account.rate, account.table = "participation", 1.0, ()
        account.accountant, account.reserved = "exact", 0
        account.count, account.limit = count, None if limit is None else whole(limit)
        account.refuted = True

    def _unnoised(self, run: str, epoch: int, charge: str, count: int) -> None:
        if self.registered["epsilon"] is not None:
            raise DPBudgetExceededError(
                "a step without noise needs a dataset that is registered with unlimited epsilon"
            )
        account = self.usable(run)
        self._check_count(account, count)
        self._check_unpaid(charge)
        account.count, account.steps = count, account.steps + 1
        self._paid.add(charge)
        self.unnoised = True

    def _release(self, run: str) -> None:
        self.accounts[run].reserved = 0

    def _link(self, run: str, datasets: Iterable[str]) -> None:
        if run not in self.accounts or not all(is_text(name) for name in datasets):
            raise ValueError("not a run of this dataset, or a name of a dataset is no text")
        self.linked |= set(datasets)

    def _book(self, runs: Iterable[str]) -> None:
        accounts = [self.accounts[run] for run in runs]
        if not accounts:
            raise ValueError("the entry names no run")
        for account in accounts:
            account.closed, account.reserved = True, 0

    # --- inside ------------------------------------------------------------------------------

    def _check_count(self, account: Account, count: int) -> None:
        # Under participation a step need not raise the count, the uses of the most used unit.
        unchanged = account.contract == "participation" and count == account.count
        if whole(count) != account.count + 1 and not unchanged:
            raise ValueError(f"the count must not go from {account.count} to {count}")

    def _check_unpaid(self, charge: str) -> None:
        if not is_text(charge) or charge in self._paid:
            raise ValueError("a charge needs an id that no earlier charge has")

    def _afford(self, run: str, count: int, account: Account) -> None:
        after = self.epsilon_with(run, count, account)
        if after > self.limit:
            raise DPBudgetExceededError(
                f"epsilon {self.limit:g} of dataset {self.registered['dataset']!r} cannot pay for"
                f" this: {self.epsilon:.4g} is spent, and with this and the reservations of living"
                f" clients it would be {after:.4g}. Close other clients, use more noise, or train"
                " on a dataset with budget left",
                details={"limit": self.limit, "spent": self.epsilon, "needed": after},
            )

    def _compose(
        self, counts: Mapping[str, int], accounts: Mapping[str, Account] | None = None
    ) -> float:
        if self.unnoised:
            return math.inf
        known = self.accounts if accounts is None else accounts
        used = [(known[run], count) for run, count in counts.items() if count]
        if not any(account.poisson for account, _ in used):
            mu2 = math.fsum(count / account.sigma**2 for account, count in used)
            return gaussian_epsilon(math.sqrt(mu2), self.delta)
        alone = used[0][0].tabulated(used[0][1]) if len(used) == 1 else math.inf
        # Both are upper bounds. The smaller one never falls when another run joins.
        return min(alone, self._filtered(used))

    def _filtered(self, used: Iterable[tuple[Account, int]]) -> float:
        order = int(self.registered["order"])
        rdp = math.fsum(
            count * subsampled_gaussian_rdp(account.sigma, account.rate, order)
            for account, count in used
        )
        return rdp_epsilon(rdp, order, self.delta)


def _counted(account: Account) -> str:
    return "uses of a unit" if account.contract == "participation" else "steps"
