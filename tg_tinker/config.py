"""What a training run is made of: frozen pydantic models that refuse unknown keys.

    from tg_tinker import LoRAConfig, OptimizerConfig, TrainingConfig
    TrainingConfig(
        model_ref="meta-llama/Llama-3-8B",
        lora_config=LoRAConfig(rank=16),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine"),
        max_steps=500,
    )

A wrong value raises `InvalidRequestError` on the spot, naming the field and its range.
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

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
ResourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,62}$")]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]


class _Config(BaseModel):
    """Base of all configs: frozen, strict about keys, silent about inputs in errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidRequestError(_explain(type(self), error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise InvalidRequestError(f"{type(self).__name__} is frozen: make a new one to set {name}")


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """One line per wrong field; unknown keys come with the list of known ones."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            lines.append(f"unknown key {where!r}; known keys: {known}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # Numbers only: any other input could be text that must not reach an error.
            got = f", got {item['input']}" if isinstance(item["input"], int | float) else ""
            lines.append(f"{where}: {message}{got}" if where else message)
    return f"{model.__name__}: " + "; ".join(lines)


class LoRAConfig(_Config):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through PEFT.

    Attributes:
        rank: r, the inner dimension, >= 1 and at most the smaller side of each target layer.
        alpha: scale, in (0, 1e6]; the adapter's output is multiplied by alpha / rank.
        dropout: probability in [0, 1) on the adapter's input while training.
        target_modules: names of the linear layers to adapt, or ``"all-linear"``.
        bias: which biases train too: none, all, or those of adapted layers.
    """

    rank: int = Field(16, ge=1)
    alpha: Annotated[Positive, Field(le=1e6)] = 32.0
    dropout: Fraction = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "q_proj", "k_proj", "v_proj", "o_proj",
    )  # fmt: skip
    bias: Literal["none", "all", "lora_only"] = "none"


class OptimizerConfig(_Config):
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: adamw (decoupled decay, arXiv:1711.05101), adam, sgd, adafactor (arXiv:1804.04235).
        learning_rate: peak rate, > 0.
        betas: decay of the moment estimates (adam, adamw).
        eps: added to the denominator (adam, adamw).
        weight_decay: >= 0.
        momentum: in [0, 1), sgd only.
        schedule: after the warm-up the rate stays, or falls to 0 at `max_steps` on a line or
            half a cosine.
        warmup_steps: steps over which the rate rises linearly to its peak.
        max_grad_norm: global L2 bound on the mean gradient of a non-private step; None is off.
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


class DPConfig(_Config):
    """Differential privacy of a run; `docs/privacy.md` explains the contracts.

    Whichever of the noise, the uses of a unit and the steps (`TrainingConfig.max_steps`) is left
    out is calculated from the others and the budget.

    Attributes:
        enabled: False trains as if no DPConfig were given.
        noise_multiplier: sigma, noise std in units of `max_grad_norm`; None calibrates it.
        max_grad_norm: C, the L2 bound of one unit's gradient; 1e-6 to 1e6, where float32 holds
            the squares of what is clipped.
        target_epsilon: the budget; None means no limit.
        target_delta: delta, also accepted as ``delta``.
        accountant_type: prv, rdp (``moments`` is rdp) or pld.
        sampling: the contract on how batches are drawn.
        dataset_size: N, under Poisson sampling.
        sample_rate: q; must equal expected batch / N when given.
        max_participations: how often one unit may be used.
        unit: what is protected: one example, or all rows of one example id.
        show_private_metrics: False reports NaN for loss and norms.
        allow_nonprivate_init: accept a start from weights without a guarantee.
    """

    enabled: bool = True
    noise_multiplier: Positive | None = None
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    target_epsilon: Positive | None = 8.0
    target_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, validation_alias=AliasChoices("target_delta", "delta")
    )
    accountant_type: Literal["prv", "rdp", "pld", "moments"] = "prv"
    sampling: Literal["participation", "poisson", "client_poisson", "worst_case"] = "participation"
    dataset_size: int | None = Field(None, ge=1)
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    max_participations: int | None = Field(None, ge=1)
    unit: Literal["example", "id"] = "example"
    show_private_metrics: bool = True
    allow_nonprivate_init: bool = False


class ResourceConfig(_Config):
    """What the actor of a client occupies.

    Attributes:
        num_cpus: CPUs reserved in Ray; None reserves none on a laptop and 1 on a cluster.
        num_gpus: GPUs reserved, a fraction of one or whole ones; None takes one where the cluster
            has one.
        custom_resources: amounts of Ray resources of your own, such as ``{"team-a": 0.01}``.
        node_labels: labels that the node must have, all of them. With either, the run and its
            sampler are only placed where they fit.
        num_threads: torch threads; None uses all cores of a laptop, else the reservation.
        activation_checkpointing: keep few activations and compute them again in the backward
            pass: less memory, about a third more time.
        park_after_minutes: without a call for so long, the run is parked: saved, and its memory,
            CPUs and GPUs freed until the next call. None is never.
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
            raise ValueError(f"num_gpus {self.num_gpus:g} must be a fraction of one, or whole GPUs")
        for name in self.custom_resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
            raise ValueError(f"custom_resources: {name} is Ray's own; see num_cpus and num_gpus")
        return self


class CheckpointConfig(_Config):
    """Artifacts that a run saves by itself, beside training. A lost run comes back from them.

    Attributes:
        every_steps: optimizer steps from one to the next; None is never.
        every_minutes: the same in minutes; saved after the first step from then on.
        keep: how many of them stay, at least 1; older ones are deleted. What `save_state` saved
            stays in any case.
    """

    every_steps: int | None = Field(None, ge=1)
    every_minutes: Positive | None = None
    keep: int = Field(2, ge=1)


class TrainingConfig(_Config):
    """One training run.

    Attributes:
        model_ref: a hub id, a local Hugging Face directory, or a GGUF file (dequantised).
        lora_config: adapters to train; None trains all weights.
        optimizer: see `OptimizerConfig`.
        dp_config: see `DPConfig`; None is a run without privacy.
        batch_size: expected rows per `forward_backward`.
        gradient_accumulation_steps: expected `forward_backward` calls per step.
        max_steps: steps after which the run is `completed`; linear and cosine need it.
        dataset_id: names the privacy ledger of a private run; ``default`` when left out. Letters,
            digits, dots, dashes and underscores.
        seed: of the adapter's first weights and, without differential privacy, of dropout.
        dtype: of the frozen weights; auto is float32 on CPU and bfloat16 on CUDA.
        resources: see `ResourceConfig`.
        checkpoints: see `CheckpointConfig`.
        metadata: your own notes, kept with the run. Not encrypted: do not put data here.
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
            raise ValueError(f"schedule {self.optimizer.schedule!r} needs max_steps to end at")
        if self.max_steps is not None and self.optimizer.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.optimizer.warmup_steps} exceed max_steps {self.max_steps}"
            )
        return self

    @model_validator(mode="after")
    def _private_clipping_is_per_unit(self) -> Self:
        if self.private and self.optimizer.max_grad_norm is not None:
            raise ValueError(
                "optimizer.max_grad_norm is for non-private runs; a private run clips each unit"
                " to dp_config.max_grad_norm"
            )
        return self
