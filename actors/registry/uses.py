"""Counts how often each unit was used, and decides which units may be used again.

`unit_uses` counts the uses of a unit by each run: the contract of participation has a limit of
these, and an asserted sample is checked against them. `unit_sums` has the sum of 1 / sigma^2 of a
unit over all runs of its dataset. A unit may be used if the dataset can pay for its own sum, which
makes an exact filter for each unit (Feldman and Zrnic 2021, arXiv:2008.11193: individual privacy
accounting). A living run that plans a number of uses also holds them for the units that it has
touched.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from actors.registry.plausibility import looks_drawn
from actors.registry.schema import CHARGES, SUMS, USES
from tg_tinker.records.accounting import (
    filter_order,
    gaussian_epsilon,
    largest_count,
    rdp_epsilon,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.entries import Entry
from tg_tinker.records.ledger import Account, Ledger
from tg_tinker.records.sums import added, times, weight

_IN_AT_A_TIME = 5_000
"""The number of bound variables in one statement."""


@dataclass(frozen=True)
class Units:
    """Some units of a dataset: what each has spent, and what living runs hold for it.

    Attributes:
        stored: the sum in the database, of the units that have one.
        held: what other runs have planned for each unit that they have touched, and not yet used.
    """

    ledger: Ledger
    stored: Mapping[bytes, float]
    held: Mapping[bytes, float]

    @classmethod
    def read(
        cls, connection: sa.Connection, tenant: str, dataset: str, ledger: Ledger,
        units: Sequence[bytes], run_id: str,
    ) -> Units:  # fmt: skip
        """Returns units as they are for a run, whose own plan holds nothing from itself."""
        held: dict[bytes, float] = {}
        for other, account in holders(ledger).items():
            if other != run_id:
                for unit, uses in uses_of(connection, other, units).items():
                    planned = times(max(0, account.reserved - uses), account.sigma)
                    held[unit] = added(held.get(unit, 0.0), planned)
        query = sa.select(SUMS.c.unit, SUMS.c.spent)
        this = (SUMS.c.tenant == tenant, SUMS.c.dataset == dataset)
        return cls(ledger, _found(connection, query.where(*this), SUMS.c.unit, units), held)

    def spent(self, unit: bytes) -> float:
        """Returns an upper bound of a unit's sum, which includes uses lost with a database."""
        known = added(self.stored.get(unit, 0.0), self.ledger.unknown)
        return min(self.ledger.spent, known)

    def needed(self, unit: bytes, cost: float) -> float:
        """Returns the sum that a unit would have after one more use and all that others hold."""
        return added(added(self.spent(unit), self.held.get(unit, 0.0)), cost)

    def at_limit(self, units: Iterable[bytes], cost: float) -> set[bytes]:
        """Returns those of the units that the dataset cannot pay one more use for."""
        needed = {unit: self.needed(unit, cost) for unit in units}
        sums = sorted(set(needed.values()))
        first = bisect_left(sums, True, key=lambda s: self.ledger.epsilon_at(s) > self.ledger.limit)
        return {unit for unit, total in needed.items() if total in set(sums[first:])}


def holders(ledger: Ledger) -> dict[str, Account]:
    """Returns the accounts of living runs that hold planned uses, by run."""
    return {
        run: account
        for run, account in ledger.accounts.items()
        if account.reserved and ledger.counts_uses(account)
    }


def units_at_limit(
    connection: sa.Connection, tenant: str, dataset: str, ledger: Ledger, units: Sequence[bytes],
    cost: float, run_id: str,
) -> set[bytes]:  # fmt: skip
    """Returns those of the units that may not be used again at this cost, whoever asks."""
    most = added(ledger.spent, cost)
    # Then every unit may be used, and none need be looked up.
    if not holders(ledger) and ledger.epsilon_at(most) <= ledger.limit:
        return set()
    found = Units.read(connection, tenant, dataset, ledger, units, run_id)
    return found.at_limit(units, cost)


