"""Tests kill -9 in the middle of a private step: the ledger never counts less than what was
drawn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.privacy.session import PrivateSession
from actors.training.call_journal import CallJournal
from support.privacy_helpers import private_session, registry, rows
from tg_tinker import ActorLostError
from tg_tinker.cluster.messages import Request
from tg_tinker.records.ledger import Ledger

POINTS = ("before-charge", "after-charge", "after-noise", "after-weights")


class Doomed(PrivateSession):
    """A session that notes each draw of noise durably before it is made, and dies at one point
    of step 3."""

    point = ""
    log = Path()

    def _noise(self, count: int) -> object:  # type: ignore[override]
        with self.log.open("a") as file:
            file.write(f"{self.step + 1}\n")
            file.flush()
            os.fsync(file.fileno())
        return PrivateSession._noise(count)

    def _refuse_step(self, *arguments: object) -> None:
        super()._refuse_step(*arguments)  # type: ignore[arg-type]
        self._die("before-charge")

    def _release(self, *arguments: object) -> tuple[float, float]:
        self._die("after-charge")
        return super()._release(*arguments)  # type: ignore[arg-type]

    def _move(self, *arguments: object) -> tuple[float, float]:
        self._die("after-noise")
        moved = super()._move(*arguments)  # type: ignore[arg-type]
        self.step -= 1
        self._die("after-weights")
        self.step += 1
        return moved

    def _die(self, point: str) -> None:
        if self.step == 2 and point == self.point:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model: str, home: str, log: str, point: str) -> None:
    """Runs in the child: makes three steps, and does not survive the third."""
    Doomed.point, Doomed.log = point, Path(log)
    dp = {"sampling": "worst_case", "noise_multiplier": 2.0}
    s = private_session(Path(model), Doomed, registry(Path(home)), dp=dp)
    for _ in range(3):
        s.forward_backward(rows())
        s.optim_step()


@pytest.mark.program
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_in_a_step_charges_cover_draws(
    tiny_model: Path, tmp_path: Path, point: str
) -> None:
    home, log = tmp_path / "home", tmp_path / "draws"
    call = f"t.train({str(tiny_model)!r}, {str(home)!r}, {str(log)!r}, {point!r})"
    code = f"import test_crashes as t; {call}"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    drawn = {int(line) for line in log.read_text().split()}
    ledger = Ledger.replay(registry(home).ledgers.entries("default", "default"))
    (account,) = ledger.accounts.values()
    charged = 2 if point == "before-charge" else 3
    assert account.count == charged
    assert len(drawn) <= charged
    assert drawn == ({1, 2, 3} if point in ("after-noise", "after-weights") else {1, 2})


def test_a_repeated_request_is_charged_and_drawn_once(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"sampling": "worst_case", "noise_multiplier": 2.0})
    calls = CallJournal(epoch=1)
    request = Request("r-0", "optim_step", 1, "h", 0)
    first = calls.run(request, lambda r, check: s.optim_step())
    moved = s.state().weights
    again = calls.run(request, lambda r, check: s.optim_step())
    assert again == first
    assert s.step == 1
    assert all((moved[name] == tensor).all() for name, tensor in s.state().weights.items())
    ledger = Ledger.replay(s.budget.registry.ledgers.entries("default", "default"))
    assert ledger.accounts[s.budget.run_id].count == 1


def test_a_request_repeated_to_the_next_actor_fails_typed_and_draws_nothing(
    tiny_model: Path,
) -> None:
    s = private_session(tiny_model)
    reply = CallJournal(epoch=2).run(
        Request("r-0", "optim_step", 1, "h", 0), lambda r, check: s.optim_step()
    )
    with pytest.raises(ActorLostError):
        reply.unwrap()
    assert s.step == 0


def test_a_repeated_charge_call_is_one_charge(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"sampling": "worst_case", "noise_multiplier": 2.0})
    known = s.budget.registry
    arguments = ("default", "default", s.budget.run_id, s.budget.epoch, "ab" * 16, [], True, [])
    first, second = known.ledgers.charge(*arguments), known.ledgers.charge(*arguments)
    assert vars(first) == vars(second)
    ledger = Ledger.replay(known.ledgers.entries("default", "default"))
    assert ledger.accounts[s.budget.run_id].count == 1


def test_an_actor_of_an_earlier_epoch_charges_nothing(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    s.forward_backward(rows())
    s.budget.registry.runs.claim(s.budget.run_id)
    with pytest.raises(ActorLostError, match="replaced"):
        s.optim_step()
    assert not s.broken
    ledger = Ledger.replay(s.budget.registry.ledgers.entries("default", "default"))
    assert ledger.epsilon == 0
