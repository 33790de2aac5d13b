"""What each op of a fused program must move and compute in one step: the figures behind its share of the limit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokenmill import _native
from tokenmill.program.kv import KvGroupSpec
from tokenmill.program.ops import (
    ActivationFormat,
    Attention,
    Embed,
    GatedActivation,
    GatherSampled,
    LinearGroup,
    LinearPart,
    Op,
    RmsNorm,
    Rope,
    Rows,
    SoftCap,
    Value,
    WeightFormat,
)
from tokenmill.program.ops import Linear as LinearOp
from tokenmill.program.program import Program
from tokenmill.program.step import StepPlan

# Operations per element of what computes no matrix product: additions, multiplications, and 10 for an exponential.
_POINTWISE = {RmsNorm: 4, Rope: 3, GatedActivation: 14, SoftCap: 12}


@dataclass(frozen=True, slots=True)
class OpWork:
    """One op in one step. Every byte counts once, as if caches were perfect within the op."""

    role: str
    """The op's place in a layer, the same for all layers: ``Linear attention.q + attention.k + attention.v``."""
    memory_bytes: int
    """Weights, and keys and values: what comes from memory once a step."""
    activation_bytes: int
    """Values read and written, which fit in caches."""
    int8_operations: int
    """Multiplications and additions of int8 products."""
    float_operations: int

    @property
    def operations(self) -> int:
        return self.int8_operations + self.float_operations


def op_work(
    op: Op, program: Program, plan: StepPlan, formats: Mapping[str, WeightFormat], groups: tuple[KvGroupSpec, ...]
) -> OpWork:
    """Work of ``op`` in the step ``plan``; ``formats`` are the packed formats of the program's matrices."""
    rows = {Rows.TOKENS: plan.tokens, Rows.SAMPLED: plan.sampled}
    activation_bytes = sum(_value_bytes(value, rows) for value in {*op.inputs(), *op.outputs()})
    memory_bytes = int8 = floats = 0
    match op:
        case LinearOp() | LinearGroup():
            parts = op.parts if isinstance(op, LinearGroup) else (LinearPart(op.x, op.weight, op.out, op.bias),)
            for part in parts:
                n, k = program.weights[part.weight]
                memory_bytes += _native.packed_bytes(int(formats[part.weight]), n, k)
                operations = 2 * n * k * rows[part.out.rows]
                if formats[part.weight].activation is ActivationFormat.F32:
                    floats += operations
                else:
                    int8 += operations
        case Embed():
            n, k = program.weights[op.weight]
            memory_bytes = plan.tokens * _native.packed_bytes(int(formats[op.weight]), n, k) // n
        case GatherSampled():
            activation_bytes = 2 * _value_bytes(op.out, rows)  # the other rows are not read
        case Attention():
            seen, read = _visible(plan, op.window)
            spec = groups[op.group]
            memory_bytes = read * spec.page_bytes // spec.layers // 32
            floats = 4 * op.heads * op.head_dim * seen
        case _:
            elements = sum(rows[value.rows] * value.width for value in op.outputs()[:1])
            floats = _POINTWISE.get(type(op), 1) * elements
    return OpWork(_role(op), memory_bytes, activation_bytes, int8, floats)


def _value_bytes(value: Value, rows: Mapping[Rows, int]) -> int:
    return rows[value.rows] * _native.value_row_bytes(value.format, value.width)


def _visible(plan: StepPlan, window: int | None) -> tuple[int, int]:
    """Pairs of query and key that attention computes, and slots whose keys it reads (once per sequence)."""
    starts, slots = plan.row_starts, plan.slots
    lengths = slots.astype(np.int64) + 1
    seen = int(lengths.sum() if window is None else np.minimum(lengths, window).sum())
    read = 0
    for sequence in range(plan.sequences):
        first, last = int(slots[starts[sequence]]), int(slots[starts[sequence + 1] - 1])
        read += last + 1 - (0 if window is None else max(0, first - window + 1))
    return seen, read


def _role(op: Op) -> str:
    if isinstance(op, LinearOp):
        names = [op.weight]
    elif isinstance(op, LinearGroup):
        names = [part.weight for part in op.parts]
    else:
        names = [value.name for value in op.outputs()[:1]]
    kind = "Linear" if isinstance(op, LinearGroup) else type(op).__name__
    return f"{kind} " + " + ".join(re.sub(r"^layers\.\d+\.", "", name) for name in names)
