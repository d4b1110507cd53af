"""Tests the sampling server over HTTP, with OpenAI's own client, on a real Serve deployment."""

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
from typing import Any, Literal, NamedTuple

import openai
import pytest
import ray
import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.requests import Request
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from serve_app import application
from serve_app.http.access import Access, HttpOptions
from serve_app.http.openai import ChatBody, CompletionBody, SampleBody
from serve_app.http.refusals import parsed
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
def server(embedded: None, tiny_model: Path) -> Iterator[Server]:
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
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"base", server.tc.id, server.artifact}
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
    for name in ("nobody", "base@1", f"{server.tc.id}@1", f"{server.tc.id}/x", "a/b", "modèle"):
        with pytest.raises(openai.NotFoundError, match="there is no model") as refused:
            client.models.retrieve(name)
        assert refused.value.type == "invalid_request_error"


def test_an_artifact_a_step_and_the_latest_answer_as_asked(
    server: Server, client: openai.OpenAI
) -> None:
    def drawn(model: str) -> tuple[str, str]:
        found = client.completions.create(model=model, prompt="abc", max_tokens=9, temperature=0)
        return found.choices[0].text, found.system_fingerprint

    def scores(model: str) -> list[float]:
        """Returns log-probabilities: texts may be equal where weights differ, because bytes that
        are no text all look alike."""
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
    for sample in found["samples"]:
        none, *tops = sample["prompt_top_logprobs"]
        assert none is None
        assert len(tops) == len(sample["prompt_logprobs"]) - 1
        for score, ((_, best),) in zip(sample["prompt_logprobs"][1:], tops, strict=True):
            assert score <= best
    status, alone, _ = post(
        f"{server.url}/sample", server.key,
        {"model": server.tc.id, "prompts": "abc", "max_tokens": 0, "prompt_logprobs": True},
    )  # fmt: skip
    assert status == 200
    assert (alone["samples"][0]["token_ids"], alone["samples"][0]["completion"]) == ([], "")
    assert len(alone["samples"][0]["prompt_logprobs"]) == 3
    assert alone["samples"][0]["prompt_top_logprobs"] is None
    assert found["weights_version"].startswith(f"{server.tc.id}@")


# --- what is refused -----------------------------------------------------------------------------

ECHO = {"max_tokens": 0, "echo": True}
SCORES = {"max_tokens": 0, "prompt_logprobs": True}
MANY = ["a" * 127] * 128
SECRET = "PATIENT-4711"


