"""Finds the files that hold the weights of a model's folder, and reads what their headers state.

A folder may hold the same weights several times, in one file, in shards, or under the names of
other programs. Only one of these sets is loaded, counted and hashed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from tg_tinker.errors import InvalidRequestError, NotFoundError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"

Shapes = Mapping[str, tuple[int, ...]]


def weight_files(directory: Path) -> list[Path]:
    """Returns the files of a folder's weights: those of its index, else the one whole file.

    Raises:
        NotFoundError: if the folder has no safetensors.
        InvalidRequestError: if the index is damaged, or names a file that is missing; or if there
            are several files and no index.
    """
    name = entry(directory)
    if name != INDEX:
        return [directory / name]
    files = [directory / file for file in indexed(directory)]
    for file in files:
        if not file.is_file():
            raise InvalidRequestError(f"{file} is missing: download the model again")
    return files


def entry(directory: Path) -> str:
    """Returns the file to load a folder's weights from: the index, else the one whole file.

    Raises:
        NotFoundError: if the folder has no safetensors.
        InvalidRequestError: if there are several files and no index.
    """
    for name in (INDEX, WHOLE):
        if (directory / name).exists():
            return name
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    if not names:
        raise NotFoundError(
            f"{directory} has no .safetensors file: convert the model to safetensors, because other"
            " formats may run code when they are read"
        )
    if len(names) > 1:
        raise InvalidRequestError(
            f"{directory} has {len(names)} .safetensors files and no {INDEX}, which says what"
            " belongs to the model: download the model again"
        )
    return names[0]


def indexed(directory: Path) -> list[str]:
    """Returns the names of the files in a folder's index.

    Raises:
        InvalidRequestError: if the index is damaged, or names a file outside of the folder.
    """
    return sorted({*weight_map(directory, (directory / INDEX).read_bytes()).values()})


def weight_map(directory: Path, index: bytes) -> dict[str, str]:
    """Returns the file of each tensor, from the content of a folder's index.

    Raises:
        InvalidRequestError: if the index is damaged, or names a file that is not directly in the
            folder or is no safetensors file.
    """
    try:
        found = dict(json.loads(index)["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError):
        found = {}
    if not found or not all(map(_is_plain, found.values())):
        raise InvalidRequestError(f"{directory / INDEX} is damaged: download the model again")
    return found


def _is_plain(name: object) -> bool:
    """Returns whether this is the name of a safetensors file, without a folder."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(char in name for char in "/\\\0")
    )


def stored_shapes(directory: Path) -> Shapes:
    """Returns the shapes that the headers of a folder's weight files state."""
    found = {}
    for file in weight_files(directory):
        # Not "pt", which maps the file as writable: Linux refuses that for a file above all memory.
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found
