"""Tests that what is loaded of a base model is what was hashed, and nothing that lies beside it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.engine import model as models
from actors.engine.model import Base
from actors.engine.model_files import opened
from actors.engine.weights import INDEX, WHOLE
from support.helpers import session
from support.models import make_model
from tg_tinker import ArtifactMismatchError, InvalidRequestError, NotFoundError, StorageError
from tg_tinker.data.text import load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """Returns a copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """Returns the tiny model in two files with an index."""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(tensors)
    where = {name: f"w{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in ("w0.safetensors", "w1.safetensors"):
        part = {name: tensors[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def load(path: Path, cache: Path | None = None, **options: Any) -> Base:
    return Base.load(str(path), cache=cache or path.parent / "cache", **options)


def doubled(source: Path, target: Path) -> None:
    """Writes the weights of a file with other values, of the same size."""
    save_file({n: 2 * t for n, t in load_file(source).items()}, target, metadata={"format": "pt"})


def same_weights(one: Base, other: Base) -> bool:
    theirs = other.model.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.model.state_dict().items())


# --- nothing else is read --------------------------------------------------------------------


class _Writes:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_beside_safetensors_is_not_opened(folder: Path, tiny_model: Path) -> None:
    """Without the usual names, transformers would choose the pickle."""
    (folder / WHOLE).rename(folder / "weights.safetensors")
    tensors = {name: 2 * tensor for name, tensor in load_file(tiny_model / WHOLE).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    assert same_weights(load(folder), load(tiny_model, folder.parent / "cache"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Writes(folder / "ran")))
    load(folder)
    load(folder, dtype="bfloat16")
    assert not (folder / "ran").exists()
    (folder / "weights.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no \.safetensors file: convert the model"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["shard-00000-model-00000-of-00001.safetensors", "consolidated.safetensors"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_of_names_with_a_meaning_change_nothing(
    folder: Path, tiny_model: Path, name: str, dtype: str
) -> None:
    """transformers takes a folder with the first of these names for a distributed checkpoint."""
    before = load(tiny_model, folder.parent / "other", dtype=dtype)
    doubled(folder / WHOLE, folder / name)
    (folder / "model.py").write_text("raise SystemExit")
    after = load(folder, dtype=dtype)
    assert same_weights(after, before)
    assert after.digest == before.digest


def test_an_index_may_give_its_files_any_plain_name(sharded: Path, tiny_model: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    odd = "shard-00000-model-00000-of-00001.safetensors"
    (sharded / "w0.safetensors").rename(sharded / odd)
    renamed = {n: odd if f == "w0.safetensors" else f for n, f in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps({"weight_map": renamed}))
    assert same_weights(load(sharded), load(tiny_model, sharded.parent / "cache"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_never_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """At a terminal, transformers would ask whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"import os\nos.mkdir({str(folder / 'ran')!r})\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / file).read_text()) | {
        "model_type": "own-type",
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {
            "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model",
            "AutoTokenizer": ["own.Tokenizer", None],
        },
    }  # fmt: skip
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(InvalidRequestError, match="cannot be loaded"):
        load_tokenizer(load(folder).tokenizer_files())
    assert not (folder / "ran").exists()


def calls_of(name: str) -> list[tuple[str, ast.Call]]:
    found = []
    for top in ("tg_tinker", "actors", "serve_app", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                function = node.func if isinstance(node, ast.Call) else None
                if isinstance(function, ast.Attribute) and function.attr == name:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_each_call_of_transformers_refuses_code_pickles_and_the_network() -> None:
    calls = calls_of("from_pretrained")
    assert len(calls) >= 4
    for place, call in calls:
        said = {one.arg: ast.unparse(one.value) for one in call.keywords}
        assert said.get("trust_remote_code") == "False", place
        assert said.get("local_files_only") == "True", place
        if "Model" in ast.unparse(call.func):
            assert said.get("use_safetensors") == "True", place


def test_nothing_of_ours_reads_a_pickle_of_torch() -> None:
    assert [
        place for place, call in calls_of("load") if ast.unparse(call.func) == "torch.load"
    ] == []


# --- links, pipes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [WHOLE, "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"],
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str, relative: bool) -> None:
    outside = folder.parent / f"outside-{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(f"../{outside.name}" if relative else outside)
    with pytest.raises(InvalidRequestError, match=f"{name} is a link that leads out of its folder"):
        load(folder)


def test_a_link_through_a_folder_is_refused_and_one_inside_is_followed(folder: Path) -> None:
    (folder / "kept").mkdir()
    (folder / WHOLE).rename(folder / "kept" / "w")
    (folder / WHOLE).symlink_to("kept/w")
    load(folder)
    (folder / "kept").rename(folder.parent / "elsewhere")
    (folder / "kept").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(InvalidRequestError, match="leads out of its folder"):
        load(folder)


def in_cache(source: Path, root: Path, name: str = "models--org--name") -> Path:
    """Returns a snapshot as the hub's cache has it: links to files by their hashes."""
    snapshot, blobs = root / name / "snapshots" / ("0" * 40), root / name / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed(tiny_model: Path, tmp_path: Path) -> None:
    base = load(in_cache(tiny_model, tmp_path), tmp_path / "cache")
    plain = load(tiny_model, tmp_path / "cache")
    assert base.identity.files == plain.identity.files
    assert base.digest == plain.digest
    assert same_weights(base, plain)


@pytest.mark.parametrize("target", ["../../../models--other--name/blobs/w", "../../blobs/gone"])
def test_a_snapshot_may_not_lead_to_another_repository(
    tiny_model: Path, tmp_path: Path, target: str
) -> None:
    snapshot = in_cache(tiny_model, tmp_path)
    other = tmp_path / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(tiny_model / WHOLE, other / "w")
    (snapshot / WHOLE).unlink()
    (snapshot / WHOLE).symlink_to(target)
    with pytest.raises(InvalidRequestError, match=r"leads out|is missing"):
        load(snapshot, tmp_path / "cache")


def test_a_folder_that_only_looks_like_the_hubs_cache_gets_no_links(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="leads out of its folder"):
        load(in_cache(tiny_model, tmp_path, "mine"), tmp_path / "cache")


@pytest.mark.parametrize("name", [WHOLE, "config.json", "chat_template.jinja", INDEX])
def test_a_pipe_is_refused_at_once(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InvalidRequestError, match=f"{name} is not a regular file"):
        load(folder)


# --- the digests ------------------------------------------------------------------------------


def test_the_index_is_a_part_of_the_identity(sharded: Path) -> None:
    one = load(sharded)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = "w1.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    two = load(sharded)
    assert one.digest == two.digest  # as artifacts of older versions know it
    assert two.other_kinds(one.identity.files) == [f"index of the weights ({INDEX})"]
    with pytest.raises(ArtifactMismatchError, match="another index of the weights"):
        two.refuse_other_files(one.identity.files)


def test_a_conversion_is_kept_by_the_index_too(sharded: Path) -> None:
    one = load(sharded, dtype="bfloat16")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = "w1.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert load(sharded, dtype="bfloat16").directory != one.directory


@pytest.mark.parametrize("target", ["gone", "/dev/zero", "../outside"])
def test_a_copy_that_cannot_be_read_makes_no_older_digest(folder: Path, target: str) -> None:
    (folder.parent / "outside").write_bytes(b"w")
    (folder / "copy.safetensors").symlink_to(target)
    base = load(folder)
    assert base.identity.former(folder) is None
    assert not base.known_as("sha256:0")


def test_a_tokenizer_writes_no_files_of_other_names(folder: Path) -> None:
    files = load(folder).tokenizer_files() | {"../escaped": b"x", "own.py": b"x"}
    assert load_tokenizer(files).vocab_size == 256
    assert not (Path(tempfile.gettempdir()) / "escaped").exists()


def test_folders_inside_cannot_exchange_files_of_one_name(sharded: Path) -> None:
    """The digest knows a file by its name, without a folder."""
    index = json.loads((sharded / INDEX).read_text())
    for number, folder in enumerate(("x", "y")):
        (sharded / folder).mkdir()
        shutil.copy(sharded / f"w{number}.safetensors", sharded / folder / "w.safetensors")
    moved = {"w0.safetensors": "x/w.safetensors", "w1.safetensors": "y/w.safetensors"}
    index["weight_map"] = {name: moved[file] for name, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InvalidRequestError, match="is damaged"):
        load(sharded)


def test_an_index_that_leaves_tensors_out_is_refused(sharded: Path) -> None:
    """They would be random, and other ones in each process."""
    index = json.loads((sharded / INDEX).read_text())
    lost = sorted(index["weight_map"])[3]
    del index["weight_map"][lost]
    (sharded / INDEX).write_text(json.dumps(index))
    tensors = load_file(sharded / "w1.safetensors")
    tensors.pop(lost)
    save_file(tensors, sharded / "w1.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequestError, match="lack 1 of its tensors, such as"):
        load(sharded)


def edit_json(name: str, **values: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


OTHER_FILES = {
    "template": (lambda f: (f / "chat_template.jinja").write_text("{{ 1 }}"), "chat template"),
    "tokenizer": (edit_json("tokenizer.json"), "files of the tokenizer"),
    "config of the tokenizer": (
        edit_json("tokenizer_config.json", pad_token="<|im_end|>"), "files of the tokenizer"
    ),
    "one more file": (lambda f: (f / "merges.txt").write_text(""), "files of the tokenizer"),
    "generation": (edit_json("generation_config.json", eos_token_id=7), "generation_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_artifact_names_the_kind_of_file_that_is_another(
    folder: Path, tiny_model: Path, kind: str, dtype: str
) -> None:
    edit, words = OTHER_FILES[kind]
    before = load(tiny_model, folder.parent / "cache", dtype=dtype)
    edit(folder)
    after = load(folder, dtype=dtype)
    assert after.digest == before.digest
    assert before.other_kinds(before.identity.files) == []
    with pytest.raises(ArtifactMismatchError, match=f"another {words}") as refused:
        after.refuse_other_files(before.identity.files)
    assert refused.value.details == {"part": "files"}


def test_a_session_refuses_a_state_of_other_files_and_changes_nothing(
    folder: Path, tiny_model: Path
) -> None:
    state = session(tiny_model).state()
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    mine = session(folder)
    with pytest.raises(ArtifactMismatchError, match=r"chat template.*Nothing was loaded"):
        mine.load(replace(state, step=5))
    assert mine.step == 0


def test_a_state_without_these_digests_is_loaded_with_a_warning(
    folder: Path, tiny_model: Path
) -> None:
    state = session(tiny_model).state()
    assert session(tiny_model).load(state) == ()
    older = {part: value for part, value in state.geometry.items() if part != "files"}
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    (said,) = session(folder).load(replace(state, geometry=older))
    assert said.startswith("the artifact is of an older version")


# --- between hashing and loading -----------------------------------------------------------------


def meanwhile(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Calls `work` once, before transformers reads the files that were opened."""
    load_model, done = models.from_directory, []

    def after(*arguments: Any) -> Any:
        if not done:
            done.append(work())
        return load_model(*arguments)

    monkeypatch.setattr(models, "from_directory", after)


def test_a_file_that_is_edited_in_place_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size and its time of modification stay the same."""
    weights = folder / WHOLE
    doubled(weights, folder.parent / "other")

    def edit() -> None:
        before = weights.stat()
        with weights.open("r+b") as file:
            file.write((folder.parent / "other").read_bytes())
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert weights.stat().st_mtime_ns == before.st_mtime_ns

    meanwhile(monkeypatch, edit)
    with pytest.raises(StorageError, match=r"changed while it was read \(model.safetensors\)"):
        load(folder)


def test_files_that_are_replaced_meanwhile_are_not_read(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled(folder / WHOLE, folder.parent / "other")
    os.link(folder / WHOLE, folder.parent / "kept")

    def replace_all() -> None:
        folder.rename(folder.parent / "moved")
        shutil.copytree(tiny_model, folder)
        (folder.parent / "other").rename(folder / WHOLE)
        (folder / "config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ 1 }}")

    plain = load(tiny_model, folder.parent / "cache")
    meanwhile(monkeypatch, replace_all)
    base = load(folder)
    assert same_weights(base, plain)
    assert base.digest == plain.digest
    assert base.tokenizer_files() == plain.tokenizer_files()


def test_what_was_loaded_is_compared_and_not_what_lies_there_later(
    folder: Path, tiny_model: Path
) -> None:
    digest = load(tiny_model, folder.parent / "cache").digest
    good = (folder / WHOLE).read_bytes()
    doubled(tiny_model / WHOLE, folder / WHOLE)
    base = load(folder)
    (folder / WHOLE).write_bytes(good)
    assert not base.known_as(digest)


def test_a_conversion_of_files_that_change_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engine import loading

    read = loading._read

    def after(given: Any, dtype: torch.dtype) -> Any:
        with (folder / WHOLE).open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
        return read(given, dtype)

    monkeypatch.setattr(loading, "_read", after)
    with pytest.raises(StorageError, match="changed while it was read"):
        load(folder, dtype="bfloat16")
    assert list((folder.parent / "cache").iterdir()) == []


def test_a_view_is_gone_after_the_load(folder: Path) -> None:
    with opened(folder) as files:
        assert sorted(path.name for path in files.view.iterdir()) == [
            "config.json", "generation_config.json", WHOLE,
        ]  # fmt: skip
        assert files.view.stat().st_mode & 0o777 == 0o700
    assert not files.view.exists()


# --- files beside a GGUF ------------------------------------------------------------------------


def make_gguf(path: Path, source: Path) -> Path:
    """Writes the tiny Llama as a GGUF file with its tokenizer."""
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    heads, width = config["num_attention_heads"], config["hidden_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = (
        tokenizer["model"]["vocab"]
        | {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
        | {"ab": 259}
    )
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(source / WHOLE).items():
        known = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(known, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NEIGHBORS = {
    "chat_template.jinja": "theirs",
    "tokenizer_config.json": '{"chat_template": "theirs", "eos_token": "<|endoftext|>"}',
    "generation_config.json": '{"eos_token_id": 7}',
    "config.json": '{"model_type": "gpt2"}',
    "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}',
    "tokenizer.json": "{}",
    "pytorch_model.bin": "a pickle",
}


def test_files_beside_a_gguf_are_not_read(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", vocab_size=260)
    alone = make_gguf(tmp_path / "alone.gguf", source)
    (tmp_path / "beside").mkdir()
    beside = Path(shutil.copy(alone, tmp_path / "beside" / "other-name.gguf"))
    for name, content in NEIGHBORS.items():
        (beside.parent / name).write_text(content)
    first = load(beside, tmp_path / "first")
    second = load(alone, tmp_path / "second")
    assert first.digest == second.digest
    assert first.directory.name == second.directory.name
    assert first.identity.files == second.identity.files
    assert first.tokenizer_files() == second.tokenizer_files()
    assert first.eos_ids == second.eos_ids
    assert b"messages[0]" in first.tokenizer_files()["chat_template.jinja"]
    assert same_weights(first, second)
    contents = [
        {f.name: f.read_bytes() for f in base.directory.iterdir()} for base in (first, second)
    ]
    assert contents[0] == contents[1]
