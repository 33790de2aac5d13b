"""The engine in a process of its own: what crosses, what happens when it or its parent dies, and that it idles."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_speaking_model

from tokenmill.engine.assemble import load_core
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.messages import (
    AddRequest,
    EngineDeadError,
    Event,
    Failed,
    Finished,
    PromptScored,
    TokenOutput,
)
from tokenmill.engine.process import EngineProcess, EngineStartError, EngineState, EventStream
from tokenmill.engine.wire import LENGTH, EngineFailed, EngineReport, decode_body, encode_frame
from tokenmill.errors import MemoryLimitError
from tokenmill.sampling import SamplingParams
from tokenmill.weights.cache import CacheEntry
from tokenmill.weights.checkpoint import open_checkpoint

LENGTH_BYTES = 4
PROMPT = np.arange(1, 40, dtype=np.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineConfig]:
    folder = tmp_path_factory.mktemp("tiny")
    path = write_speaking_model(folder / "tiny.gguf")
    return path, EngineConfig(model=path, max_model_len=2048, memory="400MB", cache_dir=folder / "cache", threads=1)


def with_engine(
    tiny: tuple[Path, EngineConfig], use: Callable[[EngineProcess], Awaitable[None]], deaths: list[str] | None = None
) -> None:
    async def run() -> None:
        engine = EngineProcess(
            tiny[1], tiny[0], on_death=lambda cause: None if deaths is None else deaths.append(cause)
        )
        await engine.start()
        try:
            await asyncio.wait_for(use(engine), 240)
        finally:
            await engine.close()

    asyncio.run(run())


def request(engine: EngineProcess, tokens: int = 10, **params: object) -> AddRequest:
    settings = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "seed": 0, **params})  # type: ignore[arg-type]
    return AddRequest(engine.new_request_id(), PROMPT, settings, arrival=time.monotonic())


async def until_finished(stream: EventStream) -> list[Event]:
    events: list[Event] = []
    while not events or not isinstance(events[-1], Finished | Failed):
        events += [event for _, event in await stream.next_events()]
    return events


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 120 s"
        await asyncio.sleep(0.01)


def test_a_request_gives_the_same_events_as_in_this_process(tiny: tuple[Path, EngineConfig]) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.8, max_tokens=12, seed=2**63 + 1, logprobs=2, prompt_logprobs=1)
    loaded = load_core(tiny[1], tiny[0])
    expected = loaded.core.handle(AddRequest(0, PROMPT, params))
    while loaded.core.busy:
        expected += loaded.core.step()
    loaded.close()

    async def use(engine: EngineProcess) -> None:
        stream = engine.submit([AddRequest(engine.new_request_id(), PROMPT, params)])
        events = await until_finished(stream)
        assert [e for e in events if isinstance(e, TokenOutput | PromptScored)] == expected[:-1]

    with_engine(tiny, use)


def test_an_engine_that_hears_nonsense_ends_instead_of_hearing_nothing_more(tiny: tuple[Path, EngineConfig]) -> None:
    deaths: list[str] = []

    async def use(engine: EngineProcess) -> None:
        stream = engine.submit([request(engine, 2000)])
        assert engine._writer is not None
        engine._writer.write(LENGTH.pack(3) + b"???")
        with pytest.raises(EngineDeadError, match="exit code 1"):
            await until_finished(stream)
        await until(lambda: engine.state is EngineState.RUNNING)

    with_engine(tiny, use, deaths)
    assert len(deaths) == 1


def test_a_refused_request_hears_of_it(tiny: tuple[Path, EngineConfig]) -> None:
    async def use(engine: EngineProcess) -> None:
        empty = AddRequest(engine.new_request_id(), np.zeros(0, np.int32), SamplingParams(seed=0))
        (event,) = await until_finished(engine.submit([empty]))
        assert isinstance(event, Failed)
        assert "empty" in event.error

    with_engine(tiny, use)


def test_a_cancelled_request_gives_its_pages_back_and_the_cache_can_be_emptied(tiny: tuple[Path, EngineConfig]) -> None:
    async def use(engine: EngineProcess) -> None:
        message = request(engine, 2000)
        stream = engine.submit([message])
        await stream.next_events()
        engine.cancel(message.request_id)
        await until_finished(stream)
        await until(lambda: engine.report is not None and engine.report.usage[0].used == 0)
        assert engine.report is not None
        assert engine.report.usage[0].cached > 0
        engine.reset_prefix_cache()
        await until(lambda: engine.report is not None and engine.report.usage[0].cached == 0)
        assert engine.report.usage[0].free == engine.report.usage[0].total
        assert engine.in_flight == 0

    with_engine(tiny, use)


def test_an_engine_killed_in_mid_step_fails_what_runs_and_comes_back(tiny: tuple[Path, EngineConfig]) -> None:
    deaths: list[str] = []

    async def use(engine: EngineProcess) -> None:
        expected = await until_finished(engine.submit([request(engine)]))
        streams = [engine.submit([request(engine, 2000)]) for _ in range(3)]
        await streams[0].next_events()
        assert engine.pid is not None
        killed = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await until_finished(stream)
        assert time.monotonic() - killed < 60
        assert engine.state is EngineState.DEAD
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            engine.submit([request(engine)])
        await until(lambda: engine.state is EngineState.RUNNING)
        again = await until_finished(engine.submit([request(engine)]))
        assert [e.token_id for e in again if isinstance(e, TokenOutput)] == [
            e.token_id for e in expected if isinstance(e, TokenOutput)
        ]
        assert engine.restarts == 1

    with_engine(tiny, use, deaths)
    assert len(deaths) == 1


def test_signals_to_the_process_group_leave_the_engine_to_its_parent(tiny: tuple[Path, EngineConfig]) -> None:
    async def use(engine: EngineProcess) -> None:
        stream = engine.submit([request(engine, 50)])
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGTERM)
        os.kill(engine.pid, signal.SIGINT)
        assert isinstance((await until_finished(stream))[-1], Finished)
        assert engine.restarts == 0

    with_engine(tiny, use)


def test_a_model_that_cannot_be_loaded_is_one_error(tiny: tuple[Path, EngineConfig], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny[0].read_bytes()[:5000])

    async def start(config: EngineConfig, path: Path) -> None:
        await EngineProcess(config, path).start()

    with pytest.raises(EngineStartError, match=r"broken\.gguf"):
        asyncio.run(start(tiny[1], broken))
    with pytest.raises(EngineStartError, match="memory") as caught:
        asyncio.run(start(EngineConfig(model=tiny[0], memory="1MB", cache_dir=tmp_path), tiny[0]))
    assert caught.value.exit_code == MemoryLimitError.exit_code


def signalled_start(tiny: tuple[Path, EngineConfig], number: signal.Signals, start_patience: float = math.inf) -> None:
    """Starts an engine that gets a signal as soon as its process is there."""

    async def start() -> None:
        engine = EngineProcess(tiny[1], tiny[0], start_patience=start_patience)
        starting = asyncio.create_task(engine.start())
        await until(lambda: engine.pid is not None)
        assert engine.pid is not None
        os.kill(engine.pid, number)
        await starting

    asyncio.run(asyncio.wait_for(start(), 240))


def test_an_engine_killed_while_it_loads_says_so(tiny: tuple[Path, EngineConfig]) -> None:
    with pytest.raises(EngineStartError, match=r"SIGKILL.*while it loaded"):
        signalled_start(tiny, signal.SIGKILL)


def test_a_start_that_hangs_is_given_up(tiny: tuple[Path, EngineConfig]) -> None:
    with pytest.raises(EngineStartError, match=r"hung: it got no further for 0\.4 s while it loaded"):
        signalled_start(tiny, signal.SIGSTOP, start_patience=0.4)


def test_a_restart_that_hangs_is_tried_again(tiny: tuple[Path, EngineConfig]) -> None:
    async def run() -> None:
        deaths: list[str] = []

        def died(cause: str) -> None:
            deaths.append(cause)
            # Short for the start that hangs; none for those that a busy machine may make long.
            engine._start_patience = 0.4 if len(deaths) == 1 else math.inf

        engine = EngineProcess(tiny[1], tiny[0], on_death=died)
        await engine.start()
        try:
            assert engine.pid is not None
            first = engine.pid
            os.kill(first, signal.SIGKILL)
            await until(lambda: engine.pid not in (None, first))
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)
            await until(lambda: engine.state is EngineState.RUNNING)
            assert "SIGKILL" in deaths[0]
            assert "hung: it got no further for 0.4 s while it loaded" in deaths[1]
            assert engine.last_death is not None
            assert engine.last_death.reason == deaths[0]
            assert isinstance((await until_finished(engine.submit([request(engine)])))[-1], Finished)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(run(), 240))


def test_an_engine_that_waits_for_another_ones_packing_does_not_look_hung(
    tiny: tuple[Path, EngineConfig], tmp_path: Path
) -> None:
    async def run() -> None:
        engine = EngineProcess(replace(tiny[1], cache_dir=tmp_path), tiny[0])
        with CacheEntry(open_checkpoint(tiny[0]), tmp_path).lock(lambda: None):
            starting = asyncio.create_task(engine.start())
            await until(lambda: engine._frames > 10)  # each of them shows the watchdog that it is alive
            assert not starting.done()
        await starting
        await engine.close()

    asyncio.run(asyncio.wait_for(run(), 240))


def test_the_engine_ends_when_its_parent_is_killed(tiny: tuple[Path, EngineConfig]) -> None:
    code = f"""
