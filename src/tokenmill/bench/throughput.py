"""Many requests at once, offline: how many tokens come out of one machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from tokenmill import _native
from tokenmill.bench.latency import random_prompts
from tokenmill.llm import LLM
from tokenmill.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class ThroughputReport:
    """Medians over the rounds; all requests arrive at once."""

    model: str
    isa: str
    threads: int
    requests: int
    input_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    seconds: tuple[float, ...]


def measure_throughput(
    llm: LLM, requests: int, input_tokens: int, output_tokens: int, rounds: int = 3
) -> ThroughputReport:
    """Runs ``requests`` prompts of random ids through ``llm.generate``, every round other ones, after a warm-up."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True, seed=0)
    vocab_size = llm.model_config.vocab_size
    llm.generate(
        random_prompts(2, input_tokens, vocab_size, seed=1), SamplingParams(max_tokens=1, temperature=0, seed=0)
    )
    seconds = []
    for round_number in range(rounds):
        prompts = random_prompts(requests, input_tokens, vocab_size, seed=100 + round_number)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
        produced = sum(len(output.token_ids) for output in outputs)
        if produced != requests * output_tokens:
            raise RuntimeError(f"{produced} tokens came out of {requests} requests of {output_tokens}")
    middle = statistics.median(seconds)
    return ThroughputReport(
        model=str(llm.config.model),
        isa=_native.active_isa(),
        threads=llm.config.threads or _native.usable_cpu_count(),
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        output_tokens_per_second=requests * output_tokens / middle,
        total_tokens_per_second=requests * (input_tokens + output_tokens) / middle,
        seconds=tuple(seconds),
    )
