"""Tests imports of adapters that PEFT wrote elsewhere: what is imported to the bit, and what is
refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from actors.artifacts.adapters import imported
from actors.training.place import Place
from actors.training.worker import Worker
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.helpers import session
from tg_tinker import (
    ArtifactMismatchError,
    DPConfig,
    InvalidRequestError,
    LineageError,
    LoRAConfig,
    NotFoundError,
    ServiceClient,
    StorageError,
    TrainingConfig,
)
from tg_tinker.cli.main import main
from tg_tinker.data.peft_files import CONFIG, MOST_CONFIG_BYTES, WEIGHTS, PeftFiles

LORA = LoRAConfig(rank=3, alpha=6.0, dropout=0.1, target_modules=("q_proj", "v_proj"))


def write_adapter(model: Path, target: Path, **values: Any) -> Path:
    """Writes an adapter by PEFT alone, with random weights in both matrices."""
    settings: dict[str, Any] = {
        "r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
    } | values  # fmt: skip
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_model, tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """Returns a copy of the adapter that a test may damage."""
    target = tmp_path / "adapter"
    target.mkdir()
    for name in (CONFIG, WEIGHTS):
        (target / name).write_bytes((adapter / name).read_bytes())
    return target


def configure(directory: Path, **values: Any) -> None:
    """Changes keys of the config; None removes a key."""
    config = json.loads((directory / CONFIG).read_text()) | values
    kept = {key: value for key, value in config.items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(kept))


def taken(model: Path, directory: Path) -> Any:
    files = PeftFiles.read(directory)
    s = session(model, lora_config=files.lora)
    return imported(files.config, files.weights, s.live_state(include_optimizer=False))


# --- what is taken over --------------------------------------------------------------------------


def test_an_adapter_of_peft_gives_the_logits_that_it_gives_in_peft(
    tiny_model: Path, adapter: Path
) -> None:
    files = PeftFiles.read(adapter)
    assert files.lora == LORA
    s = session(tiny_model, lora_config=files.lora)
    state = imported(files.config, files.weights, s.live_state(include_optimizer=False))
    s.load(state)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    ids = torch.tensor([[65, 66, 67, 68, 69]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        s.base.model.set_attn_implementation("eager")
        assert torch.allclose(s.base.model(input_ids=ids).logits, expected, atol=1e-5)
    assert (state.step, state.optimizer) == (0, None)
    assert (state.lineage.guarantee, state.lineage.base) == ("none", s.base.digest)
    assert state.lineage.ledgers == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_shorter_floats_are_kept_exactly(
    tiny_model: Path, copied: Path, dtype: torch.dtype
) -> None:
    short = {name: t.to(dtype) for name, t in load_file(copied / WEIGHTS).items()}
    (copied / WEIGHTS).write_bytes(save(short))
    for name, tensor in taken(tiny_model, copied).weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(dtype), short[name])


def test_settings_of_other_versions_that_are_off_are_taken(tiny_model: Path, copied: Path) -> None:
    configure(
        copied, use_dora=..., some_future_feature=None, another={}, peft_version="9.9",
        base_model_name_or_path="somewhere/else", revision="main", init_lora_weights="gaussian",
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    taken(tiny_model, copied)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_come_along(tmp_path: Path, tiny_model: Path, bias: str) -> None:
    directory = write_adapter(tiny_model, tmp_path / "adapter", bias=bias)
    assert PeftFiles.read(directory).lora.bias == bias
    assert taken(tiny_model, directory).weights.keys() == load_file(directory / WEIGHTS).keys()


# --- what is refused -----------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("bomb-went-off"), "")


def test_a_pickle_is_refused_unread_and_its_owner_told_what_to_do(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    (copied / WEIGHTS).rename(copied / "adapter_model.bin")
    (copied / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InvalidRequestError, match=r"pickle.*safe_serialization=True"):
        PeftFiles.read(copied)
    (copied / "adapter_model.bin").rename(copied / WEIGHTS)
    assert not (copied / "bomb-went-off").exists()


def test_a_pickle_under_the_right_name_is_no_safetensors(tiny_model: Path, copied: Path) -> None:
    (copied / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InvalidRequestError, match="no safetensors file"):
        taken(tiny_model, copied)
    assert not Path("bomb-went-off").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(NotFoundError, match=name):
        PeftFiles.read(copied)
    with pytest.raises(NotFoundError):
        PeftFiles.read(copied / "nowhere")


def test_a_huge_config_is_not_read(copied: Path) -> None:
    (copied / CONFIG).write_text(" " * MOST_CONFIG_BYTES + "{}")
    with pytest.raises(InvalidRequestError, match="more than the"):
        PeftFiles.read(copied)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"1", b"{}", b'{"peft_type": "IA3"}', b"[" * 100_000, b"\xff"]
)
def test_a_config_of_another_kind_is_refused(copied: Path, content: bytes) -> None:
    (copied / CONFIG).write_bytes(content)
    with pytest.raises(InvalidRequestError, match="peft_type"):
        PeftFiles.read(copied)


def test_a_name_that_is_there_twice_is_refused(copied: Path) -> None:
    """A reader may see one of two values, while JSON's parsers take the other."""
    text = (copied / CONFIG).read_text()
    (copied / CONFIG).write_text(text.replace('"r":', '"lora_alpha": 1, "r":'))
    with pytest.raises(InvalidRequestError, match="twice"):
        PeftFiles.read(copied)


