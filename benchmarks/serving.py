"""What the users of one server wait for each other, and what serving costs beside running offline.

    python benchmarks/serving.py long-prompt smollm2-135m [--streams 4] [--prompt-tokens 4096] [--trace]
    python benchmarks/serving.py shared-prefix smollm2-135m [--requests 8] [--prefix-tokens 1024]
    python benchmarks/serving.py throughput smollm2-135m [--requests 32] [--peer http://127.0.0.1:9000]

``long-prompt``: some streams decode when a long prompt arrives. Split, its steps keep to the target; whole, it runs in
one step, which is what the streams would wait for without split and fuse (the negative control).
``shared-prefix``: requests that begin alike arrive at once, with the prefix cache and without.
``throughput``: the same requests to the engine offline, to a server that answers whole, to one that streams, and to
another server (``--peer``; texts, in English). The client runs on the same machine; its processor time is shown.

Everything alternates within a round, and ratios are of two runs of the same seconds: machines change their speed. The
first two drive the engine step by step, so that a gap between tokens is the engine's.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from tokenmill.bench.latency import random_prompts
from tokenmill.bench.load import LoadReport, LoadRequest, Quantiles, run_load, text_requests
from tokenmill.engine.assemble import load_core
from tokenmill.engine.config import SERVING_STEP_TARGET, EngineConfig
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import AddRequest, Finished, TokenOutput
from tokenmill.engine.statistics import StepRecord
from tokenmill.evaluate.text import read_texts
from tokenmill.llm import LLM
from tokenmill.sampling import SamplingParams
from tokenmill.sources import resolve

STREAM_PROMPT = 64
WARM_STEPS = 30
"""Steps of decoding alone before a long prompt arrives."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], **numbers: int) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.add_argument("model")
        for option, default in {**numbers, "rounds": 3}.items():
            made.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
        made.set_defaults(run=run)
        return made

    long_prompts = command("long-prompt", long_prompt, streams=4, prompt_tokens=4096)
    long_prompts.add_argument("--step-target", type=float, default=SERVING_STEP_TARGET, help="seconds")
    long_prompts.add_argument("--trace", action="store_true", help="each step: expected and actual")
    command("shared-prefix", shared_prefix, requests=8, prefix_tokens=1024, suffix_tokens=32)
    rates = command("throughput", throughput, requests=32, input_tokens=128, output_tokens=64)
    rates.add_argument("--peer", action="append", default=[], help="URL of another server with the same model")
    given = parser.parse_args()
    given.run(given)


# ---- a long prompt among streams -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interference:
    """From a long prompt's arrival to its first token. Seconds."""

    first_token: float
    gaps: Quantiles
    """Between two tokens of a stream; the same for all, which decode in every step."""
    steps: list[StepRecord]

    def __str__(self) -> str:
        return (
            f"first token after {self.first_token:.2f} s; gaps p50 {1e3 * self.gaps.p50:.0f}, p99 "
            f"{1e3 * self.gaps.p99:.0f} ms in {len(self.steps)} steps"
        )


def long_prompt(given: argparse.Namespace) -> None:
    with core_of(
        given.model,
        max_num_seqs=given.streams + 1,
        max_batch_tokens=given.prompt_tokens + given.streams,
        step_target=given.step_target,
        enable_prefix_caching=False,
    ) as (core, vocab_size):
        limits = core.scheduler.limits
        for number, prompt in enumerate(random_prompts(given.streams, STREAM_PROMPT, vocab_size, seed=2)):
            core.handle(request(number, prompt, limits.context))
        prompts = iter(random_prompts(2 * given.rounds, given.prompt_tokens, vocab_size, seed=1))
        for _ in range(given.rounds):
            split = interfere(core, given.streams, next(prompts))
            if given.trace:
                trace(split.steps)
            print(f"split: {split}", flush=True)
            core.scheduler.limits = replace(limits, step_target=None)
            whole = interfere(core, given.streams, next(prompts))
            core.scheduler.limits = limits
            print(f"whole: {whole}")
            print(
                f"p99 gap {split.gaps.p99 / given.step_target:.2f} targets; first token split / whole "
                f"{split.first_token / whole.first_token:.2f}; p99 gap whole / split "
                f"{whole.gaps.p99 / split.gaps.p99:.1f}",
                flush=True,
            )


def interfere(core: EngineCore, streams: int, prompt: list[int]) -> Interference:
    for _ in range(WARM_STEPS):
        core.step()
    begin = last = time.monotonic()
    core.handle(request(streams, prompt, 1))
    gaps: list[float] = []
    steps: list[StepRecord] = []
    while True:
        told = {event.request_id for event in core.step() if isinstance(event, TokenOutput)}
        now = time.monotonic()
        if told.issuperset(range(streams)):
            gaps.append(now - last)
            last = now
        steps.append(core.statistics.recent[-1])
        if streams in told:
            quantiles = Quantiles.of(gaps)
            assert quantiles is not None
            return Interference(now - begin, quantiles, steps)


def trace(steps: list[StepRecord]) -> None:
    print("   slot  rows decoding + prompt  expected ms  actual ms  of it beside the network")
    slot = 0
    for step in steps:
        beside = step.schedule + step.sample
        print(
            f"{slot:7d}  {step.decoded:4d} + {step.prompt_tokens:4d}  {1e3 * step.expected:10.1f}  "
            f"{1e3 * step.seconds:10.1f}  {1e3 * beside:8.2f}"
        )
        slot += step.prompt_tokens


