"""From starting an interpreter to the first token, on Tokenmill and on other engines in turn, and peak memory.

Each sample is a process of its own, after a start of each engine that does not count: it brings the files into the
page cache (a cold disk would measure the disk) and converts the weights where an engine needs that. Tokenmill's first
load, with an empty build cache, is measured apart.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill import _native
from tokenmill.bench.compare import OURS, own_environment
from tokenmill.bench.latency import random_prompts
from tokenmill.bench.peers import Peer, peers_folder, problem
from tokenmill.bench.spread import Spread, pair_ratios
from tokenmill.bench.work import model_work
from tokenmill.bench.worker_process import WorkerError, WorkerProcess
from tokenmill.weights.checkpoint import open_checkpoint

PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Start:
    """One start."""

    seconds: float
    peak_bytes: int
    """VmHWM of the process: mapped pages of the model included."""


@dataclass(slots=True)
class EngineStarts:
    """One engine's starts; None where it failed."""

    name: str
    samples: list[Start | None] = field(default_factory=list)
    error: str | None = None
    seconds: Spread | None = None
    peak_bytes: Spread | None = None
    ratio: Spread | None = None
    """Tokenmill's seconds over this engine's, start by start."""


@dataclass(frozen=True, slots=True)
class StartupReport:
    """``first`` is Tokenmill's with an empty build cache, the model packed and stored."""

    threads: int
    model_bytes: int
    largest_tensor_bytes: int
    first: Start
    engines: tuple[EngineStarts, ...]


def measure_startup(
    model: Path,
    peers: Sequence[tuple[Peer, str]] = (),
    *,
    rounds: int = 5,
    threads: int = 0,
    context: int = 2048,
    timeout: float = 600.0,
    say: Callable[[str], None] = lambda _: None,
) -> StartupReport:
    """Starts each engine ``rounds`` times in turn. Raises WorkerError if Tokenmill itself does not start."""
    threads = threads or _native.usable_cpu_count()
    prompt = random_prompts(1, PROMPT_TOKENS, model_work(model).vocab_size, seed=0)[0]
    with open_checkpoint(model) as checkpoint:
        sizes = [tensor.nbytes for tensor in checkpoint.tensors.values()]

    def start(peer: tuple[Peer, str] | None, environment: Mapping[str, str]) -> Start:
        worker, python = ("tokenmill", sys.executable) if peer is None else (peer[0].worker, peer[1])
        return _start(worker, python, environment, model, prompt, threads, context, timeout)

    engines = [EngineStarts(OURS), *(EngineStarts(peer.name) for peer, _ in peers)]
    for engine, (peer, python) in zip(engines[1:], peers, strict=True):
        engine.error = problem(peer, python)
    with tempfile.TemporaryDirectory() as cache:
        say("first load, empty build cache")
        ours = own_environment() | {"TOKENMILL_CACHE": cache}
        first = start(None, ours)
        for number in range(rounds + 1):
            for engine, peer_or_ours in zip(engines, [None, *peers], strict=True):
                say(f"start {number} of {rounds}, {engine.name}" if number else f"warm-up, {engine.name}")
                sample = None
                if engine.error is None:
                    try:
                        sample = start(
                            peer_or_ours, ours if peer_or_ours is None else {"OMP_NUM_THREADS": str(threads)}
                        )
                    except WorkerError as error:
                        engine.error = str(error)
                if number > 0:
                    engine.samples.append(sample)
    for engine in engines:
        engine.seconds = Spread.of_those(_seconds(engine))
        engine.peak_bytes = Spread.of_those([None if s is None else s.peak_bytes for s in engine.samples])
        if engine is not engines[0]:
            engine.ratio = pair_ratios(_seconds(engines[0]), _seconds(engine))
    return StartupReport(threads, sum(sizes), max(sizes), first, tuple(engines))


def _seconds(engine: EngineStarts) -> list[float | None]:
    return [None if sample is None else sample.seconds for sample in engine.samples]


def _start(
    worker: str,
    python: str,
    environment: Mapping[str, str],
    model: Path,
    prompt: list[int],
    threads: int,
    context: int,
    timeout: float,
) -> Start:
    scratch = peers_folder() / "weights"
    scratch.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    process = WorkerProcess(worker, python, environment)
    try:
        task = {"model": str(model.absolute()), "threads": threads, "context": context, "sequences": 1}
        process.ask({"do": "open", **task, "scratch": str(scratch)}, timeout)
        process.ask({"do": "latency", "prompt": prompt, "output_tokens": 1}, timeout)
        return Start(time.perf_counter() - begin, process.peak_bytes())
    finally:
        process.close()
