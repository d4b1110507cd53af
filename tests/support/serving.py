"""Runs `tg-tinker serve` as a program of its own, and asks its model without any server."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from support.processes import assert_all_end, free_port

PROGRAM = Path(str(distribution("ray").locate_file(""))).parents[2] / "bin" / "tg-tinker"
"""The server has the environment of TG-Tinker; the clients' own may stand in front of it."""

UNTIL_STDIN_ENDS = 'exec 3<&0; "$@" & server=$!; { cat <&3; kill $server; } & wait $server'
"""Runs a program that gets SIGTERM when its standard input is closed: also if the tests are killed,
as the pipe ends with them. Else the server and its cluster would stay."""

START_S, END_S = 200, 60


class Server(NamedTuple):
    """Where a server listens, and the Hugging Face directory of its model."""

    url: str
    model: Path


def installed(module: str) -> Any:
    """Returns a client's module. Skips the test file where it cannot be imported for any reason."""
    try:
        return import_module(module)
    except Exception as error:
        pytest.skip(f"{module} cannot be imported: {error}", allow_module_level=True)


@contextmanager
def serving(model: Path, home: Path) -> Iterator[Server]:
    """Serves a model on a free port of the loopback until the block ends."""
    port, log = free_port(), home.with_name("server.log")
    environment = os.environ | {"TG_TINKER_HOME": str(home), "RAY_ADDRESS": "local"}
    serve = [str(PROGRAM), "serve", "--model", str(model), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["sh", "-c", UNTIL_STDIN_ENDS, "sh", *serve],
            env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/healthz", process, log)
        yield Server(f"http://127.0.0.1:{port}/v1", model)
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert_all_end(process.pid, END_S)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()}")


class Direct:
    """A model that transformers runs in this process, one text at a time."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def chat_ids(self, *messages: dict[str, str]) -> list[int]:
        found: list[int] = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return found

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Returns the log-probabilities of all tokens after each of these."""
        with torch.inference_mode():
            return self._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def score(self, context: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """Returns the log-likelihood of tokens after a context, and whether each is likeliest."""
        rows = self.logprobs([*context, *after])[len(context) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(after)[:, None]).sum().item()
        return chosen, rows.argmax(-1).tolist() == list(after)

    def continued(self, ids: Sequence[int], count: int) -> str:
        """Returns the likeliest text of at most so many tokens."""
        with torch.inference_mode():
            found = self._model.generate(
                torch.tensor([ids]), max_new_tokens=count, do_sample=False
            )[0, len(ids) :]
        text: str = self.tokenizer.decode(found, skip_special_tokens=True)
        return text

    def answer(self, text: str, count: int) -> str:
        """Returns the likeliest answer in a chat."""
        return self.continued(self.chat_ids({"role": "user", "content": text}), count)
