"""The tables of the registry in this release.

Every home stores the names of tables and columns. A change here is a new revision in `migrations`,
which `upgrade` runs on a database of an older release. Nothing else changes tables.
"""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

OWNER = sa.Table(
    "registry",
    METADATA,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
    # See `Database`.
    sa.Column("fencing_token", sa.Integer, nullable=False),
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
    # Why the run has no actor on purpose; null while it should have an actor.
    sa.Column("ended", sa.String),
    # The artifact that was saved or loaded last; null means the base model.
    sa.Column("resume_from", sa.String),
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
    # The number of folder names given to the artifact, its id included.
    sa.Column("names_given", sa.Integer, nullable=False),
    # For a copy: when its source was saved.
    sa.Column("saved_at", sa.Float, nullable=False),
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
    # See `draws`; null until the first draw.
    sa.Column("draw_position", sa.Integer),
    sa.Column("wrapped_draw_key", sa.String),
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

SUMS = sa.Table(
    "unit_sums",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("unit", sa.LargeBinary, primary_key=True),
    # The sum of 1 / sigma^2 over the uses of the unit by all runs; see `uses`.
    sa.Column("spent", sa.Double, nullable=False),
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
    # See `grants`; null in a row of revision 0002 that has none yet.
    sa.Column("mac", sa.String),
)

KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    # The position in the order in which the keys were first seen.
    sa.Column("place", sa.Integer, nullable=False),
)
