"""Adds `api_keys.mac`, and raises the fencing token by one.

The rows have no MAC yet: this revision has no keys. The registry makes them when it first opens the
database; see `actors.registry.api_keys`. Programs of revision 0002 would make rows without a MAC,
so those that still run can change nothing after this revision.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("UPDATE registry SET fencing_token = fencing_token + 1")
    op.add_column("api_keys", sa.Column("mac", sa.String))
