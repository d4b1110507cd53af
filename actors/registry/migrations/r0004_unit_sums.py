"""Adds `unit_sums` and fills it from `unit_uses`, adds the draw keys, and raises the fencing token.

The sum of a unit is 1 / sigma^2 of each of its uses, over the runs of its dataset that count uses.
Programs of revision 0003 would not add to the sums, so those that still run can change nothing
after this revision.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_ADD = sa.text(
    "INSERT INTO unit_sums (tenant, dataset, unit, spent)"
    " SELECT :tenant, :dataset, unit, uses * :cost FROM unit_uses WHERE run_id = :run"
    " ON CONFLICT (tenant, dataset, unit) DO UPDATE SET spent = unit_sums.spent + excluded.spent"
).bindparams(sa.bindparam("cost", type_=sa.Double))


def upgrade() -> None:
    op.execute("UPDATE registry SET fencing_token = fencing_token + 1")
    op.add_column("datasets", sa.Column("draw_position", sa.Integer))
    op.add_column("datasets", sa.Column("wrapped_draw_key", sa.String))
    op.create_table(
        "unit_sums",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("dataset", sa.String, primary_key=True),
        sa.Column("unit", sa.LargeBinary, primary_key=True),
        sa.Column("spent", sa.Double, nullable=False),
    )
    connection = op.get_bind()
    stored = sa.text("SELECT tenant, dataset, entry FROM ledger_entries ORDER BY seq")
    costs = {}
    for tenant, dataset, text in connection.execute(stored):
        entry = json.loads(text)
        if entry["type"] == "open":
            counts = entry["contract"] == "participation"
            costs[tenant, dataset, entry["run"]] = _cost(entry["sigma"]), counts
        elif entry["type"] == "fall_back":
            cost, _ = costs[tenant, dataset, entry["run"]]
            costs[tenant, dataset, entry["run"]] = cost, True
    for (tenant, dataset, run), (cost, counts) in costs.items():
        if counts:
            row = {"tenant": tenant, "dataset": dataset, "run": run, "cost": cost}
            connection.execute(_ADD, row)


def _cost(sigma: float) -> float:
    """Returns 1 / sigma^2, rounded up to 30 binary digits, so that sums of them are exact."""
    exact = 1 / Fraction(sigma) ** 2
    _, exponent = math.frexp(float(exact))
    return math.ldexp(math.ceil(exact * Fraction(2) ** (30 - exponent)), exponent - 30)
