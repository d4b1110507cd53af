"""What is trained of a base model: a LoRA adapter, or all weights. The door to PEFT.

How it is trained, and how many adapters are served side by side, is known elsewhere.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from actors.engine.matmul import use_fast_layers
from actors.engine.model import Base
from tg_tinker.config import LoRAConfig
from tg_tinker.errors import InvalidRequestError

Parameters = dict[str, torch.nn.Parameter]


def make_trainable(base: Base, lora: LoRAConfig | None) -> tuple[Parameters, dict[str, Any] | None]:
    """Parameters to train by their stored names, and the PEFT config (None for all weights).

    LoRA layers are injected into `base.model`; its own weights stay frozen.

    Raises:
        InvalidRequestError: target modules this model does not have, or a rank above a layer.
    """
    if lora is None:
        base.model.requires_grad_(True)
        use_fast_layers(base.model)
        return dict(base.model.named_parameters()), None
    _check_lora(base.model, lora)
    targets = lora.target_modules if lora.target_modules == "all-linear" else [*lora.target_modules]
    peft_config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias=lora.bias,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers has since changed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(base.model, peft_config)
    use_fast_layers(base.model)  # and those of the adapter
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    return named, _export_config(adapted)


def _export_config(adapted: PeftModel) -> dict[str, Any]:
    """`adapter_config.json` as PEFT itself writes it."""
    with tempfile.TemporaryDirectory() as folder:
        adapted.peft_config["default"].save_pretrained(folder)
        loaded: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return loaded | {"base_model_name_or_path": None, "inference_mode": True}


def _check_lora(model: Any, lora: LoRAConfig) -> None:
    linear = {
        name: min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        and module is not model.get_output_embeddings()
    }
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = last_names if lora.target_modules == "all-linear" else lora.target_modules
    for target in wanted:
        sides = [side for name, side in linear.items() if f".{name}".endswith(f".{target}")]
        if not sides:
            raise InvalidRequestError(
                f"target module {target!r} is not a linear layer of this model; it has:"
                f" {', '.join(last_names)} (or use 'all-linear')",
                details={"target_modules": last_names},
            )
        if lora.rank > min(sides):
            raise InvalidRequestError(
                f"rank {lora.rank} exceeds the smaller side {min(sides)} of {target!r}: a larger"
                " rank adds nothing, lower it or train all weights (lora_config=None)",
                details={"rank": lora.rank, "bound": min(sides)},
            )
