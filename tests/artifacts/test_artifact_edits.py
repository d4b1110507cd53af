"""Tests thousands of random edits of an artifact in the store: none loads, none changes the
session.

An ordinary run makes a thousand edits, `make soak` ten thousand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from actors.artifacts import publish
from actors.artifacts.publish import Draft
from actors.engine.checkpoint import Checkpoint, from_files, to_files
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING
from actors.training.place import Place
from actors.training.worker import Worker
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.helpers import assert_equal, examples, weights
from support.models import make_model
from tg_tinker import IntegrityError, LoRAConfig, NotFoundError, TrainingConfig
from tg_tinker.storage.segments import SEGMENT

EDITS = 10_000 if "TG_TINKER_SOAK" in os.environ else 1000
OTHER_TENANT = "bank"

Files = dict[str, bytes]
"""The files of an artifact by name; its wrapped key is `key`."""


class Unchecked(Registry):
    """A registry that accepts every manifest, as if the attacker had edited it to match."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.catalogue.check_manifest = (  # type: ignore[method-assign]
            lambda tenant, artifact_id, manifest: None
        )


class Attack:
    """An artifact of several segments, and the parts with which an attacker can replace its parts.

    Attributes:
        own: the files of the artifact.
        donors: files of an older save, of another tenant's save of the same state, and of an
            earlier upload of this very artifact under the same key.
    """

    def __init__(self, service: Service, saved: Checkpoint) -> None:
        self.service, self.store = service, service.store
        older = self._of(TENANT, service.publish(saved))
        draft = Draft(service.registry, service.store, service.capability, to_files(saved))
        publish.write(self.store, draft)
        self.artifact = draft.artifact_id
        earlier = self._of(TENANT, self.artifact)
        publish.publish(
            service.registry, self.store, draft, run_id=service.run, epoch=service.epoch,
            step=saved.state.step, include_optimizer=True,
        )  # fmt: skip
        run = service.registry.runs.create(OTHER_TENANT, '{"model_ref": "m"}')
        epoch = service.registry.runs.claim(run)
        shown = service.registry.data_keys.capability(OTHER_TENANT, run, epoch)
        theirs = Draft(service.registry, self.store, shown, to_files(saved))
        publish.publish(
            service.registry, self.store, theirs, run_id=run, epoch=epoch,
            step=saved.state.step, include_optimizer=True,
        )  # fmt: skip
        self.own = self._of(TENANT, self.artifact)
        self.donors = (older, self._of(OTHER_TENANT, theirs.artifact_id), earlier)
        self.earlier = earlier

    def _path(self, tenant: str, artifact: str, name: str) -> Path:
        root = self.service.root / "t" / tenant
        return root / f"keys/{artifact}.json" if name == "key" else root / f"a/{artifact}/{name}"

    def _of(self, tenant: str, artifact: str) -> Files:
        folder = self._path(tenant, artifact, "x").parent
        names = ["key", *(path.name for path in folder.iterdir())]
        return {name: self._path(tenant, artifact, name).read_bytes() for name in names}

    def put(self, files: Files, instead_of: Files) -> None:
        for name in instead_of.keys() | files.keys():
            path = self._path(TENANT, self.artifact, name)
            if name not in files:
                path.unlink()
            elif files[name] is not instead_of.get(name):
                path.write_bytes(files[name])


# --- edits: each changes `files`, given the attack ---------------------------------------------


def any_name(random: Random, files: Files) -> str:
    return random.choice(sorted(files))


def segments(content: bytes) -> list[bytes]:
    return [content[at : at + SEGMENT] for at in range(0, len(content), SEGMENT)]


def truncate(random: Random, files: Files, attack: Attack) -> None:
    name = any_name(random, files)
    ends = [random.randrange(len(files[name])), len(files[name]) - 1, 0]
    ends += range(SEGMENT, len(files[name]), SEGMENT)
    files[name] = files[name][: random.choice(ends)]


def reorder(random: Random, files: Files, attack: Attack) -> None:
    name = any_name(random, files)
    parts = segments(files[name])
    random.shuffle(parts)
    files[name] = b"".join(parts)


def repeat(random: Random, files: Files, attack: Attack) -> None:
    name = any_name(random, files)
    parts = segments(files[name])
    place = random.randrange(len(parts) + 1)
    parts[place : place + random.randrange(2)] = [random.choice(parts)]
    files[name] = b"".join(parts)


def drop(random: Random, files: Files, attack: Attack) -> None:
    name = any_name(random, files)
    parts = segments(files[name])
    del parts[random.randrange(len(parts))]
    files[name] = b"".join(parts)


def graft(random: Random, files: Files, attack: Attack) -> None:
    """Replaces a segment by one of the same file from elsewhere, at the same position or
    another."""
    name = any_name(random, files)
    parts, theirs = segments(files[name]), segments(random.choice(attack.donors)[name])
    place = random.randrange(len(parts))
    parts[place] = theirs[place] if random.random() < 0.7 else random.choice(theirs)
    files[name] = b"".join(parts)


