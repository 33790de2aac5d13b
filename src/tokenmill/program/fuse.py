"""The fuse pass: fewer passes over memory and fewer barriers, the same numbers.

Three rewrites, in this order, each checked:

1. *Quantize at the producer.* A value that quantized matrices read gets an int8 copy per activation format that they
   need (NUMERICS N2), made by its producer while the row is in cache, or by a Quantize op where the producer cannot.
   The fp32 value is dropped if nobody else reads it.
2. *Group.* Linears that read the same value (q, k, v; gate, up) become one LinearGroup: one parallel region.
3. *Fold the residual.* An Add of a Linear's result becomes the last step of that Linear.

A value named in ``keep``, or read by an op outside a rewrite, survives it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeGuard

from tokenmill.program.check import check
from tokenmill.program.ops import (
    ActivationFormat,
    Add,
    Attention,
    GatedActivation,
    Linear,
    LinearGroup,
    LinearPart,
    Op,
    Quantize,
    RmsNorm,
    Value,
    WeightFormat,
)
from tokenmill.program.program import Program


def fuse(program: Program, formats: Mapping[str, WeightFormat], keep: Collection[str] = ()) -> Program:
    """The fused program. ``formats`` gives the packed format of every matrix that a Linear reads.

    ``keep`` names values that must exist in fp32 afterwards (outputs and taps); the program's results, which nobody
    reads, always do. Raises KeyError for an unknown name in ``keep`` and ProgramError if a format is missing.
    """
    values = program.values()
    for name in keep:
        if name not in values:
            raise KeyError(f"cannot keep {name}: the program has no such value")
    kept = frozenset(keep)
    program = quantize_at_producer(program, formats, kept)
    check(program, formats)
    program = group_linears(program)
    check(program, formats)
    program = fold_residuals(program, kept)
    check(program, formats)
    return program


def quantized_name(value: str, format: ActivationFormat) -> str:
    """Name of the int8 copy of a value: ``layers.3.mlp.down.in.int8_group32``."""
    return f"{value}.{format.name.lower()}"


def quantize_at_producer(program: Program, formats: Mapping[str, WeightFormat], keep: Collection[str]) -> Program:
    """Rewrite 1: int8 copies, one per (value, activation format), assigned where the value is."""
    copies: dict[str, dict[ActivationFormat, Value]] = {}
    read_as_fp32: set[str] = set()
    ops: list[Op] = []
    for op in program.ops:
        if isinstance(op, Linear) and op.weight in formats:
            needed = formats[op.weight].activation
            if needed is not op.x.format:
                copy = replace(op.x, name=quantized_name(op.x.name, needed), format=needed)
                copies.setdefault(op.x.name, {})[needed] = copy
                op = replace(op, x=copy)
        read_as_fp32.update(value.name for value in op.inputs())
        ops.append(op)

    rewritten: list[Op] = []
    for op in ops:
        wanted = [(out, tuple(copies[out.name].values())) for out in op.outputs() if out.name in copies]
        if wanted and _makes_copies(op):
            out, made = wanted[0]
            needed_in_fp32 = out.name in read_as_fp32 or out.name in keep
            rewritten.append(replace(op, out=out if needed_in_fp32 else None, quantized=made))
        else:
            rewritten.append(op)
            rewritten.extend(Quantize(x=out, out=copy) for out, made in wanted for copy in made)
    return program.with_ops(rewritten)


def _makes_copies(op: Op) -> TypeGuard[RmsNorm | Attention | GatedActivation]:
    """Whether the op's kernels hold whole rows, and so can quantize what they produce."""
    if isinstance(op, RmsNorm):
        return op.group_width == op.x.width and not op.quantized
    return isinstance(op, Attention | GatedActivation) and not op.quantized


def group_linears(program: Program) -> Program:
    """Rewrite 2: Linears reading one value (or int8 copies of it) run together, where the first of them stood.

    They are independent by construction: each reads only that value and weights.
    """
    origin = _origins(program.ops)
    parts: dict[str, list[LinearPart]] = {}
    for op in program.ops:
        if isinstance(op, Linear) and op.adapter is None:
            part = LinearPart(x=op.x, weight=op.weight, out=op.out, bias=op.bias)
            parts.setdefault(origin[op.x.name], []).append(part)

    ops: list[Op] = []
    for op in program.ops:
        together = parts.get(origin[op.x.name], []) if isinstance(op, Linear) and op.adapter is None else []
        if len(together) < 2:
            ops.append(op)
        elif op.outputs()[0] == together[0].out:
            ops.append(LinearGroup(tuple(together)))
    return program.with_ops(ops)


def _origins(ops: Iterable[Op]) -> dict[str, str]:
    """The value of which each value is an int8 copy; any other value is its own origin."""
    origin: dict[str, str] = {}
    for op in ops:
        outputs = op.outputs()
        copies: tuple[Value, ...] = ()
        if isinstance(op, Quantize):
            origin[op.out.name] = op.x.name
            continue
        if isinstance(op, RmsNorm | Attention | GatedActivation):
            copies = op.quantized
        for value in outputs:
            # Copies of one op have one origin, named or dropped; the op's first output stands for it.
            origin[value.name] = outputs[0].name if value in copies else value.name
    return origin


def fold_residuals(program: Program, keep: Collection[str]) -> Program:
    """Rewrite 3: ``Add(x @ w.T, r)`` becomes a residual of the Linear, when the Add alone reads the product.

    The residual must exist before the Linear runs. The sum is the same: the epilogue adds it last, in fp32.
    """
    readers = program.readers()
    assigned_at = {value.name: index for index, op in enumerate(program.ops) for value in op.outputs()}
    folds: dict[str, Add] = {}
    folded: set[int] = set()
    for index, op in enumerate(program.ops):
        if not isinstance(op, Add) or op.a == op.b:
            continue
        for product, residual in ((op.a, op.b), (op.b, op.a)):
            at = assigned_at[product.name]
            linear = program.ops[at]
            if (
                isinstance(linear, Linear | LinearGroup)
                and product in linear.outputs()
                and not _has_residual(linear, product)
                and readers[product.name] == [index]
                and product.name not in keep
                and assigned_at[residual.name] < at
            ):
                folds[product.name] = op
                folded.add(index)
                assigned_at[op.out.name] = at
                break
    return program.with_ops(_fold(op, folds) for index, op in enumerate(program.ops) if index not in folded)


def _has_residual(linear: Linear | LinearGroup, product: Value) -> bool:
    parts = linear.parts if isinstance(linear, LinearGroup) else ()
    return any(part.out == product and part.residual is not None for part in parts)


def _fold(op: Op, folds: Mapping[str, Add]) -> Op:
    if isinstance(op, Linear) and op.adapter is None and op.out.name in folds:
        return LinearGroup((_fold_part(LinearPart(op.x, op.weight, op.out, op.bias), folds),))
    if isinstance(op, LinearGroup):
        return LinearGroup(tuple(_fold_part(part, folds) for part in op.parts))
    return op


def _fold_part(part: LinearPart, folds: Mapping[str, Add]) -> LinearPart:
    add = folds.get(part.out.name)
    if add is None:
        return part
    return replace(part, out=add.out, residual=add.b if add.a == part.out else add.a)
