"""Defines the privacy ledger of a dataset: an append-only, hash-chained list, and its rules.

    ledger = Ledger.replay(entries)     # raises IntegrityError unless every rule held
    ledger.epsilon, ledger.head

These are pure rules: no database, no clock, no numerical accountant. The registry decides about an
entry and stores what `append` returns in one transaction. Anyone who holds an exported ledger
replays it with the same code. Entries hold only values that do not depend on training data.

An entry is a JSON object with `seq`, `prev` (the hash of the entry before), `type` and the fields
below. Its `hash` is SHA-256 over its canonical JSON (keys sorted, no spaces) without `hash`.

    register   version, dataset, epsilon (null: unlimited), delta, unit, order, born
    upgrade    version: a ledger of an older version follows the rules of this version from here on
    unit       run, unit: the unit that nobody had stated is chosen, by a run that opens next
    open       run, contract, sigma, rate, accountant, table, limit, planned, facts
    draw       run, position, units: position n of the stream of Poisson draws is told from here on,
               bound to the run's sigma, rate and C and to a keyed digest of the list of units
    charge     run, epoch, charge, count, spent; under `poisson` also position, which is used up
    drop       run (or null), position: a draw that was told is given up
    evaluation run, epoch, charge, sigma, spent: a Gaussian release on uses of single units, by a
               run that may train on another dataset
    fall_back  run, count, limit, spent: an asserted Poisson sample was refuted; the run counts by
               uses
    unnoised   as charge: a step without noise; epsilon is infinite from here on
    release    run: the rest of its reservation is free again
    link       run, datasets: the run took over weights that were also trained on these datasets
    book       runs: their entries before this one were restored from heads; the uses of each unit
               are lost with the database, so these runs charge nothing any more

Version 1 has no `upgrade`, `unit`, `draw`, `drop` and `evaluation`, and no `spent` and `position`.
Entries of version 1 stay as they are, and are replayed by the rules of version 1. A release that
knows only version 1 says of a later ledger that an entry "breaks a rule".

The unit stays as registered, unless nobody stated it: then all runs that are open have the fact
`unit_stated` false. As long as nothing was paid for and no draw was told, an entry `unit` may
choose another unit, once. It closes these runs, because their actors hash rows by the old unit.

`count` is the number that a contract counts: uses of the most used unit (participation) or steps
(all other contracts). `spent` is the greatest sum of 1 / sigma^2 of any unit, over the uses by all
runs of the dataset: under participation, after a fall-back, after a drop, and in evaluations. It
never falls, and one charge raises it by at most 1 / sigma^2 of its run. The registry knows the sum
of each unit; a verifier knows only that this one bounds them all. `sums` rounds every sum up.

Composition: a step under `worst_case` adds 1 / sigma^2 for every unit (`everyone`). Gaussian
releases together have mu^2 = everyone + spent, and the epsilon of mu is exact. A single run under
Poisson sampling has the epsilon of its table if that is less than the filter's. All other
combinations use a Renyi filter at the order that was fixed at registration (Feldman and Zrnic 2021,
arXiv:2008.11193). The filter is valid even if later steps were chosen in the light of earlier
results. In version 1, mu^2 is the sum of count / sigma^2 over the runs.

The draws of the server are one stream of positions per dataset: 0, 1, 2, and so on, whatever run
uses them. At most one position is told and not yet used. Its draw is told again, unchanged, to
every run with the same binding. After a drop or a book, somebody may have chosen among draws, so
all later steps of `poisson` runs count by uses. What version 1 charged counts as used and unbound.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tg_tinker.errors import (
    DPBudgetExceededError,
    IntegrityError,
    InvalidRequestError,
    LedgerMismatchError,
)
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
    UNITS,
    VERSION,
    Entry,
    canonical,
    check_table,
    entry_hash,
    is_digest,
    is_newer,
    is_text,
    parse_place,
    place_of,
    real,
    whole,
)
from tg_tinker.records.sums import added, times, weight


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
        count: the count that the run has used. Uses after a drop are not in it.
        steps: the number of charges.
        facts: further values for the certificate (C, batch size, dtype, ...).
        refuted: whether the run asserted Poisson samples that did not look drawn.
        closed: the type of the entry after which the run may charge nothing any more: book, unit,
            or empty.
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
    closed: str = ""

    @property
    def poisson(self) -> bool:
        return self.contract in POISSON

    @property
    def binding(self) -> tuple[float, float, float]:
        """What a draw is bound to before it is told: sigma, rate and C."""
        return self.sigma, self.rate, float(self.facts["bound"])

    def tabulated(self, count: int) -> float:
        """Returns the epsilon of this run alone after `count` steps.

        It is the epsilon of the first table row with at least `count` steps, or infinite if the
        table has no such row.
        """
        at = bisect_left(self.table, count, key=lambda row: row[0])
        return self.table[at][1] if at < len(self.table) else math.inf


@dataclass(frozen=True)
class Told:
    """The draw that is told and not yet used: the run that was told it first, its position, its
    binding (sigma, rate, C) and the digest of its list of units."""

    run: str
    position: int
    binding: tuple[float, float, float]
    units: str


class Ledger:
    """The state of one dataset's budget. Only `append` changes it.

    Attributes:
        version: the version of the rules that hold for the next entry.
        registered: the values of the first entry, with the unit that was chosen since.
        everyone: the sum of 1 / sigma^2 of what was charged to every unit.
        spent: the greatest sum of 1 / sigma^2 of any unit over all counted uses.
        unknown: an upper bound of those uses of any one unit that were lost with a database.
        position: the position of the next draw; the number of draws that were used or dropped.
        unbound: how many of these draws version 1 charged, which bound them to nothing.
        told: the draw that is told and not yet used.
        dropped: how often a draw was given up. After the first time, Poisson steps count by uses.
    """

    def __init__(self) -> None:
        self.head, self.birth, self.length = GENESIS, "", 0
        self.version = VERSION
        self.everyone, self.spent, self.unknown = 0.0, 0.0, 0.0
        self.position, self.unbound, self.dropped = 0, 0, 0
        self.told: Told | None = None
        # By run: uses that no account counts, each as if it were of one and the same unit.
        self._uncounted: dict[str, float] = {}
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
                if is_newer(entry, ledger._rules()):
                    raise IntegrityError(
                        f"{place} breaks a rule of this release: its type or version is unknown, so"
                        " it was written by a newer release of TG-Tinker, or is forged. Use the"
                        " newest release to read this ledger"
                    )
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
            DPBudgetExceededError: a book closed the account.
            InvalidRequestError: the unit was chosen after the run was opened.
        """
        account = self.accounts[run]
        if account.closed == "unit":
            raise InvalidRequestError(
                f"this run was opened before the unit of dataset {self.registered['dataset']!r} was"
                f" chosen, which is {self.registered['unit']!r} now. Nothing was charged: create a"
                " new client"
            )
        if account.closed:
            raise DPBudgetExceededError(
                "this run may make no more steps: its charges were restored after the database was"
                " lost, and its uses of each unit are not known any more. Load one of its artifacts"
                " in a new client, which starts a new count",
                details={"limit": account.count, "epsilon": self.epsilon},
            )
        return account

    @property
    def unit_stated(self) -> bool:
        """Whether somebody chose the unit: whoever registered the dataset, or a run.

        Nobody did if the run that registered it left the unit open. Runs of earlier releases always
        stated one.
        """
        opened = self.accounts.values()
        return not opened or any(
            account.closed == "unit" or account.facts.get("unit_stated") is not False
            for account in opened
        )

    @property
    def unit_open(self) -> bool:
        """Whether an entry `unit` may still choose the unit."""
        # Whoever has seen a release or a draw must not choose whom it was to protect. After a book,
        # nobody knows what was released.
        untouched = not self._paid and self.position == 0 and self.told is None
        booked = any(account.closed for account in self.accounts.values())
        return not self.unit_stated and untouched and not booked

    @property
    def epsilon(self) -> float:
        """The epsilon spent by everything released so far."""
        counts = {run: account.count for run, account in self.accounts.items()}
        if self.version == 1:
            return self._compose_of_version_1(counts, self.accounts)
        sampled = [(a, a.count) for a in self.accounts.values() if a.poisson]
        return self._compose(added(self.everyone, self.spent), sampled)

    @property
    def released(self) -> tuple[float, list[Account]]:
        """What `epsilon` composes: mu^2 of all Gaussian releases together, and the accounts of the
        runs that made steps on Poisson samples."""
        used = [account for account in self.accounts.values() if account.count]
        mu2 = added(self.everyone, self.spent)
        if self.version == 1:
            mu2 = math.fsum(one.count / one.sigma**2 for one in used if not one.poisson)
        return mu2, [account for account in used if account.poisson]

    def epsilon_with(
        self, run: str, count: int, account: Account | None = None, held: float = 0.0
    ) -> float:
        """Returns the epsilon if `run` reached `count` and all other runs used their reservations.

        It is the epsilon of the most spent unit, except for a run that counts uses: such a run is
        asked what `count` uses of a fresh unit would cost.

        Args:
            account: the account of a run that is not open yet.
            held: the greatest sum of 1 / sigma^2 that a unit has used or that is reserved for it,
                as far as the caller knows.
        """
        accounts = dict(self.accounts) | ({run: account} if account else {})
        if self.version == 1:
            counts = {r: max(a.count, a.reserved) for r, a in accounts.items()}
            return self._compose_of_version_1(counts | {run: count}, accounts)
        one = accounts.get(run)
        if one is not None and self.counts_uses(one):
            return self.epsilon_at(times(count, one.sigma))
        reserved = [times(a.reserved, a.sigma) for a in accounts.values() if self.counts_uses(a)]
        return self.epsilon_at(max(self.spent, held, *reserved, 0.0), accounts, {run: count})

    def epsilon_at(
        self, spent: float, accounts: Mapping[str, Account] | None = None,
        counts: Mapping[str, int] = MappingProxyType({}),
    ) -> float:  # fmt: skip
        """Returns the epsilon of a unit if the sum of its uses were `spent` and all runs that do
        not count uses used their reservations, or reached these `counts`."""
        everyone, sampled = self.everyone, []
        for run, account in (self.accounts if accounts is None else accounts).items():
            count = counts.get(run, max(account.count, account.reserved))
            if account.contract == "worst_case":
                more = max(0, count - account.count)
                everyone = added(everyone, times(more, account.sigma))
            elif account.poisson:
                sampled.append((account, account.count if self.counts_uses(account) else count))
        return self._compose(added(everyone, spent), sampled)

    def counts_uses(self, account: Account) -> bool:
        """Returns whether the next step of a run counts as a use of each of its units."""
        dropped = account.contract == "poisson" and self.dropped > 0
        return account.contract == "participation" or dropped

    # --- how it changes ----------------------------------------------------------------------

    def append(self, body: Mapping[str, Any]) -> Entry:
        """Checks an entry against the rules, applies it, and returns it chained.

        Raises:
            DPBudgetExceededError: the budget cannot pay for the entry. Nothing has changed.
            ValueError, TypeError, KeyError: the entry is malformed or breaks a rule. Nothing has
                changed.
        """
        rule = self._rules()[body["type"]]
        if self.version == 1 and body["type"] in ("unit", "draw", "drop", "evaluation"):
            raise ValueError("version 1 has no such entry: upgrade the ledger first")
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

    def _rules(self) -> dict[str, Callable[..., None]]:
        return {
            "register": self._register,
            "upgrade": self._upgrade,
            "unit": self._unit,
            "open": self._open,
            "draw": self._draw,
            "charge": self._charge,
            "drop": self._drop,
            "evaluation": self._evaluation,
            "fall_back": self._fall_back,
            "unnoised": self._unnoised,
            "release": self._release,
            "link": self._link,
            "book": self._book,
        }

    def _register(
        self, version: int, dataset: str, epsilon: float | None, delta: float, unit: str,
        order: int, born: str,
    ) -> None:  # fmt: skip
        known = unit in UNITS and is_text(dataset) and isinstance(born, str)
        if not 1 <= whole(version) <= VERSION or not 0 < real(delta) < 1 or not known:
            raise ValueError("not a registration of a known version")
        if not 2 <= whole(order) <= MAX_ORDER:
            raise ValueError("the Renyi order is out of range")
        if epsilon is not None and not real(epsilon) > 0:
            raise ValueError("epsilon must be positive")
        self.registered = {
            "dataset": dataset, "epsilon": epsilon, "delta": delta, "unit": unit, "order": order,
            "born": born,
        }  # fmt: skip
        self.version = version

    def _upgrade(self, version: int) -> None:
        if whole(version) != VERSION or self.version == VERSION:
            raise ValueError("a ledger is upgraded to this version, and once")
        self.version, self.unbound = version, self.position
        for account in self.accounts.values():
            cost = times(account.count, account.sigma)
            if account.contract == "worst_case":
                self.everyone = added(self.everyone, cost)
            elif account.contract == "participation":
                # Version 1 knew the most used unit of each run, not whether it was the same unit.
                self.spent = added(self.spent, cost)
                self.unknown = added(self.unknown, cost) if account.closed else self.unknown

    def _unit(self, run: str, unit: str) -> None:
        if not self.unit_open:
            raise ValueError("the unit was stated, or something was paid for or drawn by it")
        if unit not in UNITS or unit == self.registered["unit"]:
            raise ValueError("not another unit")
        if not is_text(run) or run in self.accounts:
            raise ValueError("a run chooses the unit before it is opened")
        for account in self.accounts.values():
            account.closed, account.reserved = "unit", 0
        self.registered = self.registered | {"unit": unit}

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
        if facts.get("unit", self.registered["unit"]) != self.registered["unit"]:
            raise ValueError("the run was planned under another unit")
        if contract not in POISSON and (rate != 1 or rows):
            raise ValueError("only a Poisson sample has a rate and a table")
        check_table(rows, subsampled_gaussian_epsilon(sigma, rate, self.delta))
        if whole(planned) > (planned if limit is None else whole(limit)):
            raise ValueError("more is planned than allowed")
        account = Account(contract, sigma, rate, accountant, rows, limit, planned, facts=facts)
        self.check_epsilon(self.epsilon_with(run, planned, account))
        self.accounts[run] = account

    def _draw(self, run: str, position: int, units: str) -> None:
        account = self.usable(run)
        if account.contract != "poisson" or not is_digest(units):
            raise ValueError("only a run whose samples the server draws is told a draw of units")
        if whole(position) != self.position or self.told is not None:
            raise ValueError("not the next position, or another draw is told and not yet used")
        self._check_next_step(account, run)
        self.told = Told(run, position, account.binding, units)

    def _drop(self, run: str | None, position: int) -> None:
        if not (run is None or run in self.accounts):
            raise ValueError("not a run of this dataset")
        if self.told is None or whole(position) != self.position:
            raise ValueError("no such draw is told")
        self._give_up()

    def _charge(
        self, run: str, epoch: int, charge: str, count: int, spent: float | None = None,
        position: int | None = None,
    ) -> None:  # fmt: skip
        account = self.usable(run)
        self._check_step(account, charge, count, spent, position)
        self._check_limit(account, count)
        if self.version > 1 and self.counts_uses(account):
            self.check_sum(real(spent))
        else:
            self.check_epsilon(self.epsilon_with(run, count))
        self._take_step(run, charge, count, spent)

    def _evaluation(self, run: str, epoch: int, charge: str, sigma: float, spent: float) -> None:
        if run in self.accounts:
            self.usable(run)
        if not is_text(run) or not SIGMA_RANGE[0] <= real(sigma) <= SIGMA_RANGE[1]:
            raise ValueError("the run is no text, or the noise multiplier is out of range")
        self._check_unpaid(charge)
        self._check_spent(spent, weight(sigma))
        self.check_sum(spent)
        self._uncounted[run] = added(self._uncounted.get(run, 0.0), weight(sigma))
        self._paid.add(charge)
        self.spent = spent

    def _fall_back(
        self, run: str, count: int, limit: int | None, spent: float | None = None
    ) -> None:  # fmt: skip
        account = self.usable(run)
        if account.contract != "client_poisson" or not whole(count) <= account.steps:
            raise ValueError("only an asserted Poisson sample falls back")
        limit = None if limit is None else whole(limit)
        self._check_spent(spent, times(count, account.sigma))
        account.contract, account.rate, account.table = "participation", 1.0, ()
        account.accountant, account.reserved = "exact", 0
        account.count, account.limit = count, limit
        account.refuted = True
        self.spent = self.spent if spent is None else spent

    def _unnoised(
        self, run: str, epoch: int, charge: str, count: int, spent: float | None = None,
        position: int | None = None,
    ) -> None:  # fmt: skip
        if self.registered["epsilon"] is not None:
            raise DPBudgetExceededError(
                "a step without noise needs a dataset that is registered with unlimited epsilon"
            )
        self._check_step(self.usable(run), charge, count, spent, position)
        self._take_step(run, charge, count, spent)
        self.unnoised = True

    def _release(self, run: str) -> None:
        self.accounts[run].reserved = 0

    def _link(self, run: str, datasets: Iterable[str]) -> None:
        if run not in self.accounts or not all(is_text(name) for name in datasets):
            raise ValueError("not a run of this dataset, or a name of a dataset is no text")
        self.linked |= set(datasets)

    def _book(self, runs: Iterable[str]) -> None:
        names = list(runs)
        if not names or not all(run in self.accounts or run in self._uncounted for run in names):
            raise ValueError("the entry names no run, or one that is unknown")
        for run in names:
            self.unknown = added(self.unknown, self._uncounted.pop(run, 0.0))
            if (account := self.accounts.get(run)) is None:
                continue
            if self.version > 1 and account.contract == "participation" and not account.closed:
                self.unknown = added(self.unknown, times(account.count, account.sigma))
            account.closed, account.reserved = account.closed or "book", 0
        # A draw may have been told whose entry is lost.
        if self.version > 1 and any(a.contract == "poisson" for a in self.accounts.values()):
            self._give_up()

    # --- inside ------------------------------------------------------------------------------

    def _check_next_step(self, account: Account, run: str) -> None:
        if self.counts_uses(account):
            self.check_sum(weight(account.sigma))
            return
        self._check_limit(account, account.count + 1)
        self.check_epsilon(self.epsilon_with(run, account.count + 1))

    def _check_step(
        self, account: Account, charge: str, count: int, spent: float | None, position: int | None
    ) -> None:
        self._check_unpaid(charge)
        drops = self.version > 1 and account.contract == "poisson" and self.dropped > 0
        # Under participation a step need not raise the count, the uses of the most used unit.
        unchanged = (account.contract == "participation" or drops) and count == account.count
        if not unchanged and (drops or whole(count) != account.count + 1):
            raise ValueError(f"the count must not go from {account.count} to {count}")
        whole(count)
        self._check_spent(spent, weight(account.sigma) if self.counts_uses(account) else 0.0)
        by_count = times(count, account.sigma) if account.contract == "participation" else 0.0
        if spent is not None and spent < by_count:
            raise ValueError("the greatest sum of a unit is below that of the run's own count")
        if (position is not None) != (self.version > 1 and account.contract == "poisson"):
            raise ValueError("a step has a position if the server draws its units, and only then")
        if position is not None and (
            self.told is None
            or whole(position) != self.told.position
            or self.told.binding != account.binding
        ):
            raise ValueError("this draw is not told, or to runs with other settings")

    def _check_spent(self, spent: float | None, most: float) -> None:
        """Checks the greatest sum of any unit after a step that adds at most `most` to it."""
        if (spent is not None) != (self.version > 1):
            raise ValueError("an entry has the greatest sum from version 2 on, and only then")
        if spent is not None and not self.spent <= real(spent) <= added(self.spent, most):
            raise ValueError("the greatest sum of a unit falls, or rises by more than the step")

    def _take_step(self, run: str, charge: str, count: int, spent: float | None) -> None:
        account = self.accounts[run]
        if self.version > 1 and account.contract == "worst_case":
            self.everyone = added(self.everyone, weight(account.sigma))
        if account.contract == "poisson":
            if self.dropped:
                cost = added(self._uncounted.get(run, 0.0), weight(account.sigma))
                self._uncounted[run] = cost
            self.position, self.told = self.position + 1, None
        account.count, account.steps = count, account.steps + 1
        self.spent = self.spent if spent is None else spent
        self._paid.add(charge)

    def _give_up(self) -> None:
        """Passes over the next position. From now on, steps of `poisson` runs count by uses."""
        self.position, self.told, self.dropped = self.position + 1, None, self.dropped + 1
        for account in self.accounts.values():
            if account.contract == "poisson":
                account.limit, account.reserved = None, 0

    def _check_unpaid(self, charge: str) -> None:
        if not is_text(charge) or charge in self._paid:
            raise ValueError("a charge needs an id that no earlier charge has")

    def _check_limit(self, account: Account, count: int) -> None:
        if account.limit is not None and count > account.limit:
            raise DPBudgetExceededError(
                f"the run has used all {account.limit} {_counted(account)} that its budget pays"
                f" for: epsilon {self.epsilon:.4g} of {self.limit:g} is spent. The weights are"
                " unchanged, and save_state still works",
                details={"limit": account.limit, "epsilon": self.epsilon},
            )

    def check_sum(self, spent: float) -> None:
        """Checks that the budget can pay for a unit whose uses have this sum of 1 / sigma^2, beside
        all that is reserved for runs that do not count uses.

        Raises:
            DPBudgetExceededError: it cannot.
        """
        self.check_epsilon(self.epsilon_at(spent))

    def check_epsilon(self, after: float) -> None:
        """Checks that the budget allows a total epsilon.

        Raises:
            DPBudgetExceededError: it does not.
        """
        if after > self.limit:
            raise DPBudgetExceededError(
                f"epsilon {self.limit:g} of dataset {self.registered['dataset']!r} cannot pay for"
                f" this: {self.epsilon:.4g} is spent, and with this and the reservations of living"
                f" clients it would be {after:.4g}. Close other clients, use more noise, or train"
                " on a dataset with budget left",
                details={"limit": self.limit, "spent": self.epsilon, "needed": after},
            )

    def _compose(self, mu2: float, sampled: Iterable[tuple[Account, int]]) -> float:
        """Returns the epsilon of Gaussian releases with this mu^2 and of Poisson steps."""
        if self.unnoised:
            return math.inf
        used = [(account, count) for account, count in sampled if count]
        if not used:
            return gaussian_epsilon(math.sqrt(mu2), self.delta)
        alone = used[0][0].tabulated(used[0][1]) if len(used) == 1 and not mu2 else math.inf
        # Both are upper bounds. The smaller one never falls when another run joins.
        return min(alone, self._filtered(used, mu2))

    def _filtered(self, used: Iterable[tuple[Account, int]], mu2: float = 0.0) -> float:
        order = int(self.registered["order"])
        rdp = math.fsum(
            [order * mu2 / 2]
            + [
                count * subsampled_gaussian_rdp(account.sigma, account.rate, order)
                for account, count in used
            ]
        )
        return rdp_epsilon(rdp, order, self.delta)

    def _compose_of_version_1(
        self, counts: Mapping[str, int], accounts: Mapping[str, Account]
    ) -> float:
        """Returns the epsilon by the arithmetic of version 1. Its entries were allowed by these
        digits."""
        used = [(accounts[run], count) for run, count in counts.items() if count]
        if self.unnoised or any(account.poisson for account, _ in used):
            if self.unnoised:
                return math.inf
            alone = used[0][0].tabulated(used[0][1]) if len(used) == 1 else math.inf
            return min(alone, self._filtered(used))
        mu2 = math.fsum(count / account.sigma**2 for account, count in used)
        return gaussian_epsilon(math.sqrt(mu2), self.delta)


def _counted(account: Account) -> str:
    return "uses of a unit" if account.contract == "participation" else "steps"
