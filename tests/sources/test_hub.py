"""Catalogue files from the hub, through huggingface_hub itself, against a hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

DATA = b"GGUF" + os.urandom(50_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves one large file the way the hub does: its ETag is the SHA-256."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.etag = SHA256
        self.data = DATA
        self.downloads = 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _head(self) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{self.server.etag}"')
        self.send_header("X-Linked-Etag", f'"{self.server.etag}"')
        self.send_header("X-Linked-Size", str(len(self.server.data)))
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        self.server.downloads += "/resolve/" in self.path
        self._head()
        self.wfile.write(self.server.data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pull_from(hub: Hub, tmp_path, **environment: str) -> dict[str, str]:
    """Pulls in a process of its own, because huggingface_hub reads its settings when it is imported."""
    script = f"""
        import json
        from tokenmill.sources import CatalogueModel, ModelUnavailableError, SilentProgress, pull
        from tokenmill.sources.catalogue import HubFile
        model = CatalogueModel("tiny", "Tiny", "MIT", "", {len(DATA)}, "{SHA256}", (HubFile("org/tiny", "tiny.gguf"),))
        try:
            print(json.dumps({{"path": str(pull(model, SilentProgress()))}}))
        except ModelUnavailableError as error:
            print(json.dumps({{"reason": error.failures[0][1]}}))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "TOKENMILL_MODELS": str(tmp_path / "models"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return dict(json.loads(result.stdout))


def test_a_file_comes_from_the_hub(hub, tmp_path):
    answer = pull_from(hub, tmp_path)
    assert answer == {"path": str(tmp_path / "models/tiny.gguf")}
    assert (tmp_path / "models/tiny.gguf").read_bytes() == DATA
    assert not (tmp_path / "models/.partial").exists()


def test_another_file_under_the_name_is_not_downloaded(hub, tmp_path):
    hub.etag = "0" * 64
    assert "another file" in pull_from(hub, tmp_path)["reason"]
    assert hub.downloads == 0


def test_bytes_that_contradict_the_hub_are_removed(hub, tmp_path):
    hub.data = DATA[:-1] + bytes([DATA[-1] ^ 1])
    assert "SHA-256" in pull_from(hub, tmp_path)["reason"]
    assert hub.downloads == 1
    assert [p for p in (tmp_path / "models").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_offline_mode_is_respected(hub, tmp_path):
    assert "HF_HUB_OFFLINE" in pull_from(hub, tmp_path, HF_HUB_OFFLINE="1")["reason"]
    assert hub.downloads == 0
