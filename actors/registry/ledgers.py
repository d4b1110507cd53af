"""The ledgers of data sets in the registry: registration, and check and charge in one go.

The rules are `tg_tinker.records.ledger`'s; here they meet the database. Every change is one
immediate transaction: the decision, the ledger's entry and the units' uses become durable together
or not at all.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditLog
from actors.registry.database import METADATA, RUNS, check_epoch
from actors.registry.plausibility import looks_drawn
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import (
    DPBudgetExceededError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
)
from tg_tinker.records.accounting import gaussian_epsilon, largest_count
from tg_tinker.records.entries import Entry, registration
from tg_tinker.records.ledger import Account, Ledger
from tg_tinker.records.report import Charge, PrivacyInfo, describe_run
from tg_tinker.storage.envelope import context_of, new_key

_datasets = sa.Table(
    "datasets",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("wrapped_key", sa.String, nullable=False),
)
_entries = sa.Table(
    "ledger_entries",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("entry", sa.String, nullable=False),
)
_uses = sa.Table(
    "unit_uses",
    METADATA,
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("unit", sa.LargeBinary, primary_key=True),
    sa.Column("uses", sa.Integer, nullable=False),
)
_charges = sa.Table(
    "charges",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("evidence", sa.String, nullable=False),
    sa.Column("receipt", sa.String, nullable=False),
)
_EVENTS = {
    "register": "dataset.register", "open": "budget.reserve", "charge": "budget.charge",
    "unnoised": "budget.charge", "fall_back": "budget.fall_back", "release": "budget.release",
    "link": "budget.link", "book": "budget.book",
}  # fmt: skip
"""Type of a ledger's entry -> what the audit log calls it: every entry has its row."""

_NOTED = ("run", "epoch", "charge", "count", "limit", "planned")
_IN_AT_A_TIME = 5_000  # bound variables of one statement


