"""Makes what lies beside this script: a home of TG-Tinker 0.1.0, its base model, what to expect.

It was run once, with the program of commit 22e0997, and the result is kept for good. Do not run it
to replace the fixture: a home made by a later program proves nothing about this one. It is here to
show what the home holds, and for a second fixture, of another commit.

    git worktree add --detach SRC 22e0997
    python -m pip wheel --no-deps --no-build-isolation -w WHEEL SRC
    python -m zipfile -e WHEEL/tg_tinker-0.1.0-py3-none-any.whl SITE
    PYTHONPATH=SITE python make.py OUT

`python` has what the wheel needs. Run it from a folder that has no `tg_tinker` in it, and give a
folder OUT that does not exist: it gets `home`, `hub` and `expected.json`, in about six minutes.

Each phase is a process of its own, as a program of a user would be:

    build      trains, saves, parks, closes, loses; then the database is put into its one file
    describe   opens the home again, changes nothing, and writes down what it finds
    measure    opens a copy of the home, as a checkout by git would be, and loads every artifact
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

COMMIT = "22e0997"
MODEL = "fixture/tiny"
FOR_EVER = datetime(2200, 1, 1, tzinfo=UTC)
TENANTS = ("default", "clinic")

ROWS = [
    [5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34], [40, 41, 42, 43],
    [50] * 12, [61, 62], [70, 71, 72, 73, 74, 75], [80, 81, 82, 83],
]  # fmt: skip
EVALUATED = {"input_ids": [[5, 6, 7, 8, 9, 10], [90, 91, 92, 93, 94], [30, 31, 32]]}
PROMPT = "The spare key is"


# --- the base model --------------------------------------------------------------------------


def lay_model(hub: Path) -> None:
    """A Llama of 2 layers, width 32, random weights and a tokenizer of bytes, as the hub's cache
    has it: plain files, no links, so that any copy of the folder is the cache."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=specials[1], eos_token=specials[2], pad_token=specials[0]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(22)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=258, bos_token_id=257, initializer_range=0.2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        content = (Path(folder) / "model.safetensors").read_bytes()
        revision = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        model = hub / f"models--{MODEL.replace('/', '--')}"
        shutil.copytree(folder, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)


# --- build -----------------------------------------------------------------------------------


def config_of(**values: Any) -> Any:
    """LoRA of rank 2 in float32 on one thread of a CPU, wherever it comes back."""
    from tg_tinker import LoRAConfig, OptimizerConfig, ResourceConfig, TrainingConfig

    defaults = {
        "model_ref": MODEL,
        "lora_config": LoRAConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj")),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "dtype": "float32",
        "resources": ResourceConfig(num_gpus=0, num_threads=1),
        "seed": 7,
    }
    return TrainingConfig(**(defaults | values))


def train(tc: Any, *rows: int, noise: bool = True, **fields: Any) -> Any:
    """One step."""
    tc.forward_backward({"input_ids": [ROWS[row] for row in rows], **fields})
    return tc.optim_step(apply_dp_noise=noise).result()


def build(out: Path) -> None:
    from tg_tinker import ServiceClient

    found: dict[str, Any] = {tenant: {"runs": {}, "artifacts": {}} for tenant in TENANTS}
    with ServiceClient("local") as service, ServiceClient("local", tenant="clinic") as clinic:
        build_plain(service, found["default"])
        build_private(service, found["default"])
        build_others(service, found["default"])
        serve(service, found["default"])
        build_clinic(clinic, found["clinic"])
        list(service.sweep_store())
        clinic.verify_audit_log()
        leave_one_behind(service, found["default"])  # its actor ends with the cluster
        service.verify_audit_log()
    (out / "found.json").write_text(json.dumps(found))


