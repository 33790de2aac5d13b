"""From the chunks of a step to its plan, each plan from the one before where that is less work.

After every step of decoding comes, nearly always, one that decodes the same sequences: its plan is the last one with
another id and slot for each, and a page here and there.
"""

from __future__ import annotations

from tokenmill.engine.kv_cache import SequencePages
from tokenmill.engine.step_budget import Chunk
from tokenmill.program.step import BEST_ONLY_WORD, HEADER_WORDS, SequenceStep, StepPlan, lay_plan

_SPARE_PAGES = 8
"""Room in a plan's page tables for pages to come, so that the next plan has the same sections: 256 tokens."""


class PlanWriter:
    """Lays one plan after the other for a program of ``groups`` KV groups."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._last: StepPlan | None = None
        """Of the last step, if it only decoded; ``_pages`` are those of its sequences, in its order."""
        self._words = memoryview(b"")
        """The last plan's buffer: numpy's machinery takes longer than a handful of words."""
        self._pages: list[SequencePages | None] = []
        self._changes: list[int] = []
        """Of each of ``_pages``, as the plan has them."""

    def lay(self, chunks: list[Chunk]) -> StepPlan:
        """The plan of a step of ``chunks``, which have their pages. Valid until the next one."""
        pages = [chunk.sequence.pages for chunk in chunks]
        decodes = all(chunk.decodes for chunk in chunks)
        plan = None
        if decodes and self._last is not None and pages == self._pages:
            plan = self._next(self._last, chunks)
        if plan is None:
            plan = lay_plan([self._sequence_step(chunk) for chunk in chunks], self._groups)
            self._words = plan.buffer.data
            self._changes = [own.changes for own in pages if own is not None]
        self._words[BEST_ONLY_WORD] = all(
            chunk.sequence.takes_best for chunk in chunks if chunk.samples or chunk.scored
        )
        self._last, self._pages = plan if decodes else None, pages
        return plan

    def _next(self, plan: StepPlan, chunks: list[Chunk]) -> StepPlan | None:
        """``plan`` made that of the same sequences one token further. None if its tables are too narrow."""
        words, rows = self._words, len(chunks)
        for place, chunk in enumerate(chunks):
            sequence, pages = chunk.sequence, chunk.sequence.pages
            assert pages is not None
            words[HEADER_WORDS + place] = sequence.last_token
            words[HEADER_WORDS + rows + place] = words[HEADER_WORDS + 2 * rows + place] = sequence.computed
            if pages.changes == self._changes[place]:
                continue
            if pages.length > plan.table_stride:
                return None
            for group in range(self._groups):
                table = pages.table(group)
                plan.page_tables[group, place, : len(table)] = table
            self._changes[place] = pages.changes
        return plan

    def _sequence_step(self, chunk: Chunk) -> SequenceStep:
        sequence = chunk.sequence
        assert sequence.pages is not None
        rows = list(range(chunk.skip, chunk.skip + chunk.scored))
        if chunk.samples:
            rows.append(chunk.count - 1)
        return SequenceStep(
            token_ids=sequence.history.copy(sequence.computed, sequence.computed + chunk.count),
            first_slot=sequence.computed,
            page_tables=[sequence.pages.table(group, _SPARE_PAGES) for group in range(self._groups)],
            sampled=rows,
        )