class Budgets(AuditLog):
    """The part of the registry that answers for privacy."""

    def __init__(self, database: str) -> None:
        super().__init__(database)
        self._ledgers: dict[tuple[str, str], Ledger] = {}  # derived; checked by head on each use

    # --- data sets ---------------------------------------------------------------------------

    def register_dataset(
        self, tenant: str, dataset: str, epsilon: float | None, delta: float, unit: str,
        who: str = SDK,
    ) -> None:  # fmt: skip
        """Opens the ledger of a data set; the same registration again changes nothing.

        Raises:
            InvalidRequestError: it is registered with another budget or unit: what was promised
                is never changed.
        """
        with (
            self._refusals_noted(tenant, who, "dataset.register", dataset),
            self._change() as tx,
        ):
            ledger = self._ledger(tx, tenant, dataset)
            if ledger.length:
                _refuse_another(ledger, epsilon, delta, unit)
                return
            _refuse_after_open_training(tx, tenant, dataset)
            self._new_dataset(tx, tenant, dataset)
            born = datetime.now(UTC).isoformat()
            body = registration(dataset, epsilon, delta, unit, born)
            self._append(tx, tenant, dataset, ledger, body, who)

    def ledger_entries(self, tenant: str, dataset: str) -> list[Entry]:
        """The whole ledger, oldest entry first; empty if the data set is unknown."""
        with self._reading() as connection:
            return self._stored(connection, tenant, dataset)

    def dataset_ids(self, tenant: str) -> list[str]:
        query = sa.select(_datasets.c.id).where(_datasets.c.tenant == tenant)
        with self._reading() as connection:
            return sorted(connection.execute(query).scalars())

    # --- private runs --------------------------------------------------------------------------

    def open_account(self, tenant: str, dataset: str, entry: Entry) -> None:
        """Enters a run's contract, and reserves what it plans; a repeat changes nothing.

        Raises:
            DPBudgetExceededError: others took the budget since it was planned.
        """
        who = self._actor(entry["run"])
        with (
            self._refusals_noted(tenant, who, "budget.reserve", dataset),
            self._change() as tx,
        ):
            ledger = self._known(tx, tenant, dataset)
            if entry["run"] not in ledger.accounts or not self._has(tx, tenant, dataset, entry):
                self._append(tx, tenant, dataset, ledger, entry, who)

    def unit_key(self, tenant: str, dataset: str) -> bytes:
        """The key of a data set's unit hashes, for the memory of its training actors alone."""
        with self._reading() as connection:
            return self._unit_key(connection, tenant, dataset)

    def privacy_info(self, tenant: str, dataset: str, run_id: str) -> PrivacyInfo:
        with self._reading() as connection:
            return describe_run(self._known(connection, tenant, dataset), run_id)

    def admit(self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]) -> set[bytes]:
        """Those units that are at their limit of uses.

        Raises:
            DPBudgetExceededError: no step is left, or none of these units may be used again.
        """
        with self._refusals_noted(tenant, self._actor(run_id), "budget.charge", dataset):
            return self._at_limit(tenant, dataset, run_id, units)

    def charge(
        self, tenant: str, dataset: str, run_id: str, epoch: int, charge_id: str,
        units: Sequence[bytes], noised: bool, calls: Sequence[tuple[str, str]],
        known: Sequence[str] = (),
    ) -> Charge:  # fmt: skip
        """Checks and charges one step; durable when it returns. A repeat gets the same receipt.

        Args:
            charge_id: random, of one draw of noise.
            units: all units of the step, once each.
            noised: False is refused unless the data set is unlimited.
            calls: (batch hash, gradient hash) of the step's calls; stored as HMAC only.
            known: where whoever charges saw the ledger end, ``SEQ-HASH`` each.

        Raises:
            DPBudgetExceededError: nothing was charged.
            LedgerMismatchError: the ledger does not go through `known`; nothing was charged.
            ActorLostError: a newer actor owns the run; nothing was charged.
        """
        with self._refusals_noted(tenant, f"{run_id}@{epoch}", "budget.charge", dataset):
            step = tenant, dataset, run_id, epoch, charge_id, units, noised, calls, known
            while (charge := self._charge(*step)) is None:
                pass  # the run counts by participation now, also if the step is then refused
            return charge

    def release_reservation(self, tenant: str, dataset: str, run_id: str) -> None:
        """Frees what a run planned and has not used; it may go on where the budget allows."""
        with self._change() as tx:
            self._release(tx, tenant, dataset, run_id)

    def link(self, tenant: str, dataset: str, run_id: str, others: Sequence[str]) -> None:
        """Notes that a run took over weights that other data sets had a part in."""
        who = self._actor(run_id)
        with self._change() as tx:
            ledger = self._known(tx, tenant, dataset)
            if not ledger.linked.issuperset(others):
                body = {"type": "link", "run": run_id, "datasets": sorted(others)}
                self._append(tx, tenant, dataset, ledger, body, who)

    # --- inside ------------------------------------------------------------------------------

    def _release(self, tx: sa.Connection, tenant: str, dataset: str, run_id: str) -> None:
        ledger = self._ledger(tx, tenant, dataset)
        account = ledger.accounts.get(run_id)
        if account is not None and account.reserved > account.count:
            self._append(tx, tenant, dataset, ledger, {"type": "release", "run": run_id}, SDK)

    def _check_places(self, tenant: str, known: Mapping[str, Iterable[str]]) -> None:
        """Refuses places, by data set, that its ledger does not go through."""
        with self._reading() as connection:
            for dataset, places in known.items():
                ledger = self._ledger(connection, tenant, dataset)
                for place in places:
                    ledger.check_place(place, dataset)

    def _new_dataset(self, tx: sa.Connection, tenant: str, dataset: str) -> None:
        """A key for the hashes of its units."""
        key = self._keyring.wrap(new_key(), context_of(tenant, dataset, "unit key"))
        values = {"tenant": tenant, "id": dataset, "wrapped_key": json.dumps(key)}
        tx.execute(_datasets.insert().values(values))

    def _at_limit(
        self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]
    ) -> set[bytes]:
        with self._reading() as connection:
            ledger = self._known(connection, tenant, dataset)
            account = ledger.usable(run_id)
            if account.contract != "participation":
                _refuse_exhausted(ledger, run_id)
                return set()
            limit = account.limit
            if limit is None or account.count < limit:
                return set()
            uses = _uses_of(connection, run_id, set(units))
        at_limit = {unit for unit, count in uses.items() if count >= limit}
        if units and at_limit.issuperset(units):
            raise DPBudgetExceededError(
                f"every row of this batch was used {limit} times, the most that was agreed for"
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
        """None where the run fell back instead."""
        with self._change() as tx:
            if (again := _receipt(tx, charge_id)) is not None:
                return again
            ledger = self._known(tx, tenant, dataset)
            for place in known:
                ledger.check_place(place, dataset)
            check_epoch(tx, tenant, run_id, epoch)
            if (limits := _refuted(tx, ledger.accounts[run_id], run_id, len(units))) is not None:
                body: Entry = {"type": "fall_back", "run": run_id} | limits
                self._append(tx, tenant, dataset, ledger, body, f"{run_id}@{epoch}")
                return None
            before = ledger.epsilon
            count = _count(tx, ledger.accounts[run_id], run_id, units)
            body = {
                "type": "charge" if noised else "unnoised",
                "run": run_id, "epoch": epoch, "charge": charge_id, "count": count,
            }  # fmt: skip
            entry = self._append(tx, tenant, dataset, ledger, body, f"{run_id}@{epoch}")
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
                _charges.insert().values(
                    id=charge_id, run_id=run_id, size=len(units),
                    evidence=self._evidence(tx, tenant, dataset, run_id, calls),
                    receipt=json.dumps(asdict(charge)),
                )
            )  # fmt: skip
            return charge

    def _evidence(
        self, tx: sa.Connection, tenant: str, dataset: str, run_id: str,
        calls: Sequence[tuple[str, str]],
    ) -> str:  # fmt: skip
        """HMACs of a step's hashes under a key of the run: a plain hash would be a test of
        membership for whoever reads the database."""
        key = hmac.digest(self._unit_key(tx, tenant, dataset), run_id.encode(), hashlib.sha256)
        sealed = [
            [hmac.new(key, part.encode(), hashlib.sha256).hexdigest() for part in call]
            for call in calls
        ]
        return json.dumps(sealed)

    def _unit_key(self, connection: sa.Connection, tenant: str, dataset: str) -> bytes:
        query = sa.select(_datasets.c.wrapped_key).where(
            _datasets.c.tenant == tenant, _datasets.c.id == dataset
        )
        wrapped = json.loads(connection.execute(query).scalar_one())
        return self._keyring.unwrap(wrapped, context_of(tenant, dataset, "unit key"))

    def rewrap_unit_keys(self) -> dict[str, str]:
        """Wraps the keys of all data sets under the keyring's primary key; those that do not open
        stay as they are. Why they do not, by ``data set TENANT/NAME``."""
        problems = {}
        with self._change() as tx:
            for row in tx.execute(sa.select(_datasets)).all():
                context = context_of(row.tenant, row.id, "unit key")
                this = (_datasets.c.tenant == row.tenant, _datasets.c.id == row.id)
                try:
                    key = self._keyring.unwrap(json.loads(row.wrapped_key), context)
                except IntegrityError as error:
                    problems[f"data set {row.tenant}/{row.id}"] = error.message
                except ValueError:
                    problems[f"data set {row.tenant}/{row.id}"] = "its stored key is damaged"
                else:
                    again = json.dumps(self._keyring.wrap(key, context))
                    tx.execute(_datasets.update().where(*this).values(wrapped_key=again))
        return problems

    def _known(self, connection: sa.Connection, tenant: str, dataset: str) -> Ledger:
        ledger = self._ledger(connection, tenant, dataset)
        if not ledger.length:
            raise NotFoundError(
                f"no data set {dataset!r}: service.register_dataset makes one, and so does the"
                " first private client that names it"
            )
        return ledger

    def _ledger(self, connection: sa.Connection, tenant: str, dataset: str) -> Ledger:
        """The ledger as stored: from memory if its head is the stored one, else replayed."""
        last = (
            sa.select(_entries.c.hash)
            .where(_entries.c.tenant == tenant, _entries.c.dataset == dataset)
            .order_by(_entries.c.seq.desc())
            .limit(1)
        )
        head = connection.execute(last).scalar()
        cached = self._ledgers.get((tenant, dataset))
        if cached is None or head is None or cached.head != head:
            cached = Ledger.replay(self._stored(connection, tenant, dataset))
            self._ledgers[tenant, dataset] = cached
        return cached

    def _stored(
        self, connection: sa.Connection, tenant: str, dataset: str, after: int = -1
    ) -> list[Entry]:
        query = (
            sa.select(_entries.c.entry)
            .where(_entries.c.tenant == tenant, _entries.c.dataset == dataset)
            .where(_entries.c.seq > after)
            .order_by(_entries.c.seq)
        )
        return [json.loads(text) for text in connection.execute(query).scalars()]

    def _has(self, connection: sa.Connection, tenant: str, dataset: str, body: Entry) -> bool:
        """Whether the ledger has an entry with this content."""
        wanted = json.loads(json.dumps(body))
        return any(found | wanted == found for found in self._stored(connection, tenant, dataset))

    def _append(
        self, tx: sa.Connection, tenant: str, dataset: str, ledger: Ledger, body: Entry, who: str
    ) -> Entry:
        """Applies an entry, stores and audits it. Should the transaction fail later, the ledger
        in memory is ahead of the stored head, and the next use replays it."""
        entry = ledger.append(body)
        tx.execute(
            _entries.insert().values(
                tenant=tenant, dataset=dataset, seq=entry["seq"], hash=entry["hash"],
                entry=json.dumps(entry),
            )
        )  # fmt: skip
        details = {name: entry[name] for name in _NOTED if entry.get(name) is not None}
        details |= {"entry": entry["seq"], "head": entry["hash"]}
        if entry["type"] == "unnoised":
            details["noised"] = 0
        self._note(tx, tenant, who, _EVENTS[entry["type"]], dataset, details)
        return entry

    def _actor(self, run_id: str) -> str:
        """Who acts for a run now."""
        query = sa.select(RUNS.c.epoch).where(RUNS.c.id == run_id)
        with self._reading() as connection:
            return f"{run_id}@{connection.execute(query).scalar()}"


