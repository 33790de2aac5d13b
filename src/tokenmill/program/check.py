"""The checker: what makes a list of ops a program. Runs after recording and after each pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tokenmill.errors import TokenmillError
from tokenmill.program.ops import (
    ActivationFormat,
    Add,
    Attention,
    Embed,
    GatedActivation,
    GatherSampled,
    Linear,
    LinearGroup,
    LinearPart,
    Op,
    Quantize,
    RmsNorm,
    Rope,
    Rows,
    SoftCap,
    Value,
    WeightFormat,
)
from tokenmill.program.program import Program, describe_op


class ProgramError(TokenmillError):
    """A program breaks a rule of the op set; the message names the op and the rule."""


def check(program: Program, formats: Mapping[str, WeightFormat] | None = None) -> None:
    """Raises ProgramError unless every value is assigned once and before use and every op is well formed.

    With ``formats`` (weight name -> packed format) every Linear must also read the activation format that its weight
    multiplies (NUMERICS N2).
    """
    if program.vocab_size < 1:
        raise ProgramError(f"the vocabulary has {program.vocab_size} entries, needs at least 1")
    assigned: dict[str, Value] = {}
    for index, op in enumerate(program.ops):
        try:
            _check_operands(op, assigned)
            _check_op(op, program, formats)
        except ProgramError as error:
            raise ProgramError(f"op {index}, {describe_op(op)}: {error}") from None
    _check_weights_used(program)
    _check_kv_layers(program)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProgramError(message)


def _check_operands(op: Op, assigned: dict[str, Value]) -> None:
    for value in op.inputs():
        was = assigned.get(value.name)
        if was is None:
            raise ProgramError(f"reads {value.name} before it is assigned")
        if was != value:  # the messages of this loop take long to put together
            raise ProgramError(f"reads {value} but it was assigned as {was}")
    outputs = op.outputs()
    _require(bool(outputs), "assigns nothing")
    for value in outputs:
        if value.name == "" or value.width < 1:
            raise ProgramError(f"{value} needs a name and a width of at least 1")
        _require(value.name not in assigned, f"assigns {value.name} a second time")
        assigned[value.name] = value


def _check_op(op: Op, program: Program, formats: Mapping[str, WeightFormat] | None) -> None:
    match op:
        case Embed():
            _fp32(op.out)
            _require(op.out.rows is Rows.TOKENS, f"{op.out.name} must have one row per token")
            _require(math.isfinite(op.scale), f"scale {op.scale} is not finite")
            _weight(program, op.weight, (program.vocab_size, op.out.width))
        case RmsNorm():
            _fp32(op.x)
            _produced(op.x, op.out, op.quantized)
            _require(op.eps > 0, f"eps {op.eps} must be positive")
            whole_groups = op.group_width > 0 and op.x.width % op.group_width == 0
            _require(whole_groups, f"width {op.x.width} is not a multiple of group_width {op.group_width}")
            per_row = op.group_width == op.x.width
            _require(per_row or not op.quantized, "only a norm over the whole row makes int8 copies")
            _weight(program, op.weight, (op.group_width,))
        case Linear():
            _require(op.adapter is None, f"adapter {op.adapter!r}: adapters are not supported yet")
            _linear(program, formats, LinearPart(op.x, op.weight, op.out, op.bias))
        case LinearGroup():
            for part in op.parts:
                _linear(program, formats, part)
        case Rope():
            _rope(op)
        case Attention():
            _attention(op, program)
        case GatedActivation():
            _fp32(op.gate, op.up)
            _same_shape(op.gate, op.up)
            _produced(op.gate, op.out, op.quantized)
        case Add():
            _fp32(op.a, op.b, op.out)
            _same_shape(op.a, op.b)
            _same_shape(op.a, op.out)
        case SoftCap():
            _fp32(op.x, op.out)
            _same_shape(op.x, op.out)
            _require(op.cap > 0, f"cap {op.cap} must be positive")
        case GatherSampled():
            _fp32(op.x, op.out)
            _require(op.x.rows is Rows.TOKENS and op.out.rows is Rows.SAMPLED, "gathers sampled rows from token rows")
            _require(op.x.width == op.out.width, f"widths differ: {op.x.width} and {op.out.width}")
        case Quantize():
            _fp32(op.x)
            _int8_copy(op.x, op.out)
        case _:
            raise ProgramError("is not an op of the set")


def _fp32(*values: Value) -> None:
    for value in values:
        _require(value.format is ActivationFormat.F32, f"{value.name} is {value.format.name}, must be F32")


def _same_shape(a: Value, b: Value) -> None:
    same = (a.rows, a.width) == (b.rows, b.width)
    _require(same, f"{a.name} [{a.rows.value}, {a.width}] and {b.name} [{b.rows.value}, {b.width}] must have one shape")


def _int8_copy(x: Value, copy: Value) -> None:
    _same_shape(x, copy)
    _require(copy.format is not ActivationFormat.F32, f"{copy.name} is F32, an int8 copy must have an int8 format")


def _produced(like: Value, out: Value | None, quantized: tuple[Value, ...]) -> None:
    """The outputs of an op that can assign fp32, int8 copies, or both."""
    if out is not None:
        _fp32(out)
        _same_shape(like, out)
    for copy in quantized:
        _int8_copy(like, copy)
    formats = [copy.format for copy in quantized]
    _require(len(set(formats)) == len(formats), f"makes one int8 format twice: {[f.name for f in formats]}")


def _weight(program: Program, name: str, shape: tuple[int, ...]) -> None:
    _require(name in program.weights, f"weight {name} is not in the program's list of weights")
    found = tuple(program.weights[name])
    _require(found == shape, f"weight {name} has shape {found}, needs {shape}")


def _linear(program: Program, formats: Mapping[str, WeightFormat] | None, part: LinearPart) -> None:
    _fp32(part.out)
    _require(part.x.rows is part.out.rows, f"{part.x.name} and {part.out.name} must have the same rows")
    _weight(program, part.weight, (part.out.width, part.x.width))
    if part.bias is not None:
        _weight(program, part.bias, (part.out.width,))
    if part.residual is not None:
        _fp32(part.residual)
        _same_shape(part.residual, part.out)
    if formats is not None:
        _require(part.weight in formats, f"the packed format of weight {part.weight} is not given")
        needed = formats[part.weight].activation
        _require(
            part.x.format is needed,
            f"weight {part.weight} ({formats[part.weight].name}) multiplies {needed.name}, "
            f"but {part.x.name} is {part.x.format.name}",
        )


def _rope(op: Rope) -> None:
    _fp32(op.x, op.out)
    _same_shape(op.x, op.out)
    _require(op.x.rows is Rows.TOKENS, f"{op.x.name} must have one row per token: rows carry the positions")
    _require(op.heads > 0 and op.x.width == op.heads * op.head_dim, f"width {op.x.width} is not heads x head_dim")
    _require(
        op.rotary_dim % 2 == 0 and 0 < op.rotary_dim <= op.head_dim,
        f"rotary_dim {op.rotary_dim} must be even, positive and at most head_dim {op.head_dim}",
    )
    count = len(op.frequencies)
    _require(count == op.rotary_dim // 2, f"{count} frequencies given for rotary_dim {op.rotary_dim}")
    _require(all(math.isfinite(f) for f in op.frequencies), "a frequency is not finite")
    _require(math.isfinite(op.magnitude) and op.magnitude > 0, f"magnitude {op.magnitude} must be positive")


def _attention(op: Attention, program: Program) -> None:
    for name in ("lse", "mass", "selection", "tail_index"):
        _require(getattr(op, name) is None, f"{name}: this part of attention's signature is not supported yet")
    _fp32(op.q, op.k, op.v)
    _produced(op.q, op.out, op.quantized)
    _same_shape(op.k, op.v)
    tokens = op.q.rows is Rows.TOKENS and op.k.rows is Rows.TOKENS
    _require(tokens, "q, k and v must have one row per token")
    grouped = op.kv_heads > 0 and op.heads > 0 and op.heads % op.kv_heads == 0
    _require(grouped, f"{op.heads} heads cannot share {op.kv_heads} KV heads evenly")
    _require(op.q.width == op.heads * op.head_dim, f"q has width {op.q.width}, needs {op.heads} x {op.head_dim}")
    _require(op.k.width == op.kv_heads * op.head_dim, f"k has width {op.k.width}, needs {op.kv_heads} x {op.head_dim}")
    _require(math.isfinite(op.scale) and op.scale > 0, f"scale {op.scale} must be positive")
    _require(op.softcap is None or op.softcap > 0, f"softcap {op.softcap} must be positive")
    _require(op.window is None or op.window > 0, f"window {op.window} must be positive")
    _require(0 <= op.group < len(program.kv_groups), f"KV group {op.group} does not exist")
    spec = program.kv_groups[op.group]
    found, needed = (op.window, op.kv_heads, op.head_dim), (spec.window, spec.kv_heads, spec.head_dim)
    _require(found == needed, f"(window, kv_heads, head_dim) is {found}, KV group {op.group} has {needed}")
    _require(0 <= op.layer < spec.layers, f"layer {op.layer} is outside KV group {op.group} of {spec.layers} layers")


def _check_weights_used(program: Program) -> None:
    used = {name for op in program.ops for name in op.weights()}
    for name in program.weights:
        _require(name in used, f"weight {name} is listed but no op reads it")


def _check_kv_layers(program: Program) -> None:
    """Each layer of each group is written by exactly one attention."""
    writers = [(op.group, op.layer) for op in program.ops if isinstance(op, Attention)]
    written = set(writers)
    if len(written) < len(writers):
        group, layer = next(writer for writer in writers if writers.count(writer) > 1)
        raise ProgramError(f"layer {layer} of KV group {group} is written twice")
    for group, spec in enumerate(program.kv_groups):
        for layer in range(spec.layers):
            _require((group, layer) in written, f"layer {layer} of KV group {group} is written by no attention")
