"""The sampling server over HTTP, with OpenAI's own client, on a real Serve deployment."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import openai
import pytest
import ray
from ray import serve
from typer.testing import CliRunner

from serve_app import application
from serve_app.http.access import Access, HttpOptions
from support.http_calls import post
from support.processes import free_port
from tg_tinker import (
    AccessDeniedError,
    ClusterUnavailableError,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    OptimizerConfig,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.cli.main import main

pytestmark = pytest.mark.slow


class Server(NamedTuple):
    service: ServiceClient
    url: str
    key: str
    tc: TrainingClient
    artifact: str


def config(model: Path) -> TrainingConfig:
    return TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=0.3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(home: Path, tiny_model: Path) -> Iterator[Server]:
    with ServiceClient(address="local") as service:
        key, _ = service.create_api_key("tests")
        url = service.serve_http(str(tiny_model), port=free_port(), max_concurrent=40)
        with service.create_training_client(config(tiny_model)) as tc:
            tc.forward_backward({"input_ids": [[65, 66, 67, 68]]})
            tc.optim_step().result()
            saved = tc.save_state().artifact_id
            yield Server(service, url, key, tc, saved)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)


# --- what is answered ----------------------------------------------------------------------------


def test_a_completion_is_what_the_client_samples(server: Server, client: openai.OpenAI) -> None:
    expected = server.tc.sample("abc", max_tokens=12, temperature=0).samples[0]
    found = client.completions.create(
        model=server.tc.id, prompt="abc", max_tokens=12, temperature=0, logprobs=3
    )
    (choice,) = found.choices
    assert choice.text == expected.completion
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(choice.logprobs.top_logprobs) == 12
    assert found.usage.completion_tokens == 12
    assert found.usage.prompt_tokens == 3
    assert found.system_fingerprint == f"{server.tc.id}@1"


def test_streams_joined_are_the_whole_answer(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": server.tc.id, "prompt": ["abc", "xy"], "max_tokens": 15, "n": 2, "seed": 5,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    texts, ends, usage = {}, {}, None
    for event in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert [texts[i] for i in range(4)] == [choice.text for choice in whole.choices]
    assert ends == {i: choice.finish_reason for i, choice in enumerate(whole.choices)}
    assert usage == whole.usage


def test_chat_renders_the_template_and_streams(server: Server, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    found = client.chat.completions.create(
        model=server.tc.id, messages=messages, max_tokens=10, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    rendered = server.tc.tokenizer.apply_chat_template(
        [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    expected = server.tc.sample(rendered, max_tokens=10, temperature=0).samples[0]
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.completion)
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    deltas = [
        event.choices[0].delta
        for event in client.chat.completions.create(
            model=server.tc.id, messages=messages, max_tokens=10, temperature=0, stream=True
        )
    ]
    assert deltas[0].role == "assistant"
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content for delta in deltas) == expected.completion


def test_stop_echo_and_token_prompts(server: Server, client: openai.OpenAI) -> None:
    ids = server.tc.tokenizer("abc")["input_ids"]
    whole = client.completions.create(
        model="base", prompt=ids, max_tokens=20, temperature=0
    ).choices[0].text  # fmt: skip
    assert whole == client.completions.create(
        model="base", prompt="abc", max_tokens=20, temperature=0
    ).choices[0].text  # fmt: skip
    stop = whole[5:7]
    cut = client.completions.create(
        model="base", prompt="abc", max_tokens=20, temperature=0, stop=stop, echo=True
    ).choices[0]  # fmt: skip
    assert cut.text == "abc" + whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_models_are_the_base_the_runs_and_the_artifacts(
    server: Server, client: openai.OpenAI
) -> None:
    assert {model.id for model in client.models.list()} == {"base", server.tc.id, server.artifact}


def test_an_artifact_a_step_and_the_latest_answer_as_asked(
    server: Server, client: openai.OpenAI
) -> None:
    def drawn(model: str) -> tuple[str, str]:
        found = client.completions.create(model=model, prompt="abc", max_tokens=9, temperature=0)
        return found.choices[0].text, found.system_fingerprint

    def scores(model: str) -> list[float]:
        """Texts may be equal where weights are not: bytes that are no text all look alike."""
        found = client.completions.create(
            model=model, prompt="abc", max_tokens=9, temperature=0, logprobs=1
        )
        return found.choices[0].logprobs.token_logprobs  # type: ignore[union-attr,return-value]

    first, version = drawn(server.tc.id)
    before = scores(server.tc.id)
    assert drawn(server.artifact) == (first, server.artifact)
    assert drawn(version) == (first, version)
    for _ in range(10):
        server.tc.forward_backward({"input_ids": [[120] * 40]})
        server.tc.optim_step()
    _, newer = drawn(f"{server.tc.id}@>={int(version.partition('@')[2]) + 10}")  # waits
    assert scores(server.tc.id) != pytest.approx(before, abs=1e-3)
    assert int(newer.partition("@")[2]) > int(version.partition("@")[2])
    with pytest.raises(openai.ConflictError, match="is at step"):
        drawn(version)
    assert drawn(server.artifact)[0] == first
    server.tc.load_state(server.artifact)
    assert drawn(server.tc.id)[0] == first
    assert scores(server.tc.id) == pytest.approx(before, abs=1e-3)


def test_a_shredded_or_expired_artifact_is_refused_and_its_weights_leave_the_replica(
    server: Server, client: openai.OpenAI
) -> None:
    handle = serve.get_app_handle(next(iter(serve.status().applications)))

    def resident() -> int:
        return int(handle.load.remote().result().adapters)

    def ask(model: str) -> None:
        client.completions.create(model=model, prompt="abc", max_tokens=1)

    shredded, expiring = (server.service.copy_artifact(server.artifact) for _ in range(2))
    ask(server.artifact)
    before = resident()
    for copy in (shredded, expiring):
        ask(copy.artifact_id)
    assert resident() == before + 2
    server.service.shred_artifact(shredded.artifact_id)
    server.service.set_expiry(expiring.artifact_id, datetime.now(UTC) + timedelta(seconds=0.5))
    time.sleep(0.6)
    for copy in (shredded, expiring):
        with pytest.raises(openai.NotFoundError):
            ask(copy.artifact_id)
    known = {model.id for model in client.models.list()}
    assert not {shredded.artifact_id, expiring.artifact_id} & known
    deadline = time.monotonic() + 30
    while resident() > before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ask(server.artifact)
    assert resident() == before
    assert [*server.service.delete_expired()] == [(expiring.artifact_id, "")]


def test_our_own_route_scores_prompts(server: Server) -> None:
    status, found, _ = post(
        f"{server.url}/sample", server.key,
        {"model": server.tc.id, "prompts": ["abc", "de"], "max_tokens": 3, "temperature": 0,
         "prompt_logprobs": True, "top_logprobs": 1, "num_completions": 2},
    )  # fmt: skip
    assert status == 200
    assert [s["prompt_index"] for s in found["samples"]] == [0, 0, 1, 1]
    assert [len(s["prompt_logprobs"]) for s in found["samples"]] == [3, 3, 2, 2]
    assert found["samples"][0]["prompt_logprobs"][0] is None
    assert all(len(s["token_ids"]) == len(s["top_logprobs"]) > 0 for s in found["samples"])
    assert found["weights_version"].startswith(f"{server.tc.id}@")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "status", "told"),
    [
        ("completions", {"best_of": 3}, 400, "best_of: not supported"),
        ("completions", {"logit_bias": {"5": 1}}, 400, "logit_bias: not supported"),
        ("completions", {"temperature": "hot"}, 400, "temperature"),
        ("completions", {"temperature": -1}, 400, "temperature"),
        ("completions", {"n": 1000}, 400, "n"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"max_tokens": 20_000}, 400, "more than the 16384"),
        ("completions", {"max_tokens": 4000, "n": 5}, 400, "20000, more than the 16384"),
        ("completions", {"max_tokens": 10**400}, 400, "max_tokens"),
        ("completions", {"top_k": 10**400}, 400, "top_k"),
        ("completions", {"prompt": [-1], "echo": True}, 400, "prompt"),
        ("completions", {"prompt": "\ud800"}, 400, ""),
        ("completions", {"model": "\ud800"}, 400, ""),
        ("completions", {"model": "modèle"}, 404, "no model"),
        ("completions", {"prompt": [0] * 100_000 + ["x"]}, 400, "prompt"),
        ("completions", {"max_tokens": 126}, 400, "context of 128"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [[]]}, 400, "prompt"),
        ("completions", {"prompt": [900]}, 400, "in \\[0, 259\\)"),
        ("completions", {"stop": [str(i) for i in range(17)]}, 400, "stop: at most 16"),
        ("completions", {"seed": -1}, 400, "seed"),
        ("completions", {"seed": 10**30}, 400, "seed"),
        ("completions", {"prompt": ["a"] * 50, "n": 3}, 400, "128 of one request"),
        ("completions", {"repetition_penalty": 1e-39, "top_p": 0.5}, 400, "repetition_penalty"),
        ("completions", {"stop_token_ids": [*range(17)]}, 400, "stop_token_ids"),
        ("completions", {"stream_options": {}}, 400, "needs stream"),
        ("completions", {"echo": True, "logprobs": 0}, 400, "echo: with logprobs"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"model": "nobody"}, 404, "no model"),
        ("completions", {"model": "base@1"}, 404, "no model"),
        ("chat/completions", {"prompt": "x"}, 400, "prompt: not supported"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ("chat/completions", {"top_logprobs": 2}, 400, "needs logprobs"),
        ("chat/completions", {"tools": []}, 400, "tools: not supported"),
        ("sample", {"prompts": [], "prompt": None}, 400, "prompt"),
    ],
)
def test_what_is_wrong_is_named(
    server: Server, route: str, body: dict[str, Any], status: int, told: str
) -> None:
    right: dict[str, dict[str, Any]] = {
        "completions": {"model": "base", "prompt": "abc"},
        "chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
        "sample": {"model": "base", "prompts": "abc"},
    }
    found, answer, _ = post(f"{server.url}/{route}", server.key, right[route] | body)
    assert found == status
    assert re.search(told, answer["error"]["message"])
    assert answer["error"]["type"] == "invalid_request_error"


def test_errors_repeat_no_text(server: Server) -> None:
    secret = "PATIENT-4711"
    for body in (
        {"model": "base", "prompt": secret * 50, "max_tokens": 50},
        {"model": "base", "prompt": {"text": secret}},
        {"model": "base", "prompt": "a", "stop": secret, "surprise": secret},
        {"model": "base", "messages": [{"role": secret, "content": secret}]},
        b'{"model": "base", "prompt": "' + secret.encode(),
    ):
        for route in ("completions", "chat/completions", "sample"):
            status, answer, _ = post(f"{server.url}/{route}", server.key, body)
            assert status == 400
            assert secret not in json.dumps(answer)


def test_a_small_body_makes_no_large_answer(server: Server) -> None:
    for body in ({"prompt": [None] * 150_000}, {"messages": [0] * 300_000}, {"x" * 900_000: 1}):
        for route in ("completions", "chat/completions", "sample"):
            status, answer, _ = post(f"{server.url}/{route}", server.key, {"model": "base"} | body)
            assert status == 400
            assert len(json.dumps(answer)) < 2000


def test_what_openai_calls_nullable_may_be_null(client: openai.OpenAI) -> None:
    nothing: Any = dict.fromkeys(("n", "temperature", "max_tokens", "top_p", "stop", "seed"))
    assert client.completions.create(model="base", prompt="abc", **nothing).choices
    asked: Any = [{"role": "user", "content": "hi"}]
    assert client.chat.completions.create(model="base", messages=asked, **nothing).choices


def test_a_chat_without_a_limit_takes_what_is_left(server: Server) -> None:
    """The context is 128: there is no room for the 256 tokens of a long one."""
    asked = {"model": "base", "messages": [{"role": "user", "content": "a" * 60}]}
    status, found, _ = post(f"{server.url}/chat/completions", server.key, asked)
    assert status == 200
    assert found["usage"]["total_tokens"] <= 128


def test_nobody_without_a_key_has_a_body_read(server: Server) -> None:
    """Half-sent requests would else hold all places until their senders go."""
    host, _, port = server.url.removeprefix("http://").removesuffix("/v1").partition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as half_sent:
        half_sent.sendall(head.encode() + b"12345")
        assert half_sent.recv(100).startswith(b"HTTP/1.1 401")


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    body = {"model": "base", "prompt": "a" * 2**20}
    status, answer, _ = post(f"{server.url}/completions", server.key, body)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_unknown_routes_answer_in_the_same_form(server: Server) -> None:
    status, answer, _ = post(f"{server.url}/embeddings", server.key, {})
    assert status == 404
    assert answer["error"]["message"]


# --- access --------------------------------------------------------------------------------------


def test_a_key_is_needed_and_a_revoked_or_expired_one_opens_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"model": "base", "prompt": "a", "max_tokens": 1}
    route = f"{server.url}/completions"
    revoked, info = server.service.create_api_key("revoked")
    server.service.revoke_api_key(info.key_id)
    expired, _ = server.service.create_api_key("expired", days=1e-9)
    half = server.key[: len(server.key) // 2]
    for key in (None, "nonsense", half, server.key + "x", revoked, expired):
        status, answer, headers = post(route, key, asked)
        assert (status, answer["error"]["code"]) == (401, "access_denied")
        assert headers["WWW-Authenticate"] == "Bearer"
    assert post(route, server.key, asked)[0] == 200
    with pytest.raises(NotFoundError):
        server.service.revoke_api_key(info.key_id)


def test_a_key_that_was_used_opens_nothing_soon_after_it_is_revoked(server: Server) -> None:
    key, info = server.service.create_api_key("short")
    asked = {"model": "base", "prompt": "a", "max_tokens": 1}
    assert post(f"{server.url}/completions", key, asked)[0] == 200
    server.service.revoke_api_key(info.key_id)
    deadline = time.monotonic() + 10
    while post(f"{server.url}/completions", key, asked)[0] != 401:
        assert time.monotonic() < deadline, "a revoked key still opens the server"
        time.sleep(0.5)


def test_keys_are_stored_as_hashes_only(server: Server, home: Path) -> None:
    secret = server.key.rpartition("-")[2]
    for file in home.glob("registry.db*"):
        assert secret.encode() not in file.read_bytes()


def test_a_key_for_one_artifact_opens_no_other_model(server: Server) -> None:
    key, _ = server.service.create_api_key("narrow", models=[server.artifact])
    scoped = openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)
    assert {model.id for model in scoped.models.list()} == {"base", server.artifact}
    assert scoped.completions.create(model=server.artifact, prompt="a", max_tokens=1)
    for other in (server.tc.id, f"{server.tc.id}@1", "never-was"):
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            scoped.completions.create(model=other, prompt="a", max_tokens=1)


def test_tenants_can_neither_see_nor_name_each_others_models(
    server: Server, tiny_model: Path
) -> None:
    other = ServiceClient(tenant="other")
    key, _ = other.create_api_key("theirs")
    theirs = openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)
    assert {model.id for model in theirs.models.list()} == {"base"}
    answers = []
    for name in (server.tc.id, server.artifact, "never-was"):
        with pytest.raises(openai.NotFoundError) as refused:
            theirs.completions.create(model=name, prompt="a", max_tokens=1)
        answers.append(refused.value.body["message"].replace(name, "X"))  # type: ignore[index]
    assert len(set(answers)) == 1  # what exists elsewhere answers as what never was
    other.close()


def test_an_address_that_others_reach_needs_a_key(tiny_model: Path, server: Server) -> None:
    nobody = ServiceClient(tenant="keyless")
    with pytest.raises(InvalidRequestError, match="make an API key first"):
        nobody.serve_http(str(tiny_model), host="0.0.0.0", port=free_port())
    nobody.close()


def keyless(wanted: Callable[[], bool]) -> Any:
    """A registry that has met every store, and wants a key or none."""
    return SimpleNamespace(
        api_keys=SimpleNamespace(wanted=lambda _: wanted()),
        heads=SimpleNamespace(met=lambda *_: True),
    )


def test_an_open_server_answers_until_there_is_a_key() -> None:
    """The rule itself, on the class: a second server would need a second address."""
    known: list[str] = []
    asked: Any = SimpleNamespace(headers={"host": "localhost:8000"})
    registry = keyless(lambda: bool(known))
    access = Access(registry, HttpOptions(open=True), "nowhere")
    assert asyncio.run(access.caller(asked)).tenant == "default"
    known.append("one")
    access._keys_known_until = 0.0  # five seconds later
    with pytest.raises(AccessDeniedError):
        asyncio.run(access.caller(asked))


def test_an_open_server_knows_only_the_names_of_this_machine() -> None:
    registry = keyless(lambda: False)
    access = Access(registry, HttpOptions(open=True), "nowhere")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        asked: Any = SimpleNamespace(headers={"host": host})
        assert asyncio.run(access.caller(asked)).key_id == "open"
    for host in ("evil.example", "localhost.evil.example:8000", ""):
        asked = SimpleNamespace(headers={"host": host})
        with pytest.raises(AccessDeniedError):
            asyncio.run(access.caller(asked))


def test_revoking_the_last_key_opens_the_door_to_nobody(home: Path) -> None:
    with ServiceClient(tenant="closing") as tenant:
        assert not tenant._registry.api_keys.wanted("closing")
        _, info = tenant.create_api_key("only")
        tenant.revoke_api_key(info.key_id)
        assert tenant.list_api_keys() == []
        assert tenant._registry.api_keys.wanted("closing")


def test_another_address_than_the_running_one_is_refused(server: Server, tiny_model: Path) -> None:
    with pytest.raises(ClusterUnavailableError, match="already, not at"):
        server.service.serve_http(str(tiny_model), port=free_port())
    assert post(f"{server.url}/completions", server.key,
                {"model": "base", "prompt": "a", "max_tokens": 1})[0] == 200  # fmt: skip


# --- load ----------------------------------------------------------------------------------------


def test_64_streams_with_cancels_and_bad_requests(server: Server) -> None:
    keys = [server.key, server.service.create_api_key("second")[0]]
    clients = [openai.OpenAI(base_url=server.url, api_key=key, max_retries=0) for key in keys]
    asked: dict[str, Any] = {"model": server.tc.id, "max_tokens": 20, "temperature": 0}
    expected = clients[0].completions.create(prompt="abc", **asked).choices[0].text

    def good(client: openai.OpenAI) -> bool:
        events = client.completions.create(prompt="abc", stream=True, **asked)
        return "".join(event.choices[0].text for event in events) == expected

    def left(client: openai.OpenAI) -> bool:
        with client.completions.create(prompt="xyz", stream=True, **asked) as events:
            next(iter(events))
        return True

    def bad(client: openai.OpenAI) -> bool:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt="a" * 127, **asked)
        return True

    with ThreadPoolExecutor(64) as pool:
        results = [pool.submit((good, good, left, bad)[i % 4], clients[i // 32]) for i in range(64)]
        assert all(result.result(120) for result in results)


def test_requests_that_wait_for_a_step_hold_up_no_other(server: Server) -> None:
    def ask(model: str) -> int:
        body = {"model": model, "prompt": "a", "max_tokens": 1}
        return post(f"{server.url}/completions", server.key, body)[0]

    def answered_before_they_are() -> bool:
        with ThreadPoolExecutor(16) as pool:  # more than asyncio's own threads on a few cores
            waiting = [pool.submit(ask, f"{server.tc.id}@>=99999") for _ in range(16)]
            time.sleep(1)  # they are on their way: each waits ten seconds
            assert ask(server.tc.id) == 200
            before = not all(one.done() for one in waiting)
            assert {one.result() for one in waiting} == {409}
        return before

    # had it waited for them, it would come last every time; a busy machine may be slow once
    assert any(answered_before_they_are() for _ in range(4))


def test_too_many_requests_of_a_key_are_told_when_to_come_back(server: Server) -> None:
    key, _ = server.service.create_api_key("busy")
    body = {"model": "base", "prompt": "abc", "max_tokens": 110}
    with ThreadPoolExecutor(90) as pool:
        found = [*pool.map(lambda _: post(f"{server.url}/completions", key, body), range(90))]
    statuses = {status for status, _, _ in found}
    assert statuses == {200, 429}
    refused = [(answer, headers) for status, answer, headers in found if status == 429]
    assert all(headers["Retry-After"] == "1" for _, headers in refused)


def test_health(server: Server) -> None:
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/healthz", timeout=10) as found:
        assert json.loads(found.read()) == {"status": "ok"}


# --- the command line ----------------------------------------------------------------------------


def test_sample_and_chat_talk_to_the_server(server: Server) -> None:
    where = ["--url", server.url, "--key", server.key, "--model", server.artifact]
    whole = CliRunner().invoke(main, ["sample", "abc", *where, "--seed", "3", "--max-tokens", "9"])
    grown = CliRunner().invoke(
        main, ["sample", "-", *where, "--seed", "3", "--max-tokens", "9", "--stream"], input="abc"
    )
    assert whole.exit_code == grown.exit_code == 0
    assert whole.output == grown.output != "\n"
    talk = CliRunner().invoke(main, ["chat", *where, "--max-tokens", "5"], input="hi\nand?\n\n")
    assert talk.exit_code == 0
    wrong = CliRunner().invoke(main, ["sample", "abc", "--url", server.url, "--key", "no"])
    assert wrong.exit_code == 1
    assert "opens nothing" in wrong.output
    nowhere = CliRunner().invoke(
        main, ["sample", "abc", "--url", f"http://127.0.0.1:{free_port()}/v1"]
    )
    assert nowhere.exit_code == 1
    assert "tg-tinker serve" in nowhere.output


PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"
EXPORTS, *CURLS = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", CURLS, ids=[c.split("/", 1)[1][:12] for c in CURLS])
def test_the_curl_examples_of_the_docs_run(server: Server, command: str) -> None:
    places = {"TG_TINKER_URL": server.url, "TG_TINKER_API_KEY": server.key}
    found = subprocess.run(
        ["bash", "-c", EXPORTS + command],
        env=os.environ | places,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert '"error"' not in found.stdout
    assert '"base"' in found.stdout or '"samples"' in found.stdout


def test_the_docs_set_what_their_examples_use() -> None:
    shown = EXPORTS + "env"
    found = subprocess.run(
        ["bash", "-c", shown], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "TG_TINKER_URL=http://127.0.0.1:8000/v1\n" in found.stdout
    assert re.search("^TG_TINKER_API_KEY=.", found.stdout, re.M)


# --- where to listen, and why not ----------------------------------------------------------------


def test_ipv6_addresses_are_told_apart(server: Server, tiny_model: Path) -> None:
    nobody = ServiceClient(tenant="keyless")
    with pytest.raises(InvalidRequestError, match="make an API key first"):
        nobody.serve_http(str(tiny_model), host="::", port=free_port())
    with pytest.raises(ClusterUnavailableError, match="already, not at"):  # allowed, but late
        nobody.serve_http(str(tiny_model), host="::1", port=free_port())
    with pytest.raises(InvalidRequestError, match="has no address"):
        nobody.serve_http(str(tiny_model), host="a..b")
    with pytest.raises(NotFoundError, match="no such path"):
        nobody.serve_http("/nope/missing")
    nobody.close()


def test_serve_does_not_share_the_port_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("Serve was started")

    monkeypatch.setattr(application, "_get_global_client", lambda **_: None)
    monkeypatch.setattr(application, "_start", start)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterUnavailableError, match=f"port {port} of 127.0.0.1"):
            application.serve_http("127.0.0.1", port, 1, {}, open=True)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("tg_tinker.errors.NotFoundError: the hub gave no model 'a/b'", "the hub gave no model"),
        ("RuntimeError: what a file holds", ""),
        ("tg_tinker.errors.NotFoundError: first\nRuntimeError: what a file holds", ""),
    ],
)
def test_a_failed_start_is_explained_by_our_own_errors_only(last: str, told: str) -> None:
    message = f"The deployment failed to start 3 times in a row. Error:\n  File x\n{last}\n"
    found = application._reason(message)
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_a_stream_that_is_left_behind_ends_in_silence_after_its_cluster() -> None:
    class Answers:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"one", b"two"])

        def cancel(self) -> None:
            raise ray.exceptions.RaySystemError("the cluster has ended")

    method = SimpleNamespace(remote=lambda sealed: Answers())
    handle = SimpleNamespace(options=lambda **_: SimpleNamespace(stream=method))
    begun: Any = application.Sampler(handle).stream(b"")
    assert next(begun) == b"one"
    begun.close()
