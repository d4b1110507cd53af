"""Defines the configuration of a training run: frozen models that reject unknown keys.

    from tg_tinker import LoRAConfig, OptimizerConfig, TrainingConfig
    TrainingConfig(
        model_ref="meta-llama/Llama-3-8B",
        lora_config=LoRAConfig(rank=16),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine"),
        max_steps=500,
    )

A wrong value raises `InvalidRequestError` at once. The message names the field and its range.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from tg_tinker.errors import InvalidRequestError
from tg_tinker.texts import check_texts

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
ResourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,62}$")]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
AverageKind = Literal["ema", "tail"]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]


class _Config(BaseModel):
    """The base of all configurations: frozen and strict about keys; errors hide text inputs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidRequestError(_explain(type(self), error)) from None

    @model_validator(mode="after")
    def _texts_can_be_stored(self) -> Self:
        for name in type(self).model_fields:
            check_texts(getattr(self, name), name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise InvalidRequestError(
            f"{type(self).__name__} is frozen: create a new object to set {name}"
        )


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """Describes every wrong field in one message, and lists the known keys for an unknown key."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            lines.append(f"unknown key {where!r}; known keys: {known}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # Only numbers are repeated: any other input could be text that must not reach an error.
            got = f", got {item['input']}" if isinstance(item["input"], int | float) else ""
            lines.append(f"{where}: {message}{got}" if where else message)
    return f"{model.__name__}: " + "; ".join(lines)


class LoRAConfig(_Config):
    """The settings of low-rank adapters (Hu et al. 2021, arXiv:2106.09685), applied by PEFT.

    Attributes:
        rank: the inner dimension r, >= 1 and at most the smaller side of each target layer.
        alpha: the scale, in (0, 1e6]; the adapter's output is multiplied by alpha / rank. A private
            run that states none has 2 x rank, so that a low rank does not scale its noise up.
        dropout: the dropout probability on the adapter's input in train mode, in [0, 1).
        target_modules: the names of the linear layers to adapt, or ``"all-linear"``.
        bias: the biases that are trained too: none, all, or only those of the adapted layers.
        freeze_a: True trains B alone; A stays as the seed draws it (FFA-LoRA, Sun et al. 2024,
            arXiv:2403.12313). Half as many values get noise, and no product of two noises arises.
            The learning rate that fits is several times higher.
    """

    rank: int = Field(16, ge=1)
    alpha: Annotated[Positive, Field(le=1e6)] = 32.0
    dropout: Fraction = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "q_proj", "k_proj", "v_proj", "o_proj",
    )  # fmt: skip
    bias: Literal["none", "all", "lora_only"] = "none"
    freeze_a: bool = False


class OptimizerConfig(_Config):
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: adamw (decoupled decay, arXiv:1711.05101), adam, sgd, adafactor (arXiv:1804.04235).
        learning_rate: the peak rate, > 0.
        betas: the decay rates of the two moment estimates, each in [0, 1) (adam, adamw).
        eps: the value added to the denominator, > 0 (adam, adamw).
        weight_decay: the weight decay, >= 0.
        momentum: the momentum, in [0, 1) (sgd).
        schedule: the rate after the warm-up: constant, or falling to 0 at `max_steps`, either
            linearly or along half a cosine.
        warmup_steps: the number of steps over which the rate rises linearly to its peak.
        max_grad_norm: the global L2 bound on the mean gradient of a step, for non-private runs
            only; None means no bound.
        noise_correction: True subtracts the known variance of the privacy noise from the second
            moment (DP-AdamBC, Tang et al. 2023, arXiv:2312.14334), for private runs only (adam,
            adamw). `actors.engine.corrected_adam` states the floor.
        ema_decay: the decay, in (0, 1), of an exponential average of the weights over all steps;
            None keeps none. `save_state(average="ema")` saves it.
        tail_from: the first step, >= 1, whose weights enter an equally weighted average; None
            keeps none. `save_state(average="tail")` saves it.
    """

    name: Literal["adamw", "adam", "sgd", "adafactor"] = "adamw"
    learning_rate: Positive = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    momentum: Fraction = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: Positive | None = None
    noise_correction: bool = False
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    tail_from: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _noise_correction_needs_a_second_moment(self) -> Self:
        if self.noise_correction and self.name not in ("adam", "adamw"):
            raise ValueError(
                f"noise_correction is for adam and adamw, and {self.name} has no second moment to"
                " correct: leave it out, or use adamw"
            )
        return self


class DPConfig(_Config):
    """The differential privacy of a run; `docs/privacy.md` explains the contracts.

    The noise, the uses of a unit and the number of steps (`TrainingConfig.max_steps`) depend on
    each other and on the budget. A missing value is calculated from the other values.

    Attributes:
        enabled: False trains as if no DPConfig were given.
        noise_multiplier: sigma, the standard deviation of the noise in units of `max_grad_norm`,
            > 0; None calibrates it.
        max_grad_norm: C, the L2 bound of one unit's gradient, in [1e-6, 1e6]: float32 can represent
            the squares of gradients in this range.
        clipping: how a unit's gradient g is bounded: ``flat`` is g x min(1, C / |g|), and
            ``normalise`` is g x C / (|g| + 0.01) (Bu et al. 2022, arXiv:2206.07136), which needs no
            tuned C. Each keeps a unit within C, under zero-out and under add/remove adjacency;
            replacing a unit by another could move a step by 2 C.
        allow_plain_sgd: True accepts ``normalise`` with SGD without momentum, whose steps then no
            longer shrink with the gradient.
        target_epsilon: the budget, > 0; None takes the limit with which the dataset is registered,
            or no limit if this run registers the dataset.
        target_delta: delta, in (0, 1); also accepted as ``delta``.
        accountant_type: the accountant of Poisson samples: prv (``pld`` means prv) or rdp
            (``moments`` means rdp).
        sampling: the contract on how batches are drawn.
        dataset_size: N, the number of units in the dataset; required for Poisson sampling.
        sample_rate: q; if given, it must equal the expected batch / N.
        max_participations: the number of times that one unit may be used, under ``participation``.
        unit: the unit that is protected: ``example`` (one example) or ``id`` (all rows of one
            example id). None takes the unit of the registered dataset, else ``example``; rows with
            ids are then refused unless the dataset states its unit.
        show_private_metrics: False reports NaN for the loss and the norms, no gradient hash, a
            `num_clipped` of 0, and no warnings about rows; under Poisson sampling also no number
            of tokens and no time, which tell what was drawn.
        allow_nonprivate_init: True accepts initial weights without a guarantee; the run and its
            descendants then have no guarantee either.
    """

    enabled: bool = True
    noise_multiplier: Positive | None = None
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    clipping: Literal["flat", "normalise"] = "flat"
    allow_plain_sgd: bool = False
    target_epsilon: Positive | None = 8.0
    target_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, validation_alias=AliasChoices("target_delta", "delta")
    )
    accountant_type: Literal["prv", "rdp", "pld", "moments"] = "prv"
    sampling: Literal["participation", "poisson", "client_poisson", "worst_case"] = "participation"
    dataset_size: int | None = Field(None, ge=1)
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    max_participations: int | None = Field(None, ge=1)
    unit: Literal["example", "id"] | None = None
    show_private_metrics: bool = True
    allow_nonprivate_init: bool = False


