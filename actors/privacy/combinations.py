"""The one table of combinations that a private run may have: proven and tested, or refused.

    refuse_unproven(config)     # raises before anything is registered
    markdown()                  # the table of docs/privacy.md and `tg-tinker privacy combinations`

What a contract, a clip rule or a trainable set guarantees, it guarantees beside certain others
only. Therefore a private run needs a row here that covers its whole combination. Of several rows
that cover it, the most specific one counts: the row that covers the fewest combinations.

To add a value, add it to `VALUES`, and add rows for it. No row of today covers it: a dimension that
a row does not name means its values in `BASELINE`, which stays as it is. A combination without a
row is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.errors import InvalidRequestError

Combination = Mapping[str, str]

BASELINE: Mapping[str, tuple[str, ...]] = {
    "contract": ("participation", "poisson", "client_poisson", "worst_case"),
    "noise": ("gaussian",),
    "clipping": ("flat", "normalise"),
    "unit": ("example", "id"),
    "trainable": ("lora", "freeze_a", "full"),
    "optimizer": ("any", "plain_sgd"),
    "loss": ("cross_entropy",),
    "workers": ("1",),
    "quantization": ("none",),
}
"""What a row means that does not name a dimension. New values must not be added here."""

VALUES: Mapping[str, tuple[str, ...]] = {**BASELINE}
"""All values of each dimension. The noise `gaussian` is drawn independently for every step."""


@dataclass(frozen=True)
class Row:
    """What is known about the combinations of some values.

    Attributes:
        values: the values of each dimension that the row covers.
        proven: the paper, or the section of docs/privacy.md, with the proof.
        tests: the tests that fail if the code does not do what the proof needs.
        refused: why these combinations are refused, and what to do; empty if they are allowed.
    """

    values: Mapping[str, tuple[str, ...]]
    proven: str = ""
    tests: tuple[str, ...] = ()
    refused: str = ""

    def covers(self, combination: Combination) -> bool:
        return all(value in self.values[name] for name, value in combination.items())

    @property
    def size(self) -> int:
        """The number of combinations that the row covers."""
        return math.prod(map(len, self.values.values()))


def row(proven: str = "", *tests: str, refused: str = "", **values: str) -> Row:
    """Returns a row; `values` has alternatives separated by a bar, such as ``lora|full``."""
    named = {name: tuple(value.split("|")) for name, value in values.items()}
    return Row({**BASELINE, **named}, proven, tests, refused)


_FLAT = (
    "test_one_row_moves_the_sum_by_at_most_the_bound",
    "test_rows_of_one_id_are_clipped_together",
    "test_the_sum_equals_the_loop_oracle",
    "test_no_unit_moves_the_sum_by_more_than_the_bound_nor_the_others",
    "test_the_noise_has_std_sigma_times_bound_on_the_sum",
)
"""A unit moves the sum by at most C, whatever is trained, and the noise is that of C."""

ROWS = (
    row(
        "clipping: arXiv:1607.00133; uses of a unit as one Gaussian mechanism: arXiv:1905.02383",
        *_FLAT, "test_epsilon_of_so_many_uses", "test_two_clients_of_one_data_set_spend_one_budget",
        contract="participation", clipping="flat",
    ),
    row(
        "clipping: arXiv:1607.00133; steps as one Gaussian mechanism: arXiv:1905.02383",
        *_FLAT, "test_the_last_step_of_a_worst_case_budget_is_the_last",
        contract="worst_case", clipping="flat",
    ),
    row(
        "clipping: arXiv:1607.00133; sampled steps: arXiv:1908.10530, arXiv:2106.02848",
        *_FLAT, "test_each_unit_is_drawn_with_the_rate_and_on_its_own", "test_published_values",
        "test_a_step_of_other_rows_than_the_draw_is_refused_and_not_charged",
        contract="poisson", clipping="flat",
    ),
    row(
        "as poisson, if the owner's assertion is true",
        *_FLAT, "test_published_values",
        "test_an_implausible_run_is_counted_by_participation_from_its_first_step",
        contract="client_poisson", clipping="flat",
    ),
    row(
        "C g / (norm of g + 0.01) is shorter than C (arXiv:2206.07136); the rest as flat",
        "test_no_unit_reaches_the_bound",
        "test_nulling_one_row_moves_the_sum_by_less_than_the_bound",
        "test_no_unit_moves_the_sum_by_more_than_the_bound_nor_the_others",
        "test_the_noise_has_std_sigma_times_bound_on_the_sum",
        clipping="normalise", optimizer="any",
    ),
    row(
        refused="normalized gradients do not become shorter near a minimum, so plain SGD does not"
        " settle: use Adam or momentum, or ask for it with DPConfig(allow_plain_sgd=True)",
        clipping="normalise", optimizer="plain_sgd",
    ),
)  # fmt: skip


def verdict(combination: Combination) -> Row:
    """Returns the most specific row that covers a combination.

    A combination that no row covers is refused.
    """
    covering = [one for one in ROWS if one.covers(combination)]
    if covering:
        return min(covering, key=lambda one: one.size)
    unknown = [
        f"{name}={value}" for name, value in combination.items() if value not in VALUES[name]
    ]
    reason = f"{', '.join(unknown) or 'this combination'} has no row in the table of combinations"
    return Row({}, refused=f"{reason}: see `tg-tinker privacy combinations` for those it has")


def combination_of(config: TrainingConfig) -> dict[str, str]:
    """Returns the combination of a private run."""
    dp = config.dp_config or DPConfig()
    lora = config.lora_config
    return {
        "contract": dp.sampling,
        "noise": "gaussian",
        "clipping": dp.clipping,
        # A run that states no unit takes that of its dataset; rows do not differ between units.
        "unit": dp.unit or "example",
        "trainable": "full" if lora is None else "freeze_a" if lora.freeze_a else "lora",
        "optimizer": "plain_sgd" if _plain_sgd(config, dp) else "any",
        "loss": "cross_entropy",
        "workers": "1",
        "quantization": "none",
    }


def _plain_sgd(config: TrainingConfig, dp: DPConfig) -> bool:
    """Whether the run has SGD without momentum, and has not asked for it."""
    plain = config.optimizer.name == "sgd" and not config.optimizer.momentum
    return plain and not dp.allow_plain_sgd


def refuse_unproven(config: TrainingConfig) -> None:
    """Checks that the combination of a private run is allowed.

    Raises:
        InvalidRequestError: the table refuses the combination, or does not have it.
    """
    combination = combination_of(config)
    if reason := verdict(combination).refused:
        told = ", ".join(f"{name}={value}" for name, value in combination.items())
        raise InvalidRequestError(
            f"a private run cannot have this combination: {reason} (the run has {told})",
            details=dict(combination),
        )


# --- for readers ---------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """Returns the table for JSON: one object per row."""
    return [
        {
            **{name: list(values) for name, values in one.values.items()},
            "allowed": not one.refused,
            "proven": one.proven,
            "tests": list(one.tests),
            "refused": one.refused,
        }
        for one in ROWS
    ]


def markdown() -> str:
    """Returns the table in Markdown. A dimension with one value is named once, above the table."""
    varied = [name for name, values in VALUES.items() if len(values) > 1]
    fixed = [f"{name} `{values[0]}`" for name, values in VALUES.items() if len(values) == 1]
    head = [*(name.capitalize() for name in varied), "Verdict"]
    lines = [f"Every row has {', '.join(fixed)}.", "", _line(head), _line(["---"] * len(head))]
    lines += [_line([*(_cell(one, name) for name in varied), _told(one)]) for one in ROWS]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(one: Row, name: str) -> str:
    values = one.values[name]
    return "any" if values == VALUES[name] else ", ".join(f"`{value}`" for value in values)


def _told(one: Row) -> str:
    if one.refused:
        return f"**refused**: {one.refused}"
    tested = f". Tests: {', '.join(f'`{test}`' for test in one.tests)}" if one.tests else ""
    return f"proven: {one.proven}{tested}"
