"""Makes Serve's HTTP proxy listen at an address, also while Serve runs already.

Serve takes the HTTP options of its first start, and has no call to change them. The first start is
often that of a sampler, which needs no HTTP. But Serve's controller reads its options each time
that it looks after its proxies, so `listen` changes them there. Applications, replicas and handles
are not concerned and continue.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from tg_tinker.cluster.ports import check_port
from tg_tinker.errors import ClusterUnavailableError

START_S = 90.0
"""Seconds that a proxy may take to listen. Serve notices within about 20 that it must move."""


def listen(host: str, port: int) -> None:
    """Returns when a proxy of Serve, which is running, listens at an address.

    A proxy at Serve's default address that serves no application is moved.

    Raises:
        InvalidRequestError: the host has no address.
        ClusterUnavailableError: the port is taken, or Serve answers at another address already, or
            does not listen.
    """
    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    before, old = ray.get([controller.get_http_config.remote(), controller.get_proxies.remote()])
    if old and (before.host, before.port) == (host, port):
        return
    if old and not _is_unused(before):
        raise ClusterUnavailableError(
            f"Ray Serve answers at {before.host}:{before.port} already, not at {host}:{port}: serve"
            " there, or end all applications of Serve with `serve shutdown` and serve again"
        )
    check_port(host, port)
    try:
        _set(controller, host, port, "HeadOnly")
        for proxy in old.values():
            ray.kill(proxy)
        _await(controller, {proxy._actor_id for proxy in old.values()})
    except (ray.exceptions.RayError, TimeoutError) as error:
        with suppress(ray.exceptions.RayError):
            _set(controller, before.host, before.port, before.location)
        raise ClusterUnavailableError(
            f"Ray Serve, which runs already, does not listen at {host}:{port}"
            f" ({type(error).__name__}): run `serve shutdown` and serve before you sample"
        ) from None


def _is_unused(http: HTTPOptions) -> bool:
    """Returns whether proxies are at Serve's default address and answer for no application."""
    default = HTTPOptions()
    client: Any = _get_global_client()
    applications = client.get_serve_details()["applications"].values()
    routed = any(application["route_prefix"] is not None for application in applications)
    return not routed and (http.host, http.port) == (default.host, default.port)


def _set(controller: Any, host: str | None, port: int, location: Any) -> None:
    """Changes where the controller lets its proxies listen; at the next look it starts them."""

    def change(self: Any) -> None:
        options = self.proxy_state_manager.get_config()
        options.host, options.port, options.location = host, port, location

    ray.get(controller.__ray_call__.remote(change))


def _await(controller: Any, old: set[Any]) -> None:
    """Returns when other proxies than the old ones listen.

    Raises:
        TimeoutError: there are none within `START_S` seconds.
        RayError: a proxy cannot listen.
    """
    deadline = time.monotonic() + START_S
    while True:
        proxies = ray.get(controller.get_proxies.remote()).values()
        if proxies and not old & {proxy._actor_id for proxy in proxies}:
            remaining = max(0.0, deadline - time.monotonic())
            ray.get([proxy.ready.remote() for proxy in proxies], timeout=remaining)
            return
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)
