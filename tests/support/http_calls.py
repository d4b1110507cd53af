"""Makes calls over HTTP, and reads the metrics endpoint, as a program without a library would."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from tg_tinker import ServiceClient


def post(url: str, key: str | None, body: Any) -> tuple[int, dict[str, Any], Any]:
    """Returns status, JSON and headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def scraped(service: ServiceClient, name: str, label: str = "") -> list[str]:
    """Returns the lines of a series with this label, after the next export of all processes."""
    deadline = time.monotonic() + 40
    while True:
        found = []
        for url in service.metrics_urls():
            with urllib.request.urlopen(url, timeout=10) as answer:
                found += answer.read().decode().splitlines()
        lines = [line for line in found if line.startswith(name) and label in line]
        if any(float(line.rpartition(" ")[2]) > 0 for line in lines):
            return lines
        assert time.monotonic() < deadline, f"no {name} {label} at the metrics endpoint"
        time.sleep(1)
