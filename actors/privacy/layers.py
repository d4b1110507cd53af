"""Which layers a private run may have, and what it silences: the door to the rules of Opacus.

Whether per-unit gradients of the layers that train are right is probed in `unit_gradients`.
"""

from __future__ import annotations

from typing import Any

import torch

from tg_tinker.errors import InvalidRequestError


def refuse_mixing_layers(model: Any) -> None:
    """Layers that mix examples (batch norm) or keep statistics of data have no private form.

    Raises:
        InvalidRequestError: the model has such a layer; the rules are Opacus' own.
    """
    from opacus.validators import ModuleValidator

    # Every module, not `validate`, which looks at trainable ones: a frozen batch norm mixes too.
    rules = ModuleValidator.VALIDATORS
    problems = [
        problem
        for module in model.modules()
        if type(module) in rules
        for problem in rules[type(module)](module)
    ]
    if problems:
        raise InvalidRequestError(
            f"this model cannot be trained privately: {problems[0].args[0]}. Take a model without"
            " such layers",
            details={"layers": len(problems)},
        )


def silence_dropout(model: Any) -> None:
    """Switches off the base model's own dropout: its masks follow one another along a stream, so
    a row more would shift those of the rows behind it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
