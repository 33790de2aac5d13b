"""Running the server: the address, the engine, the HTTP loop, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from tokenmill.engine.config import EngineConfig
from tokenmill.errors import UsageError
from tokenmill.server.app import create_app
from tokenmill.server.config import ServerConfig
from tokenmill.server.http_protocol import BoundedHttpProtocol
from tokenmill.server.request_log import configure_logging, log
from tokenmill.server.served import ServedModel

_IDLE_CONNECTION_SECONDS = 65
"""Longer than the 60 s of common load balancers, so that they close first."""
_LAST_WORDS_SECONDS = 5
"""After requests were stopped, for their last bytes to leave."""


def serve(
    config: ServerConfig, engine_config: EngineConfig, path: Path, on_ready: Callable[[str, ServedModel], None]
) -> None:
    """Serves the model at ``path`` until SIGTERM or SIGINT; ``on_ready`` gets the address once requests are taken.

    The first signal lets running requests finish, at most ``config.shutdown_seconds``; a second one ends the process at
    once. Raises UsageError if the address cannot be had, EngineStartError if the model cannot be loaded.
    """
    configure_logging(config.log_format)
    with bind(config) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, engine_config, path, listener, on_ready))


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the configured address, not yet listening. Raises UsageError naming what is wrong with it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {config.host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {config.port} of {config.host} is in use; choose another with --port (0 takes a free one)"
            ) from error
        raise UsageError(f"cannot listen at {config.host} port {config.port}: {error.strerror}") from error
    return listener


def address_of(config: ServerConfig, listener: socket.socket) -> str:
    """The server's URL."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    path: Path,
    listener: socket.socket,
    on_ready: Callable[[str, ServedModel], None],
) -> None:
    served = ServedModel(config, engine_config, path)
    await served.start()
    try:
        server = _Server(_uvicorn_config(config, create_app(served)), served)
        server.on_started = lambda: on_ready(address_of(config, listener), served)
        with _settled_heap():
            await server.serve([listener])
    finally:
        await served.close()


@contextlib.contextmanager
def _settled_heap() -> Iterator[None]:
    """Garbage collections leave alone what is there now, most of a server's objects.

    A full one then takes no time, instead of the time of a step or two in which no stream gets its tokens, and comes
    as often as requests leave cycles behind: the collector waits for them to be a quarter of what it looks through.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _uvicorn_config(config: ServerConfig, app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=_IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=int(config.shutdown_seconds) + _LAST_WORDS_SECONDS,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )


class _Server(uvicorn.Server):
    """uvicorn with our signals: drain, and a second one that does not wait."""

    def __init__(self, config: uvicorn.Config, served: ServedModel) -> None:
        super().__init__(config)
        self._served = served
        self.on_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in handled}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # the engine's process ends with this one
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        served = self._served
        served.draining = True
        count = len(served.generations)
        if count:
            log.info("finishing %d requests, at most %g s", count, served.config.shutdown_seconds)
        self._loop.call_later(served.config.shutdown_seconds, served.stop_all)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: streams cost less with it."""
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ModuleNotFoundError:
        return None
    return factory