@pytest.mark.parametrize(
    "values",
    [
        {"r": ...}, {"r": 0}, {"r": "x"}, {"r": 2.5}, {"r": None}, {"lora_alpha": -1},
        {"lora_alpha": float("nan")}, {"lora_dropout": 1.0}, {"bias": "some"}, {"bias": None},
        {"target_modules": ".*_proj"}, {"target_modules": []}, {"target_modules": [1]},
        {"target_modules": None}, {"r": True}, {"r": "8"}, {"lora_alpha": "16"},
        {"lora_alpha": 1e308}, {"lora_dropout": False},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(copied: Path, values: dict[str, Any]) -> None:
    configure(copied, **values)
    with pytest.raises(InvalidRequestError):
        PeftFiles.read(copied)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]}, {"some_future_feature": True}, {"fan_in_fan_out": True},
        {"layer_replication": [[0, 1]]}, {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
        {"init_lora_weights": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_feature_that_a_run_does_not_have_is_refused(
    tiny_model: Path, copied: Path, values: dict[str, Any]
) -> None:
    configure(copied, **values)
    with pytest.raises(ArtifactMismatchError, match=next(iter(values))):
        taken(tiny_model, copied)


def nested(levels: int) -> list[Any]:
    return [nested(levels - 1)] if levels else []


@pytest.mark.parametrize(
    "values",
    [
        {f"key{number}": None for number in range(200)},
        {"rank_pattern": {f"layer{number}": 8 for number in range(201)}},
        {"rank_pattern": [{"a": dict.fromkeys(map(str, range(201)))}]},
        {"layer_replication": nested(8)},
        {"loftq_config": {"a": nested(500)}},
    ],
    ids=["keys", "keys inside", "keys deep inside", "levels", "many levels"],
)
def test_a_config_of_many_keys_or_levels_is_refused(copied: Path, values: dict[str, Any]) -> None:
    configure(copied, **values)
    with pytest.raises(InvalidRequestError, match="more than 200 keys, or more than 8 levels"):
        PeftFiles.read(copied)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_what_never_ends_is_not_read(copied: Path, name: str) -> None:
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        PeftFiles.read(copied)
    (copied / name).unlink()
    (copied / name).symlink_to("/dev/zero")
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        PeftFiles.read(copied)


def damaged(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[0]
    first = tensors[name]
    changed = {
        "missing": None, "shape": first[:-1], "flat": first.flatten(),
        "int": first.to(torch.int32), "double": first.double(),
        "nan": first.clone().fill_(torch.nan), "inf": first.clone().fill_(-torch.inf),
    }.get(kind, first)  # fmt: skip
    more = {"extra.weight": first.clone()} if kind == "extra" else {}
    if kind == "other layer":
        more, changed = {name.replace("layers.0", "layers.7"): first}, None
    kept = {n: t for n, t in (tensors | {name: changed} | more).items() if t is not None}
    return {n: t.contiguous() for n, t in kept.items()}


KINDS = ["missing", "extra", "other layer", "shape", "flat", "int", "double", "nan", "inf"]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_a_run_would_not_have_are_refused(
    tiny_model: Path, copied: Path, kind: str
) -> None:
    (copied / WEIGHTS).write_bytes(save(damaged(load_file(copied / WEIGHTS), kind)))
    with pytest.raises(InvalidRequestError, match="tensor"):
        taken(tiny_model, copied)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_weights_that_are_cut_are_refused(tiny_model: Path, copied: Path, cut: int) -> None:
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:cut])
    with pytest.raises(InvalidRequestError, match="damaged"):
        taken(tiny_model, copied)


def refusing(state: Any) -> None:
    raise ArtifactMismatchError("no")


def no_room(*_: object) -> None:
    raise StorageError("the disk is full")


def test_a_refused_adapter_leaves_the_run_as_it_was(
    service: Service, tiny_model: Path, copied: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    files = PeftFiles.read(copied)
    config = TrainingConfig(model_ref=str(tiny_model), lora_config=files.lora)
    capability = service.registry.data_keys.capability(TENANT, service.run, service.epoch)
    place = Place(TENANT, service.run, service.epoch, str(service.root), tmp_path, capability)
    worker = Worker(place, config, service.registry, lambda _: None)
    before = worker.session.state()
    with monkeypatch.context() as patch:  # what is refused was not imported
        patch.setattr(worker.session, "check_fits", refusing)
        with pytest.raises(ArtifactMismatchError):
            worker.load_adapter(lambda: None, files.config, files.weights)
    with monkeypatch.context() as patch:  # and what cannot be noted is not imported
        patch.setattr(service.registry.audit_log, "record_import", no_room)
        with pytest.raises(StorageError):
            worker.load_adapter(lambda: None, files.config, files.weights)
    bad = save(damaged(load_file(copied / WEIGHTS), "nan"))
    with pytest.raises(InvalidRequestError):
        worker.load_adapter(lambda: None, files.config, bad)
    after = worker.session.state()
    assert all(torch.equal(after.weights[n], t) for n, t in before.weights.items())
    assert after.lineage == before.lineage
    assert "artifact.import" not in "".join(service.registry.audit_log.rows(TENANT, 0, 100))
    name = worker.latest().name
    worker.load_adapter(lambda: None, files.config, files.weights)
    assert worker.latest().name != name  # nobody samples from the weights before
    assert "artifact.import" in "".join(service.registry.audit_log.rows(TENANT, 0, 100))


# --- through a real service ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(embedded: None) -> Iterator[ServiceClient]:
    with ServiceClient(address="local") as service:
        yield service


@pytest.mark.slow
def test_an_import_is_loaded_sampled_resumed_and_exported_and_marks_what_follows(
    client: ServiceClient, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    words = ["artifacts", "import", str(adapter), "--model", str(tiny_model)]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    artifact = found.stdout.strip()
    info = client.get_artifact(artifact)
    assert (info.step, info.include_optimizer) == (0, False)
    (run,) = client.list_training_clients()
    assert (run.training_client_id, run.status) == (info.training_client_id, "completed")
    folder = client.export_adapter(artifact, tmp_path / "out")
    mine, theirs = load_file(folder / WEIGHTS), load_file(adapter / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    config = TrainingConfig(model_ref=str(tiny_model), lora_config=LORA)
    with client.create_training_client(config) as tc:
        plain = tc.sample("abc", max_tokens=12, temperature=0).samples[0].token_ids
        assert "optimizer" in tc.load_state(artifact).warnings[0]
        changed = tc.sample("abc", max_tokens=12, temperature=0).samples[0].token_ids
        assert changed != plain
    with client.get_training_client(info.training_client_id) as tc:
        assert tc.sample("abc", max_tokens=12, temperature=0).samples[0].token_ids == changed
        tc.forward_backward({"input_ids": [[65, 66, 67]]})
        assert tc.optim_step().result().step == 1
    private = config.model_copy(
        update={"dp_config": DPConfig(noise_multiplier=1.0), "dataset_id": "chats"}
    )
    with client.create_training_client(private) as tc, pytest.raises(LineageError):
        tc.load_state(artifact)
    rows = [(row.event, row.subject) for row in client.audit_log()]
    assert ("artifact.import", info.training_client_id) in rows


@pytest.mark.slow
def test_an_adapter_of_another_model_is_refused_by_the_service_and_leaves_no_artifact(
    client: ServiceClient, tiny_model: Path, copied: Path
) -> None:
    tensors = load_file(copied / WEIGHTS)
    (copied / WEIGHTS).write_bytes(save(damaged(tensors, "shape")))
    before = len(client.list_artifacts())
    with pytest.raises(ArtifactMismatchError, match="shape"):
        client.import_adapter(copied, str(tiny_model))
    assert len(client.list_artifacts()) == before