@pytest.mark.parametrize(
    ("route", "body", "status", "told"),
    [
        ("completions", {"best_of": 2, "n": 3}, 400, "best_of: must be at least n"),
        ("completions", {"best_of": 64, "prompt": ["a"] * 3}, 400, "128 completions of one"),
        ("completions", {"logit_bias": {"259": 1}}, 400, "logit_bias has a token outside"),
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
        ("completions", {"prompt": [900]}, 400, "outside \\[0, 259\\)"),
        ("completions", {"stop": [str(i) for i in range(17)]}, 400, "stop: .*at most 16"),
        ("completions", {"seed": -2}, 400, "seed"),
        ("completions", {"seed": 10**30}, 400, "seed"),
        ("completions", {"prompt": ["a"] * 50, "n": 3}, 400, "128 completions of one request"),
        ("completions", {"repetition_penalty": 1e-39, "top_p": 0.5}, 400, "repetition_penalty"),
        ("completions", {"stop_token_ids": [*range(17)]}, 400, "stop_token_ids"),
        ("completions", {"stream_options": {}}, 400, "needs stream"),
        ("completions", {"echo": True, "logprobs": 21}, 400, "logprobs"),
        ("completions", {"max_tokens": 0, "logprobs": 1}, 400, "set echo=true"),
        ("completions", {"max_tokens": -1, "echo": True}, 400, "max_tokens"),
        ("completions", ECHO | {"prompt": "a" * 129}, 400, "context of 128"),
        ("completions", ECHO | {"prompt": [900]}, 400, "outside \\[0, 259"),
        ("completions", ECHO | {"prompt": MANY, "logprobs": 20}, 400, "send fewer prompts"),
        ("sample", SCORES | {"prompts": MANY, "top_logprobs": 20}, 400, "send fewer prompts"),
        ("sample", {"max_tokens": 0}, 400, "or 0 with prompt_logprobs"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"model": "nobody"}, 404, "no model"),
        ("completions", {"model": "base@1"}, 404, "no model"),
        ("chat/completions", {"prompt": "x"}, 400, "prompt: not supported"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ("chat/completions", {"top_logprobs": 2}, 400, "needs logprobs"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools: not supported"),
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
    secret = SECRET
    for body in (
        {"model": "base", "prompt": secret * 50, "max_tokens": 50},
        {"model": "base", "prompt": {"text": secret}},
        {"model": "base", "prompt": "a", "stop": secret, "surprise": secret},
        {"model": "base", "messages": [{"role": secret, "content": secret}]},
        {"model": "base", "tools": [secret], "suffix": secret, "user": [secret]},
        {"model": "base", "metadata": secret, "response_format": {"type": secret}},
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


def test_fields_that_ask_for_nothing_change_no_answer(client: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {
        "metadata": {"job": "7"}, "modalities": ["text"], "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "safety_identifier": "me", "service_tier": "auto",
        "store": False, "tool_choice": "none", "tools": [], "functions": [], "user": "me",
        "logit_bias": {}, "verbosity": "medium", "prompt_cache_key": "here", "prediction": None,
    }  # fmt: skip
    named: Any = {"role": "user", "content": "hi", "name": "Ada"}
    plain: Any = {"role": "user", "content": "hi"}
    asked: dict[str, Any] = {"model": "base", "max_tokens": 9, "temperature": 0}
    alone = client.chat.completions.create(messages=[plain], **asked).choices[0].message.content
    found = client.chat.completions.create(messages=[named], **asked, **nothing)
    assert found.choices[0].message.content == alone
    whole = client.completions.create(prompt="abc", **asked).choices[0].text
    more: Any = {"extra_body": nothing, "best_of": 1, "suffix": "", "seed": -1}
    assert client.completions.create(prompt="abc", **asked, **more).choices[0].text == whole


def of_the_model(model: Path, ids: list[int]) -> torch.Tensor:
    """Returns the log-probabilities at every place of a text, by transformers alone: [T, V]."""
    loaded = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return torch.log_softmax(loaded(torch.tensor([ids])).logits[0], -1)


def likelihood(choice: Any, context: int) -> tuple[float, bool]:
    """Reads the score of a continuation, and whether greedy sampling would have said it, as
    evaluation programs do: they ask for one token more, and leave it out."""
    scores = choice.logprobs.token_logprobs[context:-1]
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[context:-1]]
    return sum(scores), scores == best


def test_continuations_are_scored_as_evaluation_programs_ask(
    server: Server, client: openai.OpenAI, tiny_model: Path
) -> None:
    context = server.tc.tokenizer("Once upon")["input_ids"]
    loaded = LlamaForCausalLM.from_pretrained(tiny_model)
    whole = loaded.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)
    greedy = whole[0, len(context) :].tolist()
    asked: dict[str, Any] = {"model": "base", "logprobs": 1, "echo": True, "seed": 1234}
    prompts = [[*context, *greedy], [*context, *range(60, 100)], [*context, *greedy[:-1], 7]]
    found = client.completions.create(prompt=prompts, max_tokens=1, temperature=0, **asked)
    for choice, prompt in zip(found.choices, prompts, strict=True):
        rows = of_the_model(tiny_model, prompt)[len(context) - 1 : -1]
        said = torch.tensor(prompt[len(context) :])
        expected = float(rows.gather(1, said[:, None]).sum())
        total, is_greedy = likelihood(choice, len(context))
        assert total == pytest.approx(expected, abs=1e-3)
        assert is_greedy == bool((rows.argmax(-1) == said).all())
    assert [likelihood(choice, len(context))[1] for choice in found.choices] == [True, False, False]


@pytest.mark.parametrize("kind", ["text", "ids"])
@pytest.mark.parametrize("limit", [0, 3])
def test_prompts_are_scored_whole_and_streamed(
    server: Server, client: openai.OpenAI, kind: str, limit: int
) -> None:
    texts = ["a\N{OTTER}<|im_start|>b", "x", "y" * (128 - limit)]
    ids = [server.tc.tokenizer(text)["input_ids"] for text in texts]
    prompt: Any = texts if kind == "text" else ids
    asked: dict[str, Any] = {
        "model": "base", "prompt": prompt, "max_tokens": limit, "logprobs": 2, "echo": True,
        "temperature": 0, "n": 2,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    assert whole.usage.completion_tokens == sum(
        len(choice.logprobs.tokens) - len(ids[i // 2]) for i, choice in enumerate(whole.choices)
    )
    assert whole.usage.prompt_tokens == sum(map(len, ids))
    for i, choice in enumerate(whole.choices):
        text, found = texts[i // 2], choice.logprobs
        shown = text if kind == "text" else text.replace("<|im_start|>", "")
        assert choice.text[: len(shown)] == shown
        if limit == 0:
            assert (choice.text, choice.finish_reason) == (shown, "length")
            assert len(found.tokens) == len(ids[i // 2])
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        assert all(
            top[name] == score
            for name, score, top in zip(
                found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True
            )
        )
        assert {len(top) for top in found.top_logprobs[1:]} <= {2, 3}
        for name, place in zip(found.tokens, found.text_offset, strict=True):
            hidden = name.startswith(("bytes:", "<|")) and not choice.text[place:].startswith(name)
            assert hidden or choice.text[place:].startswith(name)
    joined: dict[int, dict[str, Any]] = {}
    for event in client.completions.create(**asked, stream=True):
        (part,) = event.choices
        one = joined.setdefault(part.index, {"text": ""})
        one["text"] += part.text
        for name, values in part.logprobs.to_dict().items():
            one[name] = [*one.get(name, []), *values]
    for choice in whole.choices:
        assert joined[choice.index] == {"text": choice.text, **choice.logprobs.to_dict()}


def test_an_echo_without_scores_draws_nothing_either(client: openai.OpenAI) -> None:
    found = client.completions.create(model="base", prompt="abc", max_tokens=0, echo=True)
    assert (found.choices[0].text, found.choices[0].logprobs) == ("abc", None)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 0)


def test_biases_and_the_best_of_many_reach_the_engine(client: openai.OpenAI) -> None:
    talk: Any = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": "base", "max_tokens": 4, "logit_bias": {"90": 100}}
    assert client.completions.create(prompt="abc", **asked).choices[0].text == "{{{{"
    said = client.chat.completions.create(messages=talk, **asked).choices[0].message
    assert said.content == "{{{{"
    drawn: dict[str, Any] = {
        "model": "base", "prompt": ["abc", "x"], "max_tokens": 5, "seed": 3, "logprobs": 0,
    }  # fmt: skip
    every = client.completions.create(n=4, **drawn)

    def mean(choice: Any) -> float:
        found = choice.logprobs.token_logprobs
        return sum(found) / len(found)

    expected = [sorted(every.choices[at : at + 4], key=mean, reverse=True)[:2] for at in (0, 4)]
    found = client.completions.create(n=2, best_of=4, **drawn)
    assert [c.text for c in found.choices] == [c.text for two in expected for c in two]
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert found.usage == every.usage


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["good", "bad"]
    sure: bool
    why: list[Literal["price", "taste"]] = Field(max_length=2)


def test_answers_follow_a_schema(server: Server, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="tg-tinker[structured] is not installed")
    talk: list[Any] = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": server.tc.id, "max_tokens": 100, "temperature": 1.5}
    for seed in range(4):
        said = client.chat.completions.parse(
            messages=talk, response_format=Verdict, seed=seed, **asked
        ).choices[0]  # fmt: skip
        assert said.finish_reason == "stop"
        assert said.message.parsed == Verdict.model_validate_json(said.message.content)
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema(), "strict": None},
    }
    events = client.chat.completions.create(
        messages=talk, response_format=form, stream=True, **asked
    )
    assert Verdict.model_validate_json("".join(e.choices[0].delta.content for e in events))
    found = client.completions.create(
        prompt=["a", "b"], n=3, extra_body={"response_format": form}, **asked
    )
    assert all(Verdict.model_validate_json(choice.text) for choice in found.choices)
    anything = client.chat.completions.create(
        messages=talk, response_format={"type": "json_object"}, seed=1, **asked
    ).choices[0]  # fmt: skip
    assert anything.message.content.startswith("{")
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(anything.message.content), dict)
    body = {"model": "base", "prompts": "a", "max_tokens": 4, "json_schema": {"enum": [1, 2]}}
    status, own, _ = post(f"{server.url}/sample", server.key, body)
    assert (status, own["samples"][0]["completion"] in ("1", "2")) == (200, True)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"type": "json_schema"}, "must be sent with type json_schema"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "and only then"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema: Field req"),
        ({"type": "json_schema", "json_schema": {"schema": [1]}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "more": 1}}, "more: not supported"),
        ({"type": "grammar"}, "response_format.type"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 40_000]}}}, "32768"),
        ({"type": "json_schema", "json_schema": {"schema": {"multipleOf": 997}}}, "power of ten"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {"const": SECRET}}}}, "follow"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": SECRET}}}, "follow"),
        ({"type": "json_schema", "json_schema": {"schema": {"pattern": f"{SECRET}("}}}, "pattern"),
    ],
)
def test_a_wrong_form_of_answers_is_named(server: Server, form: Any, told: str) -> None:
    pytest.importorskip("llguidance", reason="tg-tinker[structured] is not installed")
    talk = [{"role": "user", "content": "hi"}]
    for route, rest in (("chat/completions", {"messages": talk}), ("completions", {"prompt": "a"})):
        body = {"model": "base", "response_format": form, **rest}
        status, answer, _ = post(f"{server.url}/{route}", server.key, body)
        assert status == 400
        assert told in answer["error"]["message"]
        assert SECRET not in json.dumps(answer)