class ResourceConfig(_Config):
    """The resources that the actor of a client occupies.

    Attributes:
        num_cpus: the number of CPUs to reserve in Ray; None reserves 0 in an embedded cluster and
            1 in any other cluster.
        num_gpus: the number of GPUs to reserve: a fraction of one GPU, or whole GPUs. None reserves
            one GPU if an allowed node has a GPU, else none.
        custom_resources: the amounts of your own Ray resources, such as ``{"team-a": 0.01}``.
        node_labels: the labels that the node must have, all of them. The run and its sampler are
            placed only on nodes that have these labels and custom resources.
        num_threads: the number of torch threads. None uses all cores in an embedded cluster, as far
            as a container's CPU quota allows, else as many threads as reserved CPUs, at least 1.
        activation_checkpointing: True keeps few activations and computes them again in the
            backward pass. This needs less memory and about a third more time.
        park_after_minutes: the minutes without a call after which the run is parked: the run is
            saved, and its memory, CPUs and GPUs are free until the next call. None means never.
    """

    num_cpus: NonNegative | None = None
    num_gpus: NonNegative | None = None
    custom_resources: dict[ResourceName, Positive] = Field(default_factory=dict)
    node_labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    num_threads: int | None = Field(None, ge=1)
    activation_checkpointing: bool = False
    park_after_minutes: Positive | None = None

    @model_validator(mode="after")
    def _what_ray_can_reserve(self) -> Self:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(
                f"num_gpus {self.num_gpus:g} must be a fraction of one GPU, or whole GPUs"
            )
        for name in self.custom_resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
            raise ValueError(
                f"custom_resources: {name} is Ray's own name; use num_cpus and num_gpus"
            )
        return self


