"""Tests clients, services and handles in a process that was forked from their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import clusters
from tg_tinker import InvalidRequestError
from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.calls import OrderedCalls
from tg_tinker.client.future import FutureHandle
from tg_tinker.cluster import ray_calls
from tg_tinker.cluster.cluster import Cluster
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.remote_registry import RemoteRegistry


class Held:
    """A lock that a thread of the other process held at the fork."""

    def __enter__(self) -> None:
        pytest.fail("a lock was taken that nobody will release")

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "_inherited", True)
    monkeypatch.setattr(ray_calls, "_work_lock", Held())
    monkeypatch.setattr(Cluster, "_lock", Held())


def calls() -> OrderedCalls:
    found = object.__new__(OrderedCalls)
    found.closed = False
    found.lock = found._recovering = Held()  # type: ignore[assignment]
    found._saves = [pytest.fail]  # type: ignore[list-item]
    return found


def handle(reply: Reply | None = None) -> FutureHandle[Any]:
    found: FutureHandle[Any] = FutureHandle(
        TrainingLink(None, b"", lambda error, _: error), None, "f", "tc-1", "optim_step"  # type: ignore[arg-type]
    )  # fmt: skip
    found._reply = reply
    return found


async def awaited(one: FutureHandle[Any]) -> Any:
    return await one


REFUSED: dict[str, Callable[[], Any]] = {
    "submit": lambda: calls().submit("optim_step"),
    "submit_save": lambda: calls().submit_save(),
    "ask": lambda: calls().ask(lambda _: None),
    "recover": lambda: calls().recover(),
    "park": lambda: calls().park(),
    "result": lambda: handle().result(),
    "result(0)": lambda: handle().result(timeout=0),
    "done": lambda: handle().done(),
    "status": lambda: handle().status(),
    "cancel": lambda: handle().cancel(),
    "callback": lambda: handle().add_done_callback(print),
    "callback of a reply": lambda: handle(Reply()).add_done_callback(print),
    "await": lambda: asyncio.run(awaited(handle())),
    "a new service": lambda: Cluster("local", "ns"),
    "notify": lambda: object.__new__(RemoteRegistry).notify("runs.record"),
    "send": lambda: ray_calls.send(None),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("forked")
def test_every_call_is_refused_at_once_with_the_next_step(name: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"was forked.*spawn.*create a ServiceClient"
    ) as e:
        REFUSED[name]()
    assert e.value.code == "forked_process"


@pytest.mark.usefixtures("forked")
def test_what_has_arrived_is_there_and_leaving_does_nothing() -> None:
    assert handle(Reply(value=3)).result() == 3
    assert handle(Reply(value=3)).done()
    calls().close()
    link = object.__new__(Cluster)
    link._open = True
    link.end_http()
    link.close()
    assert not link.connected


PROGRAM = """
import json, os, multiprocessing, signal, sys, threading
from tg_tinker import *
signal.alarm(240)  # a hang ends here
found = {}

def attempt(work):
    try:
        work()
        return "nothing"
    except TGTinkerError as error:
        return error.code

def exits(leave):
    status = os.waitpid(leave(), 0)[1]
    return os.waitstatus_to_exitcode(status)

def in_child(work, leave=sys.exit):
    pid = os.fork()
    if pid == 0:
        work()
        leave(7)
    return pid

class Rows:
    def __len__(self): return 2
    def __getitem__(self, index): return tc.forward_backward({"input_ids": [[1, 2]]})

def loaded():
    from torch.utils.data import DataLoader
    return list(DataLoader(Rows(), num_workers=1, multiprocessing_context="fork"))

def pooled():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(asked)

def in_thread():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(exits(lambda: in_child(leaving))))
    thread.start()
    thread.join()
    return statuses[0]

def leaving():
    with service, tc:
        pass

def asked(): return attempt(service.list_artifacts)
def arrived(): return attempt(future.result)

service = ServiceClient(address="local")
config = TrainingConfig(model_ref=sys.argv[1], lora_config=LoRAConfig(rank=2))
tc = service.create_training_client(config)
future = tc.forward_backward({"input_ids": [[1, 2, 3]]})
found["leaves a with"] = exits(lambda: in_child(leaving))
found["only exits"] = exits(lambda: in_child(lambda: None))
found["in a thread"] = in_thread()
found["a pool"] = pooled()
found["a data loader"] = attempt(loaded)
with multiprocessing.get_context("fork").Pool(1) as pool:
    found["a future"] = pool.apply(arrived)
    found["a new service"] = pool.apply(attempt, [ServiceClient])
# The parent is as before.
found["tokens"] = future.result().num_tokens
found["step"] = tc.optim_step().result().step
tc.close()
service.close()
print(json.dumps(found))
"""


@pytest.mark.program
def test_children_of_every_kind_answer_at_once_and_the_parent_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    with clusters.forking():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tiny_model)],
            env=os.environ | {"TG_TINKER_HOME": str(tmp_path / "home")},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "leaves a with": 7, "only exits": 7, "tokens": 3, "step": 1,
        "in a thread": 0,  # Python ends a thread silently at `sys.exit`, also the last one
        "a data loader": "invalid_request",  # torch raises the type and text again
        **dict.fromkeys(("a pool", "a future", "a new service"), "forked_process"),
    }  # fmt: skip
    assert "***" not in done.stderr


# --- an await that was given up ------------------------------------------------------------------


def test_an_await_that_outlives_its_loop_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, answers, called = handle(), [], threading.Event()
    monkeypatch.setattr(TrainingLink, "when_done", lambda _, ref, name, work: answers.append(work))

    async def give_up() -> None:
        async def wait() -> None:
            await one

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait(), 0.01)

    asyncio.run(give_up())
    (answer,) = answers
    ray_calls.dispatch(answer)
    ray_calls.dispatch(called.set)
    assert called.wait(30)
    assert caplog.records == []
