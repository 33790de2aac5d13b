"""Which sequence runs how many tokens in the next step.

Continuous batching (Orca, OSDI 2022) with split and fuse (DeepSpeed-FastGen 2024): sequences that decode go first, then
prompts fill what is left of a fixed token budget, cut where it ends; the remainder is first among the prompts of the
next step. First come, first served: a prompt starts only when the pages for all of it are there, and none overtakes the
one that waits in front.

When pages run out, the newest sequences give theirs back and are computed again later, prompt and output so far. Only
newer sequences ever yield to older ones and the oldest can always have every page, so each step brings the oldest
nearer to its end.
"""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass

from tokenmill.engine.kv_cache import KvCache
from tokenmill.engine.sequence import Sequence

MAX_SCORED_ROWS = 64
"""Rows of logits that a step computes for log-probabilities of prompts."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step."""

    tokens: int
    sequences: int
    """Sequences that hold pages at once."""
    rows: int
    """Rows of logits; at least ``sequences``."""
    context: int
    """Tokens of one sequence."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens computed, ..., computed + count - 1 of ``sequence``."""

    sequence: Sequence
    count: int
    scored: int
    """Rows skip .. skip + scored - 1 of the chunk, whose logits give log-probabilities of prompt tokens."""
    skip: int
    samples: bool
    """True if the chunk's last row picks a token."""


class Scheduler:
    """Queues of sequences, oldest first, over one KV cache."""

    def __init__(self, cache: KvCache, limits: SchedulerLimits) -> None:
        if limits.rows < limits.sequences or limits.tokens < limits.sequences:
            raise ValueError("a step must have a token and a row of logits for every sequence")
        self.cache = cache
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence, *, discard: bool = False) -> None:
        """Forgets a sequence and returns its pages; with ``discard`` their contents are not kept for others."""
        if sequence.pages is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence, discard=discard)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, with pages for all their tokens; empty only if nothing waits or runs."""
        chunks: dict[Sequence, Chunk] = {}
        budget = _Budget(self.limits.tokens, self.limits.rows)
        preempted = self.preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                if sequence.pages is not None and sequence.decodes == decoding:
                    self._plan(sequence, chunks, budget)
        # A sequence that lost its pages in this step does not get them back in the same one.
        while preempted == self.preemptions and self.waiting and budget.tokens > 0:
            head = self.waiting[0]
            if not self._admit(head):
                break
            self._plan(head, chunks, budget)
        return [chunks[sequence] for sequence in self.running if sequence in chunks]

    def advance(self, chunk: Chunk) -> None:
        """The chunk has run: its slots are computed."""
        sequence = chunk.sequence
        assert sequence.pages is not None
        sequence.computed += chunk.count
        self.cache.commit(sequence.pages, sequence.tokens, sequence.computed)

    def _plan(self, sequence: Sequence, chunks: dict[Sequence, Chunk], budget: _Budget) -> None:
        count = min(sequence.remaining, budget.tokens)
        skip = scored = 0
        if sequence.wants_scores:
            # Row p gives the log-probability of token p + 1, so rows from scored - 1 on are wanted.
            skip = max(sequence.scored - 1 - sequence.computed, 0)
            count = min(count, skip + min(budget.scored, budget.rows))
        elif budget.rows == 0 and not sequence.request.score_only:
            count = min(count, sequence.remaining - 1)  # the last token's logits have to wait for the next step
        if count <= 0 or not self._make_room(sequence, sequence.computed + count, chunks, budget):
            return
        if sequence.wants_scores:
            scored = max(min(sequence.computed + count, sequence.prompt_length - 1) - sequence.computed - skip, 0)
        samples = not sequence.request.score_only and count == sequence.remaining
        chunk = Chunk(sequence, count, scored, skip, samples)
        chunks[sequence] = chunk
        budget.spend(chunk)

    def _make_room(self, sequence: Sequence, slots: int, chunks: dict[Sequence, Chunk], budget: _Budget) -> bool:
        """Gets pages for slots 0..slots - 1, from newer sequences if need be. False if the sequence must wait."""
        assert sequence.pages is not None
        while not self.cache.extend(sequence.pages, slots):
            victim = self.running[-1]
            if victim is sequence:
                return False  # nobody newer to take from: it keeps its pages and waits until an older one is done
            chunk = chunks.pop(victim, None)
            if chunk is not None:
                budget.refund(chunk)
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence, *, discard: bool = False) -> None:
        assert sequence.pages is not None
        self.cache.release(sequence.pages, discard=discard)
        sequence.pages = None

    def _admit(self, sequence: Sequence) -> bool:
        """Starts the sequence at the head of the queue if it and its pages fit."""
        if len(self.running) >= self.limits.sequences:
            return False
        opened = self.cache.open(
            sequence.tokens,
            self.limits.context,
            reusable=sequence.reusable,
            reserve=self._promised(),
            chunk=self.limits.tokens,
        )
        if opened is None:
            return False
        sequence.pages, sequence.computed = opened
        if not sequence.started:
            sequence.started = time.monotonic()
            sequence.cached_tokens = sequence.computed
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)
        return True

    def _promised(self) -> list[int]:
        """Pages per group that running prompts were admitted with but have not taken yet."""
        promised = [0] * self.cache.groups
        for sequence in self.running:
            if sequence.remaining > 1 and sequence.pages is not None:
                needed = self.cache.pages_needed(min(sequence.length + 1, self.limits.context), self.limits.tokens)
                for group, pages in enumerate(needed):
                    promised[group] += max(pages - sequence.pages.held(group), 0)
        return promised


@dataclass(slots=True)
class _Budget:
    tokens: int
    rows: int
    scored: int = MAX_SCORED_ROWS

    def spend(self, chunk: Chunk) -> None:
        self.tokens -= chunk.count
        self.rows -= chunk.scored + chunk.samples
        self.scored -= chunk.scored

    def refund(self, chunk: Chunk) -> None:
        self.tokens += chunk.count
        self.rows += chunk.scored + chunk.samples
        self.scored += chunk.scored


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