def test_an_answer_of_the_client_is_taken_back_as_a_message(client: openai.OpenAI) -> None:
    """Programs append what they got, with all its empty fields."""
    talk: list[Any] = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": "base", "max_tokens": 3}
    got = client.chat.completions.create(messages=talk, **asked).choices[0].message
    for form in (got, got.model_dump(), {**got.model_dump(), "annotations": [], "tool_calls": []}):
        said: Any = form
        more: Any = {"role": "user", "content": "and?"}
        assert client.chat.completions.create(messages=[*talk, said, more], **asked).choices


def test_a_chat_without_a_limit_takes_what_is_left(server: Server) -> None:
    """The context is 128, so the default of 256 tokens does not fit."""
    asked = {"model": "base", "messages": [{"role": "user", "content": "a" * 60}]}
    status, found, _ = post(f"{server.url}/chat/completions", server.key, asked)
    assert status == 200
    assert found["usage"]["total_tokens"] <= 128


def test_nobody_without_a_key_has_a_body_read(server: Server) -> None:
    """Otherwise half-sent requests would occupy all places until their senders close them."""
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
    assert scoped.models.retrieve(server.artifact).id == server.artifact
    for other in (server.tc.id, f"{server.tc.id}@1", "never-was"):
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            scoped.completions.create(model=other, prompt="a", max_tokens=1)
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            scoped.models.retrieve(other)


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
    """Returns a registry that has been compared with every store, and requires a key or not."""
    return SimpleNamespace(
        api_keys=SimpleNamespace(wanted=lambda _: wanted()),
        heads=SimpleNamespace(met=lambda *_: True),
    )


