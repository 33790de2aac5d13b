"""The thread around the core: delivery, cancelling, dying, closing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from test_core import make_core
from toy_backend import ToyBackend

from tokenmill.engine.engine import Engine, EventStream
from tokenmill.engine.messages import AddRequest, EngineDeadError, Event, Failed, Finished, FinishReason, TokenOutput
from tokenmill.sampling import SamplingParams


@pytest.fixture
def running() -> Iterator[tuple[Engine, ToyBackend]]:
    core, backend = make_core()
    with Engine(core) as engine:
        yield engine, backend


def request(engine: Engine, prompt: list[int], tokens: int = 10, **params: object) -> AddRequest:
    settings = SamplingParams(temperature=0, max_tokens=tokens, seed=0, **params)  # type: ignore[arg-type]
    return AddRequest(engine.new_request_id(), np.array(prompt, np.int32), settings)


def until_finished(stream: EventStream) -> list[Event]:
    events: list[Event] = []
    while not events or not isinstance(events[-1], Finished | Failed):
        events.append(stream.next_event())
    return events


def test_events_of_a_request_come_in_order_and_end(running: tuple[Engine, ToyBackend]) -> None:
    engine, _ = running
    events = until_finished(engine.submit([request(engine, [1, 2, 3])]))
    assert [type(e) for e in events] == [TokenOutput] * 10 + [Finished]


def test_a_refused_request_hears_of_it(running: tuple[Engine, ToyBackend]) -> None:
    engine, _ = running
    (event,) = until_finished(engine.submit([request(engine, [])]))
    assert isinstance(event, Failed)


def test_a_cancelled_request_stops_within_one_step(running: tuple[Engine, ToyBackend]) -> None:
    engine, backend = running
    message = request(engine, [1, 2, 3], tokens=300)
    in_step, go_on = threading.Event(), threading.Event()
    plain_run = backend.run

    def held_run(*arguments: object, **named: object) -> object:
        in_step.set()
        assert go_on.wait(10)
        return plain_run(*arguments, **named)  # type: ignore[arg-type]

    backend.run = held_run  # type: ignore[assignment,method-assign]
    stream = engine.submit([message])
    assert in_step.wait(10)  # a step runs: the message comes too late for this one
    engine.cancel(message.request_id)
    steps = engine.statistics.steps
    go_on.set()
    events = until_finished(stream)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.ABORT
    assert engine.usage()[0].used == 0
    assert engine.statistics.steps == steps + 1


def test_an_idle_engine_sleeps(running: tuple[Engine, ToyBackend]) -> None:
    engine, _ = running
    until_finished(engine.submit([request(engine, [1])]))
    engine.usage()
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_a_step_that_throws_reaches_every_caller(running: tuple[Engine, ToyBackend]) -> None:
    engine, backend = running
    backend.gate.clear()  # both requests are there when the step fails
    first = engine.submit([request(engine, [1], tokens=300)])
    second = engine.submit([request(engine, [2])])
    backend.fails = MemoryError("no room for the step")
    backend.gate.set()
    for stream in (first, second):
        with pytest.raises(EngineDeadError, match="MemoryError: no room for the step"):
            until_finished(stream)
    with pytest.raises(EngineDeadError, match="no room for the step"):
        engine.submit([request(engine, [3])])
    with pytest.raises(EngineDeadError, match="no room for the step"):
        engine.usage()


def test_a_question_that_fails_is_its_callers_and_nobody_elses(
    running: tuple[Engine, ToyBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = running

    def broken() -> None:
        raise ZeroDivisionError("while counting")

    monkeypatch.setattr(engine._core, "usage", broken)
    with pytest.raises(ZeroDivisionError, match="while counting"):
        engine.usage()
    assert isinstance(until_finished(engine.submit([request(engine, [1])]))[-1], Finished)


def test_closing_ends_open_requests_and_frees_once() -> None:
    core, _ = make_core()
    closed: list[bool] = []
    engine = Engine(core, on_close=lambda: closed.append(True))
    stream = engine.submit([request(engine, [1], tokens=300)])
    engine.close()
    engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        until_finished(stream)
    with pytest.raises(EngineDeadError, match="closed"):
        engine.submit([])
    assert closed == [True]


def test_stopping_frees_without_being_waited_for() -> None:
    core, _ = make_core()
    freed = threading.Event()
    engine = Engine(core, on_close=freed.set)
    engine.stop()
    assert freed.wait(10)
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        engine.submit([])


def test_outputs_that_never_started_end_with_a_cancelled_request(running: tuple[Engine, ToyBackend]) -> None:
    engine, backend = running
    in_step, go_on = threading.Event(), threading.Event()
    plain_run = backend.run

    def held_run(*arguments: object, **named: object) -> object:
        in_step.set()
        assert go_on.wait(10)
        return plain_run(*arguments, **named)  # type: ignore[arg-type]

    backend.run = held_run  # type: ignore[assignment,method-assign]
    engine.submit([request(engine, [7])])  # the step that is under way while the request under test comes and goes
    assert in_step.wait(10)
    message = request(engine, [1, 2, 3], n=4)
    stream = engine.submit([message])
    engine.cancel(message.request_id)
    go_on.set()
    ends = [stream.next_event() for _ in range(4)]
    assert {event.index for event in ends if isinstance(event, Finished)} == {0, 1, 2, 3}


def test_a_forked_child_is_refused_instead_of_waiting_for_ever(running: tuple[Engine, ToyBackend]) -> None:
    engine, _ = running
    child = os.fork()
    if child == 0:  # what happens here must neither raise nor return into pytest
        signal.alarm(10)
        try:
            engine.submit([request(engine, [1])])
        except EngineDeadError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert isinstance(until_finished(engine.submit([request(engine, [1])]))[-1], Finished)
