"""Buffer planning: where each value of a program lives in one arena.

A value is live from the op that assigns it to the last op that reads it; values that are never live together share
memory. Placement is greedy by size: the largest buffer first, each at the lowest offset where it meets no live one
(Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from tokenmill.program.ops import (
    ActivationFormat,
    Add,
    GatedActivation,
    LinearGroup,
    Op,
    Rope,
    Rows,
    SoftCap,
    Value,
)
from tokenmill.program.program import Program
from tokenmill.program.step import StepLimits

ALIGNMENT = 64
"""Bytes; offsets and row strides are multiples of it, so that every row starts on a cache line."""

RowBytes = Callable[[ActivationFormat, int], int]


@dataclass(frozen=True, slots=True)
class Placement:
    """One value's memory: row r is at ``offset + r * row_bytes``. Both are multiples of ``ALIGNMENT`` bytes."""

    offset: int
    row_bytes: int
    rows: int
    """Bound of the value's rows."""

    @property
    def bytes(self) -> int:
        return self.row_bytes * self.rows


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Placement of every value of a program by name, and the bytes of the arena that holds them all."""

    placements: Mapping[str, Placement]
    arena_bytes: int


def plan_buffers(program: Program, limits: StepLimits, keep: Collection[str], row_bytes: RowBytes) -> BufferPlan:
    """Places every value of ``program``.

    ``row_bytes(format, width)`` is the size of one row, rounded up here to ``ALIGNMENT``. Values in ``keep`` and
    values that nobody reads (the program's results) share their memory with no other value, so that they can be read
    after the step. Raises KeyError for an unknown name in ``keep``.
    """
    values = program.values()
    for name in keep:
        if name not in values:
            raise KeyError(f"cannot keep {name}: the program has no such value")
    sizes = {name: _placement(value, limits, row_bytes) for name, value in values.items()}
    buffers = _shared_buffers(program, sizes, frozenset(keep))
    offsets = _place(buffers)
    placements = {
        name: Placement(offset, sizes[name].row_bytes, sizes[name].rows)
        for buffer, offset in zip(buffers, offsets, strict=True)
        for name in buffer.names
    }
    arena = max((offset + buffer.bytes for buffer, offset in zip(buffers, offsets, strict=True)), default=0)
    return BufferPlan({name: placements[name] for name in values}, arena)


def _placement(value: Value, limits: StepLimits, row_bytes: RowBytes) -> Placement:
    rows = limits.tokens if value.rows is Rows.TOKENS else limits.sampled
    stride = -(-row_bytes(value.format, value.width) // ALIGNMENT) * ALIGNMENT
    return Placement(0, stride, rows)


@dataclass(slots=True)
class _Buffer:
    """Memory of one value, or of a chain of values each computed in place of the one before."""

    names: list[str]
    bytes: int
    first: int
    """Index of the op that assigns the first value."""
    last: int
    """Index of the last op that reads the last value."""


def _shared_buffers(program: Program, sizes: Mapping[str, Placement], keep: frozenset[str]) -> list[_Buffer]:
    readers = program.readers()
    end = len(program.ops)
    alone = {name for name in sizes if name in keep or not readers[name]}
    buffer_of: dict[str, _Buffer] = {}
    buffers: list[_Buffer] = []
    for index, op in enumerate(program.ops):
        for value in op.outputs():
            name = value.name
            if name in alone:
                buffer_of[name] = _Buffer([name], sizes[name].bytes, 0, end)
                buffers.append(buffer_of[name])
                continue
            donor = next(
                (
                    operand.name
                    for operand in _overwritable(op, value)
                    if operand.name not in alone
                    and readers[operand.name][-1] == index
                    and sizes[operand.name] == sizes[name]
                ),
                None,
            )
            if donor is None:
                buffer_of[name] = _Buffer([name], sizes[name].bytes, index, readers[name][-1])
                buffers.append(buffer_of[name])
            else:
                buffer = buffer_of[name] = buffer_of[donor]
                buffer.names.append(name)
                buffer.last = readers[name][-1]
    return buffers


def _overwritable(op: Op, out: Value) -> Iterator[Value]:
    """Operands whose element (r, c) ``op`` reads before it writes element (r, c) of ``out``, and never again.

    Rope reads a pair before it writes the pair. A Linear overwrites its residual only if no part of the group reads
    that value otherwise.
    """
    match op:
        case Add():
            yield from (op.a, op.b)
        case GatedActivation() if out == op.out:
            yield from (op.gate, op.up)
        case SoftCap() | Rope():
            yield op.x
        case LinearGroup():
            read = [value for part in op.parts for value in part.values()]
            for part in op.parts:
                if part.out == out and part.residual is not None and read.count(part.residual) == 1:
                    yield part.residual


def _place(buffers: list[_Buffer]) -> list[int]:
    """Offsets, one per buffer: the largest first, each at the lowest place free during its whole life."""
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for index in sorted(range(len(buffers)), key=lambda i: -buffers[i].bytes):
        buffer = buffers[index]
        neighbours = sorted(
            (offsets[other], offsets[other] + buffers[other].bytes)
            for other in placed
            if buffers[other].first <= buffer.last and buffer.first <= buffers[other].last
        )
        offset = 0
        for begin, finish in neighbours:
            if offset + buffer.bytes <= begin:
                break
            offset = max(offset, finish)
        offsets[index] = offset
        placed.append(index)
    return offsets
