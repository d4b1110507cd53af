"""Tests the command line: its help teaches, it starts quickly, and an error is one line."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import typer.testing
from typer.testing import CliRunner

from support.fakes import FakeService
from support.processes import free_port
from tg_tinker.cli.http_client import Server
from tg_tinker.cli.main import main
from tg_tinker.config import DPConfig, TrainingConfig
from tg_tinker.demo.options import DemoOptions, resume_command


@pytest.fixture
def service() -> FakeService:
    """Returns a service that has one run with one artifact."""
    service = FakeService()
    client = service.create_training_client(TrainingConfig(model_ref="some/model[x]"))
    client.forward_backward({"input_ids": [[1, 2, 3]]})
    client.optim_step()
    client.save_state()
    return service


def call(*words: str, service: FakeService | None = None, answer: str | None = None) -> Any:
    return CliRunner().invoke(main, list(words), obj=lambda: service, input=answer)


# --- help ---------------------------------------------------------------------------------------


def all_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    def walk(command: Any, words: tuple[str, ...]) -> None:
        found.append(words)
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, (*words, name))

    walk(typer.main.get_command(main), ())
    return found


def test_the_commands_are_these() -> None:
    assert {" ".join(words) for words in all_commands() if words} == {
        "clients", "clients list", "clients info", "clients park", "clients close",
        "demo", "init", "runs", "version", "doctor", "profile",
        "artifacts", "artifacts list", "artifacts export", "artifacts delete", "artifacts verify",
        "artifacts show", "artifacts label", "artifacts expire", "artifacts copy",
        "artifacts reseal", "artifacts shred", "artifacts import", "artifacts sweep",
        "keys", "keys list", "keys rotate", "keys retire", "keys new",
        "keys rotate-audit", "keys rotate-secret", "keys retire-secret",
        "privacy", "privacy report", "privacy certificate", "privacy ledger", "privacy verify",
        "privacy audit", "privacy plan", "privacy book-missing", "privacy drop",
        "privacy combinations", "serve", "sample", "chat",
        "audit-log", "audit-log show", "audit-log verify", "audit-log export",
        "api-keys", "api-keys create", "api-keys list", "api-keys revoke",
        "registry", "registry check", "registry accept", "registry backup", "registry restore",
        "registry upgrade",
        "up", "status", "down",
    }  # fmt: skip


def test_the_page_names_every_command_and_no_other() -> None:
    page = Path(__file__).parents[2] / "docs" / "service-client.md"
    rows = [line.split("|")[1] for line in page.read_text().splitlines()
            if line.startswith("| `tg-tinker")]  # fmt: skip
    told: set[str] = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        group = first.removeprefix("tg-tinker ").rpartition(" ")[0]
        told |= {first.removeprefix("tg-tinker "), *(f"{group} {one}".strip() for one in others)}
    commands = {" ".join(words) for words in all_commands() if words}
    groups = {name for name in commands if any(one.startswith(f"{name} ") for one in commands)}
    assert told == commands - groups


@pytest.mark.parametrize("words", [w for w in all_commands() if w != ("version",)], ids=" ".join)
def test_every_help_shows_an_example(words: tuple[str, ...]) -> None:
    found = call(*words, "--help")
    assert found.exit_code == 0
    examples = [line.strip() for line in found.output.splitlines()]
    wanted = " ".join(("tg-tinker", *words))
    assert any(line.startswith(wanted) for line in examples)


def test_without_a_command_it_shows_help() -> None:
    assert "tg-tinker demo" in call().output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, tg_tinker.cli.main;"
        "heavy = {'ray', 'torch', 'transformers', 'matplotlib', 'pyarrow', 'gguf'};"
        "print(heavy & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "set()"


def test_the_installed_command_is_this_program() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="tg-tinker")
    assert entry.load() is main


# --- demo ---------------------------------------------------------------------------------------


def test_options_and_defaults_of_the_demo_are_those_of_its_function() -> None:
    command: Any = typer.main.get_command(main)
    params = {p.name: p.default for p in command.commands["demo"].params if p.name != "help"}
    defaults = {f.name: f.default for f in dataclasses.fields(DemoOptions)}
    assert {n: Path(d) if n == "output" else d for n, d in params.items()} == defaults


def write_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_demo_runs_from_the_command_line_and_resumes_by_its_own_command(
    tmp_path: Path,
) -> None:
    options = DemoOptions(
        model="m", data=write_rows(tmp_path), steps=3, batch_size=2, rank=4, max_length=99,
        learning_rate=2e-3, output=tmp_path / "out", seed=5, no_privacy=True,
    )  # fmt: skip
    service = FakeService()
    service.artifacts["art-0"] = dataclasses.replace(_artifact(), artifact_id="art-0", step=1)
    words = resume_command(options, "art-0", "x").split()[1:]
    found = call(*words, service=service)
    assert found.exit_code == 0, found.output
    config = service.clients[0].config
    assert (config.model_ref, config.batch_size, config.seed) == ("m", 2, 5)
    assert config.lora_config is not None
    assert (config.lora_config.rank, config.optimizer.learning_rate) == (4, 2e-3)
    assert len(service.clients[0].trained) == 2  # steps 2 and 3
    assert (tmp_path / "out" / "loss.png").exists()


def _artifact() -> Any:
    service = FakeService()
    client = service.create_training_client(TrainingConfig(model_ref="m"))
    return service.artifact(client.save_state().artifact_id)


STOPS = pytest.mark.parametrize(
    ("stop", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["INT", "TERM", "HUP"],
)


@STOPS
def test_a_stop_gives_the_exit_status_of_shells(
    stop: signal.Signals, status: int, tmp_path: Path
) -> None:
    service = FakeService()
    service.on_create = lambda: signal.raise_signal(stop)
    words = ["--model", "m", "--data", str(write_rows(tmp_path)), "--output", str(tmp_path)]
    found = call("demo", *words, service=service)
    assert (found.exit_code, "Nothing was trained" in found.output) == (status, True)


@STOPS
def test_a_stop_at_a_question_is_no_answer(
    stop: signal.Signals, status: int, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyboard(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            signal.raise_signal(stop)
            return b"y\n"

    (saved,) = service.artifacts
    monkeypatch.setattr(typer.testing, "make_input_stream", lambda *_: Keyboard())
    assert call("artifacts", "delete", saved, service=service).exit_code == status
    assert saved in service.artifacts


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--rank", "x"], ["--color", "red"]])
def test_wrong_options_are_usage_errors(wrong: list[str]) -> None:
    assert call("demo", *wrong).exit_code == 2


# --- clients ------------------------------------------------------------------------------------


def test_clients_are_listed_described_parked_and_closed(service: FakeService) -> None:
    run = service.clients[0].id
    assert run in call("clients", "list", service=service).output
    said = call("clients", "info", run, service=service).output
    assert re.search(r"status +active", said)
    assert re.search(r"step +1", said)
    assert "parked" in call("clients", "park", run, service=service).output
    assert "parked" in call("clients", "list", service=service).output
    asked = call("clients", "close", run, service=service, answer="n\n")
    assert (asked.exit_code, service.clients[0].info().reason) == (1, "parked")
    assert "closed" in call("clients", "close", run, "--yes", service=service).output
    assert run not in call("clients", "list", service=service).output
    assert run in call("clients", "list", "--all", service=service).output
    for words in (("info",), ("park",), ("close", "--yes")):
        found = call("clients", words[0], "tc-unknown", *words[1:], service=service)
        assert (found.exit_code, found.stderr.startswith("error: there is no run")) == (1, True)


# --- errors -------------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_status_1(tmp_path: Path) -> None:
    data = tmp_path / "[b]rows.csv"
    data.write_text("x")
    found = call("demo", "--model", "m", "--data", str(data), "--output", str(tmp_path))
    assert found.exit_code == 1
    assert found.stderr.startswith(f"error: {data} ends in '.csv'")
    assert len(found.stderr.splitlines()) == 1
    assert found.stdout == ""


def test_errors_are_red_on_a_terminal(tmp_path: Path) -> None:
    code = (
        "from tg_tinker.cli.main import main; main(['demo', '--model', 'm', '--data', 'no.jsonl'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )
    assert found.returncode == 1
    assert "\x1b[31merror:" in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


# --- runs and artifacts -------------------------------------------------------------------------


def test_runs_lists_what_there_is(service: FakeService) -> None:
    lines = call("runs", service=service).stdout.splitlines()
    assert lines[0].split()[:4] == ["run", "status", "step", "model"]
    assert lines[1].split()[:4] == ["run-1", "active", "1", "model[x]"]
    assert service.closed


def test_artifacts_lists_what_there_is(service: FakeService) -> None:
    lines = call("artifacts", "list", service=service).stdout.splitlines()
    assert " ".join(lines[1].split()) == "art-1 run-1 1 2.5 MB yes 2025-01-02 03:04 never -"


@pytest.mark.parametrize("words", [["runs"], ["artifacts", "list"]])
def test_empty_lists_say_what_to_do(words: list[str]) -> None:
    assert "tg-tinker demo" in call(*words, service=FakeService()).stdout


def test_export_writes_where_told(service: FakeService, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    found = call("artifacts", "export", "art-1", str(target), service=service)
    assert found.exit_code == 0
    assert target.is_dir()
    assert str(target) in found.stdout


def test_exporting_an_unknown_artifact_is_an_error(service: FakeService, tmp_path: Path) -> None:
    found = call("artifacts", "export", "art-9", str(tmp_path / "a"), service=service)
    assert found.exit_code == 1
    assert "art-9" in found.stderr


@pytest.mark.parametrize(
    ("words", "answer", "left"), [(["--yes"], None, 0), ([], "y\n", 0), ([], "n\n", 1)]
)
def test_delete_asks_unless_told_not_to(
    service: FakeService, words: list[str], answer: str | None, left: int
) -> None:
    found = call("artifacts", "delete", "art-1", *words, service=service, answer=answer)
    assert len(service.artifacts) == left
    assert (found.exit_code == 0) == (left == 0)


def test_init_makes_a_home(tmp_path: Path) -> None:
    found = call("init", "--home", str(tmp_path / "home"))
    assert found.exit_code == 0
    assert (tmp_path / "home" / "keyring").exists()
    assert str(tmp_path / "home") in found.stdout


def homeless() -> list[tuple[str, ...]]:
    """Returns every command that needs a service and begins nothing, with arguments that it
    accepts."""
    given = {
        "clients info": ("c",), "clients park": ("c",), "clients close": ("c", "--yes"),
        "artifacts export": ("a", "folder"), "artifacts delete": ("a", "--yes"),
        "artifacts show": ("a",), "artifacts label": ("a", "x=y"), "artifacts copy": ("a",),
        "artifacts expire": ("a", "--never"), "artifacts reseal": ("a",),
        "artifacts shred": ("a", "--yes"),
        "keys retire": ("k1", "--yes"), "audit-log export": ("file",), "api-keys revoke": ("k",),
        "registry backup": ("file.db",), "keys rotate-secret": ("entries",),
        "keys retire-secret": ("transport",),
    }  # fmt: skip
    plain = (
        "runs", "clients list", "artifacts list", "artifacts verify", "artifacts sweep",
        "keys list", "keys rotate", "keys rotate-audit",
        "privacy report", "privacy certificate", "privacy ledger",
        "privacy book-missing", "privacy drop", "audit-log show", "audit-log verify",
        "api-keys list",
        "registry check", "registry accept", "doctor",
    )  # fmt: skip
    every = [(name, ()) for name in plain] + [*given.items()]
    return [(*name.split(), *arguments) for name, arguments in every]


@pytest.mark.parametrize("words", homeless(), ids=" ".join)
def test_what_only_looks_makes_no_home_at_a_mistyped_place(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TG_TINKER_KEYRING", raising=False)
    for place in (tmp_path / "none", tmp_path / "other"):
        (tmp_path / "other").mkdir(mode=0o700, exist_ok=True)
        found = CliRunner().invoke(
            main, list(words), env={"TG_TINKER_HOME": str(place), "RAY_ADDRESS": "local"}
        )
        assert found.exit_code == 1
        assert not isinstance(found.exception, AssertionError)
        assert "tg-tinker init" in " ".join(found.output.split())
    assert [path.name for path in tmp_path.rglob("*")] == ["other"]


def test_version_is_that_of_the_package() -> None:
    found = call("version").stdout.strip()
    assert found == f"tg-tinker {importlib.metadata.version('tg-tinker')}"


# --- privacy -------------------------------------------------------------------------------------


@pytest.fixture
def private_service() -> FakeService:
    """Returns a service after one step of a private run on the dataset clinic."""
    service = FakeService()
    dp = DPConfig(sampling="poisson", dataset_size=80, accountant_type="rdp")
    config = TrainingConfig(model_ref="m", dp_config=dp, dataset_id="clinic", max_steps=3)
    client = service.create_training_client(config)
    client.optim_step().result()
    return service


def test_a_plan_needs_no_service(tmp_path: Path) -> None:
    given = ("privacy", "plan", "--rows", "100", "--batch-size", "50", "--epochs", "2")
    found = call(*given, "--plot", str(tmp_path / "plan.png"))
    assert found.exit_code == 0
    assert "participation" in found.output
    assert (tmp_path / "plan.png").exists()
    as_json = json.loads(call(*given, "--json").output)
    assert [run["batch_size"] for run in as_json["runs"]] == [50, 100] * 4
    assert as_json["epsilon"] == 8.0


def test_a_plan_that_cannot_be_made_or_drawn_says_why(tmp_path: Path) -> None:
    found = call("privacy", "plan", "--rows", "100", "--batch-size", "101")
    assert (found.exit_code, "lower batch_size" in found.output) == (1, True)
    plot = tmp_path / "no" / "folder" / "plan.png"
    found = call("privacy", "plan", "--rows", "100", "--plot", str(plot))
    assert (found.exit_code, "cannot write" in found.output) == (1, True)


def test_privacy_is_reported_and_certified(private_service: FakeService) -> None:
    report = call("privacy", "report", "clinic", service=private_service)
    assert report.exit_code == 0, report.output
    assert "of 8 spent, delta 1e-05" in report.output
    certificate = call("privacy", "certificate", "clinic", service=private_service)
    stated = json.loads(certificate.output)
    assert stated["dataset"] == "clinic"
    assert 0 < stated["spent"]["epsilon"] < 8


def test_an_exported_ledger_is_verified_without_a_service(
    private_service: FakeService, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(call("privacy", "ledger", "clinic", service=private_service).output)
    head = json.loads(call("privacy", "certificate", "clinic", service=private_service).output)[
        "ledger"
    ]["head"]
    found = call("privacy", "verify", str(path), "--head", head)
    assert found.exit_code == 0, found.output
    assert "verified" in found.output
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    assert call("privacy", "verify", str(path)).exit_code == 0
    assert "cut off" in call("privacy", "verify", str(path), "--head", head).output
    path.write_text("\n".join([lines[0], lines[2]]))
    found = call("privacy", "verify", str(path))
    assert found.exit_code == 1
    assert "entry 1" in found.output


def test_a_data_set_without_a_ledger_names_none(private_service: FakeService) -> None:
    found = call("privacy", "report", "clinc", service=private_service)
    assert found.exit_code == 1
    assert "has no ledger" in found.output


def test_missing_charges_are_booked_and_counted(private_service: FakeService) -> None:
    assert "nothing is missing" in call("privacy", "book-missing", service=private_service).output
    private_service.missing["clinic"] = 3
    found = call("privacy", "book-missing", "clinic", service=private_service)
    assert found.exit_code == 0, found.output
    assert "3 missing charges were restored" in found.output


def test_a_draw_is_dropped_if_one_waits(private_service: FakeService) -> None:
    found = call("privacy", "drop", "clinic", service=private_service)
    assert found.exit_code == 1
    assert "no draw" in found.output


def test_the_audit_writes_its_picture_and_figures(tmp_path: Path) -> None:
    found = call("privacy", "audit", "--canaries", "1000", "--output", str(tmp_path / "out"))
    assert found.exit_code == 0, found.output
    assert "no violation found, power" in found.output
    assert found.output.count("held ") == 4
    assert (tmp_path / "out" / "audit.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["claimed_epsilon"] == 2.0


def test_what_may_be_combined_is_printed_as_a_table_and_as_json() -> None:
    table = call("privacy", "combinations")
    assert table.exit_code == 0, table.output
    rows = json.loads(call("privacy", "combinations", "--json").output)
    assert table.output.count("**refused**") == len([one for one in rows if not one["allowed"]])
    assert {"participation"} in [set(one["contract"]) for one in rows]


@pytest.mark.parametrize("wrong", [["--epsilon", "3"], ["--canaries", "9"]])
def test_an_audit_that_can_show_nothing_is_refused(wrong: list[str]) -> None:
    assert call("privacy", "audit", *wrong).exit_code == 2


# --- a client of the server ---------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Any]:
    """Yields a server that answers with `status` and one of the `bodies` after the other."""
    state = SimpleNamespace(bodies=[], asked=[], status=200, url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(state.status)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(state.bodies.pop(0))

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def text_event(text: str) -> bytes:
    return b"data: %s\n\n" % json.dumps({"choices": [{"text": text}]}).encode()


def chat_event(text: str) -> bytes:
    return b"data: %s\n\n" % json.dumps({"choices": [{"delta": {"content": text}}]}).encode()


DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("cut", [b"", b'data: {"choi', b"data: "])
def test_an_answer_that_breaks_off_is_an_error(answering: Any, cut: bytes) -> None:
    answering.bodies = [text_event("half") + cut, text_event("whole") + DONE]
    found = call("sample", "a", "--url", answering.url)
    assert (found.exit_code, found.stdout) == (1, "")
    assert "broke off" in found.stderr
    assert call("sample", "a", "--url", answering.url).stdout == "whole\n"


def test_a_url_without_its_version_gets_a_hint(answering: Any) -> None:
    answering.status = 404
    answering.bodies = [b'{"error": {"message": "Not Found"}}', b'{"error": {"message": "no X"}}']
    found = call("sample", "a", "--url", answering.url.removesuffix("/v1"))
    assert "Not Found: check that the URL ends in /v1" in found.stderr
    assert call("sample", "a", "--url", answering.url + "/").stderr == "error: no X\n"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80a/v1", "http://[::1", "http://a b/v1", "http://a..b/v1", "ftp://a"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    found = call("sample", "a", "--url", url)
    assert found.exit_code == 1
    assert "error: url" in found.stderr


@pytest.mark.parametrize("key", ["tgt-secret\n", "tgt-secret\r\nX: y", "tgt-secret\u20ac"])
def test_a_key_that_no_header_can_hold_is_not_repeated(answering: Any, key: str) -> None:
    found = call("sample", "a", "--url", answering.url, "--key", key)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("error: the API key holds")
    assert "secret" not in found.output
    assert answering.asked == []


def test_what_is_no_server_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        found = call("sample", "a", "--url", url)
        thread.join()
    assert found.exit_code == 1
    assert "error: no server answers" in found.stderr


def broken_off(*texts: str) -> Iterator[dict[str, Any]]:
    """Yields an answer during which Ctrl-C is pressed."""
    for text in texts:
        yield {"choices": [{"text": text, "delta": {"content": text}}]}
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_a_stream_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "stream", lambda *_: broken_off("ab", "c"))
    found = call("sample", "a", "--stream")
    assert (found.exit_code, found.stdout) == (130, "abc\n")


def test_ctrl_c_ends_an_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answers(server: Server, route: str, body: Any) -> Any:
        asked.append([message["content"] for message in body["messages"]])
        return broken_off("long") if len(asked) == 1 else iter(())

    monkeypatch.setattr(Server, "stream", answers)
    found = call("chat", answer="hi\nand?\n\n")
    assert found.exit_code == 0
    assert asked == [["hi"], ["hi", "long", "and?"]]


def test_sigterm_ends_the_conversation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut() -> Iterator[dict[str, Any]]:
        yield {"choices": [{"delta": {"content": "long"}}]}
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Server, "stream", lambda *_: cut())
    found = call("chat", answer="hi\nand?\n\n")
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (143, "long")


def test_an_error_ends_an_answer_and_not_the_conversation(answering: Any) -> None:
    answering.bodies = [chat_event("half"), chat_event("fine") + DONE]
    found = call("chat", "--url", answering.url, answer="one\ntwo\n\n")
    assert found.exit_code == 1
    assert found.stdout == "half\nfine\n"
    assert found.stderr.count("error: the answer broke off") == 1
    assert [m["content"] for m in answering.asked[1]["messages"]] == ["two"]


def test_a_prompt_that_is_no_text_is_refused() -> None:
    for words, given in ((["-"], b"\xff\xfe"), (["a\udcff"], b"")):
        found = CliRunner().invoke(main, ["sample", *words], input=given)
        assert found.exit_code == 1
        assert "UTF-8" in found.stderr


@pytest.mark.parametrize(
    ("words", "given", "named"),
    [
        (["--system", "a\udcff"], b"hi\n\n", "the system message"),
        ([], b"fine\n\xff\xfe\n\n", "the message"),
        (["--model", "a\udcff"], b"hi\n\n", "the request"),
    ],
)
def test_what_a_chat_would_send_and_is_no_text_is_refused(
    answering: Any, words: list[str], given: bytes, named: str
) -> None:
    answering.bodies = [chat_event("ok") + DONE] * 2
    found = CliRunner().invoke(main, ["chat", "--url", answering.url, *words], input=given)
    assert found.exit_code == 1
    assert f"error: {named} " in found.stderr
    assert len(answering.asked) <= (named == "the message")


# --- serve --------------------------------------------------------------------------------------


def serve(*words: str) -> Any:
    """Runs `tg-tinker serve` where no cluster may start."""

    def start() -> FakeService:
        raise AssertionError("a cluster was started")

    environment = {"RAY_ADDRESS": "local"}
    return CliRunner().invoke(main, ["serve", *words], obj=start, env=environment)


@pytest.mark.parametrize("model", ["/nope/missing", "./missing", "~/missing", "missing", "a/b/c"])
def test_a_model_that_is_nowhere_is_told_before_a_cluster_starts(model: str) -> None:
    found = serve("--model", model)
    assert found.exit_code == 1, found.output
    assert "no such path" in found.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "localhost"])
def test_a_port_that_is_taken_is_named_before_a_cluster_starts(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server(("::1" if ":" in host else "127.0.0.1", 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with taken:
        # Ray Serve lets others of the same user share its port.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = taken.getsockname()[1]
        found = serve("--model", "org/name", "--host", host, "--port", str(port))
    assert found.exit_code == 1, found.output
    assert f"port {port} of {host} (Address already in use)" in found.stderr


@pytest.mark.parametrize("host", ["nonsense.invalid", "a..b"])
def test_a_host_without_an_address_is_told_before_a_cluster_starts(host: str) -> None:
    found = serve("--model", "org/name", "--host", host)
    assert found.exit_code == 1, found.output
    assert f"host '{host}' has no address" in found.stderr


class ServingService(FakeService):
    """A service that gets a signal once it serves."""

    def __init__(self, stop: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.keys: list[Any] = []
        self._stop = stop

    def serve_http(self, model_ref: str, *_: Any, **options: Any) -> str:
        return "http://127.0.0.1:8000/v1"

    def list_api_keys(self) -> list[Any]:
        return self.keys

    def create_api_key(self, *_: Any) -> tuple[str, Any]:
        return "tgt-x", SimpleNamespace(key_id="k1", expires_at=_artifact().created_at)

    def metrics_urls(self) -> list[str]:
        threading.Timer(0.05, os.kill, (os.getpid(), self._stop)).start()
        return []


@STOPS
def test_a_signal_ends_serving_in_good_order(stop: signal.Signals, status: int) -> None:
    made: list[ServingService] = []

    def start() -> ServingService:
        made.append(ServingService(stop))
        return made[-1]

    words = ["serve", "--model", "org/name", "--port", str(free_port())]
    found = CliRunner().invoke(main, words, obj=start)
    assert found.exit_code == status, found.output
    assert made[0].closed
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("keys", "says"),
    [(0, "everyone on this machine;"), (1, "1 API key opens it."), (2, "2 API keys open it.")],
)
def test_a_server_says_who_may_use_it_and_how_it_stops(keys: int, says: str) -> None:
    def start() -> ServingService:
        service = ServingService()
        service.keys = [None] * keys
        return service

    words = ["serve", "--model", "org/name", "--port", str(free_port())]
    found = CliRunner().invoke(main, words, obj=start)
    assert found.exit_code == 143, found.output
    told = " ".join(found.stderr.split())
    assert says in told
    assert "Ctrl-C stops it; on a cluster that outlives this command, `serve shutdown`" in told


def test_a_config_that_exists_is_kept_and_the_next_step_told(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("mine")
    found = serve("--model", "org/name", "--write-config", str(path))
    assert found.exit_code == 1
    assert "(File exists): choose another name" in found.stderr
    assert path.read_text() == "mine"


# --- API keys -----------------------------------------------------------------------------------


def test_a_key_for_what_is_unknown_is_made_with_a_warning() -> None:
    service = ServingService()
    client = service.create_training_client(TrainingConfig(model_ref="m"))
    saved = client.save_state().artifact_id
    known = [f"--model={name}" for name in (client.id, saved, "base")]
    found = call("api-keys", "create", *known, service=service)
    assert (found.exit_code, found.stdout) == (0, "tgt-x\n")
    assert "warning" not in found.stderr
    found = call("api-keys", "create", *known, "--model", "typo", service=service)
    assert (found.exit_code, found.stdout) == (0, "tgt-x\n")
    assert found.stderr.count("warning: there is no run or artifact typo") == 1


def test_what_takes_time_is_told_on_stderr() -> None:
    found = CliRunner(env={"FORCE_COLOR": "1", "TERM": "xterm"}).invoke(
        main, ["api-keys", "create"], obj=ServingService
    )
    assert found.stdout == "tgt-x\n"
    assert "opening the registry" in found.stderr
