"""Keeps averages of a run's weights over its steps, for artifacts that are sampled.

Under privacy each step adds noise to the weights, and an average over steps has less of it (De et
al. 2022, arXiv:2204.13650). It is a function of weights that the run may release anyway, so it
costs no epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from actors.engine.gradients import Tensors
from tg_tinker.config import AverageKind, OptimizerConfig
from tg_tinker.errors import InvalidRequestError

_FIELDS: dict[AverageKind, str] = {"ema": "ema_decay", "tail": "tail_from"}


class Averages:
    """The averages that an `OptimizerConfig` asks for, in float32.

    ``ema`` weighs the step that is i steps back by decay^i, and its weights add up to 1 from the
    first step on. ``tail`` weighs all steps from `tail_from` on equally.
    """

    def __init__(
        self, config: OptimizerConfig, parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        self._parameters = parameters
        settings = {kind: getattr(config, name) for kind, name in _FIELDS.items()}
        self._settings = {kind: value for kind, value in settings.items() if value is not None}
        self._counts = dict.fromkeys(self._settings, 0)
        # Made now, so that no later step runs out of memory for them once it has moved the weights.
        self._means = {kind: self._zeros() for kind in self._settings}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Takes in the weights after a step, counted from 1."""
        for kind, setting in self._settings.items():
            if kind == "tail" and step < setting:
                continue
            self._counts[kind] = count = self._counts[kind] + 1
            share = 1 / count if kind == "tail" else (1 - setting) / (1 - setting**count)
            for name, mean in self._means[kind].items():
                mean.lerp_(self._parameters[name].float(), share)

    def of(self, kind: AverageKind) -> Tensors:
        """Returns an average in the dtype of the weights; float32 tensors are the live ones.

        Raises:
            InvalidRequestError: if this average is not kept, or no step has entered it yet.
        """
        if kind not in self._settings:
            raise InvalidRequestError(
                f"this run keeps no {kind} average: create a client with"
                f" OptimizerConfig({_FIELDS[kind]}=...), which keeps it from the first step on"
            )
        if not self._counts[kind]:
            raise InvalidRequestError(
                f"no step has entered the {kind} average yet: make a step first"
                + (f", up to step {self._settings[kind]}" if kind == "tail" else "")
            )
        return {
            name: mean.to(self._parameters[name].dtype) for name, mean in self._means[kind].items()
        }

    def state(self) -> Tensors:
        """Returns tensors named `kind::parameter`, and (setting, count) of each kind, float64."""
        found = {
            f"{kind}::{name}": mean
            for kind, means in self._means.items()
            for name, mean in means.items()
        }
        counted = {
            kind: torch.tensor([float(setting), float(self._counts[kind])], dtype=torch.float64)
            for kind, setting in self._settings.items()
        }
        return found | counted

    def load(self, state: Mapping[str, torch.Tensor], step: int) -> list[str]:
        """Restores what `state` returned; returns the kinds that lack steps up to this one.

        An average of another decay or beginning is none of this run: it begins anew.
        """
        anew: list[str] = []
        for kind, setting in self._settings.items():
            kept = state.get(kind)
            same = kept is not None and float(kept[0]) == float(setting)
            self._counts[kind] = int(state[kind][1]) if same else 0
            for name, mean in self._means[kind].items():
                mean.copy_(state[f"{kind}::{name}"] if same else torch.zeros_like(mean))
            lacking = step >= (setting if kind == "tail" else 1)
            anew += [kind] if lacking and not same else []
        return anew

    def _zeros(self) -> Tensors:
        return {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in self._parameters.items()
        }
