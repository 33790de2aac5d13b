"""One request at a time: how fast a prompt is read and tokens come, and how close that is to the machine's limits.

Measured end to end through the public API, from the request's arrival to its last token, sampler and Python included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenmill import _native
from tokenmill.bench.roofline import Limits
from tokenmill.bench.spread import Spread
from tokenmill.bench.work import model_work
from tokenmill.llm import LLM
from tokenmill.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """One value a request; shares are of the limits just before and just after that request."""

    model: str
    isa: str
    threads: int
    prompt_tokens: int
    output_tokens: int
    prefill_tokens_per_second: Spread
    """From arrival to the first token."""
    decode_tokens_per_second: Spread
    """From the first token to the last, which is one token less than came out."""
    prefill_share_of_limit: Spread
    decode_share_of_limit: Spread
    decode_bytes_per_token: int
    """Weights and, at the middle of the output, keys and values."""
    memory_read_bytes_per_second: Spread
    int8_operations_per_second: Spread


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
    warm_up, *prompts = random_prompts(rounds + 1, prompt_tokens, work.vocab_size, seed=prompt_tokens)
    llm.generate(warm_up, params)
    middle = prompt_tokens + output_tokens // 2
    prefill, decode, prefill_shares, decode_shares, limits = [], [], [], [], []
    before = Limits.now(llm.config.threads)
    for prompt in prompts:
        timings = llm.generate(prompt, params)[0].timings
        assert timings is not None
        after = Limits.now(llm.config.threads)
        limits.append(before.best(after))
        before = after
        first = timings.first_token - timings.arrival
        step = max(timings.finished - timings.first_token, 1e-9) / max(output_tokens - 1, 1)
        prefill.append(prompt_tokens / first)
        decode.append(1 / step)
        prefill_shares.append(work.prefill_seconds(prompt_tokens, limits[-1]) / first)
        decode_shares.append(work.decode_seconds(1, middle, limits[-1]) / step)
    return LatencyReport(
        model=str(llm.config.model),
        isa=_native.active_isa(),
        threads=llm.config.threads or _native.usable_cpu_count(),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_tokens_per_second=Spread.of(prefill),
        decode_tokens_per_second=Spread.of(decode),
        prefill_share_of_limit=Spread.of(prefill_shares),
        decode_share_of_limit=Spread.of(decode_shares),
        decode_bytes_per_token=work.weight_bytes + work.kv_bytes(middle),
        memory_read_bytes_per_second=Spread.of([limit.memory for limit in limits]),
        int8_operations_per_second=Spread.of([limit.int8 for limit in limits]),
    )