def _refuse_after_open_training(tx: sa.Connection, tenant: str, dataset: str) -> None:
    """No budget for data that a run without privacy has named: it would promise what is gone."""
    query = sa.select(RUNS.c.id, RUNS.c.config).where(
        RUNS.c.tenant == tenant, (RUNS.c.step > 0) | (RUNS.c.status == "active")
    )
    for run_id, text in tx.execute(query):
        config = TrainingConfig.model_validate_json(text)
        if config.dataset_id == dataset and not config.private:
            raise InvalidRequestError(
                f"data set {dataset!r} was named by {run_id}, which trains without privacy: a"
                " budget would promise what is gone already. Use another dataset_id for other data"
            )


def _receipt(connection: sa.Connection, charge_id: str) -> Charge | None:
    """Of a charge that was made."""
    known = sa.select(_charges.c.receipt).where(_charges.c.id == charge_id)
    receipt = connection.execute(known).scalar()
    return None if receipt is None else Charge(**json.loads(receipt))


def _count(tx: sa.Connection, account: Account, run_id: str, units: Sequence[bytes]) -> int:
    """What the contract counts after this step; notes the units' uses where it needs them."""
    if account.contract in ("worst_case", "poisson"):
        return account.count + 1
    uses = _uses_of(tx, run_id, units)
    if known := [unit for unit in units if unit in uses]:
        bound = {"run": run_id, "one": sa.bindparam("one")}
        update = (
            _uses.update()
            .where(_uses.c.run_id == bound["run"], _uses.c.unit == bound["one"])
            .values(uses=_uses.c.uses + 1)
        )
        tx.execute(update, [{"one": unit} for unit in known])
    if fresh := [unit for unit in units if unit not in uses]:
        rows = [{"run_id": run_id, "unit": unit, "uses": 1} for unit in fresh]
        tx.execute(_uses.insert(), rows)
    if account.contract == "client_poisson":
        return account.count + 1
    return max(account.count, *(uses.get(unit, 0) + 1 for unit in units), 0)


