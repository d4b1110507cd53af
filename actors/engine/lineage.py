"""Where weights come from: every artifact carries it, and a private run asks before it starts.

A guarantee holds from the first private step after the base model, or after weights that have
the guarantee themselves. Whatever touched data without noise since the base model ends it, for
the weights and for all that descend from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tg_tinker.errors import LineageError


@dataclass(frozen=True)
class Lineage:
    """What the weights of a session were trained on.

    Attributes:
        base: digest of the base model.
        guarantee: ``base`` (nothing but the base model), ``private``, or ``none``.
        ledgers: where the ledger ended at the last charge, ``SEQ-HASH``, by data set, of all
            private steps so far.
    """

    base: str
    guarantee: Literal["base", "private", "none"] = "base"
    ledgers: Mapping[str, str] = field(default_factory=dict)

    def unguarded(self) -> Lineage:
        """After a step without noise."""
        return replace(self, guarantee="none")

    def charged(self, dataset: str, place: str) -> Lineage:
        """After a private step; a guarantee that was lost stays lost."""
        kept: Literal["private", "none"] = "none" if self.guarantee == "none" else "private"
        return replace(self, guarantee=kept, ledgers={**self.ledgers, dataset: place})

    def refuse_unguarded(self, allowed: bool) -> None:
        """Raises unless a private run may start from these weights.

        Raises:
            LineageError: they saw data without privacy, or nobody knows.
        """
        if self.guarantee == "none" and not allowed:
            raise LineageError(
                "these weights or their optimizer state were trained without differential privacy:"
                " a private run that starts from them has no guarantee. Start from the base model"
                " or a private artifact, or set DPConfig(allow_nonprivate_init=True), which marks"
                " this run and all its artifacts as without a guarantee"
            )