def sent_to(host: str) -> Request:
    return Request({"type": "http", "headers": [(b"host", host.encode())]})


def test_an_open_server_answers_until_there_is_a_key() -> None:
    """This tests the rule on the class, because a second server would need a second address."""
    known: list[str] = []
    asked = sent_to("localhost:8000")
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
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "[::1]", "LocalHost.:8000"):
        asked = sent_to(host)
        assert asyncio.run(access.caller(asked)).key_id == "open"
    for host in ("evil.example", "localhost.evil.example:8000", "127.evil.example", "0.0.0.0",
                 "127.0.0.1.evil.example:8000", "127.0.0.1@evil.example", "[::1", ""):  # fmt: skip
        asked = sent_to(host)
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


BODIES = {
    "prompt": (CompletionBody, '{"model": "base", "prompt": "4711 HALF"}'),
    "prompts": (CompletionBody, '{"model": "base", "prompt": ["a", "4711 HALF"]}'),
    "stop": (CompletionBody, '{"model": "base", "prompt": "a", "stop": ["4711 HALF"]}'),
    "model": (CompletionBody, '{"model": "4711 HALF", "prompt": "a"}'),
    "native": (SampleBody, '{"model": "base", "prompts": ["4711 HALF"]}'),
    "chat": (ChatBody, '{"model": "base", "messages": [{"role": "user", "content": "4711 HALF"}]}'),
}


@pytest.mark.parametrize("half", [rb"\ud83d", b"\xff", b"\xed\xa0\xbd"])
@pytest.mark.parametrize("field", BODIES)
def test_half_a_character_in_a_body_is_refused_and_not_repeated(field: str, half: bytes) -> None:
    kind, body = BODIES[field]
    with pytest.raises(InvalidRequestError) as caught:
        parsed(kind, body.encode().replace(b"HALF", half))
    assert "4711" not in str(caught.value)
    assert parsed(kind, body.encode().replace(b"HALF", rb"\ud83d\ude00")).model


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
    assert "gives no access" in wrong.output
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