def build_plain(service: Any, found: dict[str, Any]) -> None:
    """A run without privacy, parked, and every kind of artifact; a rotation in the middle."""
    from tg_tinker import OptimizerConfig

    runs, artifacts = found["runs"], found["artifacts"]
    optimizer = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.01, schedule="linear", warmup_steps=1
    )
    tc = service.create_training_client(
        config_of(
            optimizer=optimizer, max_steps=20, metadata={"purpose": "fixture", "tags": ["a", "b"]}
        )
    )
    runs["plain"] = tc.id
    train(tc, 0, 1, 2)
    train(tc, 3, 4, 5)
    note = {"epoch": 1, "note": "with optimizer"}
    artifacts["labelled"] = tc.save_state(metadata=note).artifact_id
    train(tc, 6, 7)
    artifacts["weights only"] = tc.save_state(include_optimizer=False).artifact_id
    service.set_labels(artifacts["labelled"], {"stage": "gold", "team/name": "fixture"})
    service.set_expiry(artifacts["labelled"], FOR_EVER)
    artifacts["copied"] = service.copy_artifact(artifacts["labelled"]).artifact_id
    artifacts["deleted"] = tc.save_state().artifact_id
    service.delete_artifact(artifacts["deleted"])
    artifacts["shredded"] = tc.save_state().artifact_id
    service.shred_artifact(artifacts["shredded"])
    artifacts["expired"] = tc.save_state(include_optimizer=False).artifact_id
    service.set_expiry(artifacts["expired"], datetime.now(UTC) + timedelta(seconds=2))
    artifacts["resealed"] = tc.save_state().artifact_id
    service.rotate_key()  # and no rewrap: both keys open something
    service.reseal_artifact(artifacts["resealed"])
    train(tc, 0, 3, 6)
    tc.park()
    artifacts["parked"] = service.describe_training_client(tc.id).last_artifact_id
    with tempfile.TemporaryDirectory() as folder:
        adapter = service.export_adapter(artifacts["labelled"], str(Path(folder) / "adapter"))
        imported = service.import_adapter(str(adapter), MODEL, dtype="float32")
    runs["imported"] = imported.training_client_id
    artifacts["imported"] = imported.artifact_id


def build_private(service: Any, found: dict[str, Any]) -> None:
    """All four contracts, on data sets that were registered before."""
    from tg_tinker import DPBudgetExceededError, DPConfig, OptimizerConfig

    runs, artifacts = found["runs"], found["artifacts"]
    adam = OptimizerConfig(name="adam", learning_rate=1e-2)

    service.register_dataset("people", 8.0, 1e-5, unit="id")
    dp = DPConfig(noise_multiplier=2.0, max_participations=4, target_epsilon=8.0, unit="id")
    tc = service.create_training_client(
        config_of(dataset_id="people", batch_size=4, dp_config=dp, optimizer=adam)
    )
    runs["participation"] = tc.id
    people = [f"person-{row // 2}" for row in range(8)]
    train(tc, 0, 1, 2, 3, example_ids=people[:4])
    train(tc, 4, 5, 6, 7, example_ids=people[4:])
    artifacts["participation"] = tc.save_state().artifact_id
    train(tc, 0, 1, 2, 3, example_ids=people[:4])
    tc.park()
    parked = service.describe_training_client(tc.id).last_artifact_id
    artifacts["participation, parked"] = parked

    service.register_dataset("letters", 6.0, 1e-5)
    dp = DPConfig(sampling="poisson", dataset_size=8, target_epsilon=6.0)
    momentum = OptimizerConfig(name="sgd", learning_rate=1e-2, momentum=0.9)
    with service.create_training_client(
        config_of(dataset_id="letters", batch_size=2, max_steps=6, dp_config=dp, optimizer=momentum)
    ) as tc:
        runs["poisson"] = tc.id
        drawn = tc.poisson_batches({"input_ids": ROWS})
        for _ in range(3):
            tc.forward_backward(next(drawn))
            tc.optim_step().result()
        artifacts["poisson"] = tc.save_state().artifact_id

    service.register_dataset("notes", 3.0, 1e-5)
    dp = DPConfig(sampling="worst_case", noise_multiplier=3.0, target_epsilon=3.0)
    adafactor = OptimizerConfig(name="adafactor", learning_rate=1e-2)
    with service.create_training_client(
        config_of(dataset_id="notes", batch_size=2, dp_config=dp, optimizer=adafactor)
    ) as tc:
        runs["worst case"] = tc.id
        with contextlib.suppress(DPBudgetExceededError):  # which leaves the row of a refusal
            while True:
                train(tc, 0, 1)
        artifacts["worst case"] = tc.save_state().artifact_id

    service.register_dataset("chats", 7.0, 1e-5)
    dp = DPConfig(
        sampling="client_poisson", noise_multiplier=1.5, dataset_size=8, target_epsilon=7.0,
        accountant_type="rdp", show_private_metrics=False,
    )  # fmt: skip
    with service.create_training_client(
        config_of(dataset_id="chats", batch_size=2, max_steps=8, dp_config=dp, optimizer=adam)
    ) as tc:
        runs["client poisson"] = tc.id
        tc.load_state(artifacts["participation"])  # of another data set: a link
        train(tc, 0)
        train(tc, 1, 2, 3)
        artifacts["linked"] = tc.save_state().artifact_id

    service.register_dataset("untouched", 1.0, 1e-6)
    with contextlib.suppress(Exception):  # a promise is never changed
        service.register_dataset("untouched", 2.0, 1e-6)


