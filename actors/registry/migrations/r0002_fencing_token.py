"""`registry.generation` becomes `registry.fencing_token`, and is raised by one.

Programs of the first release look for the column before each change and when they open a database:
one that still runs changes nothing from here on, and one that is started later refuses it.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("UPDATE registry SET generation = generation + 1")
    op.alter_column("registry", "generation", new_column_name="fencing_token")
