"""Buffer plans: no live value is ever overwritten, and the arena is as small as the network's width allows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_programs import formats, kept_values, layer, programs, record

from tokenmill.program.buffers import ALIGNMENT, BufferPlan, Placement, plan_buffers
from tokenmill.program.fuse import fuse
from tokenmill.program.ops import (
    ActivationFormat,
    Add,
    GatedActivation,
    LinearGroup,
    Op,
    Rope,
    SoftCap,
    Value,
    WeightFormat,
)
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder
from tokenmill.program.step import StepLimits

LIMITS = StepLimits(tokens=8, sequences=4, sampled=3, context=64)


def row_bytes(format: ActivationFormat, width: int) -> int:
    return 4 * width if format is ActivationFormat.F32 else width + 8 * (width // 32 + 1)


def simulate(program: Program, plan: BufferPlan, keep: Collection[str]) -> None:
    """Runs the program on an arena whose 64-byte lines know whose data they hold; asserts that no read is stale."""
    owner = np.full(plan.arena_bytes // ALIGNMENT, "", dtype=object)

    def lines(name: str) -> slice:
        place = plan.placements[name]
        assert place.offset % ALIGNMENT == place.row_bytes % ALIGNMENT == 0
        assert place.offset + place.bytes <= plan.arena_bytes
        return slice(place.offset // ALIGNMENT, (place.offset + place.bytes) // ALIGNMENT)

    for op in program.ops:
        for value in op.inputs():
            assert (owner[lines(value.name)] == value.name).all(), f"{value.name} was overwritten before {op}"
        for value in op.outputs():
            for operand in op.inputs():
                if overlap(lines(value.name), lines(operand.name)):
                    assert lines(value.name) == lines(operand.name)
                    assert elementwise(op, value, operand), f"{op} overwrites {operand.name} while it reads it"
        for value in op.outputs():
            owner[lines(value.name)] = value.name
        for value in op.outputs():
            assert (owner[lines(value.name)] == value.name).all(), f"outputs of {op} overlap"
    readers = program.readers()
    for name in {*keep, *(name for name in readers if not readers[name])}:
        assert (owner[lines(name)] == name).all()
        for other in plan.placements:
            assert other == name or not overlap(lines(name), lines(other)), f"{name} is kept but shares with {other}"


def overlap(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop


def elementwise(op: Op, out: Value, operand: Value) -> bool:
    """Whether ``op`` reads each element of ``operand`` last when it writes the same one of ``out``."""
    match op:
        case Add() | SoftCap() | Rope():
            return True
        case GatedActivation():
            return out == op.out
        case LinearGroup():
            reads = [value for part in op.parts for value in part.values()].count(operand)
            return reads == 1 and any(part.out == out and part.residual == operand for part in op.parts)
    return False


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_value_is_overwritten_while_it_is_live(data: st.DataObject) -> None:
    program = data.draw(programs())
    keep = data.draw(kept_values(program))
    simulate(program, plan_buffers(program, LIMITS, keep, row_bytes), keep)
    fused = fuse(program, data.draw(formats(program)), keep)
    simulate(fused, plan_buffers(fused, LIMITS, keep, row_bytes), keep)


def test_the_simulation_notices_an_overlap() -> None:
    """Negative control: q moved onto k, which is live beside it."""
    program = record(layer)
    plan = plan_buffers(program, LIMITS, (), row_bytes)
    moved = replace(plan.placements["q.out"], offset=plan.placements["k.out"].offset)
    with pytest.raises(AssertionError):
        simulate(program, BufferPlan({**plan.placements, "q.out": moved}, plan.arena_bytes + 4096), ())


def test_every_value_has_a_place() -> None:
    program = record(layer)
    plan = plan_buffers(program, LIMITS, (), row_bytes)
    assert list(plan.placements) == list(program.values())
    assert plan.placements["down.in"] == Placement(plan.placements["down.in"].offset, 192, LIMITS.tokens)
    assert plan.placements["logits"].rows == LIMITS.sampled


def test_depth_costs_no_memory() -> None:
    def network(depth: int) -> Program:
        def layers(r: Recorder) -> None:
            x = r.embed("token_embedding", 64)
            for i in range(depth):
                with r.scope(f"layers.{i}"):
                    h = r.rms_norm(x, "norm", eps=1e-5, out="normed")
                    x = r.add(x, r.linear(h, "w", 64), out="out")
            r.linear(r.gather_sampled(x, out="hidden"), "token_embedding", 20, out="logits")

        return record(layers)

    def arena(depth: int, format: WeightFormat) -> int:
        program = network(depth)
        fused = fuse(program, dict.fromkeys(program.matrices(), format))
        return plan_buffers(fused, LIMITS, (), row_bytes).arena_bytes

    assert arena(20, WeightFormat.Q8_0) == arena(2, WeightFormat.Q8_0)
    assert arena(20, WeightFormat.F32) == arena(2, WeightFormat.F32)


def test_the_residual_stream_is_updated_in_place() -> None:
    program = record(layer)
    fused = fuse(program, dict.fromkeys(program.matrices(), WeightFormat.Q8_0))
    places = plan_buffers(fused, LIMITS, (), row_bytes).placements
    assert places["embedding"] == places["residual"] == places["out"]
    assert places["q.out"] == places["q.rotated"]


def test_kept_values_must_exist() -> None:
    with pytest.raises(KeyError, match="cannot keep elsewhere"):
        plan_buffers(record(layer), LIMITS, ["elsewhere"], row_bytes)
