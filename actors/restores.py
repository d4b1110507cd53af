"""A database that was put back: what it has lost, and going on from it all the same."""

from __future__ import annotations

from pathlib import Path

from actors.audit_heads import keep_in, unknown_in
from actors.ledger_heads import meet
from actors.registry import Registry
from actors.store import ArtifactStore
from tg_tinker.audit_files import read_head
from tg_tinker.audit_log import AuditHead
from tg_tinker.errors import IntegrityError
from tg_tinker.ledger_files import KeptHead
from tg_tinker.types import RegistryAcceptance, RegistryCheck


def check(registry: Registry, root: str, tenant: str, home: Path) -> RegistryCheck:
    """Holds the database against all that is known of a tenant.

    Args:
        home: keeps heads, too.

    Raises:
        StorageError: the store does not answer.
    """
    store = ArtifactStore(root)
    missing, foreign = registry.judge_heads(tenant, _unknown(registry, store, tenant, home))
    found = len(store.audit_heads(tenant)) + len(_kept(home, tenant))
    return RegistryCheck(
        rows=registry.audit_head(tenant).seq,
        heads=found - len(missing) - len(foreign),
        missing={name: head.seq for name, head in missing.items()},
        foreign=foreign,
        ledgers=_ledgers(registry, store, tenant, home),
        accepted=tuple(registry.accepting_rows(tenant)),
    )


def accept(registry: Registry, root: str, tenant: str, home: Path) -> RegistryAcceptance:
    """Goes on from a database that has lost what heads in the store and the home are of.

    Raises:
        StorageError: the store does not answer; nothing was accepted, or the next head tells it.
    """
    store = ArtifactStore(root)
    missing, _ = registry.judge_heads(tenant, _unknown(registry, store, tenant, home))
    whole = store.whole(tenant)
    row = registry.accept_heads(tenant, [head.line() for head in missing.values()])
    if row:
        keep_in(store, registry.audit_head(tenant))  # the newest copy would not go on unnoticed
    here: dict[bool, list[str]] = {True: [], False: []}
    for owner, artifact_id, stored_as in registry.all_artifacts():
        if owner == tenant:
            here[stored_as in whole].append(artifact_id)
    return RegistryAcceptance(row, tuple(here[True]), tuple(here[False]))


def _unknown(registry: Registry, store: ArtifactStore, tenant: str, home: Path) -> dict[str, str]:
    """What may be heads that the log does not know, from the store and the home, by name."""
    return unknown_in(registry, store, tenant) | {
        name: line
        for name, line in _kept(home, tenant).items()
        if registry.unknown_rows(tenant, [AuditHead.parse(line).place])
    }


def _kept(home: Path, tenant: str) -> dict[str, str]:
    """The head that the home keeps, if any."""
    path = home / f"audit-head-{tenant}"
    return {str(path): read_head(path).line()} if path.exists() else {}


def _ledgers(registry: Registry, store: ArtifactStore, tenant: str, home: Path) -> dict[str, str]:
    problems, known = {}, set()
    for dataset in registry.dataset_ids(tenant):
        known.add(registry.ledger_name(tenant, dataset))
        try:
            meet(registry, store.root, tenant, dataset, KeptHead(home, tenant, dataset).lines)
        except IntegrityError as error:
            problems[dataset] = error.message
    others = [name for name in store.all_ledger_heads(tenant) if name.split("/")[3] not in known]
    for lost in registry.lost_ledgers(tenant, [store.read_head(name) for name in others]):
        problems[lost] = (
            "it is of a data set that this registry has lost: `tg-tinker privacy book-missing` and"
            " the data set's name puts its charges back"
        )
    return problems
