"""The budget of one run, as its session sees it: the data set's key, what is left, charges."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.plan import plan_run
from actors.registry import Registry
from actors.units import Window
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.ledger import Ledger, registration
from tg_tinker.privacy import Charge, dataset_of


@dataclass(frozen=True, repr=False)
class Budget:
    """One run's way to its data set's ledger.

    Attributes:
        key: of the units' hashes; secret, the same for all runs of the data set.
    """

    registry: Registry
    tenant: str
    dataset: str
    run_id: str
    epoch: int
    key: bytes

    def admit(self, units: Sequence[bytes]) -> set[bytes]:
        """See `Budgets.admit`."""
        return self.registry.admit(self.tenant, self.dataset, self.run_id, units)

    def charge(self, window: Window, *, noised: bool) -> Charge:
        """A receipt for one draw of noise, durable. One charge id, used in this call only."""
        return self.registry.charge(
            self.tenant, self.dataset, self.run_id, self.epoch, secrets.token_hex(16),
            sorted(window.units), noised, window.calls,
        )  # fmt: skip

    def link(self, datasets: Iterable[str]) -> None:
        """Notes in the ledger what else the weights were trained on, before they are used."""
        if others := sorted(set(datasets) - {self.dataset}):
            self.registry.link(self.tenant, self.dataset, self.run_id, others)


def open_budget(
    registry: Registry, tenant: str, run_id: str, epoch: int, config: TrainingConfig, dtype: str
) -> Budget:
    """The budget of a new run, planned and reserved; or of a run that comes back, as agreed.

    The data set is registered by the first private run that names it.

    Raises:
        DPBudgetExceededError: the plan does not fit; nothing was registered or reserved.
        InvalidRequestError: the plan contradicts itself or what the data set was registered with.
    """
    dataset = dataset_of(config)
    entries = registry.ledger_entries(tenant, dataset)
    dp = config.dp_config or DPConfig()
    registered = dp.target_epsilon, dp.target_delta, dp.unit
    ledger = Ledger.replay(entries)
    if run_id not in ledger.accounts:
        if not entries:  # planned first: a refused plan must not bind the data set
            ledger.append(registration(dataset, *registered, born=""))
        plan = plan_run(dp, config, ledger)
        if not entries:
            registry.register_dataset(tenant, dataset, *registered)
        entry = plan.entry(run_id)
        entry["facts"] |= {"dtype": dtype, "message": plan.message}
        registry.open_account(tenant, dataset, entry)
    key = registry.unit_key(tenant, dataset)
    return Budget(registry, tenant, dataset, run_id, epoch, key)
