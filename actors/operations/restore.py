"""Checks a database that was restored from a backup for lost rows, and accepts their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from tg_tinker.records.heads import SignedHead
from tg_tinker.types import RegistryAcceptance, RegistryCheck


def check(registry: Registry, root: str, tenant: str, home: Path) -> RegistryCheck:
    """Compares the database with all heads of a tenant, and returns the result.

    Args:
        home: the home, which also keeps heads.

    Raises:
        StorageError: the store does not answer.
        NotFoundError: neither the database nor the store knows this tenant, but they know others.
    """
    store = ArtifactStore(root)
    if (known_tenants := tenants(registry, store)) and tenant not in known_tenants:
        raise NotFoundError(
            f"neither the database nor the store knows a tenant {tenant!r}: use one of"
            f" {', '.join(known_tenants)}"
        )
    unknown, newest = unknown_in(registry, store, tenant)
    kept, damaged = _kept(home, tenant)
    missing, others = _judged(registry, tenant, unknown, newest, kept)
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
        api_keys=registry.api_keys.problems(tenant),
    )


def accept(registry: Registry, root: str, tenant: str, home: Path) -> RegistryAcceptance:
    """Accepts the loss of the rows that the database lacks but heads in the store or home attest.

    If the call is interrupted, the next call finishes it.

    Raises:
        StorageError: the store does not answer. Either nothing was accepted, or the acceptance row
            is written and the store does not have its head yet; the message then says so.
    """
    store = ArtifactStore(root)
    unknown, newest = unknown_in(registry, store, tenant)
    missing, _ = _judged(registry, tenant, unknown, newest, _kept(home, tenant)[0])
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
    # `_problem` may have recorded artifacts that it found under another name.
    keep_newest(registry, store, tenant)
    openable = tuple(one for one, problem in problems.items() if not problem)
    return RegistryAcceptance(row, openable, {k: why for k, why in problems.items() if why})


def _judged(
    registry: Registry, tenant: str, unknown: Mapping[str, str], newest: str,
    kept: Mapping[str, str],
) -> tuple[dict[str, SignedHead], dict[str, str]]:  # fmt: skip
    """Judges objects of the store, and the head that the home keeps, which nobody else writes."""
    found, home = (
        registry.heads.judge(tenant, None, unknown, newest),
        registry.heads.judge(tenant, None, kept),
    )
    return found[0] | home[0], found[1] | home[1]


def _problem(
    registry: Registry, store: ArtifactStore, tenant: str, artifact_id: str, stored_as: str,
    whole: set[str],
) -> str:  # fmt: skip
    """Returns why an artifact does not open, or an empty text if it opens.

    An artifact that was resealed after the backup is found under its newer name.
    """
    try:
        if stored_as in whole:
            # This opens the key.
            registry.data_keys.rewrapped(tenant, artifact_id, store.read_key(tenant, stored_as))
        else:
            readopt(registry, store, tenant, artifact_id, whole)
    except (IntegrityError, NotFoundError) as error:
        return error.message
    return ""


def _keep_acceptance(registry: Registry, store: ArtifactStore, tenant: str) -> None:
    """Puts the head of the acceptance into the store.

    Without it, nothing would detect that the lost newest copy of the database is used again.
    """
    try:
        keep_in(store, registry.audit_log.head(tenant))
    except StorageError as error:
        raise StorageError(
            "the acceptance is in the audit log, but the store did not accept its head: repeat the"
            f" call. {error.message}",
            details=error.details,
        ) from None


def _stored(registry: Registry, store: ArtifactStore, tenant: str, names: Sequence[str]) -> int:
    """Returns the number of the newest row with a head in the store; 0 if there is no head."""
    places = {place_in(name): name for name in names}
    passed = places.keys() - set(registry.audit_log.missed(tenant, [*places]))
    for seq, place in sorted(((parse_place(one)[0], one) for one in passed), reverse=True):
        line = store.read_head(places[place], MOST_OF_A_HEAD)
        # The head is checked, because its name alone proves nothing.
        if not any(registry.heads.judge(tenant, None, {place: line})):
            return seq
    return 0


def _kept(home: Path, tenant: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the head that the home keeps and, for a damaged head, the problem, each by path."""
    path = home / f"audit-head-{tenant}"
    if not path.exists():
        return {}, {}
    try:
        return {str(path): read_head(path).line()}, {}
    except (IntegrityError, NotFoundError) as error:
        return {}, {str(path): error.message}


def _ledgers(registry: Registry, store: ArtifactStore, tenant: str, home: Path) -> dict[str, str]:
    """Returns what is wrong with the ledgers of a tenant, by dataset."""
    problems, known = {}, set()
    for dataset in registry.ledgers.datasets(tenant):
        known.update(registry.heads.ledger_names(tenant, dataset))
        try:
            meet_ledger(registry, store, tenant, dataset, KeptHead(home, tenant, dataset).lines)
        except IntegrityError as error:
            problems[dataset] = error.message
    others = [name for name in store.all_ledger_heads(tenant) if ledger_in(name) not in known]
    for lost in registry.heads.lost_ledgers(tenant, [store.read_head(name) for name in others]):
        problems[lost] = (
            "this registry has lost the dataset of this ledger: restore its charges with"
            " `tg-tinker privacy book-missing` and the name of the dataset"
        )
    return problems
