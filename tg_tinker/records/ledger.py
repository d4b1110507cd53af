"""The privacy ledger of a data set: an append-only, hash-chained list, and the rules it obeys.

    ledger = Ledger.replay(entries)     # raises IntegrityError unless every rule held
    ledger.epsilon, ledger.head

Pure rules: no database, no clock, no numerical accountant. The registry stores what `append`
returns, in one transaction with the decision; anyone who holds an exported ledger replays it
with the very same code. Entries hold data-independent values only.

An entry is a JSON object with `seq`, `prev` (hash of the entry before), `type` and the fields
below; `hash` is SHA-256 over its canonical JSON (keys sorted, no spaces) without `hash`.

    register   version, dataset, epsilon (null: unlimited), delta, unit, order, born
    open       run, contract, sigma, rate, accountant, table, limit, planned, facts
    charge     run, epoch, charge, count
    fall_back  run, count, limit: an asserted Poisson sample was not one; uses count from now on
    unnoised   run, epoch, charge, count: a step without noise; epsilon is infinite from here on
    release    run: the rest of its reservation is free again
    link       run, datasets: it took over weights that were trained on these as well
    book       runs: their entries before this one were put back from heads; how often they used
               which unit is lost with the database, so they charge nothing any more

`count` is what a contract counts: uses of the most used unit (participation) or steps (all
others). Composition: Gaussian contracts add up mu^2 = count / sigma^2 over all runs, an upper
bound of every unit's own sum, and the epsilon of mu is exact. A single run under Poisson
sampling has the epsilon of its table where that is less. Anything else is a Renyi filter at the
order fixed when the data set was registered (Feldman and Zrnic 2021, arXiv:2008.11193), valid
whatever was chosen in the light of earlier results.
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
    """What one run agreed to and has used.

    Attributes:
        contract: as in `DPConfig.sampling`; a fallen-back run has become `participation`.
        sigma: noise multiplier, fixed for the run.
        rate: q of a Poisson sample; 1 otherwise.
        accountant: prv, pld or rdp; exact for Gaussian contracts.
        table: (steps, epsilon) ascending, of this run alone; empty for Gaussian contracts.
        limit: most counts this run may reach; None is without limit.
        reserved: counts kept free for it while it lives.
        count: counts used.
        steps: charges made.
        facts: what the certificate states beside (C, batch size, dtype, ...).
        refuted: it asserted Poisson samples that did not look drawn.
        closed: it charges nothing any more.
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
        """Epsilon of this run alone after `count` steps: that of the next entry of the table."""
        at = bisect_left(self.table, count, key=lambda row: row[0])
        return self.table[at][1] if at < len(self.table) else math.inf