def _refuted(tx: sa.Connection, account: Account, run_id: str, size: int) -> Entry | None:
    """Count and limit of a run whose asserted sample, with this step of it, does not look like
    one: all its steps are counted by participation from here on. None if it does, or is none."""
    if account.contract != "client_poisson":
        return None
    sizes = sa.select(_charges.c.size).where(_charges.c.run_id == run_id)
    distinct, most = _units_and_most_used(tx, run_id)
    so_far = [*tx.execute(sizes).scalars(), size]
    if looks_drawn(so_far, distinct, account.facts["dataset_size"], account.rate):
        return None
    return {"count": most, "limit": _own_uses(account, most)}


def _own_uses(account: Account, used: int) -> int | None:
    """How many uses the run's own target pays for; None without one, and never below those made."""
    target, delta = account.facts["target_epsilon"], account.facts["target_delta"]
    if target is None:
        return None
    paid = largest_count(
        lambda uses: gaussian_epsilon(math.sqrt(uses) / account.sigma, delta) <= target
    )
    return max(used, paid)


def _uses_of(connection: sa.Connection, run_id: str, units: Iterable[bytes]) -> dict[bytes, int]:
    """Uses of those units that were used before."""
    wanted = list(units)
    found: dict[bytes, int] = {}
    for start in range(0, len(wanted), _IN_AT_A_TIME):
        query = sa.select(_uses.c.unit, _uses.c.uses).where(
            _uses.c.run_id == run_id, _uses.c.unit.in_(wanted[start : start + _IN_AT_A_TIME])
        )
        found |= {bytes(unit): uses for unit, uses in connection.execute(query)}
    return found


