"""The engine's own process: ``python -m tokenmill.engine.worker FD``, started by :mod:`tokenmill.engine.process`.

Messages come over the socket ``FD`` and go into the core between two steps; after every step its events and a report
go back in one frame. The process ends with its socket, so it cannot outlive the front process, however that ends.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from tokenmill.engine.assemble import LoadedCore, load_core
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import AbortRequest, AddRequest, Event
from tokenmill.engine.wire import (
    LENGTH,
    MAX_FRAME_BYTES,
    EngineFailed,
    EngineReady,
    EngineReport,
    FromEngine,
    Loading,
    LoadModel,
    Ping,
    ResetPrefixCache,
    decode_body,
    encode_frame,
)
from tokenmill.errors import TokenmillError

_Message = AddRequest | AbortRequest | ResetPrefixCache | Ping
_Inbox = queue.SimpleQueue[_Message]


def main() -> None:
    """Loads the model that the first message names and serves until the socket closes."""
    # Whoever stops a whole process group (Ctrl-C, a service manager) means the front process: it drains, then hangs up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    messages = _messages(connection)
    try:
        first = next(messages)
    except StopIteration:
        return
    if not isinstance(first, LoadModel):
        raise TypeError(f"the first message is a {type(first).__name__}, not LoadModel")
    inbox: _Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(messages, inbox), name="receive", daemon=True).start()
    try:
        config = EngineConfig(**first.config)  # type: ignore[arg-type]
        loaded = load_core(config, Path(first.path), lambda: _send(connection, [Loading()]))
    except TokenmillError as error:
        _leave(connection, EngineFailed(str(error), error.exit_code))
    except Exception as error:
        _leave(connection, EngineFailed(f"loading the model failed: {type(error).__name__}: {error}"))
    _send(connection, [_ready(loaded), _report(loaded.core, 0)])
    try:
        _serve(connection, loaded.core, inbox)
    except Exception as error:
        _leave(connection, EngineFailed(f"a step of the engine failed: {type(error).__name__}: {error}"))


def _serve(connection: socket.socket, core: EngineCore, inbox: _Inbox) -> None:
    """The step loop. Blocks without any work while there is none."""
    while True:
        events: list[Event] = []
        for message in _waiting_messages(inbox, block=not core.busy):
            if isinstance(message, ResetPrefixCache):
                core.cache.reset()
            elif not isinstance(message, Ping):  # the report that follows is what it asks for
                events += core.handle(message)
        steps = core.statistics.steps
        if core.busy:
            events += core.step()
        _send(connection, [*events, _report(core, steps)])


def _waiting_messages(inbox: _Inbox, *, block: bool) -> Iterator[_Message]:
    if block:
        yield inbox.get()
    while True:
        try:
            yield inbox.get_nowait()
        except queue.Empty:
            return


def _receive(messages: Iterator[object], inbox: _Inbox) -> None:
    """Runs beside the steps. When the front process goes, so does this one, in the middle of a step if need be."""
    try:
        for message in messages:
            assert isinstance(message, _Message)
            inbox.put(message)
    except Exception:  # an engine that hears nothing any more must not look alive
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _messages(connection: socket.socket) -> Iterator[object]:
    """Every message until the socket closes."""
    while (head := _read(connection, LENGTH.size)) is not None:
        (length,) = LENGTH.unpack(head)
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {length} bytes")
        body = _read(connection, length)
        if body is None:
            return
        yield from decode_body(body)


def _read(connection: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            received = connection.recv_into(view)
        except ConnectionError:
            return None
        if not received:
            return None
        view = view[received:]
    return data


def _send(connection: socket.socket, messages: list[FromEngine]) -> None:
    try:
        connection.sendall(encode_frame(messages))
    except OSError:
        os._exit(0)  # nobody listens any more


def _ready(loaded: LoadedCore) -> EngineReady:
    return EngineReady(
        architecture=loaded.bound.architecture,
        vocab_size=loaded.bound.program.vocab_size,
        hidden_size=loaded.bound.config.hidden_size,
        max_position=loaded.bound.config.max_position,
        ledger=loaded.ledger,
        seconds=dict(loaded.seconds),
    )


def _report(core: EngineCore, steps: int) -> EngineReport:
    """The state now, when ``steps`` were known of."""
    counters = core.statistics
    return EngineReport(
        preemptions=counters.preemptions,
        usage=core.usage(),
        running=len(core.scheduler.running),
        waiting=len(core.scheduler.waiting),
        prefix_queries=core.scheduler.prefix_queries,
        prefix_hits=core.scheduler.prefix_hits,
        step=counters.recent[-1] if counters.steps > steps else None,
    )


def _leave(connection: socket.socket, reason: EngineFailed) -> None:
    _send(connection, [reason])
    sys.stderr.flush()
    os._exit(reason.exit_code)


if __name__ == "__main__":
    main()
