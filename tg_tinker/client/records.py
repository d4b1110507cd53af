"""Reads, checks and repairs the records of one tenant: privacy ledgers and the audit log.

Each record is compared with the heads that the store and this home keep of it. `tg_tinker.records`
defines the rules of ledgers and of the audit log.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tg_tinker.backend import Registry, actors_backend
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.errors import InvalidRequestError, NotFoundError
from tg_tinker.records.audit_log import AuditRow, empty, parse_rows, verify
from tg_tinker.records.files import KeptHead, keep_head, paged, read_head, read_public_key
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.report import UNIT, PrivacyReport, dataset_of
from tg_tinker.records.successions import Signers
from tg_tinker.types import RegistryAcceptance, RegistryCheck

MOST_AUDIT_ROWS = 10_000
"""The maximum number of rows in one page of the audit log."""


class Records:
    """The part of `ServiceClient` about records; `ServiceClient` documents each method.

    Args:
        audit_keys: the folder of the public key that verifies the signatures of the audit log.
    """

    def __init__(
        self, registry: Registry, store: str, tenant: str, home: Path, audit_keys: Path
    ) -> None:
        self._registry, self._store, self._tenant = registry, store, tenant
        self._home, self._audit_keys = home, audit_keys

    # --- ledgers -----------------------------------------------------------------------------

    def meet_ledger(self, dataset: str) -> KeptHead:
        """Compares a ledger with all its known heads; returns the head that this home keeps."""
        kept = KeptHead(self._home, self._tenant, dataset)
        actors_backend().meet_ledger(self._registry, self._store, self._tenant, dataset, kept.lines)
        return kept

    def register_dataset(
        self, dataset_id: str, epsilon: float | None, delta: float, unit: str
    ) -> None:
        if not isinstance(dataset_id, str):
            raise InvalidRequestError("dataset_id must be a string: the name of the dataset")
        dp = DPConfig(target_epsilon=epsilon, target_delta=delta, unit=unit)
        checked = TrainingConfig(model_ref="any", dataset_id=dataset_id)
        self.meet_ledger(dataset_id)
        self._registry.ledgers.register(
            self._tenant, dataset_of(checked), dp.target_epsilon, dp.target_delta, dp.unit or UNIT
        )

    def privacy_report(self, dataset_id: str) -> PrivacyReport:
        entries = self._registry.ledgers.entries(self._tenant, dataset_id)
        if not entries:
            known = ", ".join(self._registry.ledgers.datasets(self._tenant)) or "none yet"
            raise NotFoundError(
                f"dataset {dataset_id!r} has no ledger; datasets with a ledger: {known}"
            )
        self.meet_ledger(dataset_id)
        counted = self._registry.ledgers.counted_units(self._tenant, dataset_id)
        return PrivacyReport(entries, counted)

    def drop_draw(self, dataset_id: str) -> int:
        told = self.privacy_report(dataset_id).ledger.told
        if told is None:
            raise InvalidRequestError(
                f"no draw of dataset {dataset_id!r} waits for its step: there is nothing to drop"
            )
        self._registry.ledgers.drop(self._tenant, dataset_id, told.position)
        return told.position

    def book_missing_charges(self, dataset_id: str) -> int:
        kept = KeptHead(self._home, self._tenant, dataset_id)
        booked: int = actors_backend().book_missing(
            self._registry, self._store, self._tenant, dataset_id, kept.lines
        )
        if not booked:
            # Raises if the ledger does not exist or is not complete.
            self.privacy_report(dataset_id)
        return booked

    # --- audit log ---------------------------------------------------------------------------

    def audit_log(self, since: int = 0, limit: int = 1000) -> list[AuditRow]:
        if since < 0 or not 1 <= limit <= MOST_AUDIT_ROWS:
            raise InvalidRequestError(
                f"since={since}, limit={limit} is out of range: since must be 0 or more, and limit"
                f" in [1, {MOST_AUDIT_ROWS}]"
            )
        return list(parse_rows(self._registry.audit_log.rows(self._tenant, since, limit), since))

    def verify_audit_log(self, head: AuditHead | None) -> AuditHead:
        kept = self._home / f"audit-head-{self._tenant}"
        public_key = read_public_key(self._audit_keys / "audit.pub")
        own: list[AuditHead] = [read_head(kept)] if kept.exists() else []
        now: AuditHead = self._registry.audit_log.head(self._tenant)
        signers = Signers(public_key, self._registry.audit_log.successions(self._tenant))
        for one in (*own, now):
            one.check(signers.at(one.seq))
        own += actors_backend().audit_heads(self._store, self._tenant, signers)
        known = [now] if head is None else [head, now]
        rows = paged(self.audit_log)
        found = verify(rows, since=empty(self._tenant), known=known, own=own, public_key=public_key)
        actors_backend().keep_audit_head(self._store, now)
        keep_head(kept, now)
        since = None if found.since is now else found.since
        return replace(now, since=since, accepted=found.accepted)

    # --- an older copy of the database -------------------------------------------------------

    def check_registry(self) -> RegistryCheck:
        found: RegistryCheck = actors_backend().check_registry(
            self._registry, self._store, self._tenant, self._home
        )
        return found

    def accept_registry(self) -> RegistryAcceptance:
        accepted: RegistryAcceptance = actors_backend().accept_registry(
            self._registry, self._store, self._tenant, self._home
        )
        return accepted
