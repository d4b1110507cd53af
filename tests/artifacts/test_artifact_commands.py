"""Tests what SDK and command line offer for saved artifacts, on a real registry and store
without Ray."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.registry.schema import METADATA
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from tg_tinker import InvalidRequestError, NotFoundError
from tg_tinker.cli.main import main
from tg_tinker.client.artifacts import MOST_LISTED
from tg_tinker.client.service import ServiceClient
from tg_tinker.records.audit_log import AuditRow, chained


class Calls(ServiceClient):
    """The methods of the real client that concern artifacts."""

    def __init__(self, service: Service) -> None:
        self._tenant, self._store = TENANT, str(service.root)
        self._home = self._audit_keys = service.home
        self._cluster: Any = None
        self._attach(service.registry)

    def close(self) -> None:
        pass


@pytest.fixture
def calls(service: Service) -> Calls:
    return Calls(service)


def run(calls: Calls, *words: str, code: int = 0, answer: str | None = None) -> str:
    found = CliRunner().invoke(main, ["artifacts", *words], obj=lambda: calls, input=answer)
    assert found.exit_code == code, found.output
    return found.output


# --- the SDK -------------------------------------------------------------------------------------


def test_a_listing_passes_every_condition_on(calls: Calls, service: Service) -> None:
    first, second = service.publish(), service.publish()
    calls.set_labels(second, {"stage": "prod"})
    when = calls.get_artifact(second).created_at

    def found(**conditions: Any) -> list[str]:
        return [info.artifact_id for info in calls.list_artifacts(**conditions)]

    assert found() == [first, second]
    assert found(label="stage=prod") == found(after=first) == [second]
    assert found(older_than=when) == found(limit=1) == [first]
    assert found(newer_than=when - timedelta(microseconds=2), run=service.run) == [second]
    assert found(run="tc-none") == []


@pytest.mark.parametrize(
    "conditions",
    [
        {"limit": 0}, {"limit": -1}, {"limit": MOST_LISTED + 1}, {"label": "stage"},
        {"label": "Stage=a"}, {"label": ""}, {"newer_than": datetime(2026, 1, 1)},
        {"older_than": datetime(2026, 1, 1)}, {"limit": "5"}, {"limit": True}, {"limit": 2.0},
        {"label": 3},
    ],
)  # fmt: skip
def test_a_condition_of_another_form_is_refused(calls: Calls, conditions: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        calls.list_artifacts(**conditions)


@pytest.mark.parametrize("labels", [None, "stage=prod", [("stage", "prod")], {"stage": None}])
def test_labels_of_another_type_are_refused(calls: Calls, service: Service, labels: Any) -> None:
    artifact = service.publish()
    with pytest.raises(InvalidRequestError, match="label"):
        calls.set_labels(artifact, labels)
    assert calls.get_artifact(artifact).labels == {}


def test_one_artifact_alone_is_verified_an_expired_one_too(calls: Calls, service: Service) -> None:
    artifact, other = service.publish(), service.publish()
    (service.root / f"t/{TENANT}/keys/{other}.json").unlink()
    assert [*calls.verify_artifacts(artifact)] == [(artifact, "")]
    ((found, problem),) = calls.verify_artifacts(other)
    assert (found, "not in the store" in problem) == (other, True)
    with pytest.raises(NotFoundError):
        [*calls.verify_artifacts("art-none")]


def test_an_expiry_without_a_time_zone_is_refused(calls: Calls, service: Service) -> None:
    with pytest.raises(InvalidRequestError, match="time zone"):
        calls.set_expiry(service.publish(), datetime(2100, 1, 1))


def test_life_goes_from_copy_to_shredding(calls: Calls, service: Service) -> None:
    source = service.publish()
    copy = calls.copy_artifact(source)
    assert calls.reseal_artifact(source).artifact_id == source
    assert [*calls.verify_artifacts()] == [(source, ""), (copy.artifact_id, "")]
    assert calls.shred_artifact(source)
    calls.set_expiry(copy.artifact_id, datetime.now(UTC) + timedelta(days=1))
    assert [*calls.delete_expired()] == []
    assert_same(service.fetch(copy.artifact_id), checkpoint())


# --- the commands --------------------------------------------------------------------------------


def test_labels_and_expiry_by_command(calls: Calls, service: Service) -> None:
    artifact, other = service.publish(), service.publish()
    assert "owner=anna stage=prod" in run(calls, "label", artifact, "stage=prod", "owner=anna")
    assert artifact in run(calls, "list", "--label", "stage=prod")
    assert other not in run(calls, "list", "--label", "stage=prod")
    assert other in run(calls, "list", "--after", artifact)
    assert other not in run(calls, "list", "--limit", "1")
    assert "no artifact fits" in run(calls, "list", "--older-than", "2020-01-31")
    assert "owner" in run(calls, "show", artifact)
    assert run(calls, "label", artifact).endswith(": -\n")
    for words in (["a=1", "a=2"], ["a"], ["A=1"]):
        assert "label" in run(calls, "label", artifact, *words, code=1)
    assert "expires: 2" in run(calls, "expire", artifact, "--days", "30")
    expires = calls.get_artifact(artifact).expires_at
    assert expires is not None
    assert timedelta(days=29) < expires - datetime.now(UTC) <= timedelta(days=30)
    assert "2099-01-31 00:00" in run(calls, "expire", artifact, "--at", "2099-01-31")
    assert "never" in run(calls, "expire", artifact, "--never")
    for words in ([], ["--days", "1", "--never"], ["--days", "1", "--at", "2099-01-31"]):
        run(calls, "expire", artifact, *words, code=1)


def test_a_long_row_is_not_cut(calls: Calls, service: Service) -> None:
    artifact = service.publish()
    calls.set_labels(artifact, {f"label-{i}": "x" * 63 for i in range(16)})
    assert f"label-9={'x' * 63}" in run(calls, "list")


def test_copy_reseal_and_verify_by_command(calls: Calls, service: Service) -> None:
    artifact = service.publish()
    copy = run(calls, "copy", artifact).strip()
    assert_same(service.fetch(copy), checkpoint())
    assert "fresh key" in run(calls, "reseal", artifact)
    assert service.registry.catalogue.reachable(TENANT) == {copy, f"{artifact}.2"}
    assert "2 of 2" in run(calls, "verify")
    (service.root / f"t/{TENANT}/keys/{copy}.json").unlink()
    assert "1 of 2" in run(calls, "verify", code=1)
    assert "1 of 1" in run(calls, "verify", artifact)
    assert "0 of 1" in run(calls, "verify", copy, code=1)


@pytest.mark.parametrize("command", ["delete", "shred"])
def test_what_destroys_asks_first(calls: Calls, service: Service, command: str) -> None:
    artifact = service.publish()
    run(calls, command, artifact, code=1, answer="n\n")
    assert_same(service.fetch(artifact), checkpoint())
    said = run(calls, command, artifact, "--yes")
    assert ("does not reach" in said) == (command == "shred")
    with pytest.raises(NotFoundError):
        service.fetch(artifact)


def test_only_what_has_expired_is_deleted_by_command(
    calls: Calls, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, kept = service.publish(), service.publish()
    for artifact, days in ((over, "1"), (kept, "3")):
        run(calls, "expire", artifact, "--days", days)
    now = datetime.now(UTC).timestamp()
    monkeypatch.setattr("actors.registry.catalogue.time.time", lambda: now + 2 * 86_400)
    for words in ([], [over, "--expired"]):
        run(calls, "delete", *words, code=1)
    run(calls, "delete", "--expired", code=1, answer="n\n")
    assert len(calls.list_artifacts()) == 2
    run(calls, "delete", "--expired", "--yes")
    assert [info.artifact_id for info in calls.list_artifacts()] == [kept]


def test_what_is_lost_is_deleted_by_its_name_alone(calls: Calls) -> None:
    assert "needs one named artifact" in run(
        calls, "delete", "--expired", "--lost", "--yes", code=1
    )


@pytest.mark.parametrize(
    "command", ["show", "label", "copy", "reseal", "shred", "delete", "verify"]
)
def test_an_unknown_artifact_is_one_line_and_no_question(calls: Calls, command: str) -> None:
    assert "list_artifacts" in run(calls, command, "art-none", code=1)


# --- terminals -----------------------------------------------------------------------------------

ESCAPE = "\x1b]0;title\x07\x1b[2J\u202e"
"""It would rename the window, clear it, and turn the text around."""


class Everything(Calls):
    """The part of `ServiceClient` that lists the contents of the database."""

    def audit_log(self, since: int, limit: int) -> Any:
        return [*map(AuditRow.parse, self._registry.audit_log.rows(self._tenant, since, limit))]

    def list_training_clients(self) -> Any:
        return self._registry.runs.of(self._tenant)

    def describe_training_client(self, client: str) -> Any:
        return self._registry.runs.get(self._tenant, client)[0]


@pytest.mark.parametrize(
    "words",
    [
        "artifacts list", "artifacts show ART", "keys list", "api-keys list", "audit-log show",
        "clients list", "clients info RUN", "runs",
    ],
)  # fmt: skip
def test_texts_of_the_database_command_no_terminal(service: Service, words: str) -> None:
    """Anyone who can write to the database may have put these texts there."""
    artifact, registry = service.publish(), service.registry
    registry.catalogue.set_labels(TENANT, artifact, {"stage": "x"})
    registry.api_keys.create(TENANT, ESCAPE, [], None)  # a row with another label is not listed
    with registry.database.change() as tx:
        newest = AuditRow.parse(registry.audit_log.rows(TENANT, 0, 1000)[-1])
        texts = {"who": ESCAPE, "event": ESCAPE, "subject": ESCAPE, "outcome": ESCAPE}
        row = chained(newest, time=newest.time, tenant=TENANT, details={}, **texts)
        for table, values in (
            ("artifact_labels", {"value": ESCAPE}),
            ("runs", {"status": ESCAPE, "ended": ESCAPE}),
        ):  # fmt: skip
            tx.execute(METADATA.tables[table].update().values(values))
        for table, values in (
            ("keys", {"id": ESCAPE, "fingerprint": "00", "place": 99}),
            ("audit_rows", {"tenant": TENANT, "seq": row.seq, "row": row.line()}),
        ):
            tx.execute(METADATA.tables[table].insert().values(values))
    asked = words.replace("ART", artifact).replace("RUN", service.run).split()
    calls = Everything(service)
    said = CliRunner().invoke(main, asked, obj=lambda: calls)
    assert r"\x1b]0;title\x07\x1b[2J\u202e" in said.output
    assert not any(character in said.output for character in ESCAPE if not character.isprintable())


def test_an_error_commands_no_terminal_and_keeps_its_lines(calls: Calls) -> None:
    def fails(*_: object) -> None:
        raise NotFoundError(f"no {ESCAPE}\nanother ä line")

    calls.get_artifact = fails  # type: ignore[method-assign, assignment]
    said = run(calls, "show", "art-1", code=1)
    assert said == "error: no \\x1b]0;title\\x07\\x1b[2J\\u202e\nanother ä line\n"
