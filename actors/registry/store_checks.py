"""The audit log against the heads that a store has of it: an older or another database is noticed
before it opens, saves or removes anything there.

A restored copy of the database has the signing key of today, so only heads that were signed here
are evidence. Anybody who can write to the store can put others there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.registry.audit_log import SDK, AuditLog
from tg_tinker.errors import AccessDeniedError, IntegrityError, RollbackError
from tg_tinker.records.audit_log import ACCEPT, AuditHead
from tg_tinker.records.entries import place_of
from tg_tinker.storage.envelope import public_key_of


class StoreChecks(AuditLog):
    """The part of the registry that knows which stores its database was held against."""

    def __init__(self, database: str) -> None:
        super().__init__(database)
        # In memory, on purpose: a database that is put back under a new process is held anew.
        self._met: set[tuple[str, str]] = set()

    def met(self, tenant: str, store: str) -> bool:
        """Whether this process has met a store, and the log has lost nothing that it saw of it."""
        reached = self._reached.get(tenant)
        if reached is None or self.unknown_rows(tenant, [place_of(*reached)]):
            self._met = {one for one in self._met if one[0] != tenant}
            return False
        self._reached[tenant] = max(reached, self._end(tenant))  # another process may have gone on
        return (tenant, store) in self._met

    def meet_store(
        self, tenant: str, store: str, lines: Mapping[str, str], who: str = SDK
    ) -> dict[str, str]:
        """Holds the log against objects that may be heads of it; then the store is met.

        Args:
            store: its root.
            lines: what all objects hold whose names the log does not know, by name.
            who: asks, for the audit log.

        Returns:
            Why an object is no head of this log, by its name. Those count for nothing.

        Raises:
            RollbackError: the log does not go through one of the heads.
        """
        with self._refusals_noted(tenant, who, "registry.check", ""):
            missing, others = self.judge_heads(tenant, lines)
            end = self._end(tenant)
            if missing:
                raise _rolled_back(*max(missing.items(), key=lambda item: item[1].seq), end[0])
        self._reached[tenant] = end
        self._met.add((tenant, store))
        return others

    def judge_heads(
        self, tenant: str, lines: Mapping[str, str]
    ) -> tuple[dict[str, AuditHead], dict[str, str]]:
        """Of objects by name: heads of this log that it does not go through, and why others are
        no heads of it."""
        heads, others, key = {}, {}, public_key_of(self._signing_key)
        for name, line in lines.items():
            try:
                heads[name] = AuditHead.authentic(line, tenant, key)
            except IntegrityError as error:
                others[name] = error.message
        places = [head.place for head in heads.values()]
        unknown = set(self.unknown_rows(tenant, places)) if places else set()
        return {name: head for name, head in heads.items() if head.place in unknown}, others

    def accept_heads(self, tenant: str, lines: Sequence[str]) -> int:
        """Goes on without what these heads are of: from now on they count as known.

        Returns:
            Number of the row that says so; 0, and no row, where the log knows them all.

        Raises:
            IntegrityError: one is no head of this log.
        """
        with self._refusals_noted(tenant, SDK, ACCEPT, ""):
            key = public_key_of(self._signing_key)
            places = {AuditHead.authentic(line, tenant, key).place for line in lines}
            if not (unknown := self.unknown_rows(tenant, [*places])):
                return 0
            with self._change() as tx:
                return self._note_acceptance(tx, tenant, unknown)

    def _refuse_unmet(self, tenant: str, store: str) -> None:
        """Where a data key is handed out, so that nobody can forget to ask."""
        if not self.met(tenant, store):
            raise AccessDeniedError(
                "the registry was not held against the heads in this store since it started, or"
                " its database changed meanwhile: repeat the call"
            )


def _rolled_back(name: str, head: AuditHead, end: int) -> RollbackError:
    where = "it has another row there" if head.seq <= end else f"it ends at row {end}"
    return RollbackError(
        f"the store has a head of row {head.seq} of the audit log of tenant {head.tenant}, {name},"
        f" that this registry does not know, {where}: its database is an older copy, or another"
        " one was in use meanwhile."
        " Nothing was opened or changed. Put the newest copy of the database back; if it is lost,"
        " `tg-tinker registry check` tells what is missing, and `tg-tinker registry accept` goes"
        " on without it",
        details={"object": name, "row": head.seq, "last_row": end},
    )
