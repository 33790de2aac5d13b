"""Answers that follow a generation: server-sent events, or one body; and clients that leave in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from tokenmill.engine.messages import EngineError
from tokenmill.errors import TokenmillError
from tokenmill.server.errors import (
    ApiError,
    ClientGoneError,
    as_api_error,
    error_body,
    error_response,
    is_anthropic,
)
from tokenmill.server.generation import Generation
from tokenmill.server.metrics import Metrics
from tokenmill.server.served import ServedModel

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event with JSON in it."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _encode(data) + b"\n\n"


def json_response(data: Mapping[str, Any] | Sequence[Any]) -> Response:
    return Response(_encode(data), media_type="application/json")


class Answer(Protocol):
    """The bodies that a route makes of a generation."""

    def whole(self) -> Mapping[str, Any]:
        """All of it, once the generation has ended."""

    def frames(self, idle: float) -> AsyncIterator[bytes]:
        """It as server-sent events, after ``idle`` seconds without news one that says nothing."""


async def respond(
    request: Request, served: ServedModel, generation: Generation, answer: Answer, *, stream: bool | None
) -> Response:
    """The response that follows ``generation``, as a stream or whole. Raises EngineError."""
    if stream:
        return EventStreamResponse(generation, answer.frames(served.config.keep_alive_seconds), served.metrics)
    await finish_or_leave(request, generation, served.metrics)
    return json_response(answer.whole())


async def finish_or_leave(request: Request, generation: Generation, metrics: Metrics) -> None:
    """Follows ``generation`` to its end, or stops it when the client leaves. Raises EngineError."""
    async with _watched(request.receive, generation, metrics):
        await generation.finish()


class EventStreamResponse(Response):
    """``frames`` as server-sent events.

    The status line waits for the first frame, so that what goes wrong before it has a status of its own; after it an
    error is the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, frames: AsyncIterator[bytes], metrics: Metrics) -> None:
        self.status_code = 200
        self.background = None
        self._generation = generation
        self._frames = frames
        self._metrics = metrics
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        async with _watched(receive, self._generation, self._metrics):
            try:
                first = await anext(self._frames)
            except (TokenmillError, ApiError) as error:
                if not isinstance(error, ClientGoneError):
                    await error_response(as_api_error(error), path)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for frame in self._frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            except ClientGoneError:
                return
            except EngineError as error:
                body = error_body(as_api_error(error), path)
                last = event(body, "error") if is_anthropic(path) else event(body) + DONE
                await send({"type": "http.response.body", "body": last, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def _watched(receive: Receive, generation: Generation, metrics: Metrics) -> AsyncIterator[None]:
    """Stops ``generation`` at once if the client goes away, and in any case when the block is left."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if generation.open_outputs:
            metrics.cancelled("client_gone")
            generation.stop(ClientGoneError("the client closed the connection"))

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.end()