import asyncio
from pathlib import Path
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.process import EngineProcess
async def main():
    config = EngineConfig(model="tiny", max_model_len=64, cache_dir={str(tiny[1].cache_dir)!r})
    engine = EngineProcess(config, Path({str(tiny[0])!r}))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert running(pid)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 120
    while running(pid):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)


def test_an_engine_whose_messages_cannot_be_handled_is_started_again(tiny: tuple[Path, EngineConfig]) -> None:
    async def run() -> None:
        faults = [ZeroDivisionError("on purpose")]

        def report(_: EngineReport) -> None:
            if faults:
                raise faults.pop()

        deaths: list[str] = []
        engine = EngineProcess(tiny[1], tiny[0], on_report=report, on_death=deaths.append)
        await engine.start()
        try:
            with pytest.raises(EngineDeadError, match="on purpose"):
                await until_finished(engine.submit([request(engine)]))
            await until(lambda: engine.state is EngineState.RUNNING)
            assert isinstance((await until_finished(engine.submit([request(engine)])))[-1], Finished)
            assert len(deaths) == engine.restarts == 1
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(run(), 240))


def test_an_idle_engine_uses_no_processor_time(tiny: tuple[Path, EngineConfig]) -> None:
    async def use(engine: EngineProcess) -> None:
        await until_finished(engine.submit([request(engine)]))
        assert engine.pid is not None
        before = processor_seconds(engine.pid)
        await asyncio.sleep(2)
        assert processor_seconds(engine.pid) - before <= 0.02  # 1 %

    with_engine(tiny, use)


def test_a_frame_carries_only_known_messages() -> None:
    (message,) = decode_body(encode_frame([EngineFailed("why", 2)])[LENGTH_BYTES:])
    assert message == EngineFailed("why", 2)
    with pytest.raises(KeyError):
        encode_frame([object()])  # type: ignore[list-item]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
