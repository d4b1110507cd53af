"""Runs many LoRA adapters on one base model: each row of a stream uses its own adapter, or none.

    bank = AdapterBank(base.model)
    bank.add(Adapter("run@7", adapter_config, weights))
    bank.pin("run@7")
    index = bank.index("run@7")
    with bank.routed([index, 0], [(40, index)]):  # two single tokens, then a piece of 40
        base.model(...)

Adapters never change: different weights have a different name. Index 0 means "no adapter" and
holds zeros. Legend: T tokens of the stream, A adapters that fit, r the largest rank among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tg_tinker.errors import InvalidRequestError, NotFoundError, QueueFullError

MOST_BYTES = 2 * 2**30
"""The default limit for the bytes of resident adapters. Adapters in use are never dropped."""

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, repr=False)
class Adapter:
    """LoRA weights by PEFT's names, and their `adapter_config.json`.

    Attributes:
        name: a unique name for these weights, such as ``run@step``.
    """

    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]

    @property
    def size(self) -> int:
        """The bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    def layers(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns (A [r, in], B [out, r]) by the model's layer names.

        B includes the factor alpha / r.

        Raises:
            InvalidRequestError: if the adapter has tensors other than LoRA matrices, or is not
                plain LoRA.
        """
        unknown = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "use_rslora")
                   if self.config.get(key)]  # fmt: skip
        others = [n for n in self.weights if not n.endswith((_DOWN, _UP))]
        if unknown or others:
            raise InvalidRequestError(
                f"adapter {self.name} cannot share a base model with others: it has"
                f" {(unknown + others)[0]}, but only A and B matrices of one rank are supported"
            )
        scale = self.config["lora_alpha"] / self.rank
        return {
            name.removesuffix(_DOWN).removeprefix("base_model.model."): (
                down, scale * self.weights[name.removesuffix(_DOWN) + _UP],
            )
            for name, down in self.weights.items() if name.endswith(_DOWN)
        }  # fmt: skip


@dataclass(repr=False)
class _Resident:
    index: int
    size: int
    users: int = 0


class AdapterBank:
    """The resident adapters, least recently used first. Only one thread may call it."""

    def __init__(self, model: torch.nn.Module, most_bytes: int = MOST_BYTES) -> None:
        self._model = model
        self._most = most_bytes
        self._resident: dict[str, _Resident] = {}
        self._layers: dict[str, _Adapted] = {}
        self._room, self._rank = 2, 1
        self.route = Route()

    def __contains__(self, name: str) -> bool:
        return name in self._resident

    @property
    def names(self) -> list[str]:
        """The names of the resident adapters."""
        return [*self._resident]

    @property
    def size(self) -> int:
        """The bytes of all resident adapters, before they are padded to one rank."""
        return self.resident[1]

    @property
    def resident(self) -> tuple[int, int]:
        """The number of resident adapters, and their bytes."""
        sizes = [resident.size for resident in self._resident.values()]
        return len(sizes), sum(sizes)

    @torch.inference_mode()
    def add(self, adapter: Adapter) -> None:
        """Makes an adapter resident. Drops unused adapters if the limit requires it.

        Raises:
            InvalidRequestError: if the adapter does not fit the model, or is not plain LoRA.
            QueueFullError: if the adapter does not fit beside the adapters in use.
        """
        if adapter.name in self:
            return
        layers = adapter.layers()
        for path, (down, up) in layers.items():
            self._check(adapter.name, path, down, up)
        self._make_room(adapter.size)
        used = {resident.index for resident in self._resident.values()}
        index = next(i for i in range(1, len(used) + 2) if i not in used)
        self._grow(index + 1, adapter.rank)
        for path, (down, up) in layers.items():
            self._wrapped(path).put(index, down, up)
        self._resident[adapter.name] = _Resident(index, adapter.size)

    def pin(self, name: str | None) -> None:
        """Keeps an adapter resident until `release` is called as often. Does nothing for None.

        Raises:
            NotFoundError: if the adapter is not resident.
        """
        if name is None:
            return
        if name not in self:
            raise NotFoundError(f"adapter {name} is not resident: load it first")
        self._resident[name] = self._resident.pop(name)  # now the most recently used
        self._resident[name].users += 1

    def index(self, name: str | None) -> int:
        """Returns the index of a pinned adapter, for `routed`; 0 for None."""
        return 0 if name is None else self._resident[name].index

    def release(self, name: str | None) -> None:
        if name is not None:
            self._resident[name].users -= 1

    def drop(self, name: str) -> None:
        """Drops an adapter that is not in use."""
        resident = self._resident.pop(name)
        for layer in self._layers.values():
            layer.clear(resident.index)

    def forget(self, name: str) -> None:
        """Drops an adapter if it is resident and not in use."""
        if name in self and not self._resident[name].users:
            self.drop(name)

    @contextmanager
    def routed(self, rows: Sequence[int], pieces: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Sets the adapters that forward passes inside the block use.

        Args:
            rows: the adapter index of each of the first tokens.
            pieces: (size, adapter index) of each piece that follows.
        """
        self.route = Route.of(rows, pieces)
        try:
            yield
        finally:
            self.route = Route()

    @contextmanager
    def alone(self, place: int) -> Iterator[None]:
        """Inside `routed`, sets the adapter of a pass over the sequence of one token of the stream.

        Args:
            place: the place of the token in the stream.
        """
        whole, self.route = self.route, self.route.alone(place)
        try:
            yield
        finally:
            self.route = whole

    # --- inside ------------------------------------------------------------------------------

    def _check(self, name: str, path: str, down: torch.Tensor, up: torch.Tensor) -> None:
        weight = getattr(_module(self._model, path), "weight", None)
        sides = () if weight is None else sorted(weight.shape)
        if sorted([down.shape[1], up.shape[0]]) != list(sides):
            raise InvalidRequestError(
                f"adapter {name} does not fit this base model: its layer {path} is"
                f" {'missing' if weight is None else 'of another size'}"
            )

    def _make_room(self, size: int) -> None:
        for name in [n for n, resident in self._resident.items() if not resident.users]:
            if self.size + size <= self._most:
                break
            self.drop(name)
        if self.size + size > self._most:
            raise QueueFullError(
                f"an adapter of {size / 1e6:.1f} MB does not fit beside the adapters in use: try"
                " again in a moment"
            )

    def _grow(self, room: int, rank: int) -> None:
        if room > self._room or rank > self._rank:
            self._room = max(self._room, 2 * room if room > self._room else 0)
            self._rank = max(self._rank, rank)
            for layer in self._layers.values():
                layer.resize(self._room, self._rank)

    def _wrapped(self, path: str) -> _Adapted:
        if path not in self._layers:
            inner = _module(self._model, path)
            layer = self._layers[path] = _Adapted(inner, self)  # type: ignore[arg-type]
            parent, _, last = path.rpartition(".")
            setattr(self._model.get_submodule(parent), last, layer)
        layer = self._layers[path]
        layer.resize(self._room, self._rank)
        return layer


@dataclass(frozen=True)
class Route:
    """The adapters that the tokens of a stream use.

    Attributes:
        runs: (start, stop, index) of neighboring tokens with the same adapter; a stop of None
            means all tokens from the start.
        rows: the adapter indices of the first R tokens if they differ; else None.
    """

    runs: tuple[tuple[int, int | None, int], ...] = ()
    rows: tuple[int, ...] | None = None

    @classmethod
    def of(cls, rows: Sequence[int], pieces: Sequence[tuple[int, int]]) -> Route:
        runs: list[tuple[int, int | None, int]] = []
        start = len(rows)
        mixed = len(set(rows)) > 1
        if rows and not mixed:
            runs.append((0, start, rows[0]))
        for size, index in pieces:
            runs.append((start, start + size, index))
            start += size
        return cls(tuple(run for run in runs if run[2]), tuple(rows) if mixed else None)

    def alone(self, place: int) -> Route:
        """Returns the route of a stream in which all tokens use the adapter of one of these."""
        if self.rows is not None and place < len(self.rows):
            index = self.rows[place]
        else:
            index = next((i for start, stop, i in self.runs if start <= place < (stop or 0)), 0)
        return Route(((0, None, index),)) if index else Route()


class _Adapted(torch.nn.Module):
    """A linear layer of the base model, with the A and B matrices of the adapters."""

    inner: torch.nn.Module
    weight: torch.Tensor

    def __init__(self, inner: torch.nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.inner = inner
        self._bank = (bank,)  # a tuple, which torch does not register as a submodule
        self._down = self._up = self.weight.new_zeros(0, 0, 0)  # [A, r, in], [A, r, out]
        self._gathered: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        """Returns the inner layer's attribute: some models look at a weight or bias of a layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        route = self._bank[0].route
        if not route.runs and route.rows is None:
            return y
        tokens, added = x.flatten(0, -2), y.flatten(0, -2)
        for start, stop, index in route.runs:
            added[start:stop].addmm_(tokens[start:stop] @ self._down[index].T, self._up[index])
        if route.rows is not None:
            count, (down, up) = len(route.rows), self._of(route.rows)
            inside = torch.bmm(tokens[:count, None], down.transpose(1, 2))  # [R, 1, r]
            added[:count, None].baddbmm_(inside, up)
        return added.view(y.shape)

    def _of(self, rows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A and B of each row: [R, r, in] and [R, r, out].

        They are kept from step to step, because copying them takes longer than the products, and
        the rows seldom change.
        """
        if self._gathered is None or self._gathered[0] != rows:
            index = torch.tensor(rows, device=self._down.device)
            self._gathered = rows, self._down[index], self._up[index]
        return self._gathered[1:]

    def resize(self, room: int, rank: int) -> None:
        old_room, old_rank = self._down.shape[:2]
        if (room, rank) == (old_room, old_rank):
            return
        down, up = self._down, self._up
        sides = self._sides
        self._down = self.weight.new_zeros(room, rank, sides[0])
        self._up = self.weight.new_zeros(room, rank, sides[1])
        self._gathered = None
        if old_room:
            self._down[:old_room, :old_rank], self._up[:old_room, :old_rank] = down, up

    def put(self, index: int, down: torch.Tensor, up: torch.Tensor) -> None:
        self.clear(index)
        self._down[index, : len(down)] = down
        self._up[index, : up.shape[1]] = up.T

    @torch.inference_mode()
    def clear(self, index: int) -> None:
        self._gathered = None
        self._down[index] = 0
        self._up[index] = 0

    @property
    def _sides(self) -> tuple[int, int]:
        """The layer's sizes (in, out). transformers' Conv1D stores its weight transposed."""
        rows, columns = self.weight.shape
        return (columns, rows) if isinstance(self.inner, torch.nn.Linear) else (rows, columns)


def _module(model: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return None
    return found.inner if isinstance(found, _Adapted) else found
