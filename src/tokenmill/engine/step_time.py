"""How long a step takes, learned from the steps that ran.

Time is modelled as a sum of costs: a constant (reading the weights), one per decoded token and per slot of context it
reads, one per prompt token, per (prompt token, slot) pair of attention and per slot of context that a chunk of a prompt
reads for all its tokens together. No cost is negative. They are fitted while
the engine runs, by recursive least squares with directional forgetting (Cao and Schwartz, "A directional forgetting
algorithm based on the decomposition of the information matrix", Automatica 2000): a measurement replaces what was
known along its own direction only, so a thousand steps of pure decoding do not wash out what a prompt token costs.
All costs are multiplied by the machine's pace, which follows the last few steps: when neighbours take the processor
away, everything slows down alike.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

_FORGETTING = 0.94
"""How much of what was known along a measurement's direction outlives it: about sixteen steps are remembered."""
_PRIOR = 1e-2
"""Information of the first guess, that everything is free: little beside one measurement of what a step has much of,
and enough to keep what it has next to nothing of from explaining anything."""
_ALIKE = 0.3
"""Information of the guess that a token costs the same, and a slot that it reads, whether it decodes or is of a prompt:
where few decode at a time only this tells what many will cost."""
_PACE = 0.5
"""Share of a measurement in the machine's pace."""
_DELAYS = 100
"""Steps with prompts whose delays are remembered."""
_LATE = 20
"""One in so many of them may be later than :attr:`StepTimeModel.delay`."""
_SWEEPS = 30
_SETTLED = 1e-3
"""Sweeps end when no cost changes by more than this share of the step."""
_OUTLIER = 4.0
"""A step that takes this many times what was expected counts as no more: somebody else had the processor."""
_SURPRISE = 0.2
"""Once a kind of step is familiar, costs are fitted to at most this share above or below what was expected; the rest is
left to the pace, and to the next measurements if it stays."""
_FAMILIAR = 10
"""Steps with (or without) prompts after which that kind is familiar."""
_FIRST_CHUNK = 32
"""Prompt tokens of a step before anything was measured; then at most twice as many as any measured step had."""
_SCALES = (1.0, 16.0, 16384.0, 64.0, 65536.0, 4096.0)
"""Units of the features, which bring them near one."""


@dataclass(slots=True)
class StepWork:
    """What a step consists of, as far as its time depends on it."""

    decoded: int = 0
    """Sequences that decode."""
    decoded_slots: int = 0
    """Slots of context that they read."""
    prompt_tokens: int = 0
    prompt_pairs: int = 0
    """Slots that the prompt tokens read, summed over the tokens."""
    prompt_slots: int = 0
    """Slots that the chunks of prompts read, summed over the chunks."""

    def add_decode(self, computed: int, sign: int = 1) -> None:
        """A token at slot ``computed``; ``sign`` -1 takes it off again."""
        self.decoded += sign
        self.decoded_slots += sign * (computed + 1)

    def add_prompt(self, computed: int, count: int, sign: int = 1) -> None:
        """``count`` tokens of a prompt from slot ``computed`` on."""
        self.prompt_tokens += sign * count
        self.prompt_pairs += sign * _pairs(computed, count)
        self.prompt_slots += sign * (computed + count)

    def features(self) -> list[float]:
        values = (1, self.decoded, self.decoded_slots, self.prompt_tokens, self.prompt_pairs, self.prompt_slots)
        return [value / scale for value, scale in zip(values, _SCALES, strict=True)]


class StepTimeModel:
    """Predicts the seconds of a step. Knows nothing at first and lets prompts grow step by step until it does."""

    def __init__(self) -> None:
        self._costs = [0.0] * len(_SCALES)
        self._information = [[_PRIOR if i == j else 0.0 for j in range(len(_SCALES))] for i in range(len(_SCALES))]
        for decoding, prompt in ((1, 3), (2, 4)):
            pair = (decoding, 1 / _SCALES[decoding]), (prompt, -1 / _SCALES[prompt])
            norm = sum(unit * unit for _, unit in pair)
            for i, row_unit in pair:
                for j, unit in pair:
                    self._information[i][j] += _ALIKE * row_unit * unit / norm
        self._pace = 1.0
        self._delays: deque[float] = deque(maxlen=_DELAYS)
        self._longest = _FIRST_CHUNK // 2
        self._observed = [0, 0]
        """Steps of decodes alone, and steps with prompts."""

    def seconds(self, work: StepWork) -> float:
        """Expected seconds of a step."""
        return self._pace * _dot(self._costs, work.features())

    @property
    def delay(self) -> float:
        """Seconds beyond what was expected that a step with prompts is late, where one in twenty is later; infinite
        while that is unknown."""
        if not self._delays:
            return math.inf
        return max(heapq.nlargest(1 + len(self._delays) // _LATE, self._delays)[-1], 0.0)

    def chunk_seconds(self, computed: int) -> float:
        """What a chunk of a prompt costs from slot ``computed`` on, however few its tokens are."""
        return self._pace * self._costs[5] / _SCALES[5] * computed

    def prompt_tokens(self, work: StepWork, computed: int, seconds: float) -> int:
        """Most tokens of a prompt that may join ``work``, from slot ``computed`` on, in ``seconds`` more."""
        unseen = max(2 * self._longest - work.prompt_tokens, 0)
        seconds -= self.chunk_seconds(computed)
        if seconds <= 0:
            return 0
        pair = self._pace * self._costs[4] / _SCALES[4]
        per_token = self._pace * (self._costs[3] / _SCALES[3] + self._costs[5] / _SCALES[5]) + pair * (computed + 0.5)
        # pair n^2 / 2 + per_token n = seconds, in the form that does not cancel where pairs cost nothing
        root = per_token + math.sqrt(per_token * per_token + 2 * pair * seconds)
        return unseen if 2 * seconds >= root * unseen else int(2 * seconds / root)

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of ``work`` took ``seconds``."""
        self._longest = max(self._longest, work.prompt_tokens)
        with_prompt = work.prompt_tokens > 0
        self._observed[with_prompt] += 1
        x = work.features()
        expected = _dot(self._costs, x)
        if self._observed[with_prompt] > _FAMILIAR and expected > 0:
            ratio = min(seconds / (self._pace * expected), _OUTLIER)
            if with_prompt:
                self._delays.append(seconds - self._pace * expected)
            self._pace *= 1 + _PACE * (ratio - 1)
            likely = self._pace * expected
            self._fit(x, min(max(seconds, (1 - _SURPRISE) * likely), (1 + _SURPRISE) * likely))
        else:
            self._fit(x, seconds)

    def _fit(self, x: list[float], seconds: float) -> None:
        along = [_dot(row, x) for row in self._information]
        forget = (1 - _FORGETTING) / _dot(along, x)
        size = range(len(x))
        kept = [[self._information[i][j] - forget * along[i] * along[j] for j in size] for i in size]
        self._information = [[kept[i][j] + x[i] * x[j] for j in size] for i in size]
        wanted = [_dot(kept[i], self._costs) + x[i] * seconds for i in size]
        # Least squares with no cost below zero: coordinate descent from the last solution.
        costs = list(self._costs)
        for _ in range(_SWEEPS):
            largest = 0.0
            for i in size:
                row = self._information[i]
                cost = max(costs[i] + (wanted[i] - _dot(row, costs)) / row[i], 0.0)
                largest = max(largest, abs(cost - costs[i]))
                costs[i] = cost
            if largest < _SETTLED * seconds:
                break
        self._costs = costs


def _pairs(computed: int, count: int) -> int:
    return count * computed + count * (count + 1) // 2


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))
