"""An engine in a child process, driven from asyncio.

A native crash or the kernel's out-of-memory killer takes the child, not the server: requests in flight fail at once
with the reason, and the child is started again, waiting longer after each failure in a row. A child that lives but
does not get on is killed, and treated the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineDeadError,
    EngineError,
    Event,
    Failed,
    Finished,
)
from tokenmill.engine.wire import (
    LENGTH,
    EngineFailed,
    EngineReady,
    EngineReport,
    FromEngine,
    Loading,
    LoadModel,
    Ping,
    ResetPrefixCache,
    ToEngine,
    decode_body,
    encode_frame,
)
from tokenmill.errors import TokenmillError

FIRST_DELAY = 0.1
LONGEST_DELAY = 30.0
"""Seconds before the first restart and at most; they double in between."""
HEALTHY_SECONDS = 60.0
"""An engine that lived this long has earned the first delay again."""
_EXIT_SECONDS = 5.0
_LOOKS = 8
"""Times that the engine is looked at, and found silent, before it is taken to hang."""


class EngineStartError(TokenmillError):
    """The engine process could not load the model. ``exit_code`` is that of the reason."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # of the instance: it carries another process's error


class EngineState(Enum):
    STARTING = "starting"
    RUNNING = "running"
    DEAD = "dead"
    """The process ended; another one is on its way."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """Why and when an engine ended unasked."""

    reason: str
    time: float
    """Seconds since 1970."""


class EventStream:
    """The events of requests that belong together, each with the time of its arrival here."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, Event]] = deque()
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next_events(self, timeout: float | None = None) -> list[tuple[float, Event]]:
        """Waits until there is an event and takes all there are; a slow reader gets several at once.

        Times are ``time.monotonic()`` seconds. Empty after ``timeout`` seconds without an event. Raises the error that
        the stream :meth:`failed <fail>` with, once its events are read.
        """
        if not self._events and self._error is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            alarm = None if timeout is None else loop.call_later(timeout, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if alarm is not None:
                    alarm.cancel()
        if not self._events and self._error is not None:
            raise type(self._error)(*self._error.args)
        events = list(self._events)
        self._events.clear()
        return events

    def put(self, now: float, event: Event) -> None:
        self._events.append((now, event))
        self._wake()

    def fail(self, error: EngineError) -> None:
        """No more events: whoever waits for one gets ``error``."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineProcess:
    """Starts, drives and restarts the engine's process. All methods belong to one event loop.

    An engine that finishes no step and answers nothing for ``patience`` seconds is killed, and so is one that gets no
    further with loading its model for ``start_patience`` seconds. ``on_report`` is called with the engine's state after
    every step, ``on_death`` with the reason when it ends unasked, ``on_restart`` when the next one is ready.
    """

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        *,
        patience: float = math.inf,
        start_patience: float = math.inf,
        on_report: Callable[[EngineReport], None] = lambda _: None,
        on_death: Callable[[str], None] = lambda _: None,
        on_restart: Callable[[EngineReady], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._path = path
        self._patience = patience
        self._start_patience = start_patience
        self._on_report = on_report
        self._on_death = on_death
        self._on_restart = on_restart
        self.state = EngineState.STARTING
        self.reason = "the engine is starting"
        """Why there is no engine, while there is none."""
        self.restarts = 0
        self.last_death: EngineDeath | None = None
        """Of an engine that ran; failed starts after it do not count."""
        self.report: EngineReport | None = None
        """The engine's state after its last step."""
        self._ids = itertools.count()
        self._streams: dict[int, tuple[EventStream, int]] = {}
        """Stream and number of outputs still to end, by request."""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._frames = 0
        """Frames that engines have sent."""

    # ---- lifetime --------------------------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Starts the process and waits for the model. Raises EngineStartError with the reason if it does not come."""
        try:
            ready = await self._launch()
        except BaseException:
            await self.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        return ready

    async def close(self, reason: str = "the server is shutting down") -> None:
        """Ends the process; requests in flight fail with ``reason``. Safe to call twice."""
        self.state, self.reason = EngineState.CLOSED, reason
        self.fail_all(reason)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        await self._reap()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def new_request_id(self) -> int:
        return next(self._ids)

    def submit(self, requests: Sequence[AddRequest], stream: EventStream | None = None) -> EventStream:
        """Hands requests in, in this order; their events come in a new stream, or beside those of the one given.

        Raises EngineDeadError if there is no engine now.
        """
        if self.state is not EngineState.RUNNING:
            raise EngineDeadError(self.reason)
        stream = stream or EventStream()
        for request in requests:
            self._streams[request.request_id] = (stream, request.outputs)
        self._send(*requests)
        return stream

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """Stops a request, or one output of it, before the engine's next step. Nothing happens if it has ended."""
        if request_id in self._streams and self.state is EngineState.RUNNING:
            self._send(AbortRequest(request_id, index))

    def forget(self, request_id: int) -> None:
        """:meth:`cancel` for a caller who does not want the remaining events either."""
        self.cancel(request_id)
        self._streams.pop(request_id, None)

    def fail_all(self, reason: str) -> None:
        """Ends every request in flight with ``reason``."""
        error = EngineDeadError(reason)
        for request_id, (stream, _) in list(self._streams.items()):
            self.forget(request_id)
            stream.fail(error)

    def reset_prefix_cache(self) -> None:
        """Frees every cached page. Raises EngineDeadError if there is no engine now."""
        if self.state is not EngineState.RUNNING:
            raise EngineDeadError(self.reason)
        self._send(ResetPrefixCache())

    # ---- the process -----------------------------------------------------------------------------------------------

    async def _launch(self) -> EngineReady:
        """A new process, its model loaded. Raises EngineStartError if it does not come that far."""
        ours, theirs = socket.socketpair()
        with theirs:
            # The child finds modules where this process does, whatever its working folder holds.
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "tokenmill.engine.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # this process's standard error: standard output carries results only
                env={**os.environ, "PYTHONPATH": path},
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        config = {field.name: getattr(self._config, field.name) for field in dataclasses.fields(self._config)}
        plain = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in config.items()}
        self._send(LoadModel(os.fspath(self._path), plain))
        watchdog = asyncio.create_task(self._watch_start(), name="engine start watchdog")
        try:
            messages = await self._receive()
            while messages == [Loading()]:
                messages = await self._receive()
            match messages:
                case [EngineReady() as ready, EngineReport() as report]:
                    self.state, self.reason, self.report = EngineState.RUNNING, "", report
                    return ready
                case [EngineFailed(error, exit_code)]:
                    raise EngineStartError(error, exit_code)
            cause = watchdog.result() if watchdog.done() else await self._cause_of_death()
            raise EngineStartError(f"{cause} while it loaded the model")
        finally:
            watchdog.cancel()

    async def _supervise(self) -> None:
        """Delivers events, and brings a new process up whenever the last one dies."""
        delay = FIRST_DELAY
        while True:
            born = time.monotonic()
            try:
                cause = await self._deliver_until_death() or await self._cause_of_death()
            except Exception as error:  # whatever it is, nobody may wait for an engine that nobody listens to
                cause = f"what the engine sent could not be handled: {type(error).__name__}: {error}"
            self.last_death = EngineDeath(cause, time.time())
            self._die(cause)
            if time.monotonic() - born > HEALTHY_SECONDS:
                delay = FIRST_DELAY
            while self.state is not EngineState.RUNNING:
                await asyncio.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)
                await self._reap()
                try:
                    ready = await self._launch()
                    self.restarts += 1
                    self._on_restart(ready)
                except Exception as error:
                    self._die(f"the engine could not be started again: {error}")

    async def _deliver_until_death(self) -> str | None:
        """Hands events out until the connection ends. The reason, if the engine gave one or was too long silent."""
        watchdog = asyncio.create_task(self._watch(), name="engine watchdog")
        try:
            while (messages := await self._receive()) is not None:
                now = time.monotonic()
                for message in messages:
                    if isinstance(message, EngineReport):
                        self.report = message
                        self._on_report(message)
                    elif isinstance(message, EngineFailed):
                        return message.error
                    elif not isinstance(message, EngineReady | Loading):
                        self._deliver(now, message)
            return watchdog.result() if watchdog.done() else None
        finally:
            watchdog.cancel()

    async def _watch(self) -> str:
        """Kills the engine if it is silent for too long, and says so.

        A busy engine sends a frame after each step, an idle one is asked for it.
        """
        await self._silence(self._patience, ask=True)
        return f"the engine hung: no step and no answer for {self._patience:g} s"

    async def _watch_start(self) -> str:
        """The same for an engine that loads its model and sends a frame whenever it has got a step further."""
        await self._silence(self._start_patience, ask=False)
        return f"the engine hung: it got no further for {self._start_patience:g} s"

    async def _silence(self, patience: float, *, ask: bool) -> None:
        """Waits until the engine has sent nothing for ``patience`` seconds, and kills it. ``ask`` it for an answer.

        Silence is counted in looks: while this process is held up itself, it does not grow.
        """
        silent, seen = 0, self._frames
        while silent < _LOOKS:
            if ask and silent == 0:
                self._send(Ping())
            await asyncio.sleep(patience / _LOOKS)
            silent, seen = (silent + 1 if self._frames == seen else 0), self._frames
        assert self._process is not None
        assert self._writer is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._writer.transport.abort()  # its end would come by itself, but not while the kernel holds the process

    def _deliver(self, now: float, event: Event) -> None:
        stream, left = self._streams.get(event.request_id, (None, 0))
        if stream is None:
            return
        if isinstance(event, Failed) or (isinstance(event, Finished) and left == 1):
            del self._streams[event.request_id]
        elif isinstance(event, Finished):
            self._streams[event.request_id] = (stream, left - 1)
        stream.put(now, event)

    def _die(self, cause: str) -> None:
        self.state, self.reason, self.report = EngineState.DEAD, cause, None
        error = EngineDeadError(cause)
        for stream, _ in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        self._on_death(cause)

    async def _cause_of_death(self) -> str:
        assert self._process is not None
        try:
            code = await asyncio.wait_for(self._process.wait(), _EXIT_SECONDS)
        except TimeoutError:
            return "the engine process closed its connection"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"the engine process was ended by {signal.Signals(-code).name}{hint}"
        return f"the engine process ended with exit code {code}"

    async def _reap(self) -> None:
        """Makes sure that the process is gone; a living one ends when its connection closes."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is None:
            return
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _send(self, *messages: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(messages))

    async def _receive(self) -> list[FromEngine] | None:
        """The messages of the next frame; None if the connection has ended."""
        assert self._reader is not None
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            body = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._frames += 1
        return decode_body(body)
