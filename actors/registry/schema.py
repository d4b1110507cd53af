"""All tables of the registry, as this release has them.

Names of tables and columns are stored in every home: a change here is a revision in `migrations`,
which `upgrade` runs over a database of an older release. Nothing else changes tables.
"""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

OWNER = sa.Table(
    "registry",
    METADATA,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
    sa.Column("fencing_token", sa.Integer, nullable=False),  # see `Database`
)

RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("config", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended", sa.String),  # why it has no actor on purpose; null while it should have one
    sa.Column("resume_from", sa.String),  # artifact saved or loaded last; null is the base model
)

ARTIFACTS = sa.Table(
    "artifacts",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("include_optimizer", sa.Boolean, nullable=False),
    sa.Column("manifest_sha256", sa.String, nullable=False),
    sa.Column("stored_as", sa.String, nullable=False),
    sa.Column("names_given", sa.Integer, nullable=False),  # of folders, the id among them
    sa.Column("saved_at", sa.Float, nullable=False),  # of a copy: when its source was saved
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("deleted_at", sa.Float),
)

LABELS = sa.Table(
    "artifact_labels",
    METADATA,
    sa.Column("artifact_id", sa.String, sa.ForeignKey("artifacts.id"), primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)

ORPHANS = sa.Table(
    "orphans",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("buried", sa.Boolean, nullable=False),
)

DATASETS = sa.Table(
    "datasets",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("wrapped_key", sa.String, nullable=False),
)

ENTRIES = sa.Table(
    "ledger_entries",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("entry", sa.String, nullable=False),
)

USES = sa.Table(
    "unit_uses",
    METADATA,
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("unit", sa.LargeBinary, primary_key=True),
    sa.Column("uses", sa.Integer, nullable=False),
)

CHARGES = sa.Table(
    "charges",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("evidence", sa.String, nullable=False),
    sa.Column("receipt", sa.String, nullable=False),
)

AUDIT_ROWS = sa.Table(
    "audit_rows",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("row", sa.String, nullable=False),
)

API_KEYS = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("models", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
)

KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("place", sa.Integer, nullable=False),  # in the order in which they were first seen
)
