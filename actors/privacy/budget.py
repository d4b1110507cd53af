"""Gives the session of one run access to its dataset's ledger: the unit key, limits and charges."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.privacy.combinations import refuse_unproven
from actors.privacy.plan import plan_run
from actors.privacy.units import ids_without_unit, unit_ids
from actors.registry.draws import Draw
from actors.registry.head_keeper import HeadKeeper
from actors.registry.registry import Registry
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.data.batch import Example
from tg_tinker.records.entries import UPGRADE, VERSION, Entry, registration
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import UNIT, Charge, dataset_of


@dataclass(repr=False)
class Budget:
    """The access of one run to the ledger of its dataset.

    `planned` checks the plan without changing anything. `open` registers the dataset and reserves.

    Attributes:
        unit: the unit that the dataset protects, ``example`` or ``id``.
        unit_stated: whether somebody chose the unit: this run, an earlier run, or whoever
            registered the dataset. Otherwise it is the default.
        key: the secret key of the unit hashes, the same for all runs of the dataset.
        known: the last head position of the ledger that the client saw, ``SEQ-HASH``; empty if the
            client saw none.
        last: the head position of the ledger after the last draw or charge; empty before.
        heads: puts heads of the ledger into the store, and detects there that another database is
            in use; None without a store.
    """

    registry: Registry
    tenant: str
    dataset: str
    run_id: str
    epoch: int
    unit: str = UNIT
    unit_stated: bool = True
    # The entries that `open` writes: that of the run, and that of a new dataset.
    plan: tuple[Entry, Entry | None] | None = None
    key: bytes = b""
    known: str = ""
    last: str = ""
    heads: HeadKeeper | None = None

    @classmethod
    def planned(
        cls, registry: Registry, tenant: str, run_id: str, epoch: int, config: TrainingConfig,
        dtype: str,
    ) -> Budget:  # fmt: skip
        """Returns the budget of a run, before anything is reserved.

        A new run is planned and checked. A restored run keeps the plan that it opened with.

        Raises:
            DPBudgetExceededError: the remaining budget cannot pay for the plan.
            InvalidRequestError: the plan contradicts itself or the registration of the dataset, or
                the combination of contract, clip rule, unit and so on is not proven.
        """
        refuse_unproven(config)
        dataset = dataset_of(config)
        budget = cls(registry, tenant, dataset, run_id, epoch)
        ledger = Ledger.replay(entries := registry.ledgers.entries(tenant, dataset))
        dp = config.dp_config or DPConfig()
        new = None
        budget.unit_stated = dp.unit is not None or (bool(entries) and ledger.unit_stated)
        if not entries:
            unit = dp.unit or UNIT
            new = registration(dataset, dp.target_epsilon, dp.target_delta, unit, born="")
            ledger.append(new)
        budget.unit = ledger.registered["unit"]
        if run_id in ledger.accounts:
            return budget
        if entries and ledger.version < VERSION:
            ledger.append(UPGRADE)  # the rules by which the plan is opened
        if dp.unit not in (None, budget.unit) and ledger.unit_open:
            budget.unit = dp.unit
            ledger.append({"type": "unit", "run": run_id, "unit": dp.unit})
        plan = plan_run(dp, config, ledger)
        entry = plan.entry(run_id)
        entry["facts"] |= {
            "dtype": dtype, "message": plan.message, "unit_stated": budget.unit_stated,
        }  # fmt: skip
        budget.plan = entry, new
        return budget

    def open(self) -> Budget:
        """Opens the account of the run, and registers the dataset if the run is its first.

        This is the last step of a creation: a run that cannot start must not register a dataset.

        Raises:
            DPBudgetExceededError: other runs took the budget since `planned`; nothing was reserved.
            InvalidRequestError: see `Ledgers.register` and `Ledgers.open_account`.
        """
        if self.plan is not None:
            (entry, new), self.plan = self.plan, None
            if new is not None:
                self.registry.ledgers.register(
                    self.tenant,
                    self.dataset,
                    new["epsilon"],
                    new["delta"],
                    new["unit"],
                    f"{self.run_id}@{self.epoch}",
                )
            self.registry.ledgers.open_account(self.tenant, self.dataset, entry)
        self.key = self.registry.ledgers.unit_key(self.tenant, self.dataset)
        return self

    def units_of(self, examples: Sequence[Example]) -> list[bytes]:
        """Returns the unit of each row as a keyed hash; see `unit_ids`.

        Raises:
            InvalidRequestError: the rows have ids, and nobody chose the unit, so that an id might
                wrongly be taken for what is protected; or it was chosen since this run was opened;
                or the unit is ``id`` and a row has no id.
        """
        if not self.unit_stated and any(row.example_id is not None for row in examples):
            ledger = Ledger.replay(self.registry.ledgers.entries(self.tenant, self.dataset))
            ledger.usable(self.run_id)
            raise ids_without_unit(self.dataset, ledger.unit_open)
        return unit_ids(self.key, examples, self.unit)

    def admit(self, units: Sequence[bytes]) -> set[bytes]:
        """Returns the units that have reached their limit of uses; see `Ledgers.admit`."""
        return self.registry.ledgers.admit(self.tenant, self.dataset, self.run_id, units)

    def draw(self, units: Sequence[bytes]) -> Draw:
        """Returns the draw from these units, each given once and in ascending order, at the present
        position of the dataset; see `Ledgers.draw`.

        Raises:
            DPBudgetExceededError: the remaining budget cannot pay for the step; nothing was told.
            InvalidRequestError: a draw with other settings or units waits for its step.
            LedgerMismatchError: see `charge`; nothing was told.
        """
        draw = self.registry.ledgers.draw(
            self.tenant, self.dataset, self.run_id, self.epoch, b"".join(units), self._heads()
        )
        self.last = draw.place
        return draw

    def note(self, units: Iterable[bytes]) -> None:
        """Makes the units of later samples known; see `Ledgers.note_units`."""
        self.registry.ledgers.note_units(self.tenant, self.dataset, self.run_id, sorted(units))

    def charge(
        self, units: Iterable[bytes], calls: Sequence[tuple[str, str]] = (), *, noised: bool,
        draw: Draw | None = None,
    ) -> Charge:  # fmt: skip
        """Charges one draw of noise durably, and returns the receipt.

        The charge id is new and is used in this call only.

        Args:
            draw: the draw of the units, under `poisson`.

        Raises:
            DPBudgetExceededError: the remaining budget cannot pay; nothing was charged.
            InvalidRequestError: another run used the draw meanwhile; nothing was charged.
            LedgerMismatchError: the ledger does not contain a head position that this run or its
                client saw, or a head in the store.
        """
        charge = self.registry.ledgers.charge(
            self.tenant, self.dataset, self.run_id, self.epoch, secrets.token_hex(16),
            sorted(units), noised, calls, self._heads(),
            None if draw is None else (draw.position, draw.units),
        )  # fmt: skip
        self.last = charge.place
        return charge

    def _heads(self) -> list[str]:
        """Returns the known head positions. Raises LedgerMismatchError if the store has shown a
        head of another chain."""
        if self.heads is not None:
            self.heads.check()
        return [place for place in (self.known, self.last) if place]

    def counted_units(self) -> int:
        """Returns how many distinct units the dataset knows; see `Ledgers`."""
        return self.registry.ledgers.counted_units(self.tenant, self.dataset)

    def link(self, datasets: Iterable[str]) -> None:
        """Records in the ledger the other datasets that the weights were trained on.

        The caller does this before it uses the weights.
        """
        if others := sorted(set(datasets) - {self.dataset}):
            self.registry.ledgers.link(self.tenant, self.dataset, self.run_id, others)
