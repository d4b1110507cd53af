"""Tests which files of a model's folder count as its weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engine.loading import prepared
from actors.engine.model import Base
from actors.engine.weights import INDEX, WHOLE, stored_shapes, weight_files
from support.helpers import examples, session
from support.models import make_tokenizer
from tg_tinker import ArtifactMismatchError, InvalidRequestError, NotFoundError


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """Returns the tiny model in several files with an index."""
    folder = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def changed(source: Path, target: Path) -> None:
    """Writes all weights of a folder into one file, with other values."""
    tensors = {name: t for file in source.glob("model-*") for name, t in load_file(file).items()}
    save_file({n: t + 1 for n, t in tensors.items()}, target, metadata={"format": "pt"})


@pytest.mark.parametrize("extra", [WHOLE, "consolidated.safetensors", "original/model.safetensors"])
def test_copies_beside_an_index_change_nothing(sharded: Path, tmp_path: Path, extra: str) -> None:
    before = Base.load(str(sharded), cache=tmp_path / "cache")
    shapes, loss = stored_shapes(sharded), session(sharded).forward_backward(examples()).loss
    (sharded / extra).parent.mkdir(exist_ok=True)
    changed(sharded, sharded / extra)
    said: list[str] = []
    after = Base.load(str(sharded), cache=tmp_path / "cache", progress=said.append)
    assert after.digest == before.digest
    assert stored_shapes(sharded) == shapes
    assert session(sharded).forward_backward(examples()).loss == loss
    size = sum(file.stat().st_size for file in sharded.glob("model-*.safetensors"))
    assert f"loading the weights ({size / 1e9:.2g} GB)" in said


def test_runs_that_hashed_the_copies_too_keep_their_base(sharded: Path, tmp_path: Path) -> None:
    state = session(sharded).live_state()
    changed(sharded, sharded / "consolidated.safetensors")
    base = Base.load(str(sharded), cache=tmp_path)
    former = base.identity.former(sharded)
    assert base.known_as(base.digest)
    assert former != base.digest
    assert base.known_as(former)
    assert not base.known_as("sha256:0")
    assert not base.known_as(None)
    with_copies = replace(state, geometry=state.geometry | {"base": former})
    session(sharded).check_fits(with_copies)
    # There the whole file was loaded, whose weights are others.
    changed(sharded, sharded / WHOLE)
    assert base.identity.former(sharded) is None
    with pytest.raises(ArtifactMismatchError, match="base differs"):
        session(sharded).check_fits(with_copies)


def test_a_conversion_takes_the_files_of_the_index(sharded: Path, tmp_path: Path) -> None:
    first = Base.load(str(sharded), cache=tmp_path / "cache", dtype="bfloat16")
    changed(sharded, sharded / WHOLE)
    again = Base.load(str(sharded), cache=tmp_path / "cache", dtype="bfloat16")
    assert again.directory == first.directory  # the copy is no part of the model
    other = Base.load(str(sharded), cache=tmp_path / "other", dtype="bfloat16")
    assert (other.digest, other.directory.name) == (first.digest, first.directory.name)
    mine, theirs = other.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    saved = json.loads((other.directory / "config.json").read_text())
    assert "transformers_weights" not in saved


def test_without_an_index_the_whole_file_is_the_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(tiny_model, folder)
    digest = Base.load(str(folder), cache=tmp_path).digest
    assert digest == Base.load(str(tiny_model), cache=tmp_path).digest
    save_file({"w": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert weight_files(folder) == [folder / WHOLE]
    assert Base.load(str(folder), cache=tmp_path).digest == digest
    assert stored_shapes(folder) == stored_shapes(tiny_model)


def test_config_does_not_choose_the_file(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(tiny_model, folder)
    save_file({"w": torch.zeros(3)}, folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    loss = session(folder).forward_backward(examples()).loss
    assert loss == session(tiny_model).forward_backward(examples()).loss


def test_a_single_file_of_another_name_is_the_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(tiny_model, folder)
    (folder / WHOLE).rename(folder / "a.safetensors")
    assert weight_files(folder) == [folder / "a.safetensors"]
    mine, theirs = (Base.load(str(path), cache=tmp_path) for path in (folder, tiny_model))
    assert mine.digest != theirs.digest  # a name is part of it
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(mine.model.state_dict()[name], tensor)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        save_file({name: torch.zeros(3)}, tmp_path / name)
    with pytest.raises(InvalidRequestError, match=f"2 .safetensors files and no {INDEX}"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"w": 3}}',
     '{"weight_map": [["w", "a"]]}', "\xff", "[" * 100_000, *(
         json.dumps({"weight_map": {"w": name}}) for name in (
             "/etc/w.safetensors", "../w.safetensors", "sub/w.safetensors", "sub\\w.safetensors",
             "w.bin", "pytorch_model.bin", "w", "..", "", ".safetensors", "w\0.safetensors",
             ["w.safetensors"],
         )
     )],
)  # fmt: skip
def test_a_damaged_index_is_named(sharded: Path, tmp_path: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(InvalidRequestError, match=f"{INDEX} is damaged: download"):
        Base.load(str(sharded), cache=tmp_path / "cache")


def test_a_missing_file_of_an_index_is_named(sharded: Path, tmp_path: Path) -> None:
    gone = weight_files(sharded)[0]
    gone.unlink()
    with pytest.raises(InvalidRequestError, match=f"{gone.name} is missing: download"):
        Base.load(str(sharded), cache=tmp_path / "cache")


# --- from the hub ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of a repository; downloads copy files from it into `cached`."""
    repository, cached = tmp_path / "repository", tmp_path / "cached"
    repository.mkdir()

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "some/model"
        for file in repository.rglob("*"):
            inside = file.relative_to(repository).as_posix()
            if file.is_file() and any(fnmatch(inside, pattern) for pattern in allow_patterns):
                (cached / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cached / inside)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


