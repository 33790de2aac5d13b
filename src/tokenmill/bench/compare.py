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
from tokenmill.bench.roofline import MEMORY_WORKING_SET
from tokenmill.bench.spread import Spread, pair_ratios
from tokenmill.bench.work import ModelWork, model_work
from tokenmill.bench.worker_process import WorkerError, WorkerProcess

OURS = "tokenmill"
_LIMIT_SECONDS = 0.15
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
class EngineResult:
    """What one engine did. ``samples`` maps a metric to one value a round, None where the engine failed."""

    name: str
    version: str = ""
    build: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    load_seconds: float | None = None
    error: str | None = None
    """Why it has no samples, or fewer than the others."""
    samples: dict[str, list[float | None]] = field(default_factory=dict)
    shares: dict[str, list[float | None]] = field(default_factory=dict)
    """Of the limits just before and after: decode of bandwidth, prefill of the int8 peak, for the work of this file."""
    spreads: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    """Tokenmill's rate over this engine's, round by round."""


@dataclass(slots=True)
class Comparison:
    """One workload on all engines; Tokenmill is the first."""

    workload: Workload
    threads: int
    rounds: int
    engines: list[EngineResult]
    memory_read_bytes_per_second: Spread | None = None
    int8_operations_per_second: Spread | None = None


@dataclass(frozen=True, slots=True)
class _Limits:
    read: float
    int8: float


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
    limits: list[_Limits] = []
    try:
        for result, (peer, python) in zip(results, [(None, sys.executable), *peers], strict=True):
            say(f"{workload.name}: opening {result.name}")
            workers.append(_open(result, peer, python, model, workload, threads, timeout))
        prompts = _prompts(workload, rounds + 1, work.vocab_size)
        warm_up = replace(workload, output_tokens=min(workload.output_tokens, _WARM_UP_TOKENS))
        for result, worker in zip(results, workers, strict=True):
            say(f"{workload.name}: warm-up, {result.name}")
            _measure(result, worker, warm_up, prompts[0], timeout)
        before = _limits(threads)
        for number in range(1, rounds + 1):
            for result, worker in zip(results, workers, strict=True):
                say(f"{workload.name}: round {number} of {rounds}, {result.name}")
                rates = _measure(result, worker, workload, prompts[number], timeout)
                after = _limits(threads)
                limits.append(_Limits(max(before.read, after.read), max(before.int8, after.int8)))
                _keep(result, rates, workload, work, limits[-1])
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
        Spread.of([limit.read for limit in limits]),
        Spread.of([limit.int8 for limit in limits]),
    )


def metrics(workload: Workload) -> tuple[str, ...]:
    """Names of the rates that a workload has, all in tokens per second."""
    if workload.alone:
        return ("prefill_tokens_per_second", "decode_tokens_per_second")
    return ("output_tokens_per_second",)


def _prompts(workload: Workload, sets: int, vocab_size: int) -> list[list[list[int]]]:
    ids = random_prompts(sets * workload.requests, workload.input_tokens, vocab_size, seed=workload.input_tokens)
    return [ids[i * workload.requests : (i + 1) * workload.requests] for i in range(sets)]


def _limits(threads: int) -> _Limits:
    return _Limits(
        _native.read_bytes_per_second(MEMORY_WORKING_SET, threads, _LIMIT_SECONDS),
        _native.int8_operations_per_second(threads, _LIMIT_SECONDS / 3),
    )


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
) -> dict[str, float] | None:
    """Rates of one round, or None with the first reason in ``result``."""
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
            "prefill_tokens_per_second": expected_in / answer["prefill_seconds"],
            "decode_tokens_per_second": (expected_out - 1) / max(answer["decode_seconds"], 1e-9),
        }
    return {"output_tokens_per_second": expected_out / answer["seconds"]}


def _keep(
    result: EngineResult, rates: dict[str, float] | None, workload: Workload, work: ModelWork, limit: _Limits
) -> None:
    for name in metrics(workload):
        result.samples.setdefault(name, []).append(None if rates is None else rates[name])
    if not workload.alone:
        return
    bytes_per_token = work.weight_bytes + work.kv_bytes(workload.input_tokens + workload.output_tokens // 2)
    for name, unit, most in (
        ("decode_share_of_bandwidth", bytes_per_token, limit.read),
        ("prefill_share_of_int8_peak", 2 * work.body_parameters, limit.int8),
    ):
        rate = None if rates is None else rates[name.split("_")[0] + "_tokens_per_second"]
        result.shares.setdefault(name, []).append(None if rate is None else rate * unit / most)


def _conclude(results: list[EngineResult]) -> None:
    for result in results:
        for name, samples in {**result.samples, **result.shares}.items():
            kept = [sample for sample in samples if sample is not None]
            if kept:
                result.spreads[name] = Spread.of(kept)
        if result is not results[0]:
            for name, samples in result.samples.items():
                ratio = pair_ratios(results[0].samples[name], samples)
                if ratio is not None:
                    result.ratios[name] = ratio