# ---- a prefix that many share --------------------------------------------------------------------------------------


def shared_prefix(given: argparse.Namespace) -> None:
    length = given.prefix_tokens + given.suffix_tokens
    sizes = {"max_num_seqs": given.requests, "step_target": SERVING_STEP_TARGET, "max_model_len": length + 32}
    with (
        core_of(given.model, **sizes) as (cached, vocab_size),
        core_of(given.model, **sizes, enable_prefix_caching=False) as (uncached, _),
    ):
        for core in (cached, uncached):  # learns what steps cost
            burst(core, random_prompts(2, length, vocab_size, seed=3))
        for number in range(given.rounds):
            prefix = random_prompts(1, given.prefix_tokens, vocab_size, seed=100 + number)[0]
            ends = random_prompts(given.requests + 1, given.suffix_tokens, vocab_size, seed=200 + number)
            prompts = [prefix + end for end in ends]
            before = cached.statistics.prompt_tokens
            with_cache = burst(cached, prompts[:-1])
            computed = cached.statistics.prompt_tokens - before
            known = burst(cached, prompts[-1:])[0]
            without = burst(uncached, prompts[:-1])
            alone = burst(uncached, prompts[-1:])[0]
            later, later_without = (statistics.fmean(sorted(times)[1:]) for times in (with_cache, without))
            print(
                f"{given.requests} at once: {computed} prompt tokens computed of {given.requests * length}; first "
                f"token of the later ones after {later:.2f} s, without the cache {later_without:.2f} s: "
                f"{later / later_without:.2f}x\n"
                f"one more: {known:.3f} s, without the cache {alone:.3f} s: {known / alone:.2f}x",
                flush=True,
            )


def burst(core: EngineCore, prompts: list[list[int]]) -> list[float]:
    """Seconds to the first token of each prompt; all arrive now."""
    now = time.monotonic()
    for number, prompt in enumerate(prompts):
        core.handle(request(number, prompt, 1, now))
    times = []
    while core.busy:
        times += [e.timings.first_token - now for e in core.step() if isinstance(e, Finished)]
    return times


# ---- server and offline engine -------------------------------------------------------------------------------------


def throughput(given: argparse.Namespace) -> None:
    sizes = {
        "max_num_seqs": given.requests,
        "max_model_len": 2 * given.input_tokens + given.output_tokens,
        "max_batch_tokens": max(512, given.requests),
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    params = SamplingParams(max_tokens=given.output_tokens, temperature=0, ignore_eos=True, seed=0)
    with (
        LLM(given.model, memory="2GB", enable_prefix_caching=False, **sizes) as llm,
        served(given.model, ["--memory=2GB", "--no-prefix-caching", *options]) as url,
    ):
        text = read_texts(["corpus:prose"])

        def prompts(seed: int, count: int) -> list[LoadRequest]:
            """The same for all, as text: not every server takes token ids."""
            return text_requests(count, text, 4 * given.input_tokens, given.output_tokens, seed)

        def offline(seed: int, count: int = given.requests) -> float:
            texts = [str(request.prompt) for request in prompts(seed, count)]
            begin = time.perf_counter()
            llm.generate(texts, params)
            return count * given.output_tokens / (time.perf_counter() - begin)

        def load(url: str, seed: int, *, stream: bool, count: int = given.requests) -> LoadReport:
            report = run_load(url, "m", prompts(seed, count), users=count, stream=stream, timeout=600)
            if report.failed:
                sys.exit(f"{report.failed} requests failed: {report.errors}")
            return report

        offline(1000, count=2)
        load(url, 1000, stream=True, count=2)
        runs = [("server, whole answers", url, False), ("server, streamed", url, True)]
        runs += [(f"{peer}, streamed", peer, True) for peer in given.peer]
        for number in range(given.rounds):
            base = offline(number)
            print(f"offline: {base:.1f} output tokens/s")
            for name, where, stream in runs:
                report = load(where, number, stream=stream)
                rate = report.output_tokens_per_second
                share = report.client_cpu_seconds / report.seconds
                print(f"{name}: {rate:.1f}, {rate / base:.2f}x; client {share:.0%} of a core", flush=True)


@contextmanager
def served(model: str, options: list[str]) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [sys.executable, "-m", "tokenmill", "serve", model, "--served-model-name", "m", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"(https?://\S+)/v1$", server.stdout.readline().rstrip())
            if address is None:
                sys.exit("the server did not start")
            yield address[1]
        finally:
            server.terminate()


# ---- both ----------------------------------------------------------------------------------------------------------


@contextmanager
def core_of(model: str, **config: object) -> Iterator[tuple[EngineCore, int]]:
    """An engine's core and the size of its vocabulary."""
    path = resolve(model)
    loaded = load_core(EngineConfig(model=model, memory="3GB", **config), path)  # type: ignore[arg-type]
    yield loaded.core, loaded.bound.program.vocab_size
    loaded.close()


def request(number: int, prompt: list[int], tokens: int, arrival: float = 0.0) -> AddRequest:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, seed=0)
    return AddRequest(number, np.array(prompt, np.int32), params, arrival=arrival)


if __name__ == "__main__":
    main()
