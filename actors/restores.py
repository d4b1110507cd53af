"""A database that was put back: what it has lost, and going on from it all the same."""

from __future__ import annotations

from pathlib import Path

from actors.audit_heads import keep_in, meet, unknown_in
from actors.ledger_heads import meet as meet_ledger
from actors.lifecycle import readopt
from actors.registry import Registry
from actors.store import ArtifactStore, ledger_in, place_in
from tg_tinker.audit_files import read_head
from tg_tinker.errors import IntegrityError, NotFoundError, StorageError
from tg_tinker.ledger import parse_place
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
    unknown = unknown_in(registry, store, tenant)
    kept, damaged = _kept(home, tenant)
    missing, others = registry.judge_heads(tenant, unknown | kept)
    known = [place_in(name) for name in store.audit_heads(tenant) if name not in unknown]
    stored = {*known}.difference(registry.missed_rows(tenant, known))
    return RegistryCheck(
        rows=registry.audit_head(tenant).seq,
        stored=max((parse_place(place)[0] for place in stored), default=0),
        heads=len(known) + len(kept.keys() - missing.keys() - others.keys()),
        missing={name: head.seq for name, head in missing.items()},
        foreign={name: why for name, why in others.items() if name not in kept},
        damaged=damaged | {name: why for name, why in others.items() if name in kept},
        ledgers=_ledgers(registry, store, tenant, home),
        accepted=tuple(registry.accepting_rows(tenant)),
    )


def accept(registry: Registry, root: str, tenant: str, home: Path) -> RegistryAcceptance:
    """Goes on from a database that has lost what heads in the store and the home are of.

    Broken off anywhere, the next call finishes it.

    Raises:
        StorageError: the store does not answer. Either nothing was accepted, or, as the message
            then says, the row is written and the store has no head of it yet.
    """
    store = ArtifactStore(root)
    lines = unknown_in(registry, store, tenant) | _kept(home, tenant)[0]
    missing, _ = registry.judge_heads(tenant, lines)
    row = registry.accept_heads(tenant, [head.line() for head in missing.values()])
    if registry.accepting_rows(tenant):
        _keep_acceptance(registry, store, tenant)
    meet(registry, store, tenant)
    whole = store.whole(tenant)
    known = [one for owner, *one in registry.all_artifacts() if owner == tenant]
    there = {
        artifact_id: name in whole or readopt(registry, store, tenant, artifact_id, whole)
        for artifact_id, name in known
    }
    openable = tuple(one for one, found in there.items() if found)
    return RegistryAcceptance(row, openable, tuple(one for one in there if one not in openable))


def _keep_acceptance(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """The newest copy, if it is found after all, would else go on unnoticed."""
    try:
        keep_in(store, registry.audit_head(tenant))
    except StorageError as error:
        raise StorageError(
            "the acceptance is in the audit log, and the store did not take its head: repeat the"
            f" call. {error.message}",
            details=error.details,
        ) from None


def _kept(home: Path, tenant: str) -> tuple[dict[str, str], dict[str, str]]:
    """The head that the home keeps, by its path; or why it is none."""
    path = home / f"audit-head-{tenant}"
    if not path.exists():
        return {}, {}
    try:
        return {str(path): read_head(path).line()}, {}
    except (IntegrityError, NotFoundError) as error:
        return {}, {str(path): error.message}


def _ledgers(registry: Registry, store: ArtifactStore, tenant: str, home: Path) -> dict[str, str]:
    problems, known = {}, set()
    for dataset in registry.dataset_ids(tenant):
        known.add(registry.ledger_name(tenant, dataset))
        try:
            meet_ledger(
                registry, store.root, tenant, dataset, KeptHead(home, tenant, dataset).lines
            )
        except IntegrityError as error:
            problems[dataset] = error.message
    others = [name for name in store.all_ledger_heads(tenant) if ledger_in(name) not in known]
    for lost in registry.lost_ledgers(tenant, [store.read_head(name) for name in others]):
        problems[lost] = (
            "it is of a data set that this registry has lost: `tg-tinker privacy book-missing` and"
            " the data set's name puts its charges back"
        )
    return problems
