"""Renames `registry.generation` to `registry.fencing_token`, and raises its value by one.

Programs of the first release read the old column before each change and when they open a database.
A program that still runs can change nothing after this revision, and a program that starts later
refuses the database.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("UPDATE registry SET generation = generation + 1")
    op.alter_column("registry", "generation", new_column_name="fencing_token")
