"""Compares the index of artifacts with the audit log.

Somebody who can write to the database can undo a deletion in the index. That is impossible in a log
whose heads others keep.
"""

from __future__ import annotations

from typing import NamedTuple

from actors.registry.audit_log import MOST_ROWS
from actors.registry.catalogue import NEVER
from actors.registry.registry import Registry
from tg_tinker.records.audit_log import AuditRow, parse_rows


class Entry(NamedTuple):
    """The state of an artifact according to the index of artifacts, or according to the audit log.

    Attributes:
        manifest: The SHA-256 of the manifest, hex; empty if the artifact was removed.
        expires_at: The expiry, in the notation of audit rows.
        row: The number of the last row about manifest or expiry; 0 in the index.
    """

    manifest: str
    expires_at: str = NEVER
    row: int = 0


def differences(registry: Registry, tenant: str) -> dict[str, str]:
    """Returns where the log contradicts the index about artifacts that exist; by id of the
    artifact."""
    told, found = _told(registry, tenant), {}
    for artifact_id, (manifest, expires_at) in registry.catalogue.entries(tenant).items():
        said = told.get(artifact_id, Entry(""))
        if not said.manifest:
            how = f"was deleted at row {said.row}" if said.row else "was never saved"
            found[artifact_id] = f"the audit log records that it {how}: the database was changed"
        elif (manifest, expires_at) != (said.manifest, said.expires_at):
            what = "expiry" if manifest == said.manifest else "manifest"
            how = f"row {said.row} of the audit log has another {what} for it"
            found[artifact_id] = f"{how}: the database was changed"
    return found


def _told(registry: Registry, tenant: str) -> dict[str, Entry]:
    told: dict[str, Entry] = {}
    since = 0
    while lines := registry.audit_log.rows(tenant, since, MOST_ROWS):
        for row in parse_rows(lines, since):
            if row.outcome == "ok" and (entry := _said(row, told.get(row.subject))) is not None:
                told[row.subject] = entry
        since += len(lines)
    return told


def _said(row: AuditRow, before: Entry | None) -> Entry | None:
    expires_at = NEVER if before is None else before.expires_at
    match row.event:
        case "artifact.save" | "artifact.copy" | "artifact.reseal":
            return Entry(str(row.details["manifest"]), expires_at, row.seq)
        case "artifact.expiry" if before is not None:
            return Entry(before.manifest, str(row.details["expires_at"]), row.seq)
        case "artifact.delete" | "artifact.shred" | "artifact.expire":
            return Entry("", row=row.seq)
    return None
