"""Tests the application as operators run it: config file, two replicas, deadlines, drain,
metrics."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import openai
import pytest
import yaml
from ray import serve
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from serve_app import application
from serve_app.application import Place
from serve_app.deploy import Settings, app
from serve_app.http.routes import HttpReplica
from support.http_calls import post, scraped
from support.models import make_model
from support.processes import free_port
from tg_tinker import LoRAConfig, PlacementError, ServiceClient, TrainingConfig
from tg_tinker.cli.main import main

pytestmark = pytest.mark.slow

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-sampling.json"
CANARY = "PATIENT-4711"


class Deployed(NamedTuple):
    service: ServiceClient
    url: str
    key: str
    model: Path
    name: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model whose greedy completions last for seconds, because it never chooses its
    end token."""
    path = make_model(tmp_path_factory.mktemp("long"), max_position_embeddings=8192)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][258] = 0
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def deployed(
    forking: None, home: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """Yields the application of `tg-tinker serve --write-config`, deployed with two replicas as
    by `serve deploy`."""
    file, port = tmp_path_factory.mktemp("config") / "serve.yaml", free_port()
    written = CliRunner().invoke(
        main, ["serve", "--model", str(model), "--port", str(port), "--write-config", str(file)]
    )
    assert written.exit_code == 0, written.output
    config = yaml.safe_load(file.read_text())
    (described,) = config["applications"]
    described["args"]["num_cpus"] = 0
    described["args"]["deadline_s"] = 2
    described["deployments"] = [{"name": "sampler", "num_replicas": 2}]
    with ServiceClient(address="local") as service:
        key, _ = service.create_api_key("tests")
        deploy(config)
        yield Deployed(service, f"http://127.0.0.1:{port}/v1", key, model, described["name"])


def deploy(config: dict[str, Any]) -> None:
    """Deploys a config as `serve deploy` does, whose REST server an embedded cluster does not
    have."""
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    options = schema.http_options.model_dump() | {"location": schema.proxy_location}
    client = serve_start(http_options=options)
    client.deploy_apps(schema)  # its own wait ends after 60 s, which a busy machine may need
    for described in schema.applications:
        client._wait_for_application_running(described.name, timeout_s=240)
    client.wait_for_proxies_serving()


def test_a_config_file_is_never_written_over(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("mine")
    found = CliRunner().invoke(main, ["serve", "--model", str(model), "--write-config", str(file)])
    assert found.exit_code == 1
    assert file.read_text() == "mine"


def test_args_that_are_unknown_or_out_of_range_are_refused() -> None:
    for wrong in ({"modelref": "x"}, {"model_ref": "x", "max_replicas": 0}, {}):
        with pytest.raises(ValueError):  # noqa: PT011
            Settings(**wrong)  # type: ignore[arg-type]
    assert app.__annotations__["settings"] is Settings  # else Serve hands over a dict


def test_the_config_file_serves_and_always_wants_a_key(deployed: Deployed) -> None:
    asked = {"model": "base", "prompt": "abc", "max_tokens": 3}
    assert post(f"{deployed.url}/completions", None, asked)[0] == 401
    assert post(f"{deployed.url}/completions", deployed.key, asked)[0] == 200


def test_a_program_that_trains_finds_the_application_of_the_file(deployed: Deployed) -> None:
    config = TrainingConfig(model_ref=str(deployed.model), lora_config=LoRAConfig(rank=4))
    with deployed.service.create_training_client(config) as tc:
        assert tc.sample("abc", max_tokens=3).weights_version == f"{tc.id}@0"
        named = openai.OpenAI(base_url=deployed.url, api_key=deployed.key)
        assert tc.id in {model.id for model in named.models.list()}
        (only,) = serve.status().applications
        assert only == deployed.name
    assert tc.id not in {model.id for model in named.models.list()}  # it lives no more


def test_two_replicas_answer_alike_and_share_the_work(deployed: Deployed) -> None:
    status = serve.status().applications[deployed.name].deployments["sampler"]
    assert status.replica_states == {"RUNNING": 2}
    asked = {"model": "base", "prompt": "abc", "max_tokens": 40, "temperature": 0}

    def answer(_: int) -> str:
        status, found, _ = post(f"{deployed.url}/completions", deployed.key, asked)
        assert status == 200
        return str(found["choices"][0]["text"])

    with ThreadPoolExecutor(24) as pool:
        assert len(set(pool.map(answer, range(24)))) == 1
    deadline, names = time.monotonic() + 40, set()
    while len(names) < 2:
        assert time.monotonic() < deadline, names
        series = scraped(deployed.service, "ray_tg_tinker_new_tokens_total")
        names = {re.search(r'replica="(\w+)"', line)[1] for line in series}  # type: ignore[index]


def test_a_deadline_ends_an_answer_and_a_stream(deployed: Deployed) -> None:
    asked = {"model": "base", "prompt": "abc", "max_tokens": 4096, "n": 4, "temperature": 0}
    status, found, _ = post(f"{deployed.url}/completions", deployed.key, asked)
    assert (status, found["error"]["code"]) == (504, "deadline_exceeded")
    client = openai.OpenAI(base_url=deployed.url, api_key=deployed.key, max_retries=0)
    with pytest.raises(openai.APIError, match="not complete after 2 s"):
        for _ in client.completions.create(stream=True, **asked):  # type: ignore[call-overload]
            pass
    assert_freed(deployed)


def running(deployed: Deployed) -> int:
    """Returns the number of slots in use, added up over many requests, because each request goes
    to some replica."""
    handle = serve.get_app_handle(deployed.name)
    return sum(handle.load.remote().result().running for _ in range(6))


def test_metrics_count_and_time_and_name_nobody(deployed: Deployed) -> None:
    asked = {"model": "base", "prompt": CANARY, "max_tokens": 5}
    assert post(f"{deployed.url}/completions", deployed.key, asked)[0] == 200
    assert post(f"{deployed.url}/completions", deployed.key, asked | {"n": -3})[0] == 400
    assert post(f"{deployed.url}/completions", deployed.key, asked | {"model": CANARY})[0] == 404
    config = TrainingConfig(model_ref=str(deployed.model), lora_config=LoRAConfig(rank=4))
    with deployed.service.create_training_client(config) as tc:
        tc.sample(CANARY, max_tokens=3)
        expressions = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"]
                       for target in panel["targets"]]  # fmt: skip
        drawn = {name for e in expressions for name in re.findall(r"ray_tg_tinker_\w+", e)}
        assert len(drawn) == 11
        for name in drawn - {"ray_tg_tinker_waiting"}:
            assert scraped(deployed.service, name)
        for reason in ("invalid_request", "not_found"):
            scraped(deployed.service, "ray_tg_tinker_refused_total", f'reason="{reason}"')
        everything = "\n".join(scraped(deployed.service, "ray_tg_tinker"))
        assert "ray_tg_tinker_waiting{" in everything
        for secret in (CANARY, tc.id, deployed.key, "default"):
            assert secret not in everything


def deployed_again(deployed: Deployed, deadline_s: float) -> None:
    place = Place("tg_tinker", str(deployed.model), "auto", str(deployed.service._home),
                  deployed.service._store, 0, 0, None)  # fmt: skip
    application._run(place, application.HttpOptions(deadline_s=deadline_s), "/")


def test_an_answer_that_runs_while_another_version_is_deployed_ends_whole(
    deployed: Deployed,
) -> None:
    deployed_again(deployed, 100)
    client = openai.OpenAI(base_url=deployed.url, api_key=deployed.key, max_retries=0)
    events = client.completions.create(
        model="base", prompt="abc", max_tokens=4096, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    next(iter(events))
    with ThreadPoolExecutor(1) as pool:
        deploying = pool.submit(deployed_again, deployed, 101)
        *_, last = events
        deploying.result(100)
    assert last.usage.completion_tokens == 4096
    asked = {"model": "base", "prompt": "abc", "max_tokens": 3}
    assert post(f"{deployed.url}/completions", deployed.key, asked)[0] == 200


def test_whoever_leaves_frees_the_slots(deployed: Deployed) -> None:
    """Each of these completions would continue for many seconds."""
    place = deployed.url.removeprefix("http://").removesuffix("/v1")
    asked = {"model": "base", "prompt": "abc", "max_tokens": 4096, "temperature": 0, "n": 4,
             "stream": True}  # fmt: skip
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {deployed.key}"}
    for _ in range(3):
        connection = http.client.HTTPConnection(place, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        assert connection.getresponse().read(10)
        assert running(deployed)
        connection.close()
        assert_freed(deployed)
    config = TrainingConfig(model_ref=str(deployed.model), lora_config=LoRAConfig(rank=4))
    with deployed.service.create_training_client(config) as tc:
        for _chunk in tc.sample_stream("abc", max_tokens=4096, temperature=0):
            assert running(deployed)
            break
        assert_freed(deployed)


def assert_freed(deployed: Deployed) -> None:
    deadline = time.monotonic() + 3
    while running(deployed):
        assert time.monotonic() < deadline, "what nobody waits for still runs"
        time.sleep(0.02)


def test_a_sampler_without_room_says_what_is_free(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "ROOM_S", 0.5)
    place = Place("tg_tinker", "elsewhere", "auto", "", "", 0, 3, None)
    with pytest.raises(PlacementError, match=r"0 CPUs, 3 GPUs on one node, free are .* 0 GPUs for"):
        application._await_room(place)


def test_a_dead_engine_fails_the_health_check() -> None:
    replica: Any = object.__new__(HttpReplica)
    for alive, status in ((True, 200), (False, 503)):
        replica.engines = SimpleNamespace(alive=alive)
        assert asyncio.run(replica.healthz()).status_code == status
    with pytest.raises(RuntimeError):
        replica.check_health()
