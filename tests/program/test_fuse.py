"""Fusing changes how a program runs and never what it computes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_programs import formats, kept_values, layer, programs, record
from tiny_models import random_weights, torch_backend, whole_plan

from tokenmill.program.check import ProgramError
from tokenmill.program.fuse import fuse
from tokenmill.program.ops import (
    ActivationFormat,
    Add,
    Attention,
    GatedActivation,
    Linear,
    LinearGroup,
    Quantize,
    RmsNorm,
    WeightFormat,
)
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def all_in(program: Program, format: WeightFormat) -> dict[str, WeightFormat]:
    return dict.fromkeys(program.matrices(), format)


def kinds(program: Program) -> list[str]:
    return [type(op).__name__ for op in program.ops]


def outputs(program: Program, names: tuple[str, ...], **options: object) -> dict[str, np.ndarray]:
    backend = torch_backend(program, random_weights(program), **options)
    results = backend.run(whole_plan(IDS, len(program.kv_groups)), outputs=names)
    return {name: array.copy() for name, array in results.items()}


def test_a_layer_becomes_five_steps_and_its_rotations() -> None:
    program = record(layer)
    fused = fuse(program, all_in(program, WeightFormat.Q4_K))
    assert kinds(fused) == [
        *("Embed", "RmsNorm", "LinearGroup", "Rope", "Rope", "Attention", "LinearGroup"),
        *("RmsNorm", "LinearGroup", "GatedActivation", "LinearGroup", "GatherSampled", "RmsNorm", "Linear"),
    ]
    assert not any(isinstance(op, Add | Quantize) for op in fused.ops)
    groups = [op for op in fused.ops if isinstance(op, LinearGroup)]
    assert [len(group.parts) for group in groups] == [3, 1, 2, 1]
    assert [group.parts[0].residual is not None for group in groups] == [False, True, False, True]
    producers = [op for op in fused.ops if isinstance(op, RmsNorm | Attention | GatedActivation)]
    assert all(op.out is None and len(op.quantized) == 1 for op in producers)
    assert "down.in.int8_group256" in fused.values()


def test_sixteen_bit_weights_read_fp32_and_quantize_nothing() -> None:
    program = record(layer)
    fused = fuse(program, all_in(program, WeightFormat.F16))
    assert all(value.format is ActivationFormat.F32 for value in fused.values().values())


def test_mixed_formats_make_one_copy_per_activation_format() -> None:
    program = record(layer)
    mixed = {**all_in(program, WeightFormat.Q4_0), "v": WeightFormat.Q6_K, "k": WeightFormat.Q8_0}
    fused = fuse(program, mixed)
    norm = next(op for op in fused.ops if isinstance(op, RmsNorm))
    assert [copy.format for copy in norm.quantized] == [ActivationFormat.INT8_GROUP32, ActivationFormat.INT8_GROUP256]
    group = next(op for op in fused.ops if isinstance(op, LinearGroup))
    assert [part.x.name for part in group.parts] == [
        "attention.in.int8_group32",
        "attention.in.int8_group32",
        "attention.in.int8_group256",
    ]


def test_a_mix_with_sixteen_bit_weights_keeps_fp32_beside_the_copy() -> None:
    program = record(layer)
    fused = fuse(program, {**all_in(program, WeightFormat.Q8_0), "v": WeightFormat.BF16})
    norm = next(op for op in fused.ops if isinstance(op, RmsNorm))
    assert norm.out is not None
    assert [copy.format for copy in norm.quantized] == [ActivationFormat.INT8_GROUP32]
    assert len(next(op for op in fused.ops if isinstance(op, LinearGroup)).parts) == 3


def test_kept_values_survive() -> None:
    program = record(layer)
    names = ("hidden", "attention.in", "o.out", "down.in", "down.out")
    fused = fuse(program, all_in(program, WeightFormat.Q8_0), keep=names)
    assert all(fused.values()[name].format is ActivationFormat.F32 for name in names)
    assert sum(isinstance(op, Add) for op in fused.ops) == 2


def test_an_unknown_name_cannot_be_kept() -> None:
    program = record(layer)
    with pytest.raises(KeyError, match="cannot keep elsewhere"):
        fuse(program, all_in(program, WeightFormat.Q8_0), keep=["elsewhere"])


def test_a_missing_format_is_named() -> None:
    program = record(layer)
    partial = all_in(program, WeightFormat.Q8_0)
    del partial["up"]
    with pytest.raises(ProgramError, match="the packed format of weight up is not given"):
        fuse(program, partial)


def test_where_the_producer_cannot_quantize_an_op_does() -> None:
    def network(r: Recorder) -> None:
        x = r.embed("token_embedding", 32)
        r.linear(x, "token_embedding", 20, out="logits")

    program = record(network)
    fused = fuse(program, all_in(program, WeightFormat.Q8_0))
    assert kinds(fused) == ["Embed", "Quantize", "Linear"]


def test_a_product_with_a_second_reader_keeps_its_add() -> None:
    def network(r: Recorder) -> None:
        x = r.embed("token_embedding", 32)
        y = r.linear(x, "w", 32)
        r.add(r.add(x, y, out="sum"), y, out="twice")

    program = record(network)
    assert kinds(fuse(program, all_in(program, WeightFormat.F32))) == ["Embed", "Linear", "Add", "Add"]


def test_a_residual_that_comes_after_the_linear_is_not_folded_into_it() -> None:
    def network(r: Recorder) -> None:
        x = r.embed("token_embedding", 32)
        y = r.linear(x, "w", 32)
        later = r.softcap(x, 3.0, out="later")
        r.add(y, later, out="sum")

    program = record(network)
    assert kinds(fuse(program, all_in(program, WeightFormat.F32))) == ["Embed", "Linear", "SoftCap", "Add"]


def test_a_sum_of_two_products_folds_into_the_later_one_only() -> None:
    def network(r: Recorder) -> None:
        x = r.embed("token_embedding", 32)
        y = r.linear(x, "a", 32)
        z = r.linear(r.softcap(y, 3.0, out="capped"), "b", 32)
        w = r.linear(r.softcap(z, 3.0, out="capped again"), "c", 32)
        r.add(r.add(w, x, out="first"), w, out="second")
        r.add(w, z, out="third")

    def sums(r: Recorder) -> None:
        x = r.embed("token_embedding", 32)
        y = r.linear(x, "a", 32)
        z = r.linear(r.softcap(x, 3.0, out="capped"), "b", 32)
        r.add(r.add(y, z, out="first"), x, out="second")

    program = record(sums)
    fused = fuse(program, all_in(program, WeightFormat.F32))
    assert kinds(fused) == ["Embed", "Linear", "SoftCap", "LinearGroup", "Add"]
    assert outputs(fused, ("second",))["second"].tobytes() == outputs(program, ("second",))["second"].tobytes()
    program = record(network)
    assert kinds(fuse(program, all_in(program, WeightFormat.F32))) == kinds(program)


def test_in_full_precision_the_fused_layer_gives_the_same_bits() -> None:
    program = record(layer)
    fused = fuse(program, all_in(program, WeightFormat.F32))
    assert len(fused.ops) < len(program.ops)
    assert outputs(fused, ("logits",))["logits"].tobytes() == outputs(program, ("logits",))["logits"].tobytes()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_program_computes_the_same_fused(data: st.DataObject) -> None:
    """Fused, int8 copies hold rounded numbers; unfused, the same rounding is emulated in each Linear."""
    program = data.draw(programs())
    packed = data.draw(formats(program))
    keep = data.draw(kept_values(program))
    fused = fuse(program, packed, keep)
    names = ("logits", *keep)
    expected = outputs(program, names, emulate_activations=packed)
    found = outputs(fused, names)
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name])
    for op in fused.ops:
        if isinstance(op, Linear):
            alone = [other for other in fused.ops if isinstance(other, Linear) and other.x == op.x]
            assert alone == [op], "Linears that read one value must be grouped"
