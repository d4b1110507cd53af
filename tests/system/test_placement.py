"""Tests where a client and its sampler run: pins, GPUs, and what no node can hold."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app import application
from support.two_nodes import asked, connected, create
from support.two_nodes import cluster_of_two as cluster_of_two  # a fixture
from tg_tinker import (
    InvalidRequestError,
    PlacementError,
    ResourceConfig,
    ServiceClient,
    TrainingClient,
)


@pytest.fixture(scope="module")
def two(forking: None, cluster_of_two: str, home: Path) -> Iterator[ServiceClient]:
    with connected(cluster_of_two, home) as service:
        yield service


def node_of(tc: TrainingClient) -> dict[str, Any]:
    import ray

    here = asked(tc, lambda self: ray.get_runtime_context().get_node_id())
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return dict(node)


@pytest.mark.program
@pytest.mark.parametrize(
    "pin", [{"custom_resources": {"team-a": 0.499}}, {"node_labels": {"zone": "north"}}]
)
def test_a_pinned_client_and_its_sampler_run_on_the_node_that_fits(
    two: ServiceClient, tiny_model: Path, pin: dict[str, Any]
) -> None:
    import ray
    from ray._private.state import actors

    with create(two, tiny_model, **pin) as tc, create(two, tiny_model, **pin) as again:
        nodes = [node_of(tc), node_of(again)]
        assert [node["Labels"].get("zone") for node in nodes] == ["north", "north"]
        tc.sample("ab", max_tokens=2)
    samplers = [
        actor for actor in actors().values()
        if actor["ActorClassName"].startswith("ServeReplica") and actor["State"] == "ALIVE"
    ]  # fmt: skip
    assert {actor["Address"]["NodeID"] for actor in samplers} == {nodes[0]["NodeID"]}
    for actor in samplers:
        replica = ray.get_actor(actor["Name"], namespace="serve")
        look = replica.__ray_call__.remote(lambda self: os.environ.get("CUDA_VISIBLE_DEVICES"))
        assert ray.get(look) == "", "it reserved no GPU"


@pytest.mark.program
def test_gpus_are_reserved_as_asked_and_none_is_seen_without(
    two: ServiceClient, tiny_model: Path
) -> None:
    def seen(tc: TrainingClient) -> tuple[list[str], str]:
        import ray

        return asked(  # type: ignore[no-any-return]
            tc,
            lambda self: (
                sorted(ray.get_runtime_context().get_accelerator_ids()["GPU"]),
                os.environ["CUDA_VISIBLE_DEVICES"],
            ),
        )

    with (
        create(two, tiny_model, num_gpus=0) as none,
        create(two, tiny_model, num_gpus=0.5, num_cpus=0) as half,
        create(two, tiny_model, num_gpus=0.5, num_cpus=0) as other,
        create(two, tiny_model, num_cpus=0) as one,
    ):
        assert seen(none) == ([], "")
        assert seen(half) == seen(other)
        (its,), (ones,) = seen(half)[0], seen(one)[0]
        assert (seen(half)[1], seen(one)[1]) == (its, ones)
        assert {its, ones} == {"0", "1"}
    with create(two, tiny_model, num_gpus=2, num_cpus=0) as both:
        assert seen(both) == (["0", "1"], "0,1")


@pytest.mark.program
@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"num_cpus": 5}, "wants 5 CPUs, but no node has more than 4"),
        ({"custom_resources": {"team-a": 1.5}}, "wants 1.5 team-as, but no node .* more than 1"),
        ({"custom_resources": {"team-b": 1}}, "wants 1 team-bs, but no node .* more than 0"),
        ({"num_gpus": 1, "custom_resources": {"team-a": 1}}, "no node has all of .*GPU.*team-a"),
        ({"num_gpus": 1, "node_labels": {"zone": "north"}}, "no node with .*north.* more than 0"),
        ({"node_labels": {"zone": "south"}}, "no living node has the labels .*south"),
    ],
)
def test_a_pin_that_no_node_fits_is_refused_at_once(
    two: ServiceClient, tiny_model: Path, pin: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        create(two, tiny_model, **pin)


@pytest.mark.program
def test_a_sampler_without_room_on_the_nodes_that_its_pins_allow_is_refused(
    two: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve would wait for ever. The head has the GPUs, and the other node the pins."""
    monkeypatch.setattr(application, "ROOM_S", 0.5)
    of = partial(application.Place, "tg_tinker", "m", "auto", "", "", 1, threads=None)
    application._await_room(of(num_gpus=1))
    application._await_room(of(num_gpus=0, resources={"team-a": 0.001}))
    for pinned in (
        of(num_gpus=0, resources={"team-a": 1.5}), of(num_gpus=1, resources={"team-a": 0.001}),
        of(num_gpus=1, labels={"zone": "north"}), of(num_gpus=0, labels={"zone": "south"}),
    ):  # fmt: skip
        with pytest.raises(PlacementError, match="on one node"):
            application._await_room(pinned)


@pytest.mark.program
def test_a_model_beyond_all_memory_is_refused_with_the_numbers(
    two: ServiceClient, tiny_model: Path, tmp_path: Path
) -> None:
    """The model has four terabytes on paper: it is a file with a hole."""
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    size = 4 * 2**40
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, size]}}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(
        PlacementError, match=r"needs at least 4.* GB \(weights 4.4e\+03"
    ) as refused:
        create(two, tmp_path)
    assert refused.value.details["weights"] == size
    assert refused.value.details["available"] < psutil.virtual_memory().total


@pytest.mark.parametrize(
    "values",
    [
        {"num_gpus": 1.5}, {"custom_resources": {"GPU": 1}}, {"custom_resources": {"a": 0}},
        {"custom_resources": {"": 1}}, {"node_labels": {"zone": "!north"}},
        {"node_labels": {"zone": "in(a,b)"}}, {"node_labels": {"": "x"}},
    ],
)  # fmt: skip
def test_what_ray_cannot_reserve_is_refused_on_the_spot(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        ResourceConfig(**values)


@pytest.mark.program
def test_the_deadline_names_the_pin(
    two: ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = {"custom_resources": {"team-a": 0.6}}  # a sampler may hold a little of it
    with create(two, tiny_model, **most) as holder:
        monkeypatch.setattr(two._cluster, "placement_timeout_s", 2.0)
        with pytest.raises(PlacementError, match=rf"team-a.*{holder.id}"):
            create(two, tiny_model, **most)