def build_others(service: Any, found: dict[str, Any]) -> None:
    """A full fine-tune that is completed, a run that failed, one that saved nothing; API keys."""
    from tg_tinker import CheckpointConfig, InvalidRequestError, LoRAConfig, OptimizerConfig

    runs, artifacts = found["runs"], found["artifacts"]
    with service.create_training_client(
        config_of(
            lora_config=None, max_steps=2, optimizer=OptimizerConfig(learning_rate=1e-3),
            checkpoints=CheckpointConfig(every_steps=50, every_minutes=600, keep=3),
        )
    ) as tc:  # fmt: skip
        runs["full"] = tc.id
        train(tc, 0, 1, 2)
        train(tc, 3, 4)
        artifacts["full"] = tc.save_state(include_optimizer=False).artifact_id
    with service.create_training_client(config_of()) as tc:
        runs["unsaved"] = tc.id
        train(tc, 0, 1)
    with contextlib.suppress(InvalidRequestError):
        service.create_training_client(config_of(lora_config=LoRAConfig(rank=64)))
    (runs["failed"],) = {run.training_client_id for run in service.list_training_clients()} - {
        *runs.values()
    }
    labelled = artifacts["labelled"]
    found["api_keys"] = {
        "live": service.create_api_key("for all", days=None)[0],
        "narrow": service.create_api_key("for one", [labelled], days=36_499)[0],
        "expired": service.create_api_key("expired", days=1e-9)[0],
        "revoked": service.create_api_key("revoked", days=None)[0],
    }
    service.revoke_api_key(key_id(found["api_keys"]["revoked"]))


def build_clinic(clinic: Any, found: dict[str, Any]) -> None:
    """Another tenant: names that the first has too, and a data set whose epsilon is infinite."""
    from tg_tinker import DPConfig

    clinic.register_dataset("people", 2.0, 1e-6)
    clinic.register_dataset("sandbox", None, 1e-5)
    with clinic.create_training_client(config_of(seed=8)) as tc:
        found["runs"]["plain"] = tc.id
        train(tc, 0, 1, 2)
        found["artifacts"]["plain"] = tc.save_state().artifact_id
        tc.sample(PROMPT, max_tokens=4, temperature=0)
    clinic.set_labels(found["artifacts"]["plain"], {"stage": "draft"})
    # Without allow_nonprivate_init it could not come back from what it saves after the last step.
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, allow_nonprivate_init=True)
    with clinic.create_training_client(
        config_of(dataset_id="sandbox", batch_size=2, dp_config=dp)
    ) as tc:
        found["runs"]["unlimited"] = tc.id
        train(tc, 0, 1)
        found["artifacts"]["unlimited"] = tc.save_state().artifact_id
        train(tc, 2, 3, noise=False)
        found["artifacts"]["without noise"] = tc.save_state().artifact_id
    found["api_keys"] = {"live": clinic.create_api_key("ward", days=None)[0]}


