"""Tests configs: what they refuse, how their errors read, and that they survive as JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tg_tinker import (
    CheckpointConfig,
    DPConfig,
    InvalidRequestError,
    LoRAConfig,
    OptimizerConfig,
    ResourceConfig,
    TrainingConfig,
)

ALL = [CheckpointConfig, DPConfig, LoRAConfig, OptimizerConfig, ResourceConfig, TrainingConfig]
SECRET = "the patient in bed 7"


def least(config: type[BaseModel]) -> dict[str, Any]:
    """Returns the arguments that have no default."""
    return {"model_ref": "m"} if config is TrainingConfig else {}


# --- defaults of the documented interface ----------------------------------------------------


def test_defaults_are_the_documented_ones() -> None:
    config = TrainingConfig(model_ref="m")
    assert (config.lora_config, config.dp_config, config.max_steps) == (None, None, None)
    assert (config.batch_size, config.gradient_accumulation_steps, config.seed) == (8, 1, 0)
    assert config.optimizer == OptimizerConfig(name="adamw", learning_rate=1e-4)
    lora = LoRAConfig()
    assert (lora.rank, lora.alpha, lora.dropout, lora.bias) == (16, 32.0, 0.0, "none")
    assert lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    dp = DPConfig()
    assert (dp.target_epsilon, dp.target_delta, dp.max_grad_norm) == (8.0, 1e-5, 1.0)
    assert (dp.accountant_type, dp.sampling, dp.unit) == ("prv", "participation", None)


@pytest.mark.parametrize("config", ALL)
def test_every_field_is_described_in_the_docstring(config: type[BaseModel]) -> None:
    described = (config.__doc__ or "").partition("Attributes:")[2]
    for name in config.model_fields:
        assert f"\n        {name}: " in described, name


# --- unknown keys ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", ALL)
def test_an_unknown_key_is_refused_with_all_known_ones(config: type[BaseModel]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        config(**least(config), lerning_rate=SECRET)
    said = str(caught.value)
    assert said.startswith(f"{config.__name__}: unknown key 'lerning_rate'; known keys: ")
    assert said.partition("known keys: ")[2].split(", ") == list(config.model_fields)


def test_an_unknown_key_of_a_nested_dict_lists_the_keys_of_that_config() -> None:
    with pytest.raises(InvalidRequestError, match="'rnak'; known keys: rank, alpha") as caught:
        TrainingConfig(model_ref="m", lora_config={"rnak": 4})
    assert "lora_config" in str(caught.value)
    assert "batch_size" not in str(caught.value)


# --- ranges ----------------------------------------------------------------------------------

OUT_OF_RANGE = [
    (CheckpointConfig, "every_steps", [0, -1, 1.5]),
    (CheckpointConfig, "every_minutes", [0, -1.0, math.nan, math.inf]),
    (CheckpointConfig, "keep", [0, -1, 1.5]),
    (ResourceConfig, "park_after_minutes", [0, -1.0, math.nan, math.inf]),
    (LoRAConfig, "rank", [0, -1, 1.5]),
    (LoRAConfig, "alpha", [0, -1.0, 1e7, math.inf, math.nan]),
    (LoRAConfig, "dropout", [-0.1, 1, math.nan]),
    (OptimizerConfig, "learning_rate", [0, -1e-4, math.nan, math.inf, -math.inf]),
    (OptimizerConfig, "eps", [0, math.nan]),
    (OptimizerConfig, "weight_decay", [-1, math.inf]),
    (OptimizerConfig, "momentum", [1, -0.5, math.nan]),
    (OptimizerConfig, "warmup_steps", [-1, 0.5]),
    (OptimizerConfig, "max_grad_norm", [0, -1, math.nan]),
    (OptimizerConfig, "ema_decay", [0, 1, -0.5, math.nan]),
    (OptimizerConfig, "tail_from", [0, -1, 1.5]),
    (DPConfig, "noise_multiplier", [0, -1, math.inf, math.nan]),
    (DPConfig, "max_grad_norm", [0, -1, math.inf, math.nan]),
    (DPConfig, "target_epsilon", [0, -8, math.inf, math.nan]),
    (DPConfig, "target_delta", [0, 1, -1e-5, math.nan]),
    (DPConfig, "sample_rate", [0, 1.01, math.nan]),
    (DPConfig, "dataset_size", [0, -5]),
    (DPConfig, "max_participations", [0, -1]),
    (ResourceConfig, "num_cpus", [-1, math.nan]),
    (ResourceConfig, "num_gpus", [-0.5, math.inf]),
    (ResourceConfig, "num_threads", [0, -1]),
    (ResourceConfig, "custom_resources", [{"a": 0}, {"a": -1.0}, {"a": math.inf}]),
    (TrainingConfig, "batch_size", [0, -8, 2.5]),
    (TrainingConfig, "gradient_accumulation_steps", [0]),
    (TrainingConfig, "max_steps", [0, -1]),
    (TrainingConfig, "seed", [-1, 2**63]),
]


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(config, field, value) for config, field, values in OUT_OF_RANGE for value in values],
)
def test_a_value_out_of_range_is_named_with_its_field(
    config: type[BaseModel], field: str, value: float | dict[str, float]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        config(**{**least(config), field: value})
    said = str(caught.value)
    shown = "delta" if field == "target_delta" else field
    assert shown in said.partition(": ")[2].partition(":")[0]
    number = value["a"] if isinstance(value, dict) else value
    assert said.endswith(f"got {number}")


AT_THE_BOUND = [
    (LoRAConfig, {"rank": 1, "alpha": 1e-9, "dropout": 0}),
    (OptimizerConfig, {"weight_decay": 0, "momentum": 0, "betas": (0, 0), "warmup_steps": 0}),
    (DPConfig, {"sample_rate": 1, "dataset_size": 1, "max_participations": 1}),
    (DPConfig, {"target_epsilon": None, "noise_multiplier": None}),
    (ResourceConfig, {"num_cpus": 0, "num_gpus": 0.25, "num_threads": 1}),
    (TrainingConfig, {"batch_size": 1, "max_steps": 1, "seed": 2**63 - 1}),
]


@pytest.mark.parametrize(("config", "values"), AT_THE_BOUND)
def test_values_at_their_bounds_are_taken(config: type[BaseModel], values: dict[str, Any]) -> None:
    made = config(**least(config), **values)
    assert {name: getattr(made, name) for name in values} == values


def test_every_numeric_field_has_its_range_checked() -> None:
    """A new number needs its bounds in the table above."""
    for config in ALL:
        checked = {field for c, field, _ in OUT_OF_RANGE if c is config}
        for name, field in config.model_fields.items():
            spelled = str(field.annotation)
            choice = "Literal" in spelled or name == "betas"
            number = re.search(r"\b(float|int)\b", spelled)
            assert choice or not number or name in checked, f"{config.__name__}.{name}"


def test_a_nan_learning_rate_names_field_and_value() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        OptimizerConfig(learning_rate=float("nan"))
    assert str(caught.value) == (
        "OptimizerConfig: learning_rate: Input should be a finite number, got nan"
    )


def test_two_wrong_fields_are_both_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"rank: .*got 0; alpha: .*got -1"):
        LoRAConfig(rank=0, alpha=-1)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_are_two_numbers_in_range(betas: Any) -> None:
    with pytest.raises(InvalidRequestError, match="betas"):
        OptimizerConfig(betas=betas)


CHOICES = [
    (LoRAConfig, "bias"), (OptimizerConfig, "name"), (OptimizerConfig, "schedule"),
    (DPConfig, "accountant_type"), (DPConfig, "sampling"), (DPConfig, "unit"),
    (TrainingConfig, "dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "field"), CHOICES)
def test_a_wrong_choice_is_answered_with_the_choices(config: type[BaseModel], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        config(**least(config), **{field: "no such thing"})
    default = config.model_fields[field].default or "example"
    assert f"{field}: " in str(caught.value)
    assert repr(default) in str(caught.value)


@pytest.mark.parametrize("targets", [[], "q_proj", [3], None])
def test_target_modules_are_names_or_all_linear(targets: Any) -> None:
    """A bare name is not a list of its letters, and a run that adapts nothing is no fine-tuning."""
    with pytest.raises(InvalidRequestError, match="target_modules"):
        LoRAConfig(target_modules=targets)
    assert LoRAConfig(target_modules="all-linear").target_modules == "all-linear"
    assert LoRAConfig(target_modules=["fc1"]).target_modules == ("fc1",)


@pytest.mark.parametrize("model_ref", ["", None, 5])
def test_a_model_ref_is_a_name(model_ref: Any) -> None:
    with pytest.raises(InvalidRequestError, match="model_ref"):
        TrainingConfig(model_ref=model_ref)


# --- rules between fields --------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_ends_needs_max_steps(schedule: Any) -> None:
    optimizer = OptimizerConfig(schedule=schedule)
    with pytest.raises(InvalidRequestError, match=f"schedule '{schedule}' needs max_steps"):
        TrainingConfig(model_ref="m", optimizer=optimizer)
    assert TrainingConfig(model_ref="m", optimizer=optimizer, max_steps=5).max_steps == 5


def test_a_warm_up_longer_than_the_run_is_refused_with_both_numbers() -> None:
    optimizer = OptimizerConfig(warmup_steps=6)
    with pytest.raises(InvalidRequestError, match="warmup_steps 6 exceed max_steps 5"):
        TrainingConfig(model_ref="m", optimizer=optimizer, max_steps=5)
    TrainingConfig(model_ref="m", optimizer=optimizer, max_steps=6)
    TrainingConfig(model_ref="m", optimizer=optimizer)


def test_a_global_norm_bound_is_refused_in_a_private_run_only() -> None:
    optimizer = OptimizerConfig(max_grad_norm=1.0)
    with pytest.raises(InvalidRequestError, match=r"dp_config\.max_grad_norm"):
        TrainingConfig(model_ref="m", optimizer=optimizer, dp_config=DPConfig())
    TrainingConfig(model_ref="m", optimizer=optimizer, dp_config=DPConfig(enabled=False))


# --- the alias delta -------------------------------------------------------------------------


def test_delta_is_another_name_of_target_delta() -> None:
    assert DPConfig(delta=1e-7) == DPConfig(target_delta=1e-7)
    assert DPConfig(delta=1e-7).target_delta == 1e-7
    with pytest.raises(InvalidRequestError, match="delta"):
        DPConfig(delta=2)


def test_two_deltas_at_once_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="delta"):
        DPConfig(delta=1e-7, target_delta=1e-5)


# --- choices that only fit private runs ------------------------------------------------------


def test_alpha_follows_the_rank_in_private_runs_unless_it_is_stated() -> None:
    def alpha(lora: LoRAConfig, dp: DPConfig | None) -> float:
        made = TrainingConfig(model_ref="m", lora_config=lora, dp_config=dp)
        read = TrainingConfig.model_validate_json(made.model_dump_json())
        assert read == made
        # What is stored states it, so another run with the same text has the same adapter.
        assert read.lora_config is not None
        assert TrainingConfig(**(dict(read) | {"dp_config": DPConfig()})).lora_config == (
            read.lora_config
        )
        return read.lora_config.alpha

    assert alpha(LoRAConfig(rank=1), DPConfig()) == 2
    assert alpha(LoRAConfig(rank=1), None) == 32
    assert alpha(LoRAConfig(rank=1), DPConfig(enabled=False)) == 32
    assert alpha(LoRAConfig(rank=1, alpha=32), DPConfig()) == 32
    assert alpha(LoRAConfig(rank=10**9), DPConfig()) == 1e6


def test_a_config_that_was_stored_with_alpha_keeps_it() -> None:
    stored = {"model_ref": "m", "lora_config": {"rank": 1, "alpha": 32.0}, "dp_config": {}}
    lora = TrainingConfig.model_validate_json(json.dumps(stored)).lora_config
    assert lora is not None
    assert (lora.alpha, lora.freeze_a) == (32, False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": OptimizerConfig(noise_correction=True)}, "for private runs"),
        (
            {
                "optimizer": OptimizerConfig(noise_correction=True),
                "dp_config": DPConfig(enabled=False),
            },
            "for private runs",
        ),
        ({"optimizer": OptimizerConfig(tail_from=9), "max_steps": 8}, "tail_from 9 exceeds"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        TrainingConfig(model_ref="m", **values)


def test_noise_correction_needs_adam() -> None:
    for name in ("sgd", "adafactor"):
        with pytest.raises(InvalidRequestError, match=f"{name} has no second moment"):
            OptimizerConfig(name=name, noise_correction=True)


# --- JSON ------------------------------------------------------------------------------------

positive = st.floats(1e-12, 1e12)
fraction = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 2**31)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)  # fmt: skip
configs = st.builds(
    TrainingConfig,
    model_ref=st.text(min_size=1),
    lora_config=st.none() | st.builds(
        LoRAConfig, rank=counts, alpha=st.floats(1e-12, 1e6), dropout=fraction,
        target_modules=st.just("all-linear") | st.lists(st.text(), min_size=1, max_size=3),
    ),
    optimizer=st.builds(
        OptimizerConfig, name=st.sampled_from(["adamw", "adam", "sgd", "adafactor"]),
        learning_rate=positive, betas=st.tuples(fraction, fraction), eps=positive,
    ),
    dp_config=st.none() | st.builds(
        DPConfig, target_epsilon=st.none() | positive, delta=st.floats(1e-12, 0.5),
        dataset_size=st.none() | counts,
    ),
    max_steps=st.none() | counts,
    seed=st.integers(0, 2**63 - 1),
    resources=st.builds(ResourceConfig, num_cpus=st.none() | st.floats(0, 64)),
    metadata=st.dictionaries(st.text(max_size=3), json_values, max_size=3),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(configs)
def test_a_config_survives_as_json(config: TrainingConfig) -> None:
    text = config.model_dump_json()
    assert TrainingConfig.model_validate_json(text) == config
    assert TrainingConfig(**json.loads(text)) == config


def test_metadata_that_json_cannot_hold_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match=r"metadata\.note") as caught:
        TrainingConfig(model_ref="m", metadata={"note": SECRET.encode()})
    assert SECRET not in str(caught.value)


# --- nothing changes, nothing shows ----------------------------------------------------------


@pytest.mark.parametrize("config", ALL)
def test_a_config_is_frozen(config: type[BaseModel]) -> None:
    made = config(**least(config))
    for name in config.model_fields:
        before = getattr(made, name)
        with pytest.raises(InvalidRequestError, match="frozen") as caught:
            setattr(made, name, SECRET)
        assert SECRET not in str(caught.value)
        assert getattr(made, name) == before


@pytest.mark.parametrize("config", ALL)
def test_no_error_shows_a_text_that_was_passed(config: type[BaseModel]) -> None:
    """Any text in any field except the free ones is refused or accepted, and never repeated."""
    for name in set(config.model_fields) - {"model_ref", "dataset_id"}:
        for wrong in (SECRET, [SECRET], {"key": SECRET}, SECRET.encode()):
            if name == "target_modules" and wrong == [SECRET]:
                continue
            if name == "metadata" and wrong == {"key": SECRET}:
                continue
            with pytest.raises(InvalidRequestError) as caught:
                config(**least(config), **{name: wrong})
            assert SECRET not in str(caught.value), name
            assert caught.value.__suppress_context__


def test_validation_from_json_hides_inputs_as_well() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingConfig.model_validate_json(json.dumps({"model_ref": "m", "batch_size": SECRET}))
    assert SECRET not in str(caught.value)
