"""Registers datasets, and checks and charges their privacy budgets.

The rules are in `tg_tinker.records.ledger`; this module applies them to the database. Every change
is one immediate transaction: the decision, the ledger entry and the uses of units become durable
together or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter
from actors.registry.book import Book
from actors.registry.database import Database
from actors.registry.draws import BLOCK, Draw, digest_of, drawn_of
from actors.registry.lookups import owned
from actors.registry.runs import check_epoch
from actors.registry.schema import CHARGES, DATASETS, RUNS, SUMS
from actors.registry.uses import (
    add_to_sums,
    all_uses,
    count_uses,
    known_to,
    most_held,
    note_units,
    own_uses,
    refuted,
    units_at_limit,
    uses_of,
)
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import (
    DPBudgetExceededError,
    InvalidRequestError,
    NotFoundError,
)
from tg_tinker.records.entries import Entry, registration
from tg_tinker.records.ledger import Account, Ledger, Told
from tg_tinker.records.report import Charge, PrivacyInfo, describe_run
from tg_tinker.records.sums import times, weight


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
        """Records a run's contract, and reserves the budget that the run plans. If the run states a
        unit, and nobody has chosen one, this chooses it. A repeat changes nothing.

        Raises:
            DPBudgetExceededError: Other runs took the budget since the plan was made.
            InvalidRequestError: Another unit holds since the plan was made; nothing was reserved.
        """
        who = self._actor(tenant, entry["run"])
        with (
            self._writer.refusals(tenant, who, "budget.reserve", dataset),
            self._database.change() as tx,
        ):
            ledger = self._book.known(tx, tenant, dataset)
            if entry["run"] in ledger.accounts and self._book.has(tx, tenant, dataset, entry):
                return
            ledger = self._book.upgraded(tx, tenant, dataset, who)
            if (unit := _unit_to_choose(ledger, entry)) is not None:
                body = {"type": "unit", "run": entry["run"], "unit": unit}
                self._book.append(tx, tenant, dataset, ledger, body, who)
            self._book.append(tx, tenant, dataset, ledger, entry, who)
            _check_held(tx, tenant, dataset, ledger, entry["run"], entry["planned"])

    def counted_units(self, tenant: str, dataset: str) -> int:
        """Returns how many distinct units the dataset knows: trained on, registered for samples, or
        evaluated."""
        query = sa.select(sa.func.count()).where(SUMS.c.tenant == tenant, SUMS.c.dataset == dataset)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def unit_key(self, tenant: str, dataset: str) -> bytes:
        """Returns the key of a dataset's unit hashes, for the memory of the dataset's training
        actors alone."""
        with self._database.reading() as connection:
            return self._book.unit_key(connection, tenant, dataset)

    def unit_keys(self, tenant: str) -> dict[str, tuple[str, bytes]]:
        """Returns the unit and the key of the unit hashes of every dataset of a tenant, for the
        memory of the tenant's training actors alone."""
        query = sa.select(DATASETS.c.id).where(DATASETS.c.tenant == tenant)
        with self._database.reading() as connection:
            return {
                dataset: (
                    self._book.known(connection, tenant, dataset).registered["unit"],
                    self._book.unit_key(connection, tenant, dataset),
                )
                for dataset in connection.execute(query).scalars().all()
            }

    def known_units(
        self, tenant: str, units: Mapping[str, Sequence[bytes]]
    ) -> dict[str, set[bytes]]:
        """Returns those of the units, by dataset, that a run has trained on or registered for
        samples, or that were evaluated. A dataset of another tenant knows no unit."""
        with self._database.reading() as connection:
            return {
                dataset: known_to(
                    connection, tenant, dataset,
                    self._book.ledger(connection, tenant, dataset).accounts, asked,
                )
                for dataset, asked in units.items()
            }  # fmt: skip

    def note_units(self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]) -> None:
        """Records units from which a run's samples will be drawn, so that they are known. Their
        sums stay the same.

        Raises:
            InvalidRequestError: The unit was chosen after the run was opened; nothing was recorded.
        """
        with self._database.change() as tx:
            _check_run(tx, tenant, run_id)
            self._book.known(tx, tenant, dataset).usable(run_id)
            note_units(tx, tenant, dataset, units)

    def privacy_info(self, tenant: str, dataset: str, run_id: str) -> PrivacyInfo:
        with self._database.reading() as connection:
            owned(connection, RUNS, tenant, run_id)
            return describe_run(self._book.known(connection, tenant, dataset), run_id)

    def admit(self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]) -> set[bytes]:
        """Returns those of the units that this run may not use again: the run has used them as
        often as agreed, or the dataset cannot pay for their sums over all runs.

        Raises:
            DPBudgetExceededError: No step is left, or none of these units may be used again.
        """
        with self._writer.refusals(tenant, self._actor(tenant, run_id), "budget.charge", dataset):
            return self._at_limit(tenant, dataset, run_id, units)

    def draw(
        self, tenant: str, dataset: str, run_id: str, epoch: int, units: bytes,
        known: Sequence[str] = (),
    ) -> Draw:  # fmt: skip
        """Tells a run the draw at the ledger's position. Before it is told for the first time, the
        position is bound durably to sigma, rate and C of the run and to the list of units; a run
        with the same binding is then told the same draw again.

        Args:
            units: The keyed hashes of all units, 16 bytes each, ascending, each once.
            known: See `charge`.

        Raises:
            InvalidRequestError: A draw with another binding is told and not yet used.
            DPBudgetExceededError: The budget cannot pay for the step; nothing was told.
            LedgerMismatchError, ActorLostError: See `charge`; nothing was told.
        """
        who = f"{run_id}@{epoch}"
        with (
            self._writer.refusals(tenant, who, "budget.draw", dataset),
            self._database.change() as tx,
        ):
            ledger = self._met(tx, tenant, dataset, run_id, epoch, known)
            account = ledger.usable(run_id)
            if ledger.counts_uses(account):
                self._refuse_used_up(tx, tenant, dataset, ledger, run_id, units)
            else:
                _refuse_exhausted(ledger, run_id)
            if account.count >= account.reserved:
                _check_held(tx, tenant, dataset, ledger, run_id, account.count + 1)
            key = self._book.unit_key(tx, tenant, dataset)
            digest = digest_of(key, ledger.position, units)
            if ledger.told is None:
                ledger = self._book.upgraded(tx, tenant, dataset, who)
                body = {
                    "type": "draw", "run": run_id, "position": ledger.position, "units": digest,
                }  # fmt: skip
                self._book.append(tx, tenant, dataset, ledger, body, who)
            elif (ledger.told.binding, ledger.told.units) != (account.binding, digest):
                raise _told_otherwise(ledger.told, dataset)
            draw_key = self._book.draw_keys.key(tx, tenant, dataset, ledger.position)
            drawn = drawn_of(draw_key, ledger.position, units, account.rate)
            return Draw(ledger.position, digest, drawn, ledger.at)

    def drop(self, tenant: str, dataset: str, position: int) -> None:
        """Gives up the draw that is told at this position. From then on, all later Poisson steps of
        the dataset count as uses of their units. A repeat changes nothing.

        Raises:
            InvalidRequestError: No draw is told at this position.
        """
        with (
            self._writer.refusals(tenant, SDK, "budget.drop", dataset),
            self._database.change() as tx,
        ):
            ledger = self._book.known(tx, tenant, dataset)
            if ledger.dropped and ledger.position == position + 1 and ledger.told is None:
                return
            if ledger.told is None or ledger.told.position != position:
                raise InvalidRequestError(
                    f"no draw is told at position {position} of dataset {dataset!r}, so there is"
                    " nothing to drop"
                )
            body: Entry = {"type": "drop", "run": None, "position": position}
            self._book.append(tx, tenant, dataset, ledger, body, SDK)

    def at_limit(
        self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes], sigma: float
    ) -> set[bytes]:
        """Returns those of the units that the dataset cannot pay for in one more Gaussian release
        at this sigma; see `evaluate`."""
        with self._database.reading() as connection:
            owned(connection, RUNS, tenant, run_id)
            ledger = self._book.ahead(connection, tenant, dataset)
            return units_at_limit(
                connection, tenant, dataset, ledger, units, weight(sigma), run_id
            )  # fmt: skip

    def evaluate(
        self, tenant: str, dataset: str, run_id: str, epoch: int, charge_id: str,
        units: Sequence[bytes], sigma: float, known: Sequence[str] = (), unit: str | None = None,
    ) -> Charge:  # fmt: skip
        """Checks and charges one Gaussian release on uses of these units, which `at_limit` does not
        name. The charge is durable on return. A repeat returns the same receipt.

        Args:
            dataset: The dataset of the units. The run may train on another dataset, and needs no
                account in this one.
            charge_id, units, known: See `charge`.
            sigma: The standard deviation of the noise divided by the sensitivity of the sum.
            unit: The unit of privacy by which the rows were hashed; None trusts the caller.

        Raises:
            DPBudgetExceededError: The dataset cannot pay for one of the units; nothing was charged.
            InvalidRequestError: Another unit holds meanwhile; nothing was charged.
            LedgerMismatchError, ActorLostError: See `charge`.
        """
        who = f"{run_id}@{epoch}"
        with (
            self._writer.refusals(tenant, who, "budget.charge", dataset),
            self._database.change() as tx,
        ):
            _check_run(tx, tenant, run_id)
            if (again := _receipt(tx, run_id, charge_id)) is not None:
                return again
            ledger = self._met(tx, tenant, dataset, run_id, epoch, known)
            ledger = self._book.upgraded(tx, tenant, dataset, who)
            if unit not in (None, ledger.registered["unit"]):
                raise _another_unit(ledger)
            costs = dict.fromkeys(units, weight(sigma))
            spent = add_to_sums(
                tx, tenant, dataset, ledger, costs, run_id, ledger.check_sum
            )  # fmt: skip
            body: Entry = {
                "type": "evaluation", "run": run_id, "epoch": epoch, "charge": charge_id,
                "sigma": sigma, "spent": spent,
            }  # fmt: skip
            return self._charged(tx, tenant, dataset, ledger, body, len(units), (), sigma)

    def charge(
        self, tenant: str, dataset: str, run_id: str, epoch: int, charge_id: str,
        units: Sequence[bytes], noised: bool, calls: Sequence[tuple[str, str]],
        known: Sequence[str] = (), told: tuple[int, str] | None = None,
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
            told: Under `poisson`, position and digest of units of the draw that the step used.

        Raises:
            DPBudgetExceededError: The budget does not allow the step; nothing was charged.
            InvalidRequestError: The draw is not told any more, because another run used it;
                nothing was charged.
            LedgerMismatchError: One of the `known` positions is not on the ledger; nothing was
                charged.
            ActorLostError: A newer actor owns the run; nothing was charged.
        """
        with self._writer.refusals(tenant, f"{run_id}@{epoch}", "budget.charge", dataset):
            step = tenant, dataset, run_id, epoch, charge_id, units, noised, calls, known, told
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
            if not self._book.known(tx, tenant, dataset).linked.issuperset(others):
                ledger = self._book.upgraded(tx, tenant, dataset, who)
                body = {"type": "link", "run": run_id, "datasets": sorted(others)}
                self._book.append(tx, tenant, dataset, ledger, body, who)

    # --- inside ------------------------------------------------------------------------------

    def _at_limit(
        self, tenant: str, dataset: str, run_id: str, units: Sequence[bytes]
    ) -> set[bytes]:
        with self._database.reading() as connection:
            ledger = self._book.ahead(connection, tenant, dataset)
            account = ledger.usable(run_id)
            if not ledger.counts_uses(account):
                _refuse_exhausted(ledger, run_id)
                return set()
            own, at_limit = _not_usable(connection, tenant, dataset, ledger, run_id, units)
        # A draw of units that may all not be used is a step, too: each of them adds zero.
        if units and at_limit.issuperset(units) and account.contract == "participation":
            raise _none_usable(ledger, account, own.issuperset(units))
        return at_limit

    def _refuse_used_up(
        self, tx: sa.Connection, tenant: str, dataset: str, ledger: Ledger, run_id: str,
        units: bytes,
    ) -> None:  # fmt: skip
        """Refuses a draw for a run that counts uses, if none of the units may be used again."""
        all_units = [units[at : at + BLOCK] for at in range(0, len(units), BLOCK)]
        own, at_limit = _not_usable(tx, tenant, dataset, ledger, run_id, all_units)
        if at_limit.issuperset(all_units):
            raise _none_usable(ledger, ledger.accounts[run_id], own.issuperset(all_units))

    def _met(
        self, tx: sa.Connection, tenant: str, dataset: str, run_id: str, epoch: int,
        known: Sequence[str],
    ) -> Ledger:  # fmt: skip
        """Returns a ledger that contains the known positions, for the newest actor of a run."""
        _check_run(tx, tenant, run_id)
        ledger = self._book.known(tx, tenant, dataset)
        for place in known:
            ledger.check_place(place, dataset)
        check_epoch(tx, tenant, run_id, epoch)
        return self._book.ahead(tx, tenant, dataset)

    def _charge(
        self, tenant: str, dataset: str, run_id: str, epoch: int, charge_id: str,
        units: Sequence[bytes], noised: bool, calls: Sequence[tuple[str, str]],
        known: Sequence[str], told: tuple[int, str] | None,
    ) -> Charge | None:  # fmt: skip
        """Returns the receipt, or None if the run fell back to participation instead."""
        who = f"{run_id}@{epoch}"
        with self._database.change() as tx:
            _check_run(tx, tenant, run_id)
            if (again := _receipt(tx, run_id, charge_id)) is not None:
                return again
            self._met(tx, tenant, dataset, run_id, epoch, known)
            ledger = self._book.upgraded(tx, tenant, dataset, who)
            account = ledger.usable(run_id)
            if (limits := refuted(tx, account, run_id, len(units))) is not None:
                uses = all_uses(tx, run_id)
                costs = {unit: times(count, account.sigma) for unit, count in uses.items()}
                spent = add_to_sums(tx, tenant, dataset, ledger, costs, run_id)
                body: Entry = {"type": "fall_back", "run": run_id, "spent": spent} | limits
                self._book.append(tx, tenant, dataset, ledger, body, who)
                return None
            body = {
                "type": "charge" if noised else "unnoised", "run": run_id, "epoch": epoch,
                "charge": charge_id, "count": count_uses(tx, ledger, account, run_id, units),
                "spent": ledger.spent,
            }  # fmt: skip
            if account.contract == "poisson":
                body["position"] = _position_of(ledger, told)
            if ledger.counts_uses(account):
                costs = dict.fromkeys(units, weight(account.sigma))
                body["spent"] = add_to_sums(
                    tx, tenant, dataset, ledger, costs, run_id, ledger.check_sum
                )  # fmt: skip
            else:
                note_units(tx, tenant, dataset, units)
            if body["count"] > account.reserved:
                _check_held(tx, tenant, dataset, ledger, run_id, body["count"])
            return self._charged(
                tx, tenant, dataset, ledger, body, len(units), calls, account.sigma
            )  # fmt: skip

    def _charged(
        self, tx: sa.Connection, tenant: str, dataset: str, ledger: Ledger, body: Entry,
        size: int, calls: Sequence[tuple[str, str]], sigma: float,
    ) -> Charge:  # fmt: skip
        """Adds an entry that pays for one draw of noise, and returns its receipt."""
        run_id, before = body["run"], ledger.epsilon
        entry = self._book.append(tx, tenant, dataset, ledger, body, f"{run_id}@{body['epoch']}")
        charge = Charge(
            charge_id=body["charge"],
            dataset=dataset,
            head=entry["hash"],
            entry=entry["seq"],
            sigma=sigma,
            noised=body["type"] != "unnoised",
            epsilon_spent=ledger.epsilon - before,
            total_epsilon=ledger.epsilon,
            delta=ledger.delta,
            count=body.get("count", 0),
        )
        tx.execute(
            CHARGES.insert().values(
                id=charge.charge_id, run_id=run_id, size=size,
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
        if known[name] != given and name == "unit" and ledger.unit_open:
            raise InvalidRequestError(
                f"dataset {known['dataset']!r} is registered, and nobody has chosen its unit yet:"
                f" create a client with DPConfig(unit={unit!r}), which chooses it",
                details={"field": name},
            )
        if known[name] != given:
            raise InvalidRequestError(
                f"dataset {known['dataset']!r} is registered with {name} {known[name]}, not"
                f" {given}: its registration is never changed. For other data, use another"
                " dataset_id",
                details={"field": name},
            )


def _unit_to_choose(ledger: Ledger, entry: Entry) -> str | None:
    """Returns the unit that a run chooses when it opens; None if its unit holds already.

    Raises:
        InvalidRequestError: The run may not choose: it was planned under a unit that holds no more,
            or the unit was stated or used since.
    """
    unit = ledger.registered["unit"]
    wanted: str = entry["facts"].get("unit", unit)
    if wanted == unit:
        return None
    if not ledger.unit_open:
        raise _another_unit(ledger)
    return wanted


def _another_unit(ledger: Ledger) -> InvalidRequestError:
    return InvalidRequestError(
        f"the unit of dataset {ledger.registered['dataset']!r} is {ledger.registered['unit']!r}:"
        " another client has chosen or used it meanwhile. Nothing was charged or reserved: create"
        " the client again, with this unit, or use another dataset_id",
        details={"field": "unit"},
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


def _check_held(
    connection: sa.Connection, tenant: str, dataset: str, ledger: Ledger, run_id: str, count: int
) -> None:
    """Checks that a run which is charged to every unit leaves what others hold for single units.

    Raises:
        DPBudgetExceededError: The run would take something that is held.
    """
    if not ledger.counts_uses(ledger.accounts[run_id]):
        held = most_held(connection, tenant, dataset, ledger)
        ledger.check_epsilon(ledger.epsilon_with(run_id, count, held=held))


def _not_usable(
    connection: sa.Connection, tenant: str, dataset: str, ledger: Ledger, run_id: str,
    units: Sequence[bytes],
) -> tuple[set[bytes], set[bytes]]:  # fmt: skip
    """Returns those of the units that have reached the run's own limit, and all that the run may
    not use again."""
    account, own = ledger.accounts[run_id], set[bytes]()
    limit = account.limit if account.contract == "participation" else own_uses(account)
    if limit is not None and (account.contract == "poisson" or account.count >= limit):
        uses = uses_of(connection, run_id, units)
        own = {unit for unit, count in uses.items() if count >= limit}
    cost = weight(account.sigma)
    return own, own | units_at_limit(connection, tenant, dataset, ledger, units, cost, run_id)


def _none_usable(ledger: Ledger, account: Account, own: bool) -> DPBudgetExceededError:
    limit = account.limit
    why = (
        f"every row of this batch was used {limit} times, which is the limit agreed for this run"
        f" (sigma {account.sigma:g}, epsilon {ledger.limit:g})"
        if own and limit is not None
        else f"epsilon {ledger.limit:g} of dataset {ledger.registered['dataset']!r} pays for no"
        f" further use of any of these rows at sigma {account.sigma:g}: all runs together have used"
        " it up on them, or open clients hold it"
    )
    return DPBudgetExceededError(
        f"{why}. Pass rows that were used less, or stop here: sample and save_state still work",
        details={"limit": limit},
    )


def _told_otherwise(told: Told, dataset: str) -> InvalidRequestError:
    sigma, rate, bound = told.binding
    return InvalidRequestError(
        f"draw {told.position} of dataset {dataset!r} is told and waits for its step. It is bound"
        f" to sigma {sigma:g}, rate {rate:g}, max_grad_norm {bound:g} and one list of units, and"
        f" this run differs from it. Finish that step in {told.run} or in a run with the same"
        f" settings and units; or give the draw up with `tg-tinker privacy drop {dataset}`, after"
        " which all Poisson steps of this dataset count as uses",
        details={"position": told.position, "run": told.run},
    )


def _position_of(ledger: Ledger, told: tuple[int, str] | None) -> int:
    """Returns the position that a step used, which must be told now.

    Raises:
        InvalidRequestError: It is not told to runs of this kind, or not any more.
    """
    now = ledger.told
    if told is None or now is None or told != (now.position, now.units):
        used = "none" if told is None else str(told[0])
        raise InvalidRequestError(
            f"the draw of this step ({used}) is not told any more: another run used it, or it was"
            f" dropped. Nothing was charged, and the step was dropped. Draw again: the next draw is"
            f" {ledger.position}",
            details={"position": ledger.position},
        )
    return now.position