def serve(service: Any, found: dict[str, Any]) -> None:
    """One request that is answered, and one that a revoked key makes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = service.serve_http(MODEL, port=port, dtype="float32")
    body = {"model": found["artifacts"]["labelled"], "prompt": PROMPT, "max_tokens": 4}
    statuses = {}
    for name in ("live", "revoked", "expired"):
        request = urllib.request.Request(
            f"{address}/completions",
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {found['api_keys'][name]}",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                statuses[name] = answer.status
        except urllib.error.HTTPError as error:
            statuses[name] = error.code
    assert statuses == {"live": 200, "revoked": 401, "expired": 401}, statuses


def leave_one_behind(service: Any, found: dict[str, Any]) -> None:
    """A run that nobody closes: it comes back from its artifact, a step behind."""
    tc = service.create_training_client(config_of(seed=9))
    found["runs"]["lost"] = tc.id
    train(tc, 0, 1, 2)
    found["artifacts"]["lost"] = tc.save_state().artifact_id
    train(tc, 3, 4)


def settle(home: Path) -> None:
    """All of the database in its one file; no empty folders and locks, which a checkout lacks."""
    database = sqlite3.connect(home / "registry.db")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    for leftover in [*home.rglob("*.lock"), *home.glob("registry.db-*")]:
        leftover.unlink()
    for folder in sorted(home.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# --- describe --------------------------------------------------------------------------------


def describe(out: Path) -> None:
    """What a program sees that opens the home: nothing is changed by that."""
    from tg_tinker import ServiceClient, __version__

    found = json.loads((out / "found.json").read_text())
    expected: dict[str, Any] = {
        "commit": COMMIT,
        "version": __version__,
        "made_with": {
            name: metadata.version(name)
            for name in ("ray", "torch", "transformers", "peft", "safetensors", "SQLAlchemy")
        },
        "model_ref": MODEL,
        "rows": ROWS,
        "evaluated": EVALUATED,
        "prompt": PROMPT,
    }
    expected["tenants"] = {}
    for tenant in TENANTS:
        with ServiceClient("local", tenant=tenant) as service:
            expected["tenants"][tenant] = describe_tenant(service, found[tenant])
            uses = service.list_keys()
    expected["keys"] = {"primary": uses.primary, "artifacts": uses.artifacts}
    (out / "expected.json").write_text(json.dumps(expected))


def describe_tenant(service: Any, found: dict[str, Any]) -> dict[str, Any]:
    head = service.verify_audit_log()
    assert service.check_registry().sound
    rows = service.audit_log(limit=10_000)
    listed = {info.artifact_id: info for info in service.list_artifacts()}
    gone = {name: id for name, id in found["artifacts"].items() if id not in listed}
    runs = {name: service.describe_training_client(id) for name, id in found["runs"].items()}
    return {
        "runs": {
            name: {
                "id": run.training_client_id,
                "status": run.status,
                "reason": run.reason,
                "step": run.step,
                "epoch": run.epoch,
                "created_at": run.created_at.isoformat(),
                "last_artifact_id": run.last_artifact_id,
            }
            for name, run in runs.items()
        },
        "artifacts": {
            name: {
                "id": id,
                "run": listed[id].training_client_id,
                "step": listed[id].step,
                "size_bytes": listed[id].size_bytes,
                "include_optimizer": listed[id].include_optimizer,
                "created_at": listed[id].created_at.isoformat(),
                "labels": dict(listed[id].labels),
                "expires_at": listed[id].expires_at and listed[id].expires_at.isoformat(),
            }
            for name, id in found["artifacts"].items()
            if id in listed
        },
        "gone": gone,
        "datasets": {name: describe_dataset(service, name) for name in datasets(rows)},
        "audit_log": {
            "rows": head.seq,
            "head": head.hash,
            "counts": dict(sorted(Counter(f"{row.event} {row.outcome}" for row in rows).items())),
        },
        "api_keys": describe_keys(service, found["api_keys"]),
    }


def datasets(rows: list[Any]) -> list[str]:
    return sorted({r.subject for r in rows if (r.event, r.outcome) == ("dataset.register", "ok")})


def describe_dataset(service: Any, name: str) -> dict[str, Any]:
    report = service.privacy_report(name)
    last = report.entries[-1]
    certificate = report.certificate()
    return {
        "place": f"{last['seq']}-{last['hash']}",
        "entries": len(report.entries),
        "total_epsilon": report.total_epsilon if math.isfinite(report.total_epsilon) else None,
        "target_epsilon": certificate["registered"]["epsilon"],
        "delta": certificate["registered"]["delta"],
        "guarantee": certificate["guarantee"],
        "linked_datasets": certificate["linked_datasets"],
        "charges": {run: facts["charges"] for run, facts in certificate["runs"].items()},
        "counted": {run: facts["counted"] for run, facts in certificate["runs"].items()},
    }


def key_id(secret: str) -> str:
    return secret.split("-")[1]


def describe_keys(service: Any, secrets: dict[str, str]) -> dict[str, Any]:
    listed = {info.key_id: info for info in service.list_api_keys()}
    described = {}
    for name, secret in secrets.items():
        info = listed.get(key_id(secret))
        described[name] = {"id": key_id(secret), "secret": secret, "listed": info is not None}
        if info is not None:
            described[name] |= {
                "label": info.label,
                "models": list(info.models),
                "created_at": info.created_at.isoformat(),
                "expires_at": info.expires_at and info.expires_at.isoformat(),
            }
    return described


# --- measure ---------------------------------------------------------------------------------


def measure(out: Path) -> None:
    """Every artifact, loaded in a copy of the home: losses and weights. The copy is not kept."""
    from tg_tinker import ServiceClient

    expected = json.loads((out / "expected.json").read_text())
    warnings.simplefilter("ignore")
    for tenant, known in expected["tenants"].items():
        with ServiceClient("local", tenant=tenant) as service:
            known["resumed"] = resume(service, known)
            for run in known["runs"].values():
                measure_run(service, run["id"], known["artifacts"])
            problems = [problem for _, problem in service.verify_artifacts() if problem]
            assert not problems, problems
            if tenant == "default":
                known["greedy"] = greedy(service, known)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def measure_run(service: Any, run: str, artifacts: dict[str, Any]) -> None:
    own = [one for name, one in artifacts.items() if one["run"] == run and name != "expired"]
    if not own:
        return
    with service.get_training_client(run) as tc:
        for one in own:
            loaded = tc.load_state(one["id"])
            one["metadata"] = loaded.metadata
            one["evaluated_loss"] = evaluate(tc)
            if tc.config.lora_config is not None:
                one["weights_sha256"] = exported_digest(service, one["id"])


def evaluate(tc: Any) -> float | None:
    """Of the weights as they are; NaN is hidden. Rounded: other machines add in another order."""
    tc.eval()
    loss = tc.forward_backward(EVALUATED).result().loss
    tc.train()
    return None if math.isnan(loss) else round(loss, 6)


def resume(service: Any, known: dict[str, Any]) -> dict[str, Any]:
    """One step more of each parked or lost run that is not private: the optimizer counts, too."""
    resumed = {}
    for name in [name for name in ("plain", "lost") if name in known["runs"]]:
        run = known["runs"][name]
        if run["reason"] == "closed":
            continue
        tc = service.get_training_client(run["id"])
        before = tc.step
        result = train(tc, 1, 4, 7)
        resumed[name] = {
            "step": before,
            "trained_rows": [1, 4, 7],
            "grad_norm": round(result.grad_norm, 6),
            "learning_rate": result.learning_rate,
            "evaluated_loss": evaluate(tc),
        }
    return resumed


def greedy(service: Any, known: dict[str, Any]) -> dict[str, Any]:
    with service.get_training_client(known["runs"]["plain"]["id"]) as tc:
        tc.load_state(known["artifacts"]["labelled"]["id"])
        (sample,) = tc.sample(PROMPT, max_tokens=12, temperature=0).samples
    return {
        "artifact": "labelled",
        "max_tokens": 12,
        "token_ids": list(sample.token_ids),
        "completion": sample.completion,
    }


def exported_digest(service: Any, artifact: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        exported = service.export_adapter(artifact, str(Path(folder) / "adapter"))
        return weights_digest(exported / "adapter_model.safetensors")


def weights_digest(file: Path) -> str:
    """SHA-256 over names, dtypes, shapes and values of all tensors, whatever their order."""
    import numpy as np
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def checkout(home: Path) -> Iterator[Path]:
    """A copy as git would make it, with the modes put back that TG-Tinker looks at."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "home"
        shutil.copytree(home, copy)
        for path in copy.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        copy.chmod(0o700)
        for name in ("keyring", "audit.key"):
            (copy / name).chmod(0o600)
        yield copy


# --- all of it -------------------------------------------------------------------------------


def phase(name: str, out: Path, home: Path) -> None:
    """In a process of its own. It ends with its embedded cluster."""
    sys.stderr.write(f"{name}\n")
    environment = os.environ | {
        "TG_TINKER_HOME": str(home), "HF_HUB_CACHE": str(out / "hub"), "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).absolute()), name, str(out)]
    subprocess.run(command, check=True, env=environment, cwd=out)


def main() -> None:
    if len(sys.argv) == 3:
        {"build": build, "describe": describe, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
        return
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True)
    home = out / "home"
    lay_model(out / "hub")
    phase("build", out, home)
    settle(home)
    time.sleep(2)  # until the artifact that expires has done so, however fast this was
    phase("describe", out, home)
    settle(home)
    with checkout(home) as copy:
        phase("measure", out, copy)
    (out / "found.json").unlink()


if __name__ == "__main__":
    main()
