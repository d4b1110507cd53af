"""Tests the table of combinations: one verdict for each, tests that exist, and refusals in time."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import get_args

import pytest

from actors.privacy import combinations
from actors.privacy.combinations import (
    ROWS,
    VALUES,
    combination_of,
    markdown,
    row,
    verdict,
)
from support.privacy_helpers import planned_budget, private_config, registry
from tg_tinker import DPConfig, InvalidRequestError, LoRAConfig, OptimizerConfig

TESTS = Path(__file__).parents[1]
EVERY = [
    dict(zip(VALUES, chosen, strict=True)) for chosen in itertools.product(*VALUES.values())
]  # fmt: skip


def test_every_combination_has_exactly_one_verdict() -> None:
    for combination in EVERY:
        covering = [one for one in ROWS if one.covers(combination)]
        assert covering, combination
        sizes = [one.size for one in covering]
        assert sizes.count(min(sizes)) == 1, combination
        assert verdict(combination) is covering[sizes.index(min(sizes))]


def test_a_row_is_either_proven_or_refused() -> None:
    for one in ROWS:
        assert bool(one.proven) != bool(one.refused)
        assert not (one.refused and one.tests)
        for name, values in one.values.items():
            assert set(values) <= set(VALUES[name]), name


def test_the_tests_that_rows_name_exist() -> None:
    defined = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert {name for one in ROWS for name in one.tests} <= defined


def test_the_table_has_every_value_that_a_configuration_can_have() -> None:
    fields = DPConfig.model_fields
    for dimension, field in (("contract", "sampling"), ("clipping", "clipping")):
        assert set(get_args(fields[field].annotation)) == set(VALUES[dimension])
    units = {name for one in get_args(fields["unit"].annotation) for name in get_args(one)}
    assert units == set(VALUES["unit"])
    for lora, name in itertools.product(
        (None, LoRAConfig()), get_args(OptimizerConfig.model_fields["name"].annotation)
    ):
        config = private_config(Path("m"), lora_config=lora, optimizer=OptimizerConfig(name=name))
        assert not verdict(combination_of(config)).refused


def test_the_most_specific_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = row(refused="not on Tuesdays", contract="poisson", clipping="flat", unit="id")
    monkeypatch.setattr(combinations, "ROWS", (*ROWS, narrow))
    here = {**EVERY[0], "contract": "poisson", "clipping": "flat", "unit": "id"}
    assert verdict(here) is narrow
    assert not verdict(here | {"unit": "example"}).refused


@pytest.mark.parametrize("name", VALUES)
def test_no_row_of_today_covers_a_value_of_tomorrow(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is added to `VALUES` alone stays refused, also beside proven values."""
    new = {**EVERY[0], name: "new"}
    assert f"{name}=new has no row" in verdict(new).refused
    monkeypatch.setattr(combinations, "VALUES", VALUES | {name: (*VALUES[name], "new")})
    assert "has no row" in verdict(new).refused
    assert "new" not in row("proven").values[name]


def test_a_refused_run_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"contract": "participation", "clipping": "flat", "trainable": "full"}
    refusal = row(refused="this is not proven: use LoRA", **here)
    monkeypatch.setattr(combinations, "ROWS", (*ROWS, refusal))
    known = registry()
    with pytest.raises(InvalidRequestError, match="this is not proven: use LoRA") as refused:
        planned_budget(known, private_config(Path("m"), lora_config=None))
    assert refused.value.details["trainable"] == "full"
    assert known.ledgers.datasets("default") == []


def test_plain_sgd_with_normalized_gradients_is_refused() -> None:
    here = {**EVERY[0], "clipping": "normalise", "optimizer": "plain_sgd"}
    assert "plain SGD does not settle" in verdict(here).refused
    assert not verdict(here | {"optimizer": "any"}).refused


def test_every_line_of_the_table_has_a_cell_for_each_column() -> None:
    """A bar within a cell would move all cells behind it into other columns."""
    _, _, head, *lines = markdown().splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert {line.count("|") for line in lines} == {head.count("|")}


def test_the_page_has_the_table_of_the_code() -> None:
    page = (TESTS.parent / "docs" / "privacy.md").read_text()
    section = page.partition("## What may be combined\n")[2].partition("\n## ")[0]
    assert section.endswith(f"\n\n{markdown()}")