class CheckpointConfig(_Config):
    """The artifacts that a run saves automatically during training. They restore a lost run.

    Attributes:
        every_steps: the number of optimizer steps between two automatic artifacts, >= 1; None
            means never.
        every_minutes: the minutes between two automatic artifacts, > 0; the run saves after the
            first step that ends later. None means never.
        keep: the number of automatic artifacts to keep, >= 1; older ones are deleted. Artifacts of
            `save_state` are always kept.
    """

    every_steps: int | None = Field(None, ge=1)
    every_minutes: Positive | None = None
    keep: int = Field(2, ge=1)


class TrainingConfig(_Config):
    """The configuration of one training run.

    Attributes:
        model_ref: a hub id, a local Hugging Face directory, or a GGUF file, which is dequantized.
        lora_config: the adapters to train; None trains all weights.
        optimizer: the optimizer, see `OptimizerConfig`.
        dp_config: the differential privacy, see `DPConfig`; None means a run without privacy.
        batch_size: the expected number of rows in one `forward_backward` call.
        gradient_accumulation_steps: the expected number of `forward_backward` calls per step.
        max_steps: the number of steps after which the run is `completed`; required by the linear
            and cosine schedules.
        dataset_id: the name of the privacy ledger of a private run, ``default`` if omitted: 1 to
            128 letters, digits, dots, dashes and underscores.
        seed: the seed of the adapter's initial weights and, in a non-private run, of dropout.
        dtype: the dtype of the frozen weights; auto means float32 on CPU and bfloat16 on CUDA.
        resources: the resources of the actor, see `ResourceConfig`.
        checkpoints: the automatic artifacts, see `CheckpointConfig`.
        metadata: your own notes, stored with the run. They are not encrypted: put no data here.
    """

    model_ref: str = Field(min_length=1)
    lora_config: LoRAConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    dp_config: DPConfig | None = None
    batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    dataset_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    resources: ResourceConfig = ResourceConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def private(self) -> bool:
        """Whether the run trains under differential privacy."""
        return self.dp_config is not None and self.dp_config.enabled

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> Self:
        if self.optimizer.schedule != "constant" and self.max_steps is None:
            raise ValueError(
                f"schedule {self.optimizer.schedule!r} needs max_steps: set the step where it ends"
            )
        if self.max_steps is not None and self.optimizer.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.optimizer.warmup_steps} exceed max_steps"
                f" {self.max_steps}: use fewer warm-up steps"
            )
        tail = self.optimizer.tail_from
        if self.max_steps is not None and tail is not None and tail > self.max_steps:
            raise ValueError(
                f"tail_from {tail} exceeds max_steps {self.max_steps}, so the average would hold no"
                " weights: begin it at an earlier step"
            )
        return self

    @model_validator(mode="after")
    def _private_clipping_is_per_unit(self) -> Self:
        if self.private and self.optimizer.max_grad_norm is not None:
            raise ValueError(
                "optimizer.max_grad_norm is for non-private runs: leave it out; a private run clips"
                " each unit to dp_config.max_grad_norm"
            )
        return self

    @model_validator(mode="after")
    def _noise_correction_needs_noise(self) -> Self:
        if self.optimizer.noise_correction and not self.private:
            raise ValueError(
                "optimizer.noise_correction is for private runs: leave it out, since this run has"
                " no noise to correct for"
            )
        return self

    @model_validator(mode="after")
    def _private_alpha_follows_the_rank(self) -> Self:
        lora = self.lora_config
        if lora is not None and self.private and "alpha" not in lora.model_fields_set:
            # Stored with its value, so that a config keeps it whatever the default becomes.
            scaled = LoRAConfig(**(dict(lora) | {"alpha": min(2.0 * lora.rank, 1e6)}))
            # A validator may not return another object, and the class is frozen.
            object.__setattr__(self, "lora_config", scaled)
        return self
