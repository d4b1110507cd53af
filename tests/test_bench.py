"""Tests the harness of `make bench`: its ratios, its fairness, and that no goal is left out."""

from __future__ import annotations

import io
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from actors.engine.model import Base
from bench import __main__ as program
from bench import machine, peers, report, utility
from bench.catalogue import benches, selected
from bench.loops import IGNORED, LoopSpec, Ours, Plain, Rows, collate
from bench.measure import Bench, Goal, Row, Run, Sheet, Spread, in_turns, ratios
from bench.privacy import WORKLOADS as PRIVACY
from bench.sdk import WORKLOADS as SDK
from bench.sides import Side, SideError, command
from bench.size import BASIS, flatness, sizes, slopes
from bench.training import WORKLOADS
from bench.workloads import Turns, Workload, check_losses, compared, run_all
from support.helpers import RAGGED, assert_close, weights, window
from support.privacy_helpers import registry, rows

GOALS = {
    "ragged": (1.6, 0.6), "uniform": (1.0, None), "row4096": (1.0, 0.5), "eval": (1.6, None),
    "full": (1.0, None), "threads": (1.7, None), "uniform-sdk": (3.0, None),
    "row32-sdk": (8.0, None),
}  # fmt: skip
"""Workload -> (at least so many times as fast, at most so much of the memory)."""


# --- ratios ----------------------------------------------------------------------------------


def test_a_ratio_is_taken_between_neighbors_and_then_the_median() -> None:
    assert ratios([2, 9, 4], [1, 3, 4]) == Spread(2, 1, 3)  # of the medians it would be 4 / 3


def test_sides_take_turns_after_one_that_does_not_count() -> None:
    order: list[str] = []
    times = in_turns({n: partial(order.append, n) for n in ("a", "b")}, 2, "turns")
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert [len(taken) for taken in times.values()] == [2, 2]


@pytest.mark.parametrize(
    ("middle", "goal", "verdict"),
    [
        (1.6, Goal(1.6), "met"),
        (1.59, Goal(1.6), "missed"),
        (0.6, Goal(0.6, at_least=False), "met"),
        (0.61, Goal(0.6, at_least=False), "missed"),
        (9.0, None, ""),
    ],
)
def test_a_goal_is_judged_by_the_median(middle: float, goal: Goal | None, verdict: str) -> None:
    assert Row("n", "w", "a", Spread(middle, 0.0, 99.0), goal).verdict == verdict


def test_what_was_not_run_is_neither_met_nor_missed() -> None:
    assert Row("n", "w", "a", None, Goal(1.0)).verdict == "not run"


