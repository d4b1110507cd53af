"""Defines the commands about sampling: `serve`, `sample` and `chat`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tg_tinker.cli.http_client import Server
from tg_tinker.cli.shared import connector
from tg_tinker.cluster.interrupts import Stopped
from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.storage.files import new_file
from tg_tinker.texts import check_text

if TYPE_CHECKING:
    pass

commands = typer.Typer()

_Url = Annotated[
    str, typer.Option(envvar="TG_TINKER_URL", help="Server URL that `tg-tinker serve` prints.")
]
_Key = Annotated[
    str | None, typer.Option(envvar="TG_TINKER_API_KEY", help="API key, if the server needs one.")
]
_Model = Annotated[
    str, typer.Option(help="Model: base, a run, run@step, run@>=step, or an artifact.")
]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")]
_Temperature = Annotated[
    float, typer.Option(min=0, help="Sampling temperature; 0 takes the most probable token.")
]
_Seed = Annotated[int | None, typer.Option(min=0, help="Sampling seed, to repeat an answer.")]
_URL = "http://127.0.0.1:8000/v1"
_STOP = "Ctrl-C stops it; on a cluster that outlives this command, `serve shutdown` does."


@commands.command()
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, Hugging Face directory or GGUF file; SmolLM2-135M if left out."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Maximum replicas of the model.")] = 1,
    write_config: Annotated[
        Path | None,
        typer.Option(help="File to write for `serve deploy`; nothing is started then."),
    ] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, until Ctrl-C or SIGTERM.

    It serves the base model, every saved artifact of runs on this base model,
    and runs that are live on the same Ray cluster. It uses a cluster that
    `tg-tinker up` or `ray start --head` left running, or else starts one for
    this command. With this one, a stop lets the answers end that have begun,
    for up to 8 seconds, and refuses new requests; a second stop ends at once.

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
    console = Console(stderr=True)
    with connector(ctx, begins=True)() as service:
        with console.status("loading the model"):
            url = service.serve_http(model, host, port, max_replicas=replicas)
        console.print(
            f"Serving at [bold]{url}[/]. {_opened_by(len(service.list_api_keys()))} {_STOP}"
        )
        console.print(f"Metrics for Prometheus: {' '.join(service.metrics_urls())}", style="dim")
        threading.Event().wait()  # until a stop: Ctrl-C, SIGTERM or SIGHUP


def _opened_by(keys: int) -> str:
    if not keys:
        return "Open to everyone on this machine; `tg-tinker api-keys create` makes keys required."
    return "1 API key opens it." if keys == 1 else f"{keys} API keys open it."


def _write_config(path: Path, model: str, host: str, port: int, replicas: int) -> None:
    from tg_tinker.backend import serve_backend

    model = str(Path(model).absolute()) if Path(model).exists() else model
    try:
        with new_file(path) as file:
            written = serve_backend().config(model, "auto", host, port, replicas, "tg_tinker")
            file.write(written.encode())
    except OSError as error:
        raise InvalidRequestError(
            f"cannot write {path} ({error.strerror}): choose another name, or remove that file"
        ) from None
    typer.echo(f"{path}: deploy it with `serve deploy {path}`")


@commands.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    model: _Model = "base",
    max_tokens: _MaxTokens = 128,
    temperature: _Temperature = 1.0,
    seed: _Seed = None,
    show_as_it_grows: Annotated[
        bool, typer.Option("--stream", help="Print the text as it is generated.")
    ] = False,
    url: _Url = _URL,
    key: _Key = None,
) -> None:
    """Complete a text with a model on a running server (see `tg-tinker serve`).

    [cyan]tg-tinker sample "Once upon a time" --stream[/]
    [cyan]tg-tinker sample - --model ARTIFACT_ID --temperature 0 < prompt.txt[/]
    """
    body: dict[str, Any] = {
        "model": model, "prompt": _text(prompt), "max_tokens": max_tokens,
        "temperature": temperature, "seed": seed,
    }  # fmt: skip
    server, parts = _server(url, key), []
    try:
        for event in server.stream("completions", body):
            parts.append(event["choices"][0]["text"])
            if show_as_it_grows:
                typer.echo(parts[-1], nl=False)
    finally:
        if show_as_it_grows and parts:  # also after Ctrl-C: the shell's prompt needs a new line
            typer.echo()
    if not show_as_it_grows:
        typer.echo("".join(parts))


def _server(url: str, key: str | None) -> Server:
    """Returns the server of a command, and warns if others can read what the command sends."""
    server = Server(url, key)
    if server.warning:
        typer.echo(f"warning: {server.warning}", err=True)
    return server


def _text(prompt: str) -> str:
    return _utf8(lambda: sys.stdin.read() if prompt == "-" else prompt, "the prompt")


def _utf8(read: Callable[[], str], what: str) -> str:
    """Returns a text of the command line; Python reads bytes that are no UTF-8 as surrogates."""
    with contextlib.suppress(UnicodeDecodeError, InvalidRequestError):
        return check_text(read(), what)
    raise InvalidRequestError(
        f"{what} is not UTF-8 text: convert it first, for example with `iconv -t utf-8`"
    )


@commands.command()
def chat(
    model: _Model = "base",
    system: Annotated[str | None, typer.Option(help="System message, sent first.")] = None,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.7,
    url: _Url = _URL,
    key: _Key = None,
) -> None:
    """Chat with a model on a running server; an empty line or Ctrl-D ends the chat.

    Ctrl-C stops the current answer. The exit status is 1 if an answer ended
    with an error.

    [cyan]tg-tinker chat --model ARTIFACT_ID[/]
    """
    server, failed = _server(url, key), False
    messages: list[dict[str, str]] = []
    if system is not None:
        text = _utf8(lambda: system, "the system message")
        messages.append({"role": "system", "content": text})
    while said := _ask():
        messages.append({"role": "user", "content": said})
        body = {"model": model, "messages": messages, "max_tokens": max_tokens,
                "temperature": temperature}  # fmt: skip
        try:
            answer = _answer(server.stream("chat/completions", body))
        except TGTinkerError as error:
            Console(stderr=True).print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
            messages.pop()
            failed = True
        else:
            messages.append({"role": "assistant", "content": answer})
    raise typer.Exit(failed)


def _answer(events: Iterator[dict[str, Any]]) -> str:
    """Prints an answer as it arrives, until its end or Ctrl-C. Returns the printed text."""
    parts = []
    try:
        for event in events:
            parts.append(event["choices"][0]["delta"]["content"])
            typer.echo(parts[-1], nl=False)
    except Stopped:
        raise
    except KeyboardInterrupt:
        pass
    finally:
        typer.echo()
    return "".join(parts)


def _ask() -> str:
    try:
        return _utf8(lambda: input("> " if sys.stdin.isatty() else ""), "the message").strip()
    except EOFError:
        return ""
