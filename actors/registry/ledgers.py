"""Registers datasets, and checks and charges their privacy budgets.

The rules are in `tg_tinker.records.ledger`; this module applies them to the database. Every change
is one immediate transaction: the decision, the ledger entry and the uses of units become durable
together or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter
from actors.registry.book import Book
from actors.registry.database import Database
from actors.registry.lookups import owned
from actors.registry.runs import check_epoch
from actors.registry.schema import CHARGES, DATASETS, RUNS
from actors.registry.uses import count_uses, refuted, uses_of
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import (
    DPBudgetExceededError,
    InvalidRequestError,
    NotFoundError,
)
from tg_tinker.records.entries import Entry, registration
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge, PrivacyInfo, describe_run


class Ledgers:
    """The part of the registry that enforces privacy budgets."""

    def __init__(self, database: Database, writer: AuditWriter, book: Book) -> None:
        self._database, self._writer, self._book = database, writer, book

    # --- datasets ----------------------------------------------------------------------------

    def register(
        self, tenant: str, dataset: str, epsilon: float | None, delta: float, unit: str,
        who: str = SDK,
    ) -> None:  # fmt: skip
        """Opens the ledger of a dataset. The same registration again changes nothing.

        Raises:
            InvalidRequestError: The dataset is registered with another budget or unit, which never
                changes; or a run without privacy has named it.
        """
        with (
            self._writer.refusals(tenant, who, "dataset.register", dataset),
            self._database.change() as tx,
        ):
            ledger = self._book.ledger(tx, tenant, dataset)
            if ledger.length:
                _refuse_another(ledger, epsilon, delta, unit)
                return
            _refuse_after_open_training(tx, tenant, dataset)
            self._book.new_dataset(tx, tenant, dataset)
            born = datetime.now(UTC).isoformat()
            body = registration(dataset, epsilon, delta, unit, born)
            self._book.append(tx, tenant, dataset, ledger, body, who)

    def entries(self, tenant: str, dataset: str) -> list[Entry]:
        """Returns the whole ledger, oldest entry first; empty if the dataset is unknown."""
        with self._database.reading() as connection:
            return self._book.stored(connection, tenant, dataset)

    def datasets(self, tenant: str) -> list[str]:
        query = sa.select(DATASETS.c.id).where(DATASETS.c.tenant == tenant)
        with self._database.reading() as connection:
            return sorted(connection.execute(query).scalars())

    # --- private runs --------------------------------------------------------------------------

    def open_account(self, tenant: str, dataset: str, entry: Entry) -> None:
        """Records a run's contract, and reserves the budget that the run plans. A repeat changes
        nothing.

        Raises:
            DPBudgetExceededError: Other runs took the budget since the plan was made.
        """
        who = self._actor(tenant, entry["run"])
        with (
            self._writer.refusals(tenant, who, "budget.reserve", dataset),
            self._database.change() as tx,
        ):
            ledger = self._book.known(tx, tenant, dataset)
            if entry["run"] not in ledger.accounts or not self._book.has(
                tx, tenant, dataset, entry
            ):
                self._book.append(tx, tenant, dataset, ledger, entry, who)

    def unit_key(self, tenant: str, dataset: str) -> bytes:
        """Returns the key of a dataset's unit hashes, for the memory of the dataset's training
        actors alone."""
        with self._database.reading() as connection:
            return self._book.unit_key(connection, tenant, dataset)

    def privacy_info(self, tenant: str, dataset: str, run_id: str) -> PrivacyInfo:
        with self._database.reading() as connection:
            owned(connection, RUNS, tenant, run_id)
            return describe_run(self._book.known(connection, tenant, dataset), run_id)

    def admit(self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]) -> set[bytes]:
        """Returns those of the units that have reached their limit of uses.

        Raises:
            DPBudgetExceededError: No step is left, or none of these units may be used again.
        """
        with self._writer.refusals(tenant, self._actor(tenant, run_id), "budget.charge", dataset):
            return self._at_limit(tenant, dataset, run_id, units)

    def charge(
        self, tenant: str, dataset: str, run_id: str, epoch: int, charge_id: str,
        units: Sequence[bytes], noised: bool, calls: Sequence[tuple[str, str]],
        known: Sequence[str] = (),
    ) -> Charge:  # fmt: skip
        """Checks and charges one step. The charge is durable on return. A repeat returns the same
        receipt.

        Args:
            charge_id: The random id of one draw of noise.
            units: All units of the step, each once.
            noised: False is refused unless the dataset has no limit.
            calls: The batch hash and gradient hash of each call of the step. Only their HMACs are
                stored.
            known: The positions, ``SEQ-HASH`` each, at which the caller saw the ledger end.

        Raises:
            DPBudgetExceededError: The budget does not allow the step; nothing was charged.
            LedgerMismatchError: One of the `known` positions is not on the ledger; nothing was
                charged.
            ActorLostError: A newer actor owns the run; nothing was charged.
        """
        with self._writer.refusals(tenant, f"{run_id}@{epoch}", "budget.charge", dataset):
            step = tenant, dataset, run_id, epoch, charge_id, units, noised, calls, known
            while (charge := self._charge(*step)) is None:
                pass  # The run now counts by participation, even if the step is then refused.
            return charge

    def release(self, tenant: str, dataset: str, run_id: str) -> None:
        """Releases the budget that a run reserved and has not used. The run may continue where the
        budget allows it."""
        with self._database.change() as tx:
            owned(tx, RUNS, tenant, run_id)
            self._book.release(tx, tenant, dataset, run_id)

    def link(self, tenant: str, dataset: str, run_id: str, others: Sequence[str]) -> None:
        """Records that a run took over weights that were trained on other datasets."""
        who = self._actor(tenant, run_id)
        with self._database.change() as tx:
            ledger = self._book.known(tx, tenant, dataset)
            if not ledger.linked.issuperset(others):
                body = {"type": "link", "run": run_id, "datasets": sorted(others)}
                self._book.append(tx, tenant, dataset, ledger, body, who)

    # --- inside ------------------------------------------------------------------------------

    def _at_limit(
        self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]
    ) -> set[bytes]:
        with self._database.reading() as connection:
            ledger = self._book.known(connection, tenant, dataset)
            account = ledger.usable(run_id)
            if account.contract != "participation":
                _refuse_exhausted(ledger, run_id)
                return set()
            limit = account.limit
            if limit is None or account.count < limit:
                return set()
            uses = uses_of(connection, run_id, set(units))
        at_limit = {unit for unit, count in uses.items() if count >= limit}
        if units and at_limit.issuperset(units):
            raise DPBudgetExceededError(
                f"every row of this batch was used {limit} times, which is the limit agreed for"
                f" this run (sigma {account.sigma:g}, epsilon {ledger.limit:g}). Pass rows that"
                " were used less, or stop here: sample and save_state still work",
                details={"limit": limit},
            )
        return at_limit

    def _charge(
        self, tenant: str, dataset: str, run_id: str, epoch: int, charge_id: str,
        units: Sequence[bytes], noised: bool, calls: Sequence[tuple[str, str]],
        known: Sequence[str],
    ) -> Charge | None:  # fmt: skip
        """Returns the receipt, or None if the run fell back to participation instead."""
        with self._database.change() as tx:
            _check_run(tx, tenant, run_id)
            if (again := _receipt(tx, run_id, charge_id)) is not None:
                return again
            ledger = self._book.known(tx, tenant, dataset)
            for place in known:
                ledger.check_place(place, dataset)
            check_epoch(tx, tenant, run_id, epoch)
            if (limits := refuted(tx, ledger.accounts[run_id], run_id, len(units))) is not None:
                body: Entry = {"type": "fall_back", "run": run_id} | limits
                self._book.append(tx, tenant, dataset, ledger, body, f"{run_id}@{epoch}")
                return None
            before = ledger.epsilon
            count = count_uses(tx, ledger.accounts[run_id], run_id, units)
            body = {
                "type": "charge" if noised else "unnoised",
                "run": run_id, "epoch": epoch, "charge": charge_id, "count": count,
            }  # fmt: skip
            entry = self._book.append(tx, tenant, dataset, ledger, body, f"{run_id}@{epoch}")
            charge = Charge(
                charge_id=charge_id,
                dataset=dataset,
                head=entry["hash"],
                entry=entry["seq"],
                sigma=ledger.accounts[run_id].sigma,
                noised=noised,
                epsilon_spent=ledger.epsilon - before,
                total_epsilon=ledger.epsilon,
                delta=ledger.delta,
                count=count,
            )
            tx.execute(
                CHARGES.insert().values(
                    id=charge_id, run_id=run_id, size=len(units),
                    evidence=self._book.evidence(tx, tenant, dataset, run_id, calls),
                    receipt=json.dumps(asdict(charge)),
                )
            )  # fmt: skip
            return charge

    def _actor(self, tenant: str, run_id: str) -> str:
        """Returns the name of the actor that owns a run now."""
        with self._database.reading() as connection:
            return f"{run_id}@{_check_run(connection, tenant, run_id).epoch}"


def _refuse_after_open_training(tx: sa.Connection, tenant: str, dataset: str) -> None:
    """Refuses a budget for data that a run without privacy has named: the privacy that such a
    budget promises is already lost."""
    query = sa.select(RUNS.c.id, RUNS.c.config).where(
        RUNS.c.tenant == tenant, (RUNS.c.step > 0) | (RUNS.c.status == "active")
    )
    for run_id, text in tx.execute(query):
        config = TrainingConfig.model_validate_json(text)
        if config.dataset_id == dataset and not config.private:
            raise InvalidRequestError(
                f"dataset {dataset!r} was named by {run_id}, which trains without privacy: a"
                " budget would promise privacy that is already lost. For other data, use another"
                " dataset_id"
            )


def _check_run(connection: sa.Connection, tenant: str, run_id: str) -> Any:
    """Returns the row of a tenant's run."""
    run = owned(connection, RUNS, tenant, run_id)
    if run is None:
        raise NotFoundError(f"no training client {run_id!r} of this tenant")
    return run


