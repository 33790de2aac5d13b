"""What a long prompt costs those who are being answered, and what their answers cost the prompt.

Some streams decode; then a long prompt arrives. Split, its steps keep to the target; whole, it runs in one step, which
is what the streams would wait for without split and fuse. Both go over the same engine, in turn, so that a ratio is of
two runs of the same seconds. Driven step by step, without a server: the gap between tokens is that of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from tokenmill.bench.latency import random_prompts
from tokenmill.bench.load import Quantiles
from tokenmill.engine.assemble import LoadedCore
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import AbortRequest, AddRequest, TokenOutput
from tokenmill.engine.statistics import StepRecord
from tokenmill.sampling import SamplingParams

_STREAM_PROMPT = 64
_WARM_STEPS = 40
"""Steps of decoding alone before the prompt arrives."""


@dataclass(frozen=True, slots=True)
class LongPromptRun:
    """The time from the prompt's arrival to its first token. Seconds."""

    first_token: float
    gaps: Quantiles
    """Between two tokens of a stream; the same for all streams, which decode in every step."""
    longest_gap: float
    steps: tuple[StepRecord, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class LongPromptRound:
    """One run of each kind, right after each other."""

    split: LongPromptRun
    whole: LongPromptRun

    @property
    def first_token_ratio(self) -> float:
        """What cutting costs the prompt: time to first token split / whole."""
        return self.split.first_token / self.whole.first_token

    @property
    def gap_ratio(self) -> float:
        """What cutting spares the streams: 99th percentile of gaps whole / split."""
        return self.whole.gaps.p99 / self.split.gaps.p99


def measure_long_prompt(
    loaded: LoadedCore,
    *,
    streams: int,
    prompt_tokens: int,
    rounds: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[LongPromptRound]:
    """``loaded`` needs a step target, ``prompt_tokens + streams`` tokens in a step, and no prefix caching."""
    core, limits = loaded.core, loaded.core.scheduler.limits
    vocab_size = loaded.bound.program.vocab_size
    prompts = random_prompts(2 * rounds, prompt_tokens, vocab_size, seed=1)
    params = SamplingParams(max_tokens=limits.context, temperature=0, ignore_eos=True, seed=0)
    for number, prompt in enumerate(random_prompts(streams, _STREAM_PROMPT, vocab_size, seed=2)):
        core.handle(AddRequest(number, np.array(prompt, np.int32), params))
    found = []
    for number in range(rounds):
        runs = []
        for place, target in enumerate((limits.step_target, None)):
            say(f"round {number + 1} of {rounds}: {'whole' if target is None else 'split'}")
            core.scheduler.limits = replace(limits, step_target=target)
            runs.append(_run(core, streams, 1000 + 2 * number + place, prompts[2 * number + place]))
        found.append(LongPromptRound(*runs))
    core.scheduler.limits = limits
    for number in range(streams):
        core.handle(AbortRequest(number))
    return found


def _run(core: EngineCore, streams: int, number: int, prompt: list[int]) -> LongPromptRun:
    for _ in range(_WARM_STEPS):
        core.step()
    begin = last = time.monotonic()
    params = SamplingParams(max_tokens=1, temperature=0, seed=0)
    core.handle(AddRequest(number, np.array(prompt, np.int32), params, arrival=begin))
    gaps: list[float] = []
    steps: list[StepRecord] = []
    while True:
        told = {event.request_id for event in core.step() if isinstance(event, TokenOutput)}
        now = time.monotonic()
        if len(told - {number}) == streams:
            gaps.append(now - last)
            last = now
        steps.append(core.statistics.recent[-1])
        if number in told:
            quantiles = Quantiles.of(gaps)
            assert quantiles is not None, "the streams decode in the step that ends the prompt"
            return LongPromptRun(now - begin, quantiles, max(gaps), tuple(steps))
