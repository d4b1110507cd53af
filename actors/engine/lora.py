"""Selects the trainable parameters of a base model: a LoRA adapter, or all weights.

Within the packages, only this module imports PEFT. Training is in `session`; serving several
adapters side by side is in `actors.sampling`.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
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

_LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)


@dataclass(frozen=True, repr=False)
class Trainable:
    """The tensors of a model that a run trains and saves, by stored name (PEFT's of an adapter).

    Attributes:
        moved: the tensors that the optimizer moves.
        fixed: the tensors of the adapter that stay as the seed drew them: A, under `freeze_a`.
        adapter_config: PEFT's configuration; None if all weights are trained.
    """

    moved: Parameters
    fixed: Parameters
    adapter_config: dict[str, Any] | None

    @property
    def saved(self) -> Parameters:
        """All tensors without which the trained model cannot be rebuilt from its base."""
        return self.moved | self.fixed


def make_trainable(base: Base, lora: LoRAConfig | None) -> Trainable:
    """Returns what to train. LoRA layers are injected into `base.model`; its own weights stay
    frozen.

    Raises:
        InvalidRequestError: if the model lacks a target module, if PEFT would not put a plain
            adapter there, or if the rank exceeds the smaller side of every adapted layer.
    """
    if lora is None:
        base.model.requires_grad_(True)
        use_fast_layers(base.model)
        return Trainable(dict(base.model.named_parameters()), {}, None)
    _check_lora(base.model, lora)
    adapted = _adapted(base.model, lora)
    use_fast_layers(base.model)  # includes the layers of the adapter
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    if lora.bias == "none":
        _refuse_others(named)
    fixed = {n: p for n, p in named.items() if lora.freeze_a and n.endswith(".lora_A.weight")}
    for parameter in fixed.values():
        parameter.requires_grad_(False)
    moved = {name: parameter for name, parameter in named.items() if name not in fixed}
    return Trainable(moved, fixed, _export_config(adapted))


def _adapted(model: Any, lora: LoRAConfig) -> PeftModel:
    """Returns the model with LoRA layers in its linear layers, and nowhere else.

    In some mixtures of experts, PEFT takes names of layers, and `all-linear`, for the experts and
    routers too, which are no layers there but parameters. Such an adapter would not fit beside
    others on one base model, so `all-linear` leaves it out, and names that ask for it are refused.
    """
    names = _last_names(model)
    targets = _all_linear(model) if lora.target_modules == "all-linear" else [*lora.target_modules]
    # Adapters of experts may need more memory than there is.
    trial = any(parameter.ndim == 3 for parameter in model.parameters())
    try:
        adapted = _injected(model, lora, targets, without_memory=trial)
        found = adapted.peft_config["default"]
        if not trial and not found.target_parameters:
            return adapted
        adapted.unload()
        if found.target_parameters:
            targets = _layers_only(model, lora, targets, found)
        return _injected(model, lora, targets)
    except ValueError as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(
            f"PEFT cannot adapt target_modules {_listed(targets)} of this model ({error}): use"
            f" other names, of {_listed(names)}",
            details={"target_modules": names},
        ) from None


def _layers_only(
    model: Any, lora: LoRAConfig, targets: str | list[str], found: LoraConfig
) -> list[str]:
    """Returns the target modules that PEFT takes for layers, of `all-linear`.

    Args:
        found: what PEFT makes of the targets.

    Raises:
        InvalidRequestError: if the targets are names, and some of them mean parameters.
    """
    if lora.target_modules == "all-linear":
        return sorted(found.target_modules)
    tried = _injected(model, lora, _all_linear(model), without_memory=True)
    usable = sorted(tried.peft_config["default"].target_modules)
    raise InvalidRequestError(
        f"target_modules {_listed({*targets} - {*found.target_modules})} mean the experts or"
        " routers of this model, which are parameters and no linear layers, so they get no adapter:"
        f" use {_listed(usable)}, or 'all-linear' for all of these",
        details={"target_modules": usable},
    )


def _injected(
    model: Any, lora: LoRAConfig, targets: str | list[str], without_memory: bool = False
) -> PeftModel:
    peft_config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0 if without_memory else lora.dropout,  # else it refuses parameters
        target_modules=targets,
        bias=lora.bias,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT uses a name of transformers that transformers has since changed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        if without_memory:  # in a trial, PEFT warns of what the trial is to find out
            warnings.filterwarnings("ignore", category=RuntimeWarning)
        return get_peft_model(model, peft_config, low_cpu_mem_usage=without_memory)


def _refuse_others(named: Parameters) -> None:
    """Raises if PEFT has put an adapter on a layer of another kind, which cannot be sampled."""
    others = [n for n in named if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        layer = others[0].partition(".lora_")[0].removeprefix("base_model.model.")
        raise InvalidRequestError(
            f"a target module also names {layer}, which is no linear layer: use longer names, such"
            " as the ends of the paths of the layers"
        )


def _export_config(adapted: PeftModel) -> dict[str, Any]:
    """Returns `adapter_config.json` as PEFT itself writes it."""
    with tempfile.TemporaryDirectory() as folder:
        adapted.peft_config["default"].save_pretrained(folder)
        loaded: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return loaded | {"base_model_name_or_path": None, "inference_mode": True}


def _check_lora(model: Any, lora: LoRAConfig) -> None:
    linear = _linear_layers(model)
    names = _last_names(model)
    wanted = names if lora.target_modules == "all-linear" else lora.target_modules
    largest = 0
    for target in wanted:
        sides = [min(layer.weight.shape) for name, layer in linear.items() if _ends(name, target)]
        if not sides:
            raise InvalidRequestError(
                f"target module {target!r} {_why_not(model, target)}: use one of {_listed(names)},"
                " or 'all-linear'",
                details={"target_modules": names},
            )
        largest = max(largest, *sides)
    if lora.rank > largest:
        raise InvalidRequestError(
            f"rank {lora.rank} exceeds the smaller side of every target layer, at most {largest}:"
            " lower the rank, since a larger one adds nothing, or train all weights"
            " (lora_config=None)",
            details={"rank": lora.rank, "bound": largest},
        )


def _linear_layers(model: Any) -> dict[str, Any]:
    """Returns the layers that may get an adapter by name: all linear layers but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR)
        and module is not model.get_output_embeddings()
        and _returns_tensor(module)
    }


def _all_linear(model: Any) -> str | list[str]:
    """Returns the target modules that mean all linear layers to PEFT: a keyword, or their paths."""
    linear = _linear_layers(model)
    head = model.get_output_embeddings()
    others = [
        m for name, m in model.named_modules() if isinstance(m, _LINEAR) and name not in linear
    ]
    return "all-linear" if all(module is head for module in others) else sorted(linear)


def _returns_tensor(layer: Any) -> bool:
    """Returns whether a linear layer is no more than that. Some routers return other things too."""
    if type(layer).forward in {kind.forward for kind in _LINEAR}:
        return True
    try:
        with torch.no_grad():
            return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), torch.Tensor)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False


def _last_names(model: Any) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in _linear_layers(model)})


def _why_not(model: Any, target: str) -> str:
    found = next((m for name, m in model.named_modules() if name and _ends(name, target)), None)
    if found is None:
        return "names no layer of this model"
    if found is model.get_output_embeddings():
        return "is the output head of this model, which gets no adapter"
    return f"is a layer of class {type(found).__name__}, not a linear layer"


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _listed(names: Iterable[str] | str) -> str:
    return repr(names) if isinstance(names, str) else ", ".join(sorted(names))
