"""The plan of one step: which tokens run, where their keys go, which rows are sampled.

One flat int32 buffer, so that a step is one native call and later one broadcast. Sections in this order:

=================  ==================================  ==================================================
section            length                              meaning
=================  ==================================  ==================================================
header             8                                   version, tokens, sequences, sampled, groups, stride, best only, 0
token_ids          tokens                              vocabulary ids
positions          tokens                              positions for RoPE
slots              tokens                              place in the sequence's cache (equals position unless evicted)
row_starts         sequences + 1                       rows [row_starts[s], row_starts[s + 1]) belong to sequence s
sampled_rows       sampled                             rows whose logits are wanted, ascending
page_tables        groups * sequences * table stride   page id of logical page i (slots 32 i .. 32 i + 31), -1 = freed
=================  ==================================  ==================================================

Rows of a sequence have consecutive ascending slots; after the step the sequence's length is its last slot + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.program.kv import PAGE_TOKENS

STEP_VERSION = 1
HEADER_WORDS = 8
BEST_ONLY_WORD = 6
"""1 if of each row of logits only the largest and its place are wanted: all else may then be anything smaller."""
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's part of a step."""

    token_ids: Sequence[int] | Int32
    first_slot: int
    """Slot of the first token; the following ones are consecutive."""
    page_tables: Sequence[Sequence[int] | Int32]
    """One page table per KV group, covering at least slots 0 .. first_slot + len(token_ids) - 1."""
    sampled: Sequence[int] = ()
    """Indices into ``token_ids`` whose logits are wanted, ascending."""
    first_position: int | None = None
    """Position of the first token, if it differs from ``first_slot``."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A plan and its views. Build it with :func:`lay_plan`."""

    buffer: Int32

    @property
    def tokens(self) -> int:
        return int(self.buffer[1])

    @property
    def sequences(self) -> int:
        return int(self.buffer[2])

    @property
    def sampled(self) -> int:
        return int(self.buffer[3])

    @property
    def groups(self) -> int:
        return int(self.buffer[4])

    @property
    def table_stride(self) -> int:
        return int(self.buffer[5])

    def _section(self, index: int) -> Int32:
        t, s, r, g, stride = self.tokens, self.sequences, self.sampled, self.groups, self.table_stride
        lengths = (t, t, t, s + 1, r, g * s * stride)
        start = HEADER_WORDS + sum(lengths[:index])
        return self.buffer[start : start + lengths[index]]

    @property
    def token_ids(self) -> Int32:
        return self._section(0)

    @property
    def positions(self) -> Int32:
        return self._section(1)

    @property
    def slots(self) -> Int32:
        return self._section(2)

    @property
    def row_starts(self) -> Int32:
        return self._section(3)

    @property
    def sampled_rows(self) -> Int32:
        return self._section(4)

    @property
    def page_tables(self) -> Int32:
        """``[groups, sequences, table_stride]``."""
        return self._section(5).reshape(self.groups, self.sequences, self.table_stride)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds of the symbols of a step, known when buffers are planned."""

    tokens: int
    """Rows of one step."""
    sequences: int
    sampled: int
    """Rows of logits of one step."""
    context: int
    """Slots of one sequence."""


def lay_plan(sequences: Sequence[SequenceStep], groups: int, *, best_only: bool = False) -> StepPlan:
    """Packs the sequences' parts, in the given order, into one plan; ``best_only`` is :data:`BEST_ONLY_WORD`.

    Raises ValueError if a sequence has no tokens or a page table is too short for its tokens.
    """
    stride = max((len(table) for s in sequences for table in s.page_tables), default=0)
    page_tables = np.full((groups, len(sequences), stride), -1, dtype=np.int32)
    # Lists, made into arrays once: a step of decoding has few words of each section for every sequence, and numpy calls
    # on a handful of words cost more than the words.
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    row_starts: list[int] = []
    sampled_rows: list[int] = []
    for index, sequence in enumerate(sequences):
        row, count, first = len(token_ids), len(sequence.token_ids), sequence.first_slot
        if count == 0:
            raise ValueError(f"sequence {index} of the step has no tokens")
        if len(sequence.page_tables) != groups:
            raise ValueError(
                f"sequence {index} has {len(sequence.page_tables)} page tables, the program {groups} KV groups"
            )
        last_page = (first + count - 1) // PAGE_TOKENS
        for group, table in enumerate(sequence.page_tables):
            if len(table) <= last_page:
                raise ValueError(
                    f"sequence {index}: page table of group {group} has {len(table)} pages, needs {last_page + 1}"
                )
            page_tables[group, index, : len(table)] = table
        position = first if sequence.first_position is None else sequence.first_position
        token_ids += sequence.token_ids.tolist() if isinstance(sequence.token_ids, np.ndarray) else sequence.token_ids
        positions += range(position, position + count)
        slots += range(first, first + count)
        row_starts.append(row)
        sampled_rows += [row + place for place in sequence.sampled]
    row_starts.append(len(token_ids))
    header = [STEP_VERSION, len(token_ids), len(sequences), len(sampled_rows), groups, stride, int(best_only), 0]
    rows = np.array(header + token_ids + positions + slots + row_starts + sampled_rows, dtype=np.int32)
    return StepPlan(np.concatenate((rows, page_tables.reshape(-1))))