def _receipt(connection: sa.Connection, run_id: str, charge_id: str) -> Charge | None:
    """Returns the receipt of an earlier charge of a run, or None if there was no such charge."""
    this = (CHARGES.c.id == charge_id, CHARGES.c.run_id == run_id)
    known = sa.select(CHARGES.c.receipt).where(*this)
    receipt = connection.execute(known).scalar()
    return None if receipt is None else Charge(**json.loads(receipt))


def _refuse_another(ledger: Ledger, epsilon: float | None, delta: float, unit: str) -> None:
    known = ledger.registered
    for name, given in (("epsilon", epsilon), ("delta", delta), ("unit", unit)):
        if known[name] != given:
            raise InvalidRequestError(
                f"dataset {known['dataset']!r} is registered with {name} {known[name]}, not"
                f" {given}: its registration is never changed. For other data, use another"
                " dataset_id",
                details={"field": name},
            )


def _refuse_exhausted(ledger: Ledger, run_id: str) -> None:
    account = ledger.accounts[run_id]
    used_up = account.limit is not None and account.count >= account.limit
    if used_up or ledger.epsilon_with(run_id, account.count + 1) > ledger.limit:
        steps = f"all {account.limit} steps that the budget pays for are made, " if used_up else ""
        raise DPBudgetExceededError(
            f"no step is left: {steps}epsilon {ledger.epsilon:.4g} of {ledger.limit:g} is spent or"
            " reserved by others. sample and save_state still work",
            details={"limit": account.limit},
        )
