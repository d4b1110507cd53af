"""Gives the session of one run access to its dataset's ledger: the unit key, limits and charges."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.privacy.plan import plan_run
from actors.registry.head_keeper import HeadKeeper
from actors.registry.registry import Registry
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.records.entries import Entry, registration
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge, dataset_of


@dataclass(repr=False)
class Budget:
    """The access of one run to the ledger of its dataset.

    `planned` checks the plan without changing anything. `open` registers the dataset and reserves.

    Attributes:
        key: the secret key of the unit hashes, the same for all runs of the dataset.
        known: the last head position of the ledger that the client saw, ``SEQ-HASH``; empty if the
            client saw none.
        last: the head position of the ledger after the last charge; empty before the first charge.
        heads: puts heads of the ledger into the store, and detects there that another database is
            in use; None without a store.
    """

    registry: Registry
    tenant: str
    dataset: str
    run_id: str
    epoch: int
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
            InvalidRequestError: the plan contradicts itself or the registration of the dataset.
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

    def open(self, **facts: Any) -> Budget:
        """Opens the account of the run, and registers the dataset if the run is its first.

        Args:
            facts: what the certificate also states, as known once the model is loaded. It must not
                depend on training data.

        This is the last step of a creation: a run that cannot start must not register a dataset.

        Raises:
            DPBudgetExceededError: other runs took the budget since `planned`; nothing was reserved.
            InvalidRequestError: see `Ledgers.register`.
        """
        if self.plan is not None:
            (entry, new), self.plan = self.plan, None
            entry["facts"] |= facts
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
        """Returns the units that have reached their limit of uses; see `Ledgers.admit`."""
        return self.registry.ledgers.admit(self.tenant, self.dataset, self.run_id, units)

    def charge(
        self, units: Iterable[bytes], calls: Sequence[tuple[str, str]] = (), *, noised: bool
    ) -> Charge:
        """Charges one draw of noise durably, and returns the receipt.

        The charge id is new and is used in this call only.

        Raises:
            DPBudgetExceededError: the remaining budget cannot pay; nothing was charged.
            LedgerMismatchError: the ledger does not contain a head position that this run or its
                client saw, or a head in the store.
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
        """Records in the ledger the other datasets that the weights were trained on.

        The caller does this before it uses the weights.
        """
        if others := sorted(set(datasets) - {self.dataset}):
            self.registry.ledgers.link(self.tenant, self.dataset, self.run_id, others)
