"""Defines the server that other people's clients call, and its model without that server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.engine.loading import prepared
from support.models import make_home
from support.serving import Direct, Server, serving
from tg_tinker.demo.options import find_demo_model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, converted_models: Path) -> Iterator[Server]:
    with prepared(str(find_demo_model()), torch.float32, converted_models, print) as (_, files):
        model = files.source
    home = make_home(tmp_path_factory.mktemp("server") / "home", converted_models)
    with serving(model, home) as running:
        yield running


@pytest.fixture(scope="session")
def direct(server: Server) -> Direct:
    return Direct(server.model)
