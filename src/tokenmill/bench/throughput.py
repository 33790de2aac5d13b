"""Many requests at once, offline: how many tokens come out of one machine, and how close that is to its limits."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokenmill import _native
from tokenmill.bench.latency import random_prompts
from tokenmill.bench.roofline import Limits
from tokenmill.bench.spread import Spread
from tokenmill.bench.work import model_work
from tokenmill.llm import LLM
from tokenmill.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class ThroughputReport:
    """One value a round; all requests of a round arrive at once."""

    model: str
    isa: str
    threads: int
    requests: int
    input_tokens: int
    output_tokens: int
    output_tokens_per_second: Spread
    """Over the whole round, prompts included."""
    total_tokens_per_second: Spread
    """Prompt tokens counted too."""
    share_of_limit: Spread
    """The least time of this work (``ModelWork.request_seconds``) over the round's."""


def measure_throughput(
    llm: LLM, requests: int, input_tokens: int, output_tokens: int, rounds: int = 3
) -> ThroughputReport:
    """Runs ``requests`` prompts of random ids through ``llm.generate``, every round other ones, after a warm-up."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True, seed=0)
    work = model_work(llm.path, llm.config.kv_element)
    llm.generate(
        random_prompts(2, input_tokens, work.vocab_size, seed=1), SamplingParams(max_tokens=1, temperature=0, seed=0)
    )
    seconds, shares = [], []
    before = Limits.now(llm.config.threads)
    for number in range(rounds):
        prompts = random_prompts(requests, input_tokens, work.vocab_size, seed=100 + number)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
        after = Limits.now(llm.config.threads)
        produced = sum(len(output.token_ids) for output in outputs)
        if produced != requests * output_tokens:
            raise RuntimeError(f"{produced} tokens came out of {requests} requests of {output_tokens}")
        least = work.request_seconds(requests, input_tokens, output_tokens, before.best(after))
        shares.append(least / seconds[-1])
        before = after
    return ThroughputReport(
        model=str(llm.config.model),
        isa=_native.active_isa(),
        threads=llm.config.threads or _native.usable_cpu_count(),
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        output_tokens_per_second=Spread.of([requests * output_tokens / s for s in seconds]),
        total_tokens_per_second=Spread.of([requests * (input_tokens + output_tokens) / s for s in seconds]),
        share_of_limit=Spread.of(shares),
    )
