"""What the engine has done and is doing, as numbers for metrics, logs and the live view."""

from __future__ import annotations

import bisect
from collections import Counter, deque
from dataclasses import dataclass, field

from tokenmill.engine.kv_cache import PoolUsage
from tokenmill.engine.messages import FailureKind, FinishReason

SECONDS_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_RECENT_STEPS = 1024


@dataclass(slots=True)
class Histogram:
    """Counts of values up to each bound (not cumulative; the last count is of those above all bounds)."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclass(slots=True)
class StepRecord:
    """One step. Times in seconds."""

    begin: float
    """By the engine's clock (``time.monotonic()``)."""
    schedule: float
    """Choosing what runs and laying the plan."""
    forward: float
    """The network, with what else was done meanwhile."""
    sample: float
    """From logits to tokens and events."""
    decoded: int
    """Sequences that decoded."""
    prompt_tokens: int
    sampled: int
    """Tokens picked."""
    sequences: int
    """That took part."""
    expected: float = 0.0
    """Seconds that it should have taken by what the engine had learned; 0 if it keeps to no target."""

    @property
    def seconds(self) -> float:
        return self.schedule + self.forward + self.sample

    @property
    def rows(self) -> int:
        return self.decoded + self.prompt_tokens


@dataclass(slots=True)
class StepStatistics:
    """Counters since the start."""

    steps: int = 0
    tokens: int = 0
    """Rows that ran."""
    prompt_tokens: int = 0
    """Of them, prompts and what was computed again after a preemption."""
    sampled: int = 0
    preemptions: int = 0
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    decode_step_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS_BOUNDS))
    """Steps that only decoded."""
    prompt_step_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS_BOUNDS))
    """Steps with tokens of prompts in them."""
    step_rows: Histogram = field(default_factory=lambda: Histogram(ROWS_BOUNDS))
    requests: int = 0
    """That were let in."""
    finished: Counter[FinishReason] = field(default_factory=Counter)
    """Outputs by how they ended."""
    failed: Counter[FailureKind] = field(default_factory=Counter)
    """Requests by why they failed; OVERLOADED ones were never let in."""
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))

    def add(self, step: StepRecord) -> None:
        rows, seconds = step.rows, step.seconds
        self.steps += 1
        self.tokens += rows
        self.prompt_tokens += step.prompt_tokens
        self.sampled += step.sampled
        self.schedule_seconds += step.schedule
        self.forward_seconds += step.forward
        self.sample_seconds += step.sample
        (self.prompt_step_seconds if step.prompt_tokens else self.decode_step_seconds).add(seconds)
        self.step_rows.add(rows)
        self.recent.append(step)

    def copy(self) -> StepStatistics:
        """These counters at this moment."""
        return StepStatistics(
            steps=self.steps,
            tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            sampled=self.sampled,
            preemptions=self.preemptions,
            schedule_seconds=self.schedule_seconds,
            forward_seconds=self.forward_seconds,
            sample_seconds=self.sample_seconds,
            decode_step_seconds=self.decode_step_seconds.copy(),
            prompt_step_seconds=self.prompt_step_seconds.copy(),
            step_rows=self.step_rows.copy(),
            requests=self.requests,
            finished=Counter(self.finished),
            failed=Counter(self.failed),
            recent=deque(self.recent, maxlen=_RECENT_STEPS),
        )


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine between two steps."""

    time: float
    """By the engine's clock (``time.monotonic()``)."""
    running: int
    """Sequences that hold pages."""
    waiting: int
    """Sequences that do not: not yet started, or preempted."""
    swapped: int
    """Of those that wait, the ones whose pages are in swap files."""
    kv: tuple[PoolUsage, ...]
    """Pages of each KV group."""
    prefix_queries: int
    """Tokens of the sequences that have started."""
    prefix_hits: int
    """Of them, those found in the prefix cache."""
    swap_used: int
    """Bytes of swap files."""
    swap_limit: int
    swapped_out: int
    """Sequences that were written to swap files, and read back, since the start."""
    swapped_in: int
    steps: StepStatistics

    @property
    def kv_usage(self) -> float:
        """Share of the pages that sequences hold, 0 to 1, of the fullest group."""
        return max((pool.used / pool.total for pool in self.kv if pool.total), default=0.0)