def _units_and_most_used(connection: sa.Connection, run_id: str) -> tuple[int, int]:
    """How many units a run has used, and how often the most used one."""
    query = sa.select(sa.func.count(), sa.func.max(_uses.c.uses)).where(_uses.c.run_id == run_id)
    distinct, most = connection.execute(query).one()
    return distinct, most or 0


def _refuse_another(ledger: Ledger, epsilon: float | None, delta: float, unit: str) -> None:
    known = ledger.registered
    for name, given in (("epsilon", epsilon), ("delta", delta), ("unit", unit)):
        if known[name] != given:
            raise InvalidRequestError(
                f"data set {known['dataset']!r} is registered with {name} {known[name]}, not"
                f" {given}: what was promised for it is never changed. Use another dataset_id for"
                " other data",
                details={"field": name},
            )


def _refuse_exhausted(ledger: Ledger, run_id: str) -> None:
    account = ledger.accounts[run_id]
    used_up = account.limit is not None and account.count >= account.limit
    if used_up or ledger.epsilon_with(run_id, account.count + 1) > ledger.limit:
        steps = f"all {account.limit} that the budget pays for are made, " if used_up else ""
        raise DPBudgetExceededError(
            f"no step is left: {steps}epsilon {ledger.epsilon:.4g} of {ledger.limit:g} is spent or"
            " reserved by others. sample and save_state still work",
            details={"limit": account.limit},
        )
