"""Counts how often each unit of a run was used, within the transaction of a charge.

The contracts of participation and of an asserted sample are checked against these counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from actors.registry.plausibility import looks_drawn
from actors.registry.schema import CHARGES, USES
from tg_tinker.records.accounting import gaussian_epsilon, largest_count
from tg_tinker.records.entries import Entry
from tg_tinker.records.ledger import Account

_IN_AT_A_TIME = 5_000
"""The number of bound variables in one statement."""


def count_uses(tx: sa.Connection, account: Account, run_id: str, units: Sequence[bytes]) -> int:
    """Returns the contract's count after this step, and records the uses of units if the contract
    needs them."""
    if account.contract in ("worst_case", "poisson"):
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
    return {"count": most, "limit": _own_uses(account, most)}


def _own_uses(account: Account, used: int) -> int | None:
    """Returns how many uses the run's own target pays for, at least those already made. Returns
    None if the run has no target."""
    target, delta = account.facts["target_epsilon"], account.facts["target_delta"]
    if target is None:
        return None
    paid = largest_count(
        lambda uses: gaussian_epsilon(math.sqrt(uses) / account.sigma, delta) <= target
    )
    return max(used, paid)


def uses_of(connection: sa.Connection, run_id: str, units: Iterable[bytes]) -> dict[bytes, int]:
    """Returns the number of uses of those units that were used before."""
    wanted = list(units)
    found: dict[bytes, int] = {}
    for start in range(0, len(wanted), _IN_AT_A_TIME):
        query = sa.select(USES.c.unit, USES.c.uses).where(
            USES.c.run_id == run_id, USES.c.unit.in_(wanted[start : start + _IN_AT_A_TIME])
        )
        found |= {bytes(unit): uses for unit, uses in connection.execute(query)}
    return found


def _units_and_most_used(connection: sa.Connection, run_id: str) -> tuple[int, int]:
    """Returns how many units a run has used, and how often it used the most used unit."""
    query = sa.select(sa.func.count(), sa.func.max(USES.c.uses)).where(USES.c.run_id == run_id)
    distinct, most = connection.execute(query).one()
    return distinct, most or 0
