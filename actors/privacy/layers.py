"""Refuses layers that cannot train privately, by the rules of Opacus, and switches dropout off.

`unit_gradients` probes whether the per-unit gradients of the trainable layers are correct.
"""

from __future__ import annotations

from typing import Any

import torch

from tg_tinker.errors import InvalidRequestError


def refuse_mixing_layers(model: Any) -> None:
    """Refuses a model whose layers mix examples (batch norm) or keep statistics of the data.

    These layers have no private form. The rules are those of Opacus.

    Raises:
        InvalidRequestError: the model has a layer of this kind.
    """
    from opacus.validators import ModuleValidator

    # `validate` checks trainable modules only, and a frozen batch norm mixes examples too.
    rules = ModuleValidator.VALIDATORS
    problems = [
        problem
        for module in model.modules()
        if type(module) in rules
        for problem in rules[type(module)](module)
    ]
    if problems:
        raise InvalidRequestError(
            f"this model cannot be trained privately: {problems[0].args[0]}. Use a model without"
            " layers of this kind",
            details={"layers": len(problems)},
        )


def silence_dropout(model: Any) -> None:
    """Switches off the dropout of the base model, and other noise of its training mode.

    That is each `nn.Dropout`, and each setting of a layer or of its config whose name says dropout
    or jitter.

    The masks of this dropout follow one another along a stream, so an additional row would shift
    the masks of the rows behind it.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(holder, name, 0.0)
