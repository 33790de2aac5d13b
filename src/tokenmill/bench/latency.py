"""One request at a time: how fast a prompt is read and tokens come, and how close that is to the machine's limits.

Measured end to end through the public API, from the request's arrival to its last token, sampler and Python included.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from tokenmill import _native
from tokenmill.bench.roofline import MEMORY_WORKING_SET
from tokenmill.bench.work import model_work
from tokenmill.llm import LLM
from tokenmill.sampling import SamplingParams

_BANDWIDTH_SECONDS = 0.15


@dataclass(frozen=True, slots=True)
class LatencySample:
    """One request, with the machine's limits read right before and after it."""

    prefill_seconds: float
    """Arrival to first token."""
    decode_seconds: float
    """First token to last."""
    read_bytes_per_second: float
    """The larger of the read bandwidths just before and just after."""
    int8_operations_per_second: float


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Medians over the samples; shares are of each sample's own limits."""

    model: str
    isa: str
    threads: int
    prompt_tokens: int
    output_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_bytes_per_token: int
    """Weights and, at the middle of the output, keys and values."""
    decode_share_of_bandwidth: float
    prefill_share_of_int8_peak: float
    """2 x body parameters x prompt tokens / time to first token / int8 peak."""
    memory_read_bytes_per_second: float
    int8_operations_per_second: float
    samples: tuple[LatencySample, ...]


def random_prompts(count: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random ids: nothing that a cache could know, the same for every engine."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(count, tokens))
    return [[int(token) for token in row] for row in ids]


def measure_latency(llm: LLM, prompt_tokens: int, output_tokens: int, rounds: int = 5) -> LatencyReport:
    """Runs one request ``rounds`` times after a warm-up, greedy, ``output_tokens`` each whatever the model says.

    ``llm`` should have prefix caching off, or prompts must differ (they do). Raises UsageError through ``llm``.
    """
    work = model_work(llm.path, llm.config.kv_element)
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True, seed=0)
    prompts = random_prompts(rounds + 1, prompt_tokens, work.vocab_size, seed=prompt_tokens)
    llm.generate(prompts[0], params)
    samples = tuple(_sample(llm, prompt, params) for prompt in prompts[1:])
    operations = 2 * work.body_parameters * prompt_tokens
    bytes_per_token = work.weight_bytes + work.kv_bytes(prompt_tokens + output_tokens // 2)
    steps = max(output_tokens - 1, 1)

    return LatencyReport(
        model=str(llm.config.model),
        isa=_native.active_isa(),
        threads=llm.config.threads or _native.usable_cpu_count(),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_tokens_per_second=statistics.median([prompt_tokens / s.prefill_seconds for s in samples]),
        decode_tokens_per_second=statistics.median([steps / s.decode_seconds for s in samples]),
        decode_bytes_per_token=bytes_per_token,
        decode_share_of_bandwidth=statistics.median(
            [bytes_per_token * steps / s.decode_seconds / s.read_bytes_per_second for s in samples]
        ),
        prefill_share_of_int8_peak=statistics.median(
            [operations / s.prefill_seconds / s.int8_operations_per_second for s in samples]
        ),
        memory_read_bytes_per_second=statistics.median([s.read_bytes_per_second for s in samples]),
        int8_operations_per_second=statistics.median([s.int8_operations_per_second for s in samples]),
        samples=samples,
    )


def _sample(llm: LLM, prompt: list[int], params: SamplingParams) -> LatencySample:
    threads = llm.config.threads

    def bandwidth() -> float:
        return _native.read_bytes_per_second(MEMORY_WORKING_SET, threads, _BANDWIDTH_SECONDS)

    before = bandwidth()
    timings = llm.generate(prompt, params)[0].timings
    assert timings is not None
    after = bandwidth()
    return LatencySample(
        prefill_seconds=timings.first_token - timings.arrival,
        decode_seconds=max(timings.finished - timings.first_token, 1e-9),
        read_bytes_per_second=max(before, after),
        int8_operations_per_second=_native.int8_operations_per_second(threads, _BANDWIDTH_SECONDS),
    )
