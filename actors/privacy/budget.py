"""The budget of one run, as its session sees it: the data set's key, what is left, charges."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.privacy.plan import plan_run
from actors.registry.head_keeper import HeadKeeper
from actors.registry.registry import Registry
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.records.entries import Entry, registration
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge, dataset_of


@dataclass(repr=False)
class Budget:
    """One run's way to its data set's ledger. `planned` looks, `open` registers and reserves.

    Attributes:
        key: of the units' hashes; secret, the same for all runs of the data set.
        known: where the client last saw the ledger end, ``SEQ-HASH``; empty if it never did.
        last: the same of the last charge.
        heads: may know from the store that another database is in use.
    """

    registry: Registry
    tenant: str
    dataset: str
    run_id: str
    epoch: int
    plan: tuple[Entry, Entry | None] | None = None  # to open with: the run, a new data set
    key: bytes = b""
    known: str = ""
    last: str = ""
    heads: HeadKeeper | None = None

    @classmethod
    def planned(
        cls, registry: Registry, tenant: str, run_id: str, epoch: int, config: TrainingConfig,
        dtype: str,
    ) -> Budget:  # fmt: skip
        """The budget of a new run, checked but not taken; or of one that comes back, as agreed.

        Raises:
            DPBudgetExceededError: the plan does not fit.
            InvalidRequestError: it contradicts itself or what the data set was registered with.
        """
        dataset = dataset_of(config)
        budget = cls(registry, tenant, dataset, run_id, epoch)
        ledger = Ledger.replay(entries := registry.ledgers.entries(tenant, dataset))
        if run_id in ledger.accounts:
            return budget
        dp = config.dp_config or DPConfig()
        new = None
        if not entries:
            new = registration(dataset, dp.target_epsilon, dp.target_delta, dp.unit, born="")
            ledger.append(new)
        plan = plan_run(dp, config, ledger)
        entry = plan.entry(run_id)
        entry["facts"] |= {"dtype": dtype, "message": plan.message}
        budget.plan = entry, new
        return budget

    def open(self) -> Budget:
        """Registers the data set where the run is its first, and enters the run. Last of all
        that a creation does: a run that cannot start must bind no data set.

        Raises:
            DPBudgetExceededError: others took the budget since; nothing was reserved.
            InvalidRequestError: see `Ledgers.register`.
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

    def admit(self, units: Sequence[bytes]) -> set[bytes]:
        """See `Ledgers.admit`."""
        return self.registry.ledgers.admit(self.tenant, self.dataset, self.run_id, units)

    def charge(
        self, units: Iterable[bytes], calls: Sequence[tuple[str, str]] = (), *, noised: bool
    ) -> Charge:
        """A receipt for one draw of noise, durable. One charge id, used in this call only.

        Raises:
            LedgerMismatchError: the ledger does not go through what this run or its client saw,
                or through a head in the store.
        """
        if self.heads is not None:
            self.heads.check()
        charge = self.registry.ledgers.charge(
            self.tenant, self.dataset, self.run_id, self.epoch, secrets.token_hex(16),
            sorted(units), noised, calls, [place for place in (self.known, self.last) if place],
        )  # fmt: skip
        self.last = charge.place
        return charge

    def link(self, datasets: Iterable[str]) -> None:
        """Notes in the ledger what else the weights were trained on, before they are used."""
        if others := sorted(set(datasets) - {self.dataset}):
            self.registry.ledgers.link(self.tenant, self.dataset, self.run_id, others)
