"""Tests the audit log as its users see it: the SDK, the command, a real service."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.registry import rollback
from actors.storage.home import DATABASE
from support.audit import CONFIG, THEM, US, VECTORS, LocalService, good, restored, vector
from support.audit import place as place  # fixtures
from support.audit import registry as registry
from support.audit import run as run
from support.processes import free_port
from tg_tinker import (
    DPBudgetExceededError,
    DPConfig,
    IntegrityError,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    ServiceClient,
    TrainingConfig,
)
from tg_tinker.cli.main import main
from tg_tinker.cluster.messages import Request
from tg_tinker.records.audit_log import AuditRow
from tg_tinker.records.files import read_head, read_public_key, write_export
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.successions import Signers
from tg_tinker.storage.envelope import new_signing_key

# --- the SDK on a real registry, without a cluster ----------------------------------------------


@pytest.fixture
def service(place: Path) -> LocalService:
    made = LocalService(place)
    for _ in range(5):
        made._registry.runs.create(US, CONFIG)
    return made


def test_verification_says_since_which_head(service: LocalService, place: Path) -> None:
    first = service.verify_audit_log()
    assert (first.seq, first.since) == (5, None)
    first.check((place / "audit.pub").read_bytes())
    service._registry.runs.create(US, CONFIG)
    second = service.verify_audit_log()
    assert (second.seq, second.since) == (6, first)
    assert read_head(place / f"audit-head-{US}") == second
    assert kept_by(service) in ([first, second], [second, first])


def test_a_head_is_known_also_where_no_row_followed_it(service: LocalService) -> None:
    first = service.verify_audit_log()
    assert service.verify_audit_log().since == first


def kept_by(service: LocalService) -> list[AuditHead]:
    public_key = (service._home / "audit.pub").read_bytes()
    return rollback.kept(service._store, US, Signers(public_key))


def test_an_old_database_behind_the_head_of_this_home_is_refused(service: LocalService) -> None:
    def go_on() -> None:
        service._registry.runs.create(US, CONFIG)
        service.verify_audit_log()

    restored(service, go_on)
    shutil.rmtree(service._store)
    with pytest.raises(IntegrityError, match="ends at row 5, a head of row 6"):
        service.verify_audit_log()
    service._registry.runs.create(US, CONFIG)  # it goes on, on another branch
    with pytest.raises(IntegrityError, match="forked: row 6"):
        service.verify_audit_log()


def test_an_old_home_behind_a_head_in_the_store_is_refused(service: LocalService) -> None:
    def go_on() -> None:
        service._registry.runs.create(US, CONFIG)
        rollback.keep(service._store, service._registry.audit_log.head(US))

    restored(service, go_on)
    with pytest.raises(IntegrityError, match="ends at row 5, a head of row 6"):
        service.verify_audit_log()


def test_a_head_of_a_lost_branch_is_not_replaced_by_that_of_the_next(
    service: LocalService,
) -> None:
    def go_on() -> None:
        service._registry.runs.create(US, CONFIG)
        rollback.keep(service._store, service._registry.audit_log.head(US))

    restored(service, go_on)
    go_on()  # the store is given a head of the same number
    with pytest.raises(IntegrityError, match="forked: row 6"):
        service.verify_audit_log()


def test_a_head_in_other_hands_is_enough(service: LocalService) -> None:
    kept: list[AuditHead] = []

    def go_on() -> None:
        service._registry.runs.create(US, CONFIG)
        kept.append(service._registry.audit_log.head(US))

    restored(service, go_on)
    assert service.verify_audit_log().seq == 5
    with pytest.raises(IntegrityError, match="ends at row 5"):
        service.verify_audit_log(kept[0])


def test_rows_changed_in_the_database_are_named(service: LocalService) -> None:
    service.verify_audit_log()
    with closing(sqlite3.connect(service._home / DATABASE)) as database:
        database.execute(
            "UPDATE audit_rows SET row = replace(row, 'sdk', 'xyz') WHERE seq = 3"
        )  # fmt: skip
        database.commit()
    with pytest.raises(IntegrityError, match="row 3 of the audit log was changed"):
        service.verify_audit_log()


def test_a_refused_log_does_not_replace_the_head_that_is_kept(service: LocalService) -> None:
    head = service.verify_audit_log()
    with closing(sqlite3.connect(service._home / DATABASE)) as database:
        database.execute("DELETE FROM audit_rows WHERE seq = 5")
        database.commit()
    with pytest.raises(IntegrityError):
        service.verify_audit_log()
    assert read_head(service._home / f"audit-head-{US}") == head
    assert kept_by(service) == [head]


def test_what_is_no_head_in_the_store_is_named_until_it_is_removed(service: LocalService) -> None:
    head = service._registry.audit_log.head(US)
    folder = Path(service._store) / f"t/{US}/audit"
    theirs = service._registry.audit_log.head(THEM)
    for name, line, why in (
        (f"{head.place}.json", head.signed(new_signing_key()).line(), "another key signed"),
        ("x.json", "{}", "not a signed head"),
        ("x.json", head.line()[:-9], "not a signed head"),
        ("f o.json", head.line(), "not a signed head"),
        (f"{theirs.place}.json", theirs.line(), "another tenant"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{line}\n")
        with pytest.raises(IntegrityError, match=rf"audit/{name} .*{why}.* remove that object"):
            service.verify_audit_log()
        (folder / name).unlink()
    (folder / f"{head.place}.json.0badf00d").touch()  # what a killed write left on Azure
    service.verify_audit_log()


@pytest.mark.parametrize(("since", "limit"), [(-1, 10), (0, 0), (0, 10_001)])
def test_impossible_pages_are_refused(service: LocalService, since: int, limit: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"since={since}, limit={limit}"):
        service.audit_log(since, limit)


# --- the command ---------------------------------------------------------------------------------


def call(*words: object, service: ServiceClient | None = None) -> Any:
    return CliRunner().invoke(main, ["audit-log", *map(str, words)], obj=lambda: service)


def test_an_export_is_verified_where_there_is_no_cluster(
    service: LocalService, tmp_path: Path
) -> None:
    early = tmp_path / "early.jsonl"
    assert call("export", early, service=service).exit_code == 0
    service._registry.runs.create(US, CONFIG)
    late = tmp_path / "late.jsonl"
    assert call("export", late, service=service).exit_code == 0
    assert len(late.read_text().splitlines()) == 7
    program = (
        "import sys; from tg_tinker.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, sorted({'ray', 'torch', 'sqlalchemy',"
        " 'transformers', 'actors'} & set(sys.modules)))"
    )
    words = ["audit-log", "verify", str(late), "--since", str(early), "--public-key"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, str(service._home / "audit.pub")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "verified: 6 rows" in done.stdout
    assert "consistent since head 5" in done.stdout
    assert done.stdout.endswith("0 []\n")
    found = call("verify", early, "--since", late, "--public-key", service._home / "audit.pub")
    assert (found.exit_code, "a head of row 6 is known" in found.output) == (1, True)


def test_an_export_never_overwrites_a_file(service: LocalService, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    found = call("export", tmp_path / "there", service=service)
    assert (found.exit_code, "File exists" in found.output) == (1, True)
    assert (tmp_path / "there").read_text() == "mine"


def test_an_export_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[AuditRow]:
        yield good()[0]
        raise IntegrityError("the second is damaged")

    with pytest.raises(IntegrityError, match="second"):
        write_export(tmp_path / "log", rows(), read_head(vector("good")))
    assert not (tmp_path / "log").exists()


def test_show_and_verify_say_what_there_is(service: LocalService, tmp_path: Path) -> None:
    shown = call("show", "--since", 3, service=service).output.splitlines()
    assert [line.split()[0] for line in shown] == ["row", "4", "5"]
    assert "run.create" in shown[1]
    assert "5 rows" in call("verify", service=service).output
    assert call("verify", tmp_path / "x", service=service).exit_code == 1
    missing = call("verify", tmp_path / "x", "--public-key", VECTORS / "audit.pub")
    assert (missing.exit_code, "No such file" in missing.output) == (1, True)
    with pytest.raises(NotFoundError, match="public key"):
        read_public_key(tmp_path / "audit.pub")


# --- a real service ------------------------------------------------------------------------------

CANARY = "qzvx-canary-prompt"


def post(url: str, key: str, body: dict[str, Any]) -> int:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def for_one_use(config: TrainingConfig) -> TrainingConfig:
    """Returns the same config as a private one, with one use of each unit."""
    dp = DPConfig(noise_multiplier=1.0, max_participations=1)
    return config.model_copy(update={"dp_config": dp, "dataset_id": "patients"})


@pytest.mark.slow
def test_everything_that_a_service_does_leaves_its_row_and_no_content(
    embedded: None, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """It covers training, private training, artifacts, sampling over SDK and HTTP, and keys."""
    tokens = [70, 71, 72, 73, 74, 75, 76, 77]
    batch = {"input_ids": [tokens]}
    config = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2))
    with ServiceClient(address="local") as service:
        key, info = service.create_api_key("a label", days=1)
        url = service.serve_http(str(tiny_model), port=free_port())
        with service.create_training_client(config) as tc:
            calls = [tc.forward_backward(batch), tc.forward_backward({"input_ids": [tokens[:5]]})]
            tc.optim_step().result()
            results = [call.result() for call in calls]
            saved = tc.save_state(metadata={"note": CANARY}).artifact_id
            tc.sample([CANARY, CANARY], max_tokens=3, temperature=0)
            assert list(tc.sample_stream(CANARY, max_tokens=3))
            assert post(url, key, {"model": tc.id, "prompt": CANARY, "max_tokens": 4}) == 200
            assert post(url, key, {"model": saved, "prompt": CANARY, "max_tokens": 4}) == 200
            assert post(url, f"{key}x", {"model": "base", "prompt": CANARY}) == 401
            tc.load_state(saved)
            tc.forward_backward(batch)
            step = tc.optim_step()
            again = Request(step.future_id, "optim_step", 1, "any", 0)  # a repeat is no other step
            link = tc._calls.link
            assert link.open(link.send(again), again.request_id).value == step.result()
            # The row of the step is there although the client closes at once.
        with service.get_training_client(tc.id):
            pass
        with service.create_training_client(for_one_use(config)) as private:
            private.forward_backward(batch)
            private.optim_step().result()
            private.forward_backward(batch)
            assert isinstance(private.optim_step().exception(), DPBudgetExceededError)
        service.export_adapter(saved, tmp_path / "adapter")
        service.delete_artifact(saved)
        service.revoke_api_key(info.key_id)
        head, rows = service.verify_audit_log(), service.audit_log()
    assert head.since is not None, "save_state and export put heads into the store"
    assert (head.seq, head.hash) == (rows[-1].seq, rows[-1].hash)
    check_rows(rows, tc.id, private.id, saved, info.key_id)
    stored = "".join(row.line() for row in rows)
    hashes = [part for one in results for part in (one.batch_hash, one.gradient_hash)]
    for secret in (*hashes, CANARY, key, "a label", str(tokens)[1:-1]):
        assert secret.removeprefix("sha256:") not in stored


def check_rows(rows: list[AuditRow], run: str, private: str, saved: str, key: str) -> None:
    """Checks the rows of each subject, in order. Rows of different actors may be interleaved."""
    one, three, by_key = f"{run}@1", f"{run}@3", f"api-key {key}"
    expected = {
        run: [
            ("sdk", "run.create", "ok"), ("sdk", "run.claim", "ok"), (one, "step", "ok"),
            ("sdk", "sample", "ok"), ("sdk", "sample", "ok"), (by_key, "sample", "ok"),
            (one, "step", "ok"), ("sdk", "run.complete", "ok"), ("sdk", "run.claim", "ok"),
            (three, "run.resume", "ok"), ("sdk", "run.complete", "ok"),
        ],
        saved: [
            (one, "artifact.save", "ok"), (by_key, "artifact.load", "ok"), (by_key, "sample", "ok"),
            (one, "artifact.load", "ok"), (three, "artifact.load", "ok"),
            ("sdk", "artifact.load", "ok"), ("sdk", "artifact.export", "ok"),
            ("sdk", "artifact.delete", "ok"),
        ],
        private: [
            ("sdk", "run.create", "ok"), ("sdk", "run.claim", "ok"), (f"{private}@1", "step", "ok"),
            ("sdk", "run.complete", "ok"),
        ],
        "patients": [
            (f"{private}@1", "dataset.register", "ok"), (f"{private}@1", "budget.reserve", "ok"),
            (f"{private}@1", "budget.charge", "ok"),
            (f"{private}@1", "budget.charge", "dp_budget_exceeded"),
            ("sdk", "budget.release", "ok"),
        ],
        key: [
            ("sdk", "api_key.create", "ok"), ("anyone", "api_key.check", "access_denied"),
            ("sdk", "api_key.revoke", "ok"),
        ],
    }  # fmt: skip
    for subject, wanted in expected.items():
        found = [(row.who, row.event, row.outcome) for row in rows if row.subject == subject]
        assert found == wanted, subject
    assert {row.subject for row in rows} == set(expected)
