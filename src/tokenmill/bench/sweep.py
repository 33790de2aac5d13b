"""Prefill and decode at several depths and batch sizes, as llama-bench's ``pp`` and ``tg`` with ``-d``.

The tokens before are in the prefix cache, put there by a request that is not measured; every measured request says
how many it found there, and another number than asked for is an error. All through the public API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tokenmill.bench.latency import random_prompts
from tokenmill.bench.roofline import Limits
from tokenmill.bench.spread import Spread
from tokenmill.bench.work import ModelWork, model_work
from tokenmill.engine.messages import Timings
from tokenmill.errors import UsageError
from tokenmill.llm import LLM
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One measured place. ``tokens`` are those of the prompt (prefill) or those decoded for each sequence."""

    phase: str
    tokens: int
    depth: int
    batch: int
    tokens_per_second: Spread
    """Of all sequences together."""
    share_of_limit: Spread
    """The least time that the limits just before and just after allow (``ModelWork``) over the time taken."""


def sweep_latency(
    llm: LLM,
    *,
    prompt_tokens: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    output_tokens: int = 64,
    rounds: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[SweepPoint]:
    """Yields prefill points (each prompt length at each depth), then decode points (each depth and batch size).

    ``llm`` needs prefix caching, room for the largest batch, and depths that are whole pages. Raises UsageError
    otherwise.
    """
    for depth in depths:
        if depth % PAGE_TOKENS:
            raise UsageError(f"depth is {depth}; it must be a multiple of {PAGE_TOKENS}, the tokens of a KV page")
    work = model_work(llm.path, llm.config.kv_element)
    for depth in depths:
        for tokens in prompt_tokens:
            say(f"prefill of {tokens} tokens at depth {depth}")
            yield _prefill(llm, work, tokens, depth, rounds)
    for depth in depths:
        for batch in batches:
            say(f"decode of {batch} at depth {depth}")
            yield _decode(llm, work, depth, batch, output_tokens, rounds)


def _prefill(llm: LLM, work: ModelWork, tokens: int, depth: int, rounds: int) -> SweepPoint:
    prefix = random_prompts(1, depth, work.vocab_size, seed=depth)[0]
    if prefix:
        llm.generate(prefix, _greedy(1))
    llm.generate(random_prompts(1, tokens, work.vocab_size, seed=0)[0], _greedy(1))
    rates, shares = [], []
    before = Limits.now(llm.config.threads)
    for prompt in random_prompts(rounds, tokens, work.vocab_size, seed=tokens + 1):
        timings = _timings(llm, [prefix + prompt], 1, depth)[0]
        after = Limits.now(llm.config.threads)
        seconds = timings.first_token - timings.arrival
        rates.append(tokens / seconds)
        shares.append(work.prefill_seconds(tokens, before.best(after)) / seconds)
        before = after
    return SweepPoint("prefill", tokens, depth, 1, Spread.of(rates), Spread.of(shares))


def _decode(llm: LLM, work: ModelWork, depth: int, batch: int, tokens: int, rounds: int) -> SweepPoint:
    # One token beyond the cached pages, so that all sequences begin to decode in the same step.
    prompts = random_prompts(batch, depth + 1, work.vocab_size, seed=depth + 7)
    llm.generate(prompts, _greedy(2))
    rates, shares = [], []
    before = Limits.now(llm.config.threads)
    for _ in range(rounds):
        timings = _timings(llm, prompts, tokens, depth)
        after = Limits.now(llm.config.threads)
        step = (max(t.finished for t in timings) - max(t.first_token for t in timings)) / (tokens - 1)
        rates.append(batch / step)
        shares.append(work.decode_seconds(batch, depth + tokens // 2, before.best(after)) / step)
        before = after
    return SweepPoint("decode", tokens, depth, batch, Spread.of(rates), Spread.of(shares))


def _timings(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, cached: int) -> list[Timings]:
    found = [output.timings for output in llm.generate(list(prompts), _greedy(tokens))]
    timings = [each for each in found if each is not None]
    for each in timings:
        if each.cached_tokens != cached:
            raise UsageError(
                f"{each.cached_tokens} of {cached} tokens before the measured ones were in the prefix cache: "
                "it is switched off or too small; give more --memory or less depth and batch"
            )
    return timings


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, seed=0)
