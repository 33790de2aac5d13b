"""What a request leaves behind in the server's process: nothing, whatever its kind and however it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served_model import NAME
from starlette.types import ASGIApp, Message

from tokenmill.engine.config import EngineConfig
from tokenmill.server import gate
from tokenmill.server.app import create_app
from tokenmill.server.config import ServerConfig
from tokenmill.server.served import ServedModel

ROUNDS, REQUESTS = 2, 20
SHORTLY = 0.05
"""Seconds of the server's alarms in place of minutes: an event loop keeps them until then, though nobody waits."""
MESSAGES = [{"role": "user", "content": "hello"}]
SHORT = {"prompt": "the rain", "max_tokens": 3}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
KINDS: dict[str, tuple[str, Any]] = {
    "whole": ("/v1/completions", SHORT),
    "several outputs": ("/v1/completions", {**SHORT, "n": 3, "logprobs": 3}),
    "several prompts": ("/v1/completions", {**SHORT, "prompt": ["a", "b", "c"]}),
    "stream": ("/v1/completions", {**SHORT, "stream": True}),
    "client leaves": ("/v1/completions", {**SHORT, "max_tokens": 1000, "ignore_eos": True, "stream": True}),
    "conversation": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "stream": True}),
    "schema": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "response_format": FORMAT}),
    "tools": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "tools": [TOOL]}),
    "responses": ("/v1/responses", {"input": "hello", "max_output_tokens": 16, "stream": True}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3, "stream": True}),
    "embeddings": ("/v1/embeddings", {"input": ["a", "b"]}),
    "unknown parameter": ("/v1/completions", {**SHORT, "nonsense": 1}),
    "refused by the engine": ("/v1/completions", {**SHORT, "structured_outputs": {"regex": "("}}),
    "not JSON": ("/v1/completions", None),
    "no such route": ("/nothing", {}),
}


async def ask(app: ASGIApp, path: str, body: Any, *, leave: bool = False) -> int:
    """The status of the answer, once it is over; with ``leave`` the client goes at the answer's first bytes."""
    data = b"{" if body is None else json.dumps(body).encode()
    gone = asyncio.Event()
    pending = [{"type": "http.request", "body": data, "more_body": False}]
    status = 0

    async def receive() -> Message:
        if pending:
            return pending.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        if leave and message["type"] == "http.response.body":
            gone.set()

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    where = {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    await app({**scope, **where, "headers": headers, "client": ("127.0.0.1", 1), "server": ("x", 1)}, receive, send)
    return status


@pytest.fixture(scope="module")
def with_app(tiny_model: Path) -> Iterator[Callable[[Callable[[ASGIApp], Awaitable[Any]]], Any]]:
    """Runs something with an application of this process, whose engine has been warmed up."""
    engine = EngineConfig(model=tiny_model, max_model_len=2048, max_num_seqs=8, memory="600MB", threads=1)
    with asyncio.Runner() as runner:
        served = ServedModel(ServerConfig(names=(NAME,), keep_alive_seconds=SHORTLY), engine, tiny_model)
        runner.run(served.start())
        app = create_app(served)
        # The latest steps are kept for the live view; from here on each of them takes the place of another.
        enough = {**SHORT, "max_tokens": served.steps.recent.maxlen, "ignore_eos": True}
        assert runner.run(ask(app, "/v1/completions", enough)) == 200
        yield lambda use: runner.run(use(app))  # type: ignore[arg-type]
        runner.run(served.close())


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_leaves_nothing_behind(
    with_app: Callable[..., list[int]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", SHORTLY)
    path, body = KINDS[kind]

    async def use(app: ASGIApp) -> list[int]:
        grown = []
        for _ in range(1 + ROUNDS):
            before = allocated()
            for _ in range(REQUESTS):
                await ask(app, path, body, leave=kind == "client leaves")
            await asyncio.sleep(2 * SHORTLY)  # and for the engine's last words on requests whose clients have left
            grown.append(allocated() - before)
        return grown[1:]

    assert min(with_app(use)) < REQUESTS  # objects; what belongs to one request are hundreds


def allocated() -> int:
    """Blocks of Python's allocator in use."""
    gc.collect()
    return sys.getallocatedblocks()