def flip(random: Random, files: Files, attack: Attack) -> None:
    name = any_name(random, files)
    changed = bytearray(files[name])
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    files[name] = bytes(changed)


def overwrite(random: Random, files: Files, attack: Attack) -> None:
    name = any_name(random, files)
    start, end = sorted(random.randrange(len(files[name]) + 1) for _ in range(2))
    fill = random.choice([bytes(end - start), random.randbytes(end - start)])
    files[name] = files[name][:start] + fill + files[name][end:]


def append(random: Random, files: Files, attack: Attack) -> None:
    files[any_name(random, files)] += random.choice([b"\0", random.randbytes(16), bytes(SEGMENT)])


def swap(random: Random, files: Files, attack: Attack) -> None:
    one, other = random.sample(sorted(files), 2)
    files[one], files[other] = files[other], files[one]


def replay(random: Random, files: Files, attack: Attack) -> None:
    """Replaces some files, or all, by those of another artifact or of an earlier upload."""
    donor = random.choice(attack.donors)
    for name in random.sample(sorted(files), random.randint(1, len(files))):
        files[name] = donor[name]


def replay_all(random: Random, files: Files, attack: Attack) -> None:
    files.update(random.choice(attack.donors))


def remove(random: Random, files: Files, attack: Attack) -> None:
    del files[any_name(random, files)]


def redescribe(random: Random, files: Files, attack: Attack) -> None:
    """Replaces the manifest by another of the same form: a file left out, a size, hash, id or
    tag changed."""
    manifest = json.loads(files["manifest.json"])
    name = random.choice(sorted(manifest["files"]))
    match random.randrange(6):
        case 0:
            del manifest["files"][name]
        case 1:
            manifest["files"][name]["size"] += random.choice([-1, 1])
        case 2:
            manifest["files"][name]["sha256"] = random.randbytes(32).hex()
        case 3:
            manifest["commitment"] = random.randbytes(32).hex()
        case 4:
            manifest["tag"] = random.randbytes(32).hex()
        case _:
            manifest["files"]["more.enc"] = manifest["files"][name]
            files["more.enc"] = files[name]
    files["manifest.json"] = canonical(manifest)


def and_rehash(random: Random, files: Files, attack: Attack) -> None:
    """Makes another edit, and a manifest with the right sizes and hashes for it."""
    random.choice([truncate, reorder, graft, flip, overwrite, swap, replay])(random, files, attack)
    try:
        manifest = json.loads(files["manifest.json"])
        for name, entry in manifest["files"].items():
            entry["size"] = len(files[name])
            entry["sha256"] = hashlib.sha256(files[name]).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # the manifest itself was edited
    files["manifest.json"] = canonical(manifest)


def canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


EDIT: list[Callable[[Random, Files, Attack], None]] = [
    truncate, reorder, repeat, drop, graft, flip, overwrite, append, swap, replay, replay_all,
    remove, redescribe, and_rehash,
]  # fmt: skip


# --- none of them loads ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model that is wide enough for an adapter of more than one segment."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden_size=256)


@pytest.mark.parametrize("kind", [Registry, Unchecked])
def test_no_random_edit_loads_or_changes_the_session(
    service: Service, model: Path, tmp_path: Path, kind: type[Registry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    registry = kind(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    place = Place(
        TENANT, service.run, service.epoch, str(service.root), tmp_path, service.capability
    )
    config = TrainingConfig(model_ref=str(model), lora_config=LoRAConfig(rank=80))
    worker = Worker(place, config, registry, lambda _: None)
    worker.session.forward_backward(examples())
    worker.session.optim_step()
    state = worker.session.live_state(include_optimizer=True)
    attack = Attack(service, Checkpoint(state, {}, service.registry.runs.of(TENANT)[0].created_at))
    assert max(len(segments(content)) for content in attack.own.values()) >= 3
    assert worker.load_state(lambda: None, attack.artifact).step == 1
    worker.session.forward_backward(examples())
    worker.session.optim_step()  # what is loaded would be seen
    live, released = weights(worker.session), []
    monkeypatch.setattr("actors.training.worker.from_files", released.append)
    random, before = Random(5), attack.own
    for number in range(EDITS // 2):
        edit = random.choice(EDIT)
        files = dict(attack.own)
        edit(random, files, attack)
        if files == attack.own or (kind is Unchecked and files == attack.earlier):
            continue  # nothing was changed; an earlier upload is valid to a registry that forgot
        attack.put(files, before)
        before = files
        try:
            worker.load_state(lambda: None, attack.artifact)
        except (IntegrityError, NotFoundError):
            pass
        else:
            pytest.fail(f"edit {number} ({edit.__name__}) was loaded")
        assert released == []
        assert worker.session.step == 2
        assert all(torch.equal(live[n], now) for n, now in weights(worker.session).items())
    attack.put(attack.own, before)
    monkeypatch.setattr("actors.training.worker.from_files", from_files)
    assert worker.load_state(lambda: None, attack.artifact).step == 1
    assert_equal(weights(worker.session), state.weights)
