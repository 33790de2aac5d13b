"""The same work on Tokenmill and on other engines, in turn.

Each engine runs in a process and a virtual environment of its own. All are open at once and measured A B A B, since a
shared machine's speed drifts; ratios are taken within a round. An engine that is missing, crashes, hangs or produces
another number of tokens is reported, and the others go on without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenmill import _native
from tokenmill.bench.latency import random_prompts
from tokenmill.bench.peers import Peer, peers_folder, problem
from tokenmill.bench.roofline import Limits
from tokenmill.bench.spread import Spread, pair_ratios
from tokenmill.bench.work import ModelWork, model_work
from tokenmill.bench.worker_process import WorkerError, WorkerProcess

OURS = "tokenmill"
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """``requests`` prompts of ``input_tokens`` random ids each; ``output_tokens`` are decoded for each, greedily."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def alone(self) -> bool:
        """One request: prefill and decode are told apart."""
        return self.requests == 1


LATENCY = Workload("latency", 1, 512, 64)
THROUGHPUT = Workload("throughput", 32, 128, 64)


@dataclass(slots=True)
class Metric:
    """One rate of one engine in tokens per second, one value a round, None where the engine failed."""

    samples: list[float | None] = field(default_factory=list)
    shares: list[float | None] = field(default_factory=list)
    """Of the limits just before and after: the least time of Tokenmill's work on this file over the time taken."""
    rate: Spread | None = None
    share: Spread | None = None
    ratio: Spread | None = None
    """Tokenmill's rate over this engine's, round by round."""


@dataclass(slots=True)
class EngineResult:
    """What one engine did. ``metrics`` are prefill and decode of one request, or output of many."""

    name: str
    version: str = ""
    build: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    load_seconds: float | None = None
    error: str | None = None
    """Why it has no samples, or fewer than the others."""
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass(slots=True)
class Comparison:
    """One workload on all engines; Tokenmill is the first."""

    workload: Workload
    threads: int
    rounds: int
    engines: list[EngineResult]
    memory_read_bytes_per_second: Spread | None = None
    int8_operations_per_second: Spread | None = None


