"""The thread that runs the engine's core, and the mailboxes around it."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar, cast

from tokenmill.engine.core import EngineCore
from tokenmill.engine.kv_cache import PoolUsage
from tokenmill.engine.messages import AbortRequest, AddRequest, EngineDeadError, Event, Failed, Finished, Message
from tokenmill.engine.statistics import EngineSnapshot, StepStatistics

Result = TypeVar("Result")


class _Stop:
    """Asks the thread to end."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Something to be done between two steps, and where its result goes."""

    function: Callable[[], object]
    result: Future[object]

    def run(self) -> None:
        try:
            self.result.set_result(self.function())
        except BaseException as error:  # the caller's to deal with: nobody else's request ends for it
            self.result.set_exception(error)


_Item = Message | _Stop | _Call


class EventStream:
    """The events of requests submitted together. Iterate with :meth:`next_event` until every request has ended.

    With ``together`` they arrive when all requests have ended or one has failed: a reader who wants the whole answer
    is not woken for every token, which would take the processor, and the interpreter, from the step that is running.
    """

    def __init__(self, engine: Engine, requests: int, *, together: bool) -> None:
        self._engine = engine
        self._open = requests
        self._together = together
        self._held: list[Event] = []
        self._failed = False
        self._batches: queue.SimpleQueue[list[Event] | EngineDeadError] = queue.SimpleQueue()
        self._unread: deque[Event] = deque()

    def hold(self, event: Event, *, ends: bool) -> None:
        """The engine's side: an event, perhaps the last one of its request. Nobody sees it before :meth:`pass_on`."""
        self._held.append(event)
        if ends:
            self._open -= 1
            self._failed |= isinstance(event, Failed)

    def pass_on(self) -> None:
        """The engine's side: that was all of this step."""
        if not self._together or self._failed or self._open == 0:
            self._batches.put(self._held)
            self._held = []

    def fail(self, error: EngineDeadError) -> None:
        """The engine's side: no more events."""
        self._batches.put(error)

    def next_event(self) -> Event:
        """Blocks until there is an event. Raises EngineDeadError if there never will be."""
        self._engine.check_process()
        while not self._unread:
            batch = self._batches.get()
            if isinstance(batch, EngineDeadError):
                self._batches.put(batch)  # for the next caller too
                raise EngineDeadError(str(batch)) from batch
            self._unread.extend(batch)
        return self._unread.popleft()


class Engine:
    """Runs an :class:`EngineCore` in a thread of its own. All methods may be called from any thread.

    An idle engine blocks on its inbox: no polling. A message that arrives during a step acts before the next one.
    """

    def __init__(self, core: EngineCore, on_close: Callable[[], None] = lambda: None) -> None:
        self._core = core
        self._on_close = on_close
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._streams: dict[int, tuple[EventStream, int]] = {}
        """Stream and number of outputs still to end, by request."""
        self._ids = itertools.count()
        self._dead: EngineDeadError | None = None
        self._closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="tokenmill-engine", daemon=True)
        self._thread.start()
        _running.add(self)

    @property
    def statistics(self) -> StepStatistics:
        """Counters of the core."""
        return self._core.statistics

    def usage(self) -> list[PoolUsage]:
        """Pages of each KV group between two steps. Raises EngineDeadError."""
        return self._between_steps(self._core.usage)

    def snapshot(self) -> EngineSnapshot:
        """What the engine does and has done, between two steps. Raises EngineDeadError."""
        return self._between_steps(self._core.snapshot)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes. Raises EngineDeadError."""
        self._between_steps(self._core.reset_prefix_cache)

    def new_request_id(self) -> int:
        return next(self._ids)

    def submit(self, requests: list[AddRequest], *, together: bool = False) -> EventStream:
        """Hands requests in, in this order. Raises EngineDeadError if the engine is closed or has died."""
        self.check_process()
        stream = EventStream(self, len(requests), together=together)
        with self._lock:
            self._check_alive()
            for request in requests:
                self._streams[request.request_id] = (stream, request.outputs)
                self._inbox.put(request)
        return stream

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """Stops a request, or one output of it, before the next step. Nothing happens if it has ended."""
        self._inbox.put(AbortRequest(request_id, index))

    def close(self) -> None:
        """Ends the thread after the current step and frees everything; open requests fail. Safe to call twice."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stop(self) -> None:
        """:meth:`close` without waiting. Takes no lock, so a finalizer may call it wherever a collection happens."""
        self._closed = True
        self._inbox.put(_Stop())

    @property
    def runs_here(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raises EngineDeadError in a forked child, which has no thread to wait for."""
        if not self.runs_here:
            raise EngineDeadError(
                f"the engine belongs to process {self._process}, from which this one was forked; load the model here"
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _between_steps(self, function: Callable[[], Result]) -> Result:
        """The result of ``function`` in the engine's thread. Raises EngineDeadError and what the function raises."""
        result: Future[Result] = Future()
        self.check_process()
        with self._lock:
            self._check_alive()
            self._inbox.put(_Call(function, cast("Future[object]", result)))
        return result.result()

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine is closed")
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._deliver(self._core.step())
            error = EngineDeadError("the engine was closed while the request ran")
        except BaseException as cause:  # whatever it is, nobody may wait for events that never come
            error = EngineDeadError(f"the engine stopped: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        with self._lock:
            self._dead = error
            streams = {stream for stream, _ in self._streams.values()}
            self._streams.clear()
        for stream in streams:
            stream.fail(error)
        for item in self._pending():
            if isinstance(item, _Call):
                item.result.set_exception(error)
        self._on_close()

    def _take_messages(self) -> bool:
        """Handles everything in the inbox, waiting for the first message if there is no work. False to stop."""
        if self._core.busy and self._inbox.empty():
            return True
        waiting = () if self._core.busy else (self._inbox.get(),)
        for item in itertools.chain(waiting, self._pending()):
            if isinstance(item, _Stop):
                return False
            if isinstance(item, _Call):
                item.run()
            else:
                self._deliver(self._core.handle(item))
        return True

    def _pending(self) -> Iterator[_Item]:
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _deliver(self, events: list[Event]) -> None:
        touched: dict[EventStream, None] = {}
        with self._lock:
            for event in events:
                stream, left = self._streams.get(event.request_id, (None, 0))
                if stream is None:
                    continue
                ends = isinstance(event, Failed) or (isinstance(event, Finished) and left == 1)
                if ends:
                    del self._streams[event.request_id]
                elif isinstance(event, Finished):
                    self._streams[event.request_id] = (stream, left - 1)
                stream.hold(event, ends=ends)
                touched[stream] = None
        for stream in touched:
            stream.pass_on()


_running: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes: a thread that is inside of native code then would take the process down with it."""
    for engine in list(_running):
        if engine.runs_here:
            engine.close()