def test_flatness_is_the_dearest_batch_of_512_tokens_or_more_over_the_cheapest() -> None:
    rank, _, length = BASIS
    costs = {(rank, n // length, length): [float(c)] for n, c in ((256, 9), (512, 3), (1024, 2))}
    costs[rank, 1, 1024] = [7.0]  # another length of row: not on this axis
    row = flatness(costs)
    assert row.ratio == Spread(1.5, 1.5, 1.5)
    assert row.verdict == "missed"


def test_memory_has_a_slope_within_a_micro_batch_and_another_beyond() -> None:
    rank, _, length = BASIS
    peaks = {256: 300, 512: 556, 1024: 1068, 2048: 1084, 4096: 1116}  # 44 + n, 1052 + n / 64
    sizes = {(rank, n // length, length): peak * 2**20 for n, peak in peaks.items()}
    within, beyond = slopes(sizes).rows
    assert within[1:] == ("44 MiB", "1,024 KiB", "0%")
    assert beyond[1:] == ("1,052 MiB", "16 KiB", "0%")


# --- the goals -------------------------------------------------------------------------------


def test_every_goal_has_its_workload_and_bound() -> None:
    found = {one.name: (one.speed, one.memory) for one in WORKLOADS}
    found |= {one.name: (one.goal, None) for one in peers.WORKLOADS}
    stated = {
        name: tuple(goal and goal.bound for goal in goals)
        for name, goals in found.items()
        if any(goals)
    }
    assert stated == GOALS
    assert all(speed.at_least for speed, _ in found.values() if speed)
    assert not any(memory.at_least for _, memory in found.values() if memory)


def test_ours_is_private_where_the_goal_says_so() -> None:
    private = {one.name for one in WORKLOADS if one.ours("m").private}
    assert private == {"ragged", "uniform", "row32", "row4096", "threads"}
    assert not any(one.theirs("m").private for one in WORKLOADS if one.name != "threads")


def test_both_sides_of_a_workload_train_the_same_values() -> None:
    for one in (*WORKLOADS, *PRIVACY, *SDK):
        assert one.ours("m").rank == one.theirs("m").rank, one.name


def test_the_sizes_reach_from_256_to_8192_tokens_one_to_64_rows_rank_4_to_128() -> None:
    found = sizes(quick=False)
    assert {256, 512, 1024, 2048, 4096, 8192} <= {rows * length for _, rows, length in found}
    assert {1, 8, 64} <= {rows for _, rows, length in found if rows * length == 1024}
    assert {rank for rank, *_ in found} == {4, 16, 64, 128}


# --- fairness --------------------------------------------------------------------------------


@pytest.fixture
def loops(tiny_model: Path, tmp_path: Path) -> tuple[Ours, Plain]:
    """Returns both loops on the same weights, with adapters that are not zero."""
    spec = LoopSpec("ours", str(tiny_model), rank=4)
    base = Base.load(str(tiny_model), cache=tmp_path)
    ours, plain = Ours(base, spec), Plain(base.directory, spec)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(named(plain))
    with torch.no_grad():
        for name, parameter in ours.session._parameters.items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            parameters[name].copy_(parameter)
    return ours, plain


def named(plain: Plain) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (name.replace(".default.", "."), parameter)
        for name, parameter in plain.model.named_parameters()
        if parameter.requires_grad
    ]


def test_the_plain_loop_and_ours_have_one_loss_and_one_gradient(
    loops: tuple[Ours, Plain],
) -> None:
    ours, plain = loops
    rows = RAGGED
    assert ours.evaluate(rows) == pytest.approx(plain.evaluate(rows), rel=1e-5)
    assert plain.backward(rows) == pytest.approx(ours.evaluate(rows), rel=1e-5)
    theirs = {name: parameter.grad for name, parameter in named(plain)}
    ours.session.forward_backward(examples_of(rows))
    labeled = sum(int((torch.tensor(labels[1:]) != IGNORED).sum()) for _, labels in rows)
    mine = {name: total / labeled for name, total in window(ours.session).items()}
    assert_close(mine, theirs, 1e-4)  # type: ignore[arg-type]


def test_both_clip_and_take_the_same_steps(loops: tuple[Ours, Plain]) -> None:
    """It compares how far the weights moved, after steps on gradients of different size."""
    ours, plain = loops
    before = {name: tensor.clone() for name, tensor in weights(ours.session).items()}
    for loop in loops:
        loop.train(RAGGED)
        loop.train(RAGGED[:2])
    mine, theirs = weights(ours.session), dict(named(plain))
    assert_close(
        {name: mine[name] - start for name, start in before.items()},
        {name: theirs[name].detach() - start for name, start in before.items()},
        1e-2,
    )


def examples_of(rows: Rows) -> list:  # type: ignore[type-arg]
    from bench.loops import as_batch
    from tg_tinker.data.batch import normalize

    return normalize(as_batch(rows))


def test_padding_carries_neither_attention_nor_loss() -> None:
    batch = collate([([5, 6, 7], [IGNORED, 6, 7]), ([8], [8])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_sides_that_compute_different_things_are_not_compared() -> None:
    check_losses({"ours": 2.0, "theirs": 2.0001})
    with pytest.raises(SideError, match="same loss"):
        check_losses({"ours": 2.0, "theirs": 2.1})
    with pytest.raises(SideError):
        check_losses({"ours": 2.0, "theirs": float("nan")})


# --- processes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_workload_runs_in_two_processes_and_tells_time_and_memory(
    tiny_model: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")
    tiny = partial(LoopSpec, rank=4)
    one = Workload(
        "tiny", "tiny, private", "plain", lambda: RAGGED, partial(tiny, "ours", private=True),
        partial(tiny, "plain"), memory=Goal(0.6, at_least=False),
    )  # fmt: skip
    time, whole, step = compared(one, Run(str(tiny_model), repeats=2))
    assert time.name == "tiny"
    assert time.ratio
    assert time.ratio.low > 0
    assert whole.name == "tiny-memory"
    assert whole.goal == one.memory
    assert step.goal is None
    mebibytes = [int(found.ours.split()[0].replace(",", "")) for found in (whole, step)]
    assert mebibytes[0] > 100 > mebibytes[1]  # torch and its libraries; two layers of width 32
    assert {path.name for path in tmp_path.iterdir()} == {"bench-output", "elsewhere"}
    assert not list((tmp_path / "elsewhere").iterdir())  # no ledger, no keyring stays behind


def test_the_step_whose_memory_is_measured_is_the_first_timed_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of 4,096 tokens takes half a minute, so no step is made without a figure."""
    asked: list[str] = []

    class Fake:
        def ask(self, what: str, rows: Rows) -> dict[str, float]:
            asked.append(what)
            return {"loss": 1.0, "seconds": len(asked), "bytes": 1, "process_bytes": 1}

    monkeypatch.setattr(
        "bench.workloads.opened", lambda *_: nullcontext({"ours": Fake(), "theirs": Fake()})
    )
    (row, *_) = compared(WORKLOADS[0], Run("m", repeats=2))
    assert asked[::2] == asked[1::2] == ["evaluate", "peak of train", "train"]
    assert row.ratio == ratios([3, 6], [4, 5])


def test_a_side_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(SideError, match="no such server"):
        Side(["sh", "-c", "echo no such server >&2"], tmp_path / "log").wait()


def test_a_workload_whose_side_ends_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(one: Workload, run: Run) -> list[Row]:
        raise SideError("out of memory")

    monkeypatch.setattr("bench.workloads.compared", broken)
    run = Run("m")
    run_all(WORKLOADS[:1], run)
    assert [(row.verdict, row.remark) for row in run.rows] == [("not run", "out of memory")]


def test_a_peer_that_cannot_be_installed_leaves_its_goals_open_with_the_reason(
    tiny_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline() -> Path:
        raise peers.NotRunError("no route to the registry")

    monkeypatch.setattr(peers, "skyrl_environment", offline)
    run = Run(str(tiny_model))
    peers.run(run)
    assert {row.name: row.remark for row in run.rows} == {
        one.name: "no route to the registry" for one in peers.WORKLOADS
    }
    assert "OpenRL" in {name for name, _ in run.sheets[-1].rows}


@pytest.mark.parametrize(("loss", "verdict"), [(2.0001, "missed"), (2.01, "not run")])
def test_a_peer_that_computes_another_loss_has_no_ratio(loss: float, verdict: str) -> None:
    class Answers:
        def __init__(self, loss: float) -> None:
            self._answer = {"seconds": 1.0, "loss": loss}

        def ask(self, what: str, rows: Rows) -> dict[str, float]:
            return self._answer

    sides: Any = {"ours": Answers(2.0), "ours, private": Answers(2.0), "SkyRL": Answers(loss)}
    run, one = Run("m", repeats=2), peers.WORKLOADS[0]
    peers.measured(run, one, sides, peers.evaluated(one, sides))
    assert [row.verdict for row in run.rows] == [verdict, "" if verdict == "missed" else verdict]


def test_who_is_asked_first_changes_from_turn_to_turn() -> None:
    asked: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self._name = name

        def ask(self, what: str, rows: Rows) -> dict[str, float]:
            asked.append(self._name)
            return {}

    sides: Any = {name: Named(name) for name in ("ours", "theirs")}
    with Turns(sides, WORKLOADS[0], 2) as turns:
        assert turns.take("train", []).keys() == turns.take("train", []).keys() == sides.keys()
    assert asked == ["ours", "theirs", "theirs", "ours"]


def test_only_our_own_engine_has_our_setting_of_threads() -> None:
    spun = {kind: [word for word in command(LoopSpec(kind, "m")) if "SPIN" in word] for kind in
            ("ours", "plain", "opacus", "sdk")}  # fmt: skip
    assert spun == {"ours": ["GOMP_SPINCOUNT=1000"], "plain": [], "opacus": [], "sdk": []}


# --- what is learned at one epsilon ---------------------------------------------------------


def tiny_study(model: Path, tmp_path: Path, **changes: Any) -> utility.Study:
    """Returns a study of eight rows on the tiny model."""
    task = utility.Task(str(model), 2, (1,), 8, "a commit", rows=8, batch=4)
    found = utility.Study(replace(task, **changes), registry(), tmp_path / "utility.json")
    found._base = Base.load(str(model), cache=tmp_path / "models")
    found._training = found._held_out = rows()
    return found


def test_a_study_goes_on_where_it_stopped_and_starts_anew_for_another_task(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, setting = utility.SIDES[1], (1e-2, 0.5)
    made = tiny_study(tiny_model, tmp_path).run(side, setting, 1)
    assert made.after.keys() == {"last", "ema", "tail"}
    assert len({made.before, *made.after.values()}) > 2
    assert 0 < made.epsilon <= 8
    assert made.sigma > 0
    monkeypatch.setattr(utility.Study, "_trained", lambda *_: pytest.fail("it was there already"))
    assert tiny_study(tiny_model, tmp_path).run(side, setting, 1) == made
    for other in ({"steps": 3}, {"commit": "another"}):
        assert tiny_study(tiny_model, tmp_path, **other)._runs == {}


def test_sides_of_a_study_share_model_rows_and_noise(tiny_model: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_model, tmp_path)
    plain = study._loaded().model.state_dict().keys()
    sessions = [
        study._session(study._config(side, 1e-2, 0.5, seed))
        for side, seed in ((utility.BASIS, 1), (utility.BASIS, 2), (utility.SIDES[2], 1))
    ]
    assert study._loaded().model.state_dict().keys() == plain  # no adapter in the loaded one
    embeddings = {id(s.base.model.get_input_embeddings().weight) for s in sessions}
    assert len(embeddings) == 1
    one, other_seed, same_seed = (s._noise(5).tolist() for s in sessions)  # type: ignore[attr-defined]
    assert one == same_seed != other_seed
    drawn = [[len(sample) for sample in study._samples(seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]


def test_a_line_of_a_study_states_epsilon_seeds_spread_and_the_pairs() -> None:
    def runs(*after: float, sigma: float = 0.5) -> list[utility.Found]:
        losses = [{"last": x, "ema": x - 0.1, "tail": x + 0.1} for x in after]
        return [utility.Found(5.0, loss, 7.9 if sigma else 0.0, sigma) for loss in losses]

    found = {
        "LoRA": runs(4.0, 4.2, 4.4), "normalise": runs(3.9, 4.1, 4.1),
        "without privacy": runs(3.0, 3.0, 3.0, sigma=0.0),
    }  # fmt: skip
    settings = dict.fromkeys(found, (0.02, 0.2))
    line = dict(zip(utility.HEADINGS, [*utility.sides(found, settings)][1], strict=True))
    assert line == {
        "side": "normalise", "rate": "0.02", "C": "0.2", "epsilon": "7.90", "sigma": "0.5",
        "seeds": "3", "before": "5.000 [5.000..5.000]", "after": "4.100 [3.900..4.100]",
        "against LoRA, paired": "-0.100 [-0.300..-0.100]", "gap closed": "45 % [45..55]",
    }  # fmt: skip
    averaged = dict(zip(utility.AVERAGED, next(utility.averages(found)), strict=True))
    assert averaged["ema - last"] == "-0.100 [-0.100..-0.100]"
    assert averaged["tail"] == "4.300 [4.100..4.500]"


# --- the program -----------------------------------------------------------------------------


def test_a_plain_run_is_what_takes_under_15_minutes() -> None:
    known = benches()
    assert list(selected(known, [], everything=False)) == ["training", "size", "sdk"]
    assert sum(known[name].minutes for name in ("training", "size", "sdk")) <= 14
    assert "peers" not in selected(known, [], everything=True)


def test_one_workload_or_a_whole_bench_can_be_chosen() -> None:
    found = selected(benches(), ["ragged", "audit"], everything=False)
    assert found == {"training": frozenset({"ragged"}), "audit": frozenset()}


def test_names_of_benches_and_workloads_are_distinct() -> None:
    names = [name for b in benches().values() for name in (b.name, *b.workloads)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("repeats", ["0", "-1", "x"])
def test_no_turn_at_all_is_refused(repeats: str) -> None:
    with pytest.raises(SystemExit):
        program.main(["--repeats", repeats])


def test_an_unknown_name_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program.main(["--only", "raged"]) == 2
    assert "'raged'" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The workloads of a bench are kept one by one, because the usual run has a bench of eight
    minutes."""
    done = Row("ragged", "chats", "plain", Spread(2.0, 1.5, 2.5), Goal(1.6))

    def stopped(run: Run) -> None:
        run.rows.append(done)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "benches", lambda: {"a": Bench("a", "slow", 1, stopped)})
    assert program.main(["--only", "a", "--model", "m"]) == 130
    told = capsys.readouterr()
    assert "stopped" in told.err
    assert "2.00x [1.50..2.50]" in told.out
    (row,) = json.loads((tmp_path / "bench-output" / "bench.json").read_text())["rows"]
    assert row["name"] == "ragged"
    assert (tmp_path / "bench-output" / "bench.png").exists()


def test_no_picture_of_an_earlier_run_stays_beside_new_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {"CPU": "a CPU", "cores": "2"}
    row = Row("a", "fast", "plain", Spread(2.0, 1.5, 2.5), Goal(1.6))
    program.deliver(facts, Run("m", rows=[row]))
    assert (tmp_path / "bench-output" / "bench.png").exists()
    program.deliver(facts, Run("m", rows=[replace(row, goal=None)]))
    assert not (tmp_path / "bench-output" / "bench.png").exists()


@pytest.mark.parametrize(("load", "quiet"), [(0.9, True), (5.2, False)])
def test_a_machine_with_other_work_is_told_of(
    monkeypatch: pytest.MonkeyPatch, load: float, quiet: bool
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    told = machine.described()["load before"]
    assert told.startswith(f"{load} processes")
    assert ("not quiet" in told) != quiet


def test_the_help_names_every_bench_and_how_to_read_a_ratio(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told and bench.about in told for name, bench in benches().items())
    assert "theirs / ours" in told


def test_figures_are_written_as_table_json_markdown_and_picture(tmp_path: Path) -> None:
    rows = [
        Row("a", "fast | work", "plain", Spread(2.0, 1.5, 2.5), Goal(1.6), "1 s", "2 s"),
        Row("b", "peer", "peer", None, Goal(3.0), remark="make bench-peers"),
    ]
    sheet = Sheet("more", ("x", "y"), [("1", "2")])
    facts = {"CPU": "a CPU", "cores": "2"}
    report.write_json(tmp_path / "bench.json", facts, rows, [sheet])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["verdict"] for row in found["rows"]] == ["met", "not run"]
    assert found["rows"][0]["ratio"] == {"middle": 2.0, "low": 1.5, "high": 2.5}
    text = report.markdown(facts, [report.as_sheet(rows), sheet])
    assert "| fast \\| work | plain | 2.00x [1.50..2.50] | >= 1.6x | met |" in text
    assert "make bench-peers" in text
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(report.table(report.as_sheet(rows)))
    printed = screen.export_text()
    assert "[min..max]" in printed
    assert "2.00x [1.50..2.50]" in printed
    assert report.draw(rows, tmp_path / "bench.png", facts)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not report.draw(rows[1:], tmp_path / "none.png", facts)


def test_the_page_states_every_goal() -> None:
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    for name, (speed, memory) in GOALS.items():
        (line,) = [row for row in page.splitlines() if row.startswith(f"| `{name}`:")]
        assert ("1.0x" if speed == 1 else f"{speed:g}x") in line, name
        if memory:
            assert f"| `{name}-memory`:" in page
            assert f"at most {memory}x" in page


def test_the_readme_repeats_ratios_of_the_page() -> None:
    root = Path(__file__).parents[1]
    readme, page = ((root / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    found = re.search(
        r"ran (\S+ to \S+) times as fast .* in (\S+) of\s+its memory, and (\S+ to \S+) times",
        readme, re.DOTALL,
    )  # fmt: skip
    assert found
    results = page.partition("## Results")[2].partition("\n## ")[0]
    ranges = ("private, ragged", "peak memory, private, ragged", "private, uniform")
    rows = ("ragged chats", "their peak memory", "uniform 8 x 128")
    for told, spread, row in zip(found.groups(), ranges, rows, strict=True):
        (line,) = re.findall(rf"^\| {spread} \|.*$", results, re.MULTILINE)
        *measured, stated = [cell.strip() for cell in line.split("|")[2:-1]]
        least, most = min(measured, key=size), max(measured, key=size)
        assert stated == (least if least == most else f"{least} to {most}")
        assert told.replace(" to ", "x to ") + "x" == stated
        (full,) = re.findall(rf"^\| {row} \|.*$", results, re.MULTILINE)
        assert f"**{measured[0]}**" in full, "the full run's own table"


def size(ratio: str) -> float:
    return float(ratio.removesuffix("x"))