def compare(
    model: Path,
    peers: Sequence[tuple[Peer, str]],
    workload: Workload,
    *,
    rounds: int = 5,
    threads: int = 0,
    timeout: float = 600.0,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measures ``workload`` on Tokenmill and each peer (with its interpreter), ``rounds`` times in turn.

    ``timeout`` is what an engine may take for one answer, in seconds; opening a model may take five times as long.
    Raises ModelFileError and UnsupportedModelError if Tokenmill cannot read the model at all.
    """
    threads = threads or _native.usable_cpu_count()
    work = model_work(model)
    results = [EngineResult(OURS), *(EngineResult(peer.name) for peer, _ in peers)]
    workers: list[WorkerProcess | None] = []
    limits: list[Limits] = []
    try:
        for result, (peer, python) in zip(results, [(None, sys.executable), *peers], strict=True):
            say(f"{workload.name}: opening {result.name}")
            workers.append(_open(result, peer, python, model, workload, threads, timeout))
        prompts = _prompts(workload, rounds + 1, work.vocab_size)
        warm_up = replace(workload, output_tokens=min(workload.output_tokens, _WARM_UP_TOKENS))
        for result, worker in zip(results, workers, strict=True):
            say(f"{workload.name}: warm-up, {result.name}")
            _measure(result, worker, warm_up, prompts[0], timeout)
        before = Limits.now(threads)
        for number in range(1, rounds + 1):
            for result, worker in zip(results, workers, strict=True):
                say(f"{workload.name}: round {number} of {rounds}, {result.name}")
                times = _measure(result, worker, workload, prompts[number], timeout)
                after = Limits.now(threads)
                limits.append(before.best(after))
                _keep(result, times, workload, work, limits[-1])
                before = after
    finally:
        for worker in workers:
            if worker is not None:
                worker.close()
    _conclude(results)
    return Comparison(
        workload,
        threads,
        rounds,
        results,
        Spread.of([limit.memory for limit in limits]),
        Spread.of([limit.int8 for limit in limits]),
    )


def _prompts(workload: Workload, sets: int, vocab_size: int) -> list[list[list[int]]]:
    ids = random_prompts(sets * workload.requests, workload.input_tokens, vocab_size, seed=workload.input_tokens)
    return [ids[i * workload.requests : (i + 1) * workload.requests] for i in range(sets)]


def _open(
    result: EngineResult, peer: Peer | None, python: str, model: Path, workload: Workload, threads: int, timeout: float
) -> WorkerProcess | None:
    """The worker with its model open, or None with the reason in ``result``."""
    if peer is not None and (reason := problem(peer, python)) is not None:
        result.error = reason
        return None
    environment = {"OMP_NUM_THREADS": str(threads)} if peer is not None else own_environment()
    worker = None
    try:
        worker = WorkerProcess("tokenmill" if peer is None else peer.worker, python, environment)
        scratch = peers_folder() / "weights"
        scratch.mkdir(parents=True, exist_ok=True)
        answer = worker.ask(
            {
                "do": "open",
                "model": str(model.absolute()),
                "threads": threads,
                "context": workload.input_tokens + workload.output_tokens,
                "sequences": workload.requests,
                "scratch": str(scratch),
            },
            5 * timeout,
        )
    except WorkerError as error:
        result.error = str(error)
        if worker is not None:
            worker.close()
        return None
    result.version, result.build = answer["version"], answer["build"]
    result.settings, result.load_seconds = answer["settings"], answer["load_seconds"]
    return worker


def own_environment() -> dict[str, str]:
    """So that the worker imports this very package, however it was found here."""
    source = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": source if not before else f"{source}{os.pathsep}{before}"}


def _measure(
    result: EngineResult, worker: WorkerProcess | None, workload: Workload, prompts: list[list[int]], timeout: float
) -> dict[str, tuple[int, float]] | None:
    """Tokens and seconds of each metric in one round, or None with the first reason in ``result``."""
    if worker is None or result.error is not None:
        return None
    tokens = {"output_tokens": workload.output_tokens}
    expected_in, expected_out = (workload.requests * n for n in (workload.input_tokens, workload.output_tokens))
    try:
        if workload.alone:
            answer = worker.ask({"do": "latency", "prompt": prompts[0], **tokens}, timeout)
        else:
            answer = worker.ask({"do": "throughput", "prompts": prompts, **tokens}, timeout)
    except WorkerError as error:
        result.error = str(error)
        return None
    if (answer["prompt_tokens"], answer["output_tokens"]) != (expected_in, expected_out):
        result.error = (
            f"ran {answer['prompt_tokens']} tokens in and {answer['output_tokens']} out, "
            f"asked for {expected_in} and {expected_out}: its figures cannot be compared"
        )
        return None
    if workload.alone:
        return {
            "prefill": (expected_in, answer["prefill_seconds"]),
            "decode": (expected_out - 1, max(answer["decode_seconds"], 1e-9)),
        }
    return {"output": (expected_out, answer["seconds"])}


def _keep(
    result: EngineResult,
    times: dict[str, tuple[int, float]] | None,
    workload: Workload,
    work: ModelWork,
    limits: Limits,
) -> None:
    """Adds one round's rates and shares."""
    w = workload
    if w.alone:
        step = work.decode_seconds(1, w.input_tokens + w.output_tokens // 2, limits)
        least = {"prefill": work.prefill_seconds(w.input_tokens, limits), "decode": (w.output_tokens - 1) * step}
    else:
        least = {"output": work.request_seconds(w.requests, w.input_tokens, w.output_tokens, limits)}
    for name, seconds_at_least in least.items():
        metric = result.metrics.setdefault(name, Metric())
        tokens, seconds = (0, None) if times is None else times[name]
        metric.samples.append(None if seconds is None else tokens / seconds)
        metric.shares.append(None if seconds is None else seconds_at_least / seconds)


def _conclude(results: list[EngineResult]) -> None:
    ours = results[0]
    for result in results:
        for name, metric in result.metrics.items():
            metric.rate, metric.share = Spread.of_those(metric.samples), Spread.of_those(metric.shares)
            if result is not ours:
                metric.ratio = pair_ratios(ours.metrics[name].samples, metric.samples)
