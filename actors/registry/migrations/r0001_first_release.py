"""Creates the tables of the first release whose homes can be upgraded.

Databases of that release have no stored revision. Therefore this revision finds the tables
complete, or creates those that are missing: the release made some tables only when it first needed
them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TABLES = sa.MetaData()

sa.Table(
    "registry",
    TABLES,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
    sa.Column("generation", sa.Integer, nullable=False),
)

sa.Table(
    "runs",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("config", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended", sa.String),
    sa.Column("resume_from", sa.String),
)

sa.Table(
    "artifacts",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("include_optimizer", sa.Boolean, nullable=False),
    sa.Column("manifest_sha256", sa.String, nullable=False),
    sa.Column("stored_as", sa.String, nullable=False),
    sa.Column("names_given", sa.Integer, nullable=False),
    sa.Column("saved_at", sa.Float, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("deleted_at", sa.Float),
)

sa.Table(
    "artifact_labels",
    TABLES,
    sa.Column("artifact_id", sa.String, sa.ForeignKey("artifacts.id"), primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)

sa.Table(
    "orphans",
    TABLES,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("buried", sa.Boolean, nullable=False),
)

sa.Table(
    "datasets",
    TABLES,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("wrapped_key", sa.String, nullable=False),
)

sa.Table(
    "ledger_entries",
    TABLES,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("entry", sa.String, nullable=False),
)

sa.Table(
    "unit_uses",
    TABLES,
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("unit", sa.LargeBinary, primary_key=True),
    sa.Column("uses", sa.Integer, nullable=False),
)

sa.Table(
    "charges",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("evidence", sa.String, nullable=False),
    sa.Column("receipt", sa.String, nullable=False),
)

sa.Table(
    "audit_rows",
    TABLES,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("row", sa.String, nullable=False),
)

sa.Table(
    "api_keys",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("models", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
)

sa.Table(
    "keys",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("place", sa.Integer, nullable=False),
)


def upgrade() -> None:
    TABLES.create_all(op.get_bind(), checkfirst=True)
