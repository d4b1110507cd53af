"""Refuses layers that cannot train privately, by the rules of Opacus; sets the mode of others.

`gradient_probes` tests whether forward passes repeat and per-unit gradients are correct.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def adapter_dropout(model: Any) -> Iterator[None]:
    """Puts the dropout of an adapter, and nothing else of the model, in train mode.

    In train mode, the base model may draw random numbers in ways that no list of layers knows:
    dropout by functions, jitter, layers left out. Its masks follow one another along a stream, so
    an additional row would shift the masks of the rows behind it.
    """
    model.eval()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "lora_dropout":
            module.train()
    try:
        yield
    finally:
        model.eval()