class Ledger:
    """The state of one data set's budget. `append` is the only way to change it."""

    def __init__(self) -> None:
        self.head, self.birth, self.length = GENESIS, "", 0
        self.registered: Entry = {}
        self.accounts: dict[str, Account] = {}
        self.unnoised = False
        self.linked: set[str] = set()
        self.hashes: list[str] = []  # of all entries
        self._paid: set[str] = set()  # charge ids: each pays for one draw

    @classmethod
    def replay(cls, entries: Iterable[Mapping[str, Any]]) -> Ledger:
        """The ledger that these entries describe.

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
        """Registered epsilon; infinite for an unlimited data set."""
        epsilon = self.registered["epsilon"]
        return math.inf if epsilon is None else float(epsilon)

    @property
    def delta(self) -> float:
        return float(self.registered["delta"])

    @property
    def at(self) -> str:
        """Where it ends, ``SEQ-HASH`` of the last entry."""
        return place_of(self.length - 1, self.head)

    def goes_through(self, place: str) -> bool:
        """Whether an entry is at this place, ``SEQ-HASH``."""
        seq, found = parse_place(place)
        return seq < self.length and self.hashes[seq] == found

    def check_place(self, place: str, dataset: str) -> None:
        """Refuses a place that somebody knows of this ledger and that it does not go through.

        Args:
            dataset: its name, which an empty ledger does not have.

        Raises:
            LedgerMismatchError: it is behind that place, or another chain.
        """
        if self.goes_through(place):
            return
        seq, _ = parse_place(place)
        behind = seq >= self.length
        reason = (
            f"has {self.length} entries, and its entry {seq} is known: an older copy of the"
            " registry's database was put in its place"
            if behind
            else f"forked: its entry {seq} is not the one that is known. Two databases went on from"
            " one, or this is another one"
        )
        raise LedgerMismatchError(
            f"the ledger of data set {dataset!r} {reason}. Nothing was charged or changed: put the"
            f" newest copy of the database back, or, if it is lost, run `tg-tinker privacy"
            f" book-missing {dataset}`",
            details={"dataset": dataset, "entries": self.length, "known": seq, "behind": behind},
        )

    def usable(self, run: str) -> Account:
        """The account of a run that may still charge.

        Raises:
            DPBudgetExceededError: it was closed.
        """
        account = self.accounts[run]
        if account.closed:
            raise DPBudgetExceededError(
                "charges of this run were booked again after the database was lost, and how often"
                " it used which unit is not known any more: it may not go on. Its artifacts load"
                " in a new client, which starts to count anew",
                details={"limit": account.count, "epsilon": self.epsilon},
            )
        return account

    @property
    def epsilon(self) -> float:
        """Spent by everything released so far."""
        return self._compose({run: account.count for run, account in self.accounts.items()})

    def epsilon_with(self, run: str, count: int, account: Account | None = None) -> float:
        """Spent if `run` had reached `count` and all other runs had used their reservations.

        `account` stands in for a run that is not open yet.
        """
        accounts = dict(self.accounts) | ({run: account} if account else {})
        counts = {r: max(a.count, a.reserved) for r, a in accounts.items()}
        return self._compose(counts | {run: count}, accounts)

    # --- how it changes ----------------------------------------------------------------------

    def append(self, body: Mapping[str, Any]) -> Entry:
        """Checks an entry against the rules, applies it, and returns it chained.

        Raises:
            DPBudgetExceededError: the budget cannot pay for it; nothing has changed.
            ValueError, TypeError, KeyError: it makes no sense; nothing has changed.
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
            raise ValueError("the first entry, and no other, registers the data set")
        if not set(body).isdisjoint(CHAIN):
            raise ValueError("an entry is chained here, and nowhere else")
        # Before the rule, which changes the state: what JSON cannot hold must change nothing.
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
            raise ValueError("no such Renyi order")
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
            raise ValueError("not a new run under a known contract")
        rows = tuple((whole(n), real(epsilon)) for n, epsilon in table)
        if not SIGMA_RANGE[0] <= real(sigma) <= SIGMA_RANGE[1] or not 0 < real(rate) <= 1:
            raise ValueError("no such noise or rate")
        if not (isinstance(facts, dict) and is_text(run) and is_text(accountant)):
            raise ValueError("facts are an object, names are text")
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
                f" for: epsilon {self.epsilon:.4g} of {self.limit:g} is spent. Weights are as"
                " before, save_state still works",
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
                "a step without noise needs a data set registered with unlimited epsilon"
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
            raise ValueError("not a run of this data set, or no names")
        self.linked |= set(datasets)

    def _book(self, runs: Iterable[str]) -> None:
        accounts = [self.accounts[run] for run in runs]
        if not accounts:
            raise ValueError("nothing is booked")
        for account in accounts:
            account.closed, account.reserved = True, 0

    # --- inside ------------------------------------------------------------------------------

    def _check_count(self, account: Account, count: int) -> None:
        # Under participation a step may use no unit more often than the most used one before.
        unchanged = account.contract == "participation" and count == account.count
        if whole(count) != account.count + 1 and not unchanged:
            raise ValueError(f"the count goes from {account.count} to {count}")

    def _check_unpaid(self, charge: str) -> None:
        if not is_text(charge) or charge in self._paid:
            raise ValueError("a charge has an id of its own")

    def _afford(self, run: str, count: int, account: Account) -> None:
        after = self.epsilon_with(run, count, account)
        if after > self.limit:
            raise DPBudgetExceededError(
                f"epsilon {self.limit:g} of data set {self.registered['dataset']!r} cannot pay:"
                f" {self.epsilon:.4g} is spent, this would make it {after:.4g}, reservations of"
                " living clients included. Close other clients, use more noise, or train on data"
                " that is not spent",
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
        # Both are bounds. The smaller never falls when another run joins in.
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
