"""A database that was put back: what it has lost, and going on from it all the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.artifacts.copies import readopt
from actors.registry.registry import Registry
from actors.registry.rollback import (
    keep_in,
    keep_newest,
    meet,
    meet_ledger,
    tenants,
    unknown_in,
)
from actors.storage.store import MOST_OF_A_HEAD, ArtifactStore, ledger_in, place_in
from tg_tinker.errors import IntegrityError, NotFoundError, StorageError
from tg_tinker.records.entries import parse_place
from tg_tinker.records.files import KeptHead, read_head
from tg_tinker.types import RegistryAcceptance, RegistryCheck


def check(registry: Registry, root: str, tenant: str, home: Path) -> RegistryCheck:
    """Holds the database against all that is known of a tenant.

    Args:
        home: keeps heads, too.

    Raises:
        StorageError: the store does not answer.
        NotFoundError: others are known, and this tenant is not.
    """
    store = ArtifactStore(root)
    if (known_tenants := tenants(registry, store)) and tenant not in known_tenants:
        raise NotFoundError(
            f"neither the database nor the store has anything of a tenant {tenant!r}: they know"
            f" {', '.join(known_tenants)}"
        )
    unknown = unknown_in(registry, store, tenant)
    kept, damaged = _kept(home, tenant)
    missing, others = registry.heads.judge(tenant, None, unknown | kept)
    known = [name for name in store.audit_heads(tenant) if name not in unknown]
    return RegistryCheck(
        rows=registry.audit_log.head(tenant).seq,
        stored=_stored(registry, store, tenant, known),
        heads=len(known) + len(kept.keys() - missing.keys() - others.keys()),
        missing={name: head.seq for name, head in missing.items()},
        foreign={name: why for name, why in others.items() if name not in kept},
        damaged=damaged | {name: why for name, why in others.items() if name in kept},
        ledgers=_ledgers(registry, store, tenant, home),
        accepted=tuple(registry.audit_log.accepting(tenant)),
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
    missing, _ = registry.heads.judge(tenant, None, lines)
    row = registry.heads.accept(tenant, [head.line() for head in missing.values()])
    if registry.audit_log.accepting(tenant):
        _keep_acceptance(registry, store, tenant)
    meet(registry, store, tenant)
    buried = {name for name, seen in registry.orphans.of(tenant).items() if seen.buried}
    whole = store.whole(tenant) - buried
    problems = {
        artifact_id: _problem(registry, store, tenant, artifact_id, stored_as, whole)
        for owner, artifact_id, stored_as in registry.catalogue.all()
        if owner == tenant
    }
    keep_newest(registry, store, tenant)  # of what was found under another name
    openable = tuple(one for one, problem in problems.items() if not problem)
    return RegistryAcceptance(row, openable, {k: why for k, why in problems.items() if why})


def _problem(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, stored_as: str,
    whole: set[str],
) -> str:  # fmt: skip
    """Why an artifact does not open, empty where it does; one that was resealed since is found."""
    try:
        if stored_as in whole:
            # Opens it.
            registry.data_keys.rewrapped(tenant, artifact_id, store.read_key(tenant, stored_as))
        else:
            readopt(registry, store, tenant, artifact_id, whole)
    except (IntegrityError, NotFoundError) as error:
        return error.message
    return ""


def _keep_acceptance(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """The newest copy, if it is found after all, would else go on unnoticed."""
    try:
        keep_in(store, registry.audit_log.head(tenant))
    except StorageError as error:
        raise StorageError(
            "the acceptance is in the audit log, and the store did not take its head: repeat the"
            f" call. {error.message}",
            details=error.details,
        ) from None


def _stored(registry: Registry, store: ArtifactStore, tenant: str, names: Sequence[str]) -> int:
    """Number of the newest row that a head in the store is of, 0 where there is none."""
    places = {place_in(name): name for name in names}
    passed = places.keys() - set(registry.audit_log.missed(tenant, [*places]))
    for seq, place in sorted(((parse_place(one)[0], one) for one in passed), reverse=True):
        line = store.read_head(places[place], MOST_OF_A_HEAD)
        if not any(
            registry.heads.judge(tenant, None, {place: line})
        ):  # a name alone proves nothing
            return seq
    return 0


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
    for dataset in registry.ledgers.datasets(tenant):
        known.add(registry.heads.ledger_name(tenant, dataset))
        try:
            meet_ledger(registry, store, tenant, dataset, KeptHead(home, tenant, dataset).lines)
        except IntegrityError as error:
            problems[dataset] = error.message
    others = [name for name in store.all_ledger_heads(tenant) if ledger_in(name) not in known]
    for lost in registry.heads.lost_ledgers(tenant, [store.read_head(name) for name in others]):
        problems[lost] = (
            "it is of a data set that this registry has lost: `tg-tinker privacy book-missing` and"
            " the data set's name puts its charges back"
        )
    return problems
