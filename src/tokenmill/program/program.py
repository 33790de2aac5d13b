"""A program: one network as a list of ops, with the weights and the KV cache that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

from tokenmill.program.kv import KvElement, KvGroupSpec
from tokenmill.program.ops import ActivationFormat, Attention, LinearGroup, LinearPart, Op, Value

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One network, recorded. Passes make new programs; nothing edits one in place."""

    ops: tuple[Op, ...]
    kv_groups: tuple[KvGroupSpec, ...]
    weights: Mapping[str, Shape]
    """Shape of every weight that an op names: matrices ``(n, k)``, vectors ``(n,)``."""
    vocab_size: int

    def values(self) -> dict[str, Value]:
        """Every value by its name, in the order of assignment."""
        return {value.name: value for op in self.ops for value in op.outputs()}

    def readers(self) -> dict[str, list[int]]:
        """Indices of the ops that read each value, ascending; a value that nobody reads has an empty list."""
        readers: dict[str, list[int]] = {name: [] for name in self.values()}
        for index, op in enumerate(self.ops):
            for name in dict.fromkeys(value.name for value in op.inputs()):
                readers.setdefault(name, []).append(index)
        return readers

    def end_for(self, outputs: Iterable[str]) -> int:
        """How many ops, from the first on, a step has to run for the values ``outputs`` and for all keys and values;
        without any ``outputs`` the whole program. Raises KeyError for an unknown value."""
        writes = [index + 1 for index, op in enumerate(self.ops) if isinstance(op, Attention)]
        ends = {value.name: index + 1 for index, op in enumerate(self.ops) for value in op.outputs()}
        wanted = [ends[name] for name in outputs]
        return max(writes + wanted) if wanted else len(self.ops)

    def matrices(self) -> tuple[str, ...]:
        """Names of the weights that are matrices, in the order of first use."""
        return tuple(name for name, shape in self.weights.items() if len(shape) == 2)

    def vectors(self) -> tuple[str, ...]:
        """Names of the weights that are vectors (norm gains, biases), in the order of first use."""
        return tuple(name for name, shape in self.weights.items() if len(shape) == 1)

    def with_ops(self, ops: Iterable[Op]) -> Program:
        """The same program with other ops."""
        return replace(self, ops=tuple(ops))

    def with_kv_element(self, element: KvElement) -> Program:
        """The same program with keys and values stored as ``element`` in every KV group."""
        return replace(self, kv_groups=tuple(replace(group, element=element) for group in self.kv_groups))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(program: Program) -> Iterator[str]:
    yield f"program of {len(program.ops)} ops, {len(program.weights)} weights, vocabulary {program.vocab_size}"
    for index, group in enumerate(program.kv_groups):
        window = "all slots" if group.window is None else f"window {group.window}"
        yield (
            f"  kv group {index}: {group.layers} layers x {group.kv_heads} heads x {group.head_dim}, {window}, "
            f"{group.element.name.lower()}, {group.page_bytes} bytes a page"
        )
    for index, op in enumerate(program.ops):
        yield f"{index:5d}  {describe_op(op)}"


def describe_op(op: Op) -> str:
    """One line: ``out [tokens, 576] = Linear(x=..., weight=...)``; attributes at their defaults are left out."""
    outputs = ", ".join(_describe_value(value) for value in op.outputs())
    if isinstance(op, LinearGroup):
        arguments = "; ".join(_describe_part(part) for part in op.parts)
    else:
        arguments = ", ".join(
            f"{f.name}={_describe_operand(getattr(op, f.name))}"
            for f in fields(op)
            if f.name not in op.OUTPUTS and getattr(op, f.name) != f.default
        )
    return f"{outputs} = {type(op).__name__}({arguments})"


def _describe_part(part: LinearPart) -> str:
    extras = "".join(
        f", {name}={_describe_operand(operand)}"
        for name, operand in (("bias", part.bias), ("residual", part.residual))
        if operand is not None
    )
    return f"x={part.x.name}, weight={part.weight}{extras}"


def _describe_value(value: Value) -> str:
    element = "" if value.format is ActivationFormat.F32 else f" {value.format.name.lower()}"
    return f"{value.name} [{value.rows.value}, {value.width}]{element}"


def _describe_operand(operand: object) -> str:
    if isinstance(operand, Value):
        return operand.name
    if isinstance(operand, tuple):
        return f"<{len(operand)} values>"
    if isinstance(operand, float):
        return f"{operand:.9g}"
    return str(getattr(operand, "value", operand))
