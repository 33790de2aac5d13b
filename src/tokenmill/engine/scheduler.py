"""Which sequence runs how many tokens in the next step.

Continuous batching (Orca, OSDI 2022) with split and fuse (DeepSpeed-FastGen 2024): sequences that decode go first, then
prompts fill what is left of the step's budget of tokens and time, cut where it ends; the remainder is first among the
prompts of the next step. A policy ranks the sequences, by arrival unless told otherwise: a prompt starts only when the
pages for all of it are there, and none overtakes the one that waits in front. Only who waits for a beginning that
another sequence is just computing lets others pass: it will then start behind that beginning.

When pages run out, the sequences of the worst rank give theirs back. Later they are read back from a swap file, or
computed again, prompt and output so far. Only worse ranks ever yield to better ones and the best can always have every
page, so each step brings the best nearer to its end.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from enum import Enum, auto

from tokenmill.engine.kv_cache import KvCache
from tokenmill.engine.policies import Rank
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step_budget import MAX_SCORED_ROWS, Chunk, StepBudget
from tokenmill.engine.step_time import StepTimeModel, StepWork
from tokenmill.engine.swap import SwappedPages, SwapSpace
from tokenmill.program.kv import PAGE_TOKENS

__all__ = ["MAX_SCORED_ROWS", "Chunk", "Scheduler", "SchedulerLimits"]

_DECODES_OBSERVED = 4


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
    step_target: float | None = None
    """Seconds that a step should take: prompts are cut so that it does. None: they are cut by ``tokens`` only."""
    headroom: int = 2 * PAGE_TOKENS
    """Tokens that every running sequence can go on for before a prompt starts. Without it a prompt that just fits is
    preempted by the next page that anybody needs, again and again, and computed for nothing."""


class Scheduler:
    """Queues of sequences, best rank first, over one KV cache."""

    def __init__(self, cache: KvCache, limits: SchedulerLimits, swap: SwapSpace | None = None) -> None:
        if limits.rows < limits.sequences or limits.tokens < limits.sequences:
            raise ValueError("a step must have a token and a row of logits for every sequence")
        self.cache = cache
        self.limits = limits
        self.swap = swap
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        """Tokens of the sequences that started, and how many of them were found in the prefix cache."""
        self.prefix_hits = 0
        self.planned = StepWork()
        """What the step that was scheduled last consists of."""
        self.step_time = StepTimeModel()
        self._observed = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_rank)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Adds a sequence with the tokens of ``parent``, over its pages where there is a seat for it."""
        if parent.pages is None or len(self.running) >= self.limits.sequences:
            self.add(child)
            return
        child.pages, child.computed = self.cache.fork(parent.pages), parent.computed
        bisect.insort(self.running, child, key=_rank)

    def remove(self, sequence: Sequence, *, discard: bool = False) -> None:
        """Forgets a sequence and returns its pages; with ``discard`` their contents are not kept for others."""
        if sequence.pages is None:
            self.waiting.remove(sequence)
            self._drop_swapped(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence, discard=discard)

    def schedule(self, now: float) -> list[Chunk]:
        """The chunks of the next step, with pages for all their tokens; empty only if nothing waits or runs but
        for a grammar, or beams have to make room for each other first.

        ``now`` in seconds becomes the start of sequences that start.
        """
        budget = StepBudget(self.limits.tokens, self.limits.rows, self.limits.step_target, self.step_time)
        preempted = self.preemptions
        others = []
        for sequence in list(self.running):
            if sequence.decodes:
                self._plan_decode(sequence, budget)
            else:
                others.append(sequence)
        if self.limits.step_target is not None and (others or self.waiting):
            for sequence in self._at_hand():
                if sequence.request.generates:
                    budget.everyone.add_decode(sequence.length - 1)
        for sequence in others:
            self._plan(sequence, budget)
        # A sequence that lost its pages in this step does not get them back in the same one.
        place = 0
        while (
            preempted == self.preemptions
            and place < len(self.waiting)
            and len(self.running) < self.limits.sequences
            and budget.prompt_tokens(0) > 0
        ):
            head = self.waiting[place]
            if head.parked:
                place += 1
                continue
            match self._admit(head, now):
                case _Admission.STARTED:
                    self._plan(head, budget)
                case _Admission.DEFERRED:
                    place += 1
                case _Admission.FULL:
                    break
        chunks = budget.chunks
        if not chunks:
            self._unseat_parked()
        self.planned = budget.work
        return [chunks[sequence] for sequence in self.running if sequence in chunks]

    def expected_seconds(self) -> float:
        """How long the step that was scheduled last should take; 0 if steps keep to no target."""
        return 0.0 if self.limits.step_target is None else self.step_time.seconds(self.planned)

    def advance(self, chunks: list[Chunk]) -> None:
        """The chunks have run: their slots are computed."""
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.pages is not None
            sequence.computed += chunk.count
            if sequence.computed < sequence.pages.due:
                sequence.pages.computed = sequence.computed
            else:
                self.cache.commit(sequence.pages, sequence.tokens, sequence.computed)

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of ``work`` took ``seconds``."""
        self._observed += 1
        # Steps of decoding alone are all alike: a few of them tell enough.
        if self.limits.step_target is not None and (work.prompt_tokens or self._observed % _DECODES_OBSERVED == 0):
            self.step_time.observe(work, seconds)

    def _at_hand(self) -> list[Sequence]:
        """Those that run, and of those that wait the ones that there are seats and pages for."""
        at_hand = list(self.running)
        room = [usage.free + usage.cached for usage in self.cache.usage()]
        needed = self._promised()
        for sequence in self.waiting[: self.limits.sequences - len(self.running)]:
            pages = self.cache.pages_needed(sequence.length + 1, self.limits.tokens)
            needed = [sum(counts) for counts in zip(needed, pages, strict=True)]
            if any(need > has for need, has in zip(needed, room, strict=True)):
                break
            at_hand.append(sequence)
        return at_hand

    def _plan_decode(self, sequence: Sequence, budget: StepBudget) -> None:
        """The token sampled last. A step has a token and a row of logits for everyone: only pages can be short."""
        assert sequence.pages is not None
        if sequence.computed < sequence.pages.room or self._make_room(sequence, sequence.length, budget):
            budget.decode(sequence)

    def _plan(self, sequence: Sequence, budget: StepBudget) -> None:
        """As many of the next tokens as fit."""
        if sequence.pages is None:
            return  # they went to a better rank
        decodes = sequence.decodes
        count = min(sequence.remaining, budget.tokens if decodes else budget.prompt_tokens(sequence.computed))
        skip = scored = 0
        wanted = sequence.wanted_rows
        if wanted:
            skip = max(wanted.start - sequence.computed, 0)
            count = min(count, skip + min(budget.scored, budget.rows))
        elif budget.rows == 0 and sequence.request.generates:
            count = min(count, sequence.remaining - 1)  # the last token's logits have to wait for the next step
        if sequence.compiling is not None:
            count = min(count, sequence.remaining - 1)  # the last token has to wait for the grammar
        if count <= 0 or not self._make_room(sequence, sequence.computed + count, budget):
            return
        if wanted:
            scored = max(min(sequence.computed + count, wanted.stop) - sequence.computed - skip, 0)
        samples = sequence.request.generates and count == sequence.remaining
        budget.spend(Chunk(sequence, count, scored, skip, samples, decodes))

    def _make_room(self, sequence: Sequence, slots: int, budget: StepBudget) -> bool:
        """Gets pages for slots 0..slots - 1, from worse ranks if need be. False if the sequence must wait."""
        assert sequence.pages is not None
        while not self.cache.extend(sequence.pages, slots):
            victim = self.running[-1]
            if victim is sequence:
                return False  # nobody to take from: it keeps its pages and waits until a better rank is done
            budget.refund(victim)
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        assert sequence.pages is not None
        if self.swap is not None and sequence.computed > 0:
            held = -(-sequence.computed // PAGE_TOKENS)
            tables = [sequence.pages.table(group)[:held] for group in range(self.cache.groups)]
            sequence.swapped = self.swap.store(tables, sequence.computed)
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _unseat_parked(self) -> None:
        """Nothing can run: if that is because beams sit on pages and seats that their siblings lack, one yields."""
        parked = [sequence for sequence in self.running if sequence.parked]
        stuck = any(not s.parked and s.compiling is None for s in (*self.waiting, *self.running))
        if parked and stuck:
            self._preempt(parked[-1])

    def _release(self, sequence: Sequence, *, discard: bool = False) -> None:
        assert sequence.pages is not None
        self.cache.release(sequence.pages, discard=discard)
        sequence.pages = None

    def _admit(self, sequence: Sequence, now: float) -> _Admission:
        """Starts the sequence if its pages fit and nobody is just computing its beginning."""
        if sequence.swapped is not None:
            return self._bring_back(sequence, sequence.swapped, now)
        if sequence.awaits is not None and sequence.awaits.computing is not None:
            return _Admission.DEFERRED
        match = self.cache.match(sequence.tokens, sequence.reusable, sequence.request.params.cache_salt)
        sequence.awaits = match.computing
        if sequence.awaits is not None:
            return _Admission.DEFERRED
        opened = self.cache.open(match, self.limits.context, reserve=self._promised(), chunk=self.limits.tokens)
        if opened is None:
            return _Admission.FULL
        sequence.pages, sequence.computed = opened
        if sequence.started is None:
            sequence.started = now
            sequence.cached_tokens = sequence.computed
            self.prefix_queries += sequence.length
            self.prefix_hits += sequence.computed
        self._run(sequence)
        return _Admission.STARTED

    def _bring_back(self, sequence: Sequence, swapped: SwappedPages, now: float) -> _Admission:
        """Starts a swapped sequence where it was."""
        opened = self.cache.reopen(
            sequence.tokens,
            swapped.computed,
            self.limits.context,
            reserve=self._promised(),
            chunk=self.limits.tokens,
            salt=sequence.request.params.cache_salt,
        )
        if opened is None:
            return _Admission.FULL
        pages, missing = opened
        whole = swapped.load(missing)
        self._drop_swapped(sequence)
        if not whole:
            self.cache.release(pages, discard=True)
            return self._admit(sequence, now)  # computed again
        sequence.pages, sequence.computed = pages, swapped.computed
        self._run(sequence)
        return _Admission.STARTED

    def _run(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_rank)

    def _drop_swapped(self, sequence: Sequence) -> None:
        if sequence.swapped is not None:
            sequence.swapped.close()
            sequence.swapped = None

    def _promised(self) -> list[int]:
        """Pages per group that running sequences need but have not taken yet: for all of the prompt, and to go on."""
        promised = [0] * self.cache.groups
        for sequence in self.running:
            if sequence.pages is not None:
                length = min(sequence.length + self.limits.headroom, sequence.longest(self.limits.context))
                needed = self.cache.pages_needed(length, self.limits.tokens)
                for group, pages in enumerate(needed):
                    promised[group] += max(pages - sequence.pages.held(group), 0)
        return promised


class _Admission(Enum):
    STARTED = auto()
    DEFERRED = auto()
    """Another sequence is computing the same beginning: this one lets others pass until that is done."""
    FULL = auto()


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
