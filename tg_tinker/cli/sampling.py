"""The commands about sampling: `serve`, `sample` and `chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tg_tinker.cli.http_client import stream
from tg_tinker.cli.shared import connector
from tg_tinker.errors import InvalidRequestError, TGTinkerError

if TYPE_CHECKING:
    pass

commands = typer.Typer()

_Url = Annotated[
    str, typer.Option(envvar="TG_TINKER_URL", help="Of the server, as `tg-tinker serve` prints it.")
]
_Key = Annotated[
    str | None, typer.Option(envvar="TG_TINKER_API_KEY", help="Where the server wants one.")
]
_Model = Annotated[
    str, typer.Option(help="base, a run, run@step, run@>=step, or an artifact of the server.")
]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
_Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")]
_Seed = Annotated[int | None, typer.Option(min=0, help="Repeats the same answer.")]
_URL = "http://127.0.0.1:8000/v1"


@commands.command()
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, Hugging Face directory or GGUF file; SmolLM2-135M if left out."),
    ] = None,
    host: Annotated[str, typer.Option(help="Others than loopback need an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model at most.")] = 1,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Write a file for `serve deploy` instead, and start nothing."),
    ] = None,
) -> None:
    """Answer requests over HTTP, as OpenAI's API does, until Ctrl-C.

    Serves the base model, every saved artifact of runs on it, and runs that live
    on the same Ray cluster. A cluster that `ray start --head` left running is
    used; else one starts for this command.

      [cyan]tg-tinker serve[/]
      [cyan]curl localhost:8000/v1/models[/]
      [cyan]tg-tinker serve --model path/or/hub-id --host 0.0.0.0[/]
      [cyan]tg-tinker serve --write-config serve.yaml[/]
    """
    from tg_tinker.client.serving import check_serving
    from tg_tinker.demo.options import find_demo_model

    model = model or str(find_demo_model())
    if write_config is not None:
        _write_config(write_config, model, host, port, replicas)
        return
    check_serving(model, host, port)
    console, stopped = Console(stderr=True), threading.Event()
    with connector(ctx, begins=True)() as service:
        # Not before: Ray, when it starts, sets one of its own that prints frames.
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        with console.status("loading the model"):
            url = service.serve_http(model, host, port, max_replicas=replicas)
        keys = service.list_api_keys()
        console.print(
            f"Serving at [bold]{url}[/]. "
            + (f"{len(keys)} API keys open it." if keys else "Open to everyone on this machine:")
            + ("" if keys else " `tg-tinker api-keys create` ends that. Ctrl-C stops it.")
        )
        console.print(f"Metrics for Prometheus: {' '.join(service.metrics_urls())}", style="dim")
        while not stopped.wait(1):
            pass


def _write_config(path: Path, model: str, host: str, port: int, replicas: int) -> None:
    from tg_tinker.backend import serve_backend

    model = str(Path(model).absolute()) if Path(model).exists() else model
    try:
        with path.open("x") as file:
            file.write(serve_backend().config(model, "auto", host, port, replicas, "tg_tinker"))
    except OSError as error:
        raise InvalidRequestError(
            f"cannot write {path} ({error.strerror}): choose another name, or remove what is there"
        ) from None
    typer.echo(f"{path}: deploy it with `serve deploy {path}`")


@commands.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from stdin.")],
    model: _Model = "base",
    max_tokens: _MaxTokens = 128,
    temperature: _Temperature = 1.0,
    seed: _Seed = None,
    show_as_it_grows: Annotated[
        bool, typer.Option("--stream", help="Print the text as it is drawn.")
    ] = False,
    url: _Url = _URL,
    key: _Key = None,
) -> None:
    """Complete a text on a running server.

    [cyan]tg-tinker sample "Once upon a time" --stream[/]
    [cyan]tg-tinker sample - --model ARTIFACT_ID --temperature 0 < prompt.txt[/]
    """
    body: dict[str, Any] = {
        "model": model, "prompt": _text(prompt), "max_tokens": max_tokens,
        "temperature": temperature, "seed": seed,
    }  # fmt: skip
    parts = []
    try:
        for event in stream(url, key, "completions", body):
            parts.append(event["choices"][0]["text"])
            if show_as_it_grows:
                typer.echo(parts[-1], nl=False)
    finally:
        if show_as_it_grows and parts:  # also after Ctrl-C: the shell's prompt begins a line
            typer.echo()
    if not show_as_it_grows:
        typer.echo("".join(parts))


def _text(prompt: str) -> str:
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # bytes that are no text may have come in as lone surrogates
    except UnicodeError:
        raise InvalidRequestError(
            "the prompt is not UTF-8 text: convert it first, such as with `iconv -t utf-8`"
        ) from None
    return text


@commands.command()
def chat(
    model: _Model = "base",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.7,
    url: _Url = _URL,
    key: _Key = None,
) -> None:
    """Talk to a model on a running server; an empty line or Ctrl-D ends it.

    Ctrl-C ends an answer. The exit status is 1 if one ended with an error.

    [cyan]tg-tinker chat --model ARTIFACT_ID[/]
    """
    messages: list[dict[str, str]] = []
    failed = False
    if system is not None:
        messages.append({"role": "system", "content": system})
    while said := _ask():
        messages.append({"role": "user", "content": said})
        body = {"model": model, "messages": messages, "max_tokens": max_tokens,
                "temperature": temperature}  # fmt: skip
        try:
            answer = _answer(stream(url, key, "chat/completions", body))
        except TGTinkerError as error:
            Console(stderr=True).print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
            messages.pop()
            failed = True
        else:
            messages.append({"role": "assistant", "content": answer})
    raise typer.Exit(failed)


def _answer(events: Iterator[dict[str, Any]]) -> str:
    """Prints an answer as it grows, until its end or Ctrl-C."""
    parts = []
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for event in events:
                parts.append(event["choices"][0]["delta"]["content"])
                typer.echo(parts[-1], nl=False)
    finally:
        typer.echo()
    return "".join(parts)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