def add_to_sums(
    tx: sa.Connection, tenant: str, dataset: str, ledger: Ledger, costs: Mapping[bytes, float],
    run_id: str, check: Callable[[float], None] = lambda needed: None,
) -> float:  # fmt: skip
    """Adds a cost to the sum of each of these units, and returns the greatest sum of any unit of
    the dataset.

    Args:
        check: raises an error if the dataset cannot pay for a unit of this sum. It is called with
            the greatest sum that one of these units needs.
    """
    found = Units.read(tx, tenant, dataset, ledger, [*costs], run_id)
    check(max((found.needed(unit, cost) for unit, cost in costs.items()), default=0.0))
    values = {unit: added(found.stored.get(unit, 0.0), cost) for unit, cost in costs.items()}
    this = (SUMS.c.tenant == tenant, SUMS.c.dataset == dataset)
    if known := [unit for unit in values if unit in found.stored]:
        update = SUMS.update().where(*this, SUMS.c.unit == sa.bindparam("one"))
        update = update.values(spent=sa.bindparam("sum"))
        tx.execute(update, [{"one": unit, "sum": values[unit]} for unit in known])
    if fresh := [unit for unit in values if unit not in found.stored]:
        row = {"tenant": tenant, "dataset": dataset}
        tx.execute(SUMS.insert(), [row | {"unit": u, "spent": values[u]} for u in fresh])
    reached = (added(found.spent(unit), cost) for unit, cost in costs.items())
    return max(ledger.spent, *reached, 0.0)


def most_held(connection: sa.Connection, tenant: str, dataset: str, ledger: Ledger) -> float:
    """Returns the greatest sum that any unit has spent or that living runs hold for it."""
    if not (runs := holders(ledger)):
        return ledger.spent
    held = sa.case(
        *(
            (USES.c.run_id == run, (account.reserved - USES.c.uses) * weight(account.sigma))
            for run, account in runs.items()
        ),
        else_=0.0,
    )
    left = sa.func.sum(sa.case((held > 0, held), else_=0.0)).label("held")
    touched = (
        sa.select(SUMS.c.spent, left)
        .join(USES, USES.c.unit == SUMS.c.unit)
        .where(SUMS.c.tenant == tenant, SUMS.c.dataset == dataset, USES.c.run_id.in_([*runs]))
        .group_by(SUMS.c.unit, SUMS.c.spent)
        .subquery()
    )
    pairs = connection.execute(sa.select(touched.c.spent, touched.c.held).distinct())
    sums = (
        added(min(ledger.spent, added(spent, ledger.unknown)), planned) for spent, planned in pairs
    )
    return max(ledger.spent, *sums, 0.0)


# --- which units are known -----------------------------------------------------------------------


def note_units(tx: sa.Connection, tenant: str, dataset: str, units: Iterable[bytes]) -> None:
    """Makes units known to a dataset, although nothing is added to their sums."""
    wanted = set(units)
    fresh = sorted(wanted - _with_sums(tx, tenant, dataset, wanted))
    if fresh:
        row = {"tenant": tenant, "dataset": dataset, "spent": 0.0}
        tx.execute(SUMS.insert(), [row | {"unit": unit} for unit in fresh])


def forget_units(tx: sa.Connection, tenant: str, dataset: str) -> None:
    """Forgets the units of a dataset that has charged none, because another unit was chosen."""
    tx.execute(SUMS.delete().where(SUMS.c.tenant == tenant, SUMS.c.dataset == dataset))


def known_to(
    connection: sa.Connection, tenant: str, dataset: str, runs: Iterable[str],
    units: Iterable[bytes],
) -> set[bytes]:  # fmt: skip
    """Returns those of the units that a dataset knows.

    Args:
        runs: the runs of the dataset. Asserted samples of older releases are in their uses only.
    """
    wanted = set(units)
    by_runs = {unit for run in runs for unit in uses_of(connection, run, wanted)}
    return by_runs | _with_sums(connection, tenant, dataset, wanted)


def _with_sums(
    connection: sa.Connection, tenant: str, dataset: str, units: Iterable[bytes]
) -> set[bytes]:
    this = (SUMS.c.tenant == tenant, SUMS.c.dataset == dataset)
    query = sa.select(SUMS.c.unit, SUMS.c.spent).where(*this)
    return {*_found(connection, query, SUMS.c.unit, units)}


# --- the uses of one run -------------------------------------------------------------------------


