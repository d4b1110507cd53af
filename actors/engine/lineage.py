"""Records the origin of weights. Every artifact carries it, and a private run checks it at start.

A guarantee holds from the first private step after the base model, or after weights that have
the guarantee themselves. Any training without noise since the base model ends the guarantee, for
these weights and for all weights that descend from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tg_tinker.errors import LineageError


@dataclass(frozen=True)
class Lineage:
    """A record of the training that a session's weights have had.

    Attributes:
        base: the digest of the base model.
        guarantee: ``base`` (nothing but the base model), ``private``, or ``none``.
        ledgers: the ledger's head position at the last charge, ``SEQ-HASH``, by dataset, for all
            private steps and evaluations so far.
    """

    base: str
    guarantee: Literal["base", "private", "none"] = "base"
    ledgers: Mapping[str, str] = field(default_factory=dict)

    def unguarded(self) -> Lineage:
        """Returns the lineage after a step without noise."""
        return replace(self, guarantee="none")

    def charged(self, dataset: str, place: str) -> Lineage:
        """Returns the lineage after a private step. A lost guarantee stays lost."""
        kept: Literal["private", "none"] = "none" if self.guarantee == "none" else "private"
        return replace(self, guarantee=kept, ledgers={**self.ledgers, dataset: place})

    def evaluated(self, dataset: str, place: str) -> Lineage:
        """Returns the lineage after a charged evaluation on a dataset.

        The evaluation moves no weight. But whoever chooses these weights by its result lets the
        held-out units decide about them, so they carry the epsilon of that ledger too.
        """
        return replace(self, ledgers={**self.ledgers, dataset: place})

    def refuse_unguarded(self, allowed: bool) -> None:
        """Raises unless a private run may start from these weights.

        Args:
            allowed: whether the run accepts weights without a guarantee.

        Raises:
            LineageError: if the weights were trained without privacy, or their origin is unknown.
        """
        if self.guarantee == "none" and not allowed:
            raise LineageError(
                "these weights or their optimizer state were trained without differential privacy:"
                " a private run that starts from them has no guarantee. Start from the base model"
                " or a private artifact, or set DPConfig(allow_nonprivate_init=True), which marks"
                " this run and all its artifacts as without a guarantee"
            )
