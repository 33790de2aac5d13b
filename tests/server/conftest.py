"""Servers that tests share. Whoever harms a server starts one of their own with ``serving``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import SMALL, RunningServer, serving
from tiny_gguf import write_speaking_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_model(tmp_path_factory.mktemp("served") / "tiny.gguf")


@pytest.fixture(scope="session")
def shared_server(tiny_model: Path) -> Iterator[RunningServer]:
    with serving(tiny_model, *SMALL) as running:
        yield running


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The shared server; a test that leaves anything running in it fails."""
    yield shared_server
    shared_server.until_idle()


@pytest.fixture(scope="session")
def real_server(smollm2_path: Path) -> Iterator[RunningServer]:
    """The real default model."""
    with serving(smollm2_path, "--max-model-len", "1024", "--max-num-seqs", "8", name="smollm2-135m") as running:
        yield running