def downloaded(hub: Path) -> set[str]:
    cached = hub.parent / "cached"
    return {file.relative_to(cached).as_posix() for file in cached.rglob("*.safetensors")}


def test_only_the_files_of_the_index_are_downloaded(sharded: Path, hub: Path) -> None:
    shutil.copytree(sharded, hub, dirs_exist_ok=True)
    for extra in (WHOLE, "consolidated.safetensors", "original/model.safetensors"):
        (hub / extra).parent.mkdir(exist_ok=True)
        changed(sharded, hub / extra)
    base = Base.load("some/model", cache=hub.parent / "cache")
    assert downloaded(hub) == {file.name for file in sharded.glob("*.safetensors")}
    assert base.digest == Base.load(str(sharded), cache=hub.parent / "cache").digest
    assert base.tokenizer_files()["tokenizer.json"]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [({WHOLE, "consolidated.safetensors"}, {WHOLE}), ({"a.safetensors"}, {"a.safetensors"})],
)
def test_without_an_index_the_whole_file_is_downloaded(
    tiny_model: Path, hub: Path, there: set[str], wanted: set[str]
) -> None:
    shutil.copy(tiny_model / "config.json", hub)
    for name in there:
        shutil.copy(tiny_model / WHOLE, hub / name)
    with prepared("some/model", torch.float32, hub.parent / "cache", lambda said: None):
        pass
    assert downloaded(hub) == wanted


def test_an_adapter_on_the_hub_is_refused_before_its_weights_come(hub: Path) -> None:
    adapter(hub)
    with pytest.raises(InvalidRequestError, match=r"is an adapter.*import_adapter"):
        Base.load("some/model", cache=hub.parent / "cache")
    assert downloaded(hub) == set()


# --- adapters --------------------------------------------------------------------------------


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"w": torch.zeros(3)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter_as_model_says_how_to_use_it(
    tiny_model: Path, tmp_path: Path, with_model: bool
) -> None:
    """With a config beside it, transformers would attach it, or load another model instead."""
    folder = tmp_path / "adapter"
    if with_model:
        shutil.copytree(tiny_model, folder)
    else:
        folder.mkdir()
    with pytest.raises(InvalidRequestError, match=r"is an adapter.*import_adapter"):
        Base.load(str(adapter(folder)), cache=tmp_path / "cache")


def test_a_folder_without_anything_is_still_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json"):
        Base.load(str(tmp_path), cache=tmp_path / "cache")


def test_a_model_without_tokenizer_is_converted(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", WHOLE):
        shutil.copy(tiny_model / name, folder)
    base: Any = Base.load(str(folder), cache=tmp_path / "cache", dtype="bfloat16")
    assert base.dtype == torch.bfloat16
    assert base.tokenizer_files().keys() == {"config.json"}