def count_uses(
    tx: sa.Connection, ledger: Ledger, account: Account, run_id: str, units: Sequence[bytes]
) -> int:
    """Returns the contract's count after this step, and records the uses of units if the contract
    needs them."""
    counts_uses = ledger.counts_uses(account)
    if not counts_uses and account.contract != "client_poisson":
        return account.count + 1
    uses = uses_of(tx, run_id, units)
    if known := [unit for unit in units if unit in uses]:
        bound = {"run": run_id, "one": sa.bindparam("one")}
        update = (
            USES.update()
            .where(USES.c.run_id == bound["run"], USES.c.unit == bound["one"])
            .values(uses=USES.c.uses + 1)
        )
        tx.execute(update, [{"one": unit} for unit in known])
    if fresh := [unit for unit in units if unit not in uses]:
        rows = [{"run_id": run_id, "unit": unit, "uses": 1} for unit in fresh]
        tx.execute(USES.insert(), rows)
    if account.contract == "poisson":
        return account.count
    if account.contract == "client_poisson":
        return account.count + 1
    return max(account.count, *(uses.get(unit, 0) + 1 for unit in units), 0)


def refuted(tx: sa.Connection, account: Account, run_id: str, size: int) -> Entry | None:
    """Returns count and limit for a run whose asserted sample, this step included, does not look
    like a sample: from now on participation counts all its steps. Returns None if it looks like a
    sample, or if the run asserts none."""
    if account.contract != "client_poisson":
        return None
    sizes = sa.select(CHARGES.c.size).where(CHARGES.c.run_id == run_id)
    distinct, most = _units_and_most_used(tx, run_id)
    so_far = [*tx.execute(sizes).scalars(), size]
    if looks_drawn(so_far, distinct, account.facts["dataset_size"], account.rate):
        return None
    return {"count": most, "limit": own_uses(account, most)}


def own_uses(account: Account, used: int = 0) -> int | None:
    """Returns how many uses of a unit the run's own target pays for, beside the Poisson steps that
    it has made, and at least those already made. Returns None if the run has no target."""
    if (stated := account.facts["target_epsilon"]) is None:
        return None
    target, delta = float(stated), float(account.facts["target_delta"])
    order, sampled = filter_order(target, delta), 0.0
    if account.contract == "poisson":
        sampled = account.count * subsampled_gaussian_rdp(account.sigma, account.rate, order)

    def fits(uses: int) -> bool:
        mu2: float = uses / account.sigma**2
        if not sampled:
            return gaussian_epsilon(math.sqrt(mu2), delta) <= target
        return rdp_epsilon(sampled + order * mu2 / 2, order, delta) <= target

    return max(used, largest_count(fits))


def uses_of(connection: sa.Connection, run_id: str, units: Iterable[bytes]) -> dict[bytes, int]:
    """Returns the number of uses by a run of those units that it used before."""
    query = sa.select(USES.c.unit, USES.c.uses).where(USES.c.run_id == run_id)
    return _found(connection, query, USES.c.unit, units)


def all_uses(connection: sa.Connection, run_id: str) -> dict[bytes, int]:
    """Returns the number of uses by a run of every unit that it used."""
    query = sa.select(USES.c.unit, USES.c.uses).where(USES.c.run_id == run_id)
    return {bytes(unit): uses for unit, uses in connection.execute(query)}


def _found(
    connection: sa.Connection, query: sa.Select[Any], column: sa.Column[Any], units: Iterable[bytes]
) -> dict[bytes, Any]:
    """Returns the rows of a query of (unit, value) for these units."""
    wanted = list(units)
    found: dict[bytes, Any] = {}
    for start in range(0, len(wanted), _IN_AT_A_TIME):
        some = query.where(column.in_(wanted[start : start + _IN_AT_A_TIME]))
        found |= {bytes(unit): value for unit, value in connection.execute(some)}
    return found


def _units_and_most_used(connection: sa.Connection, run_id: str) -> tuple[int, int]:
    """Returns how many units a run has used, and how often it used the most used unit."""
    query = sa.select(sa.func.count(), sa.func.max(USES.c.uses)).where(USES.c.run_id == run_id)
    distinct, most = connection.execute(query).one()
    return distinct, most or 0
