"""The op set: what a network may be made of.

A program is a list of these ops over values that are assigned once. Every op is a frozen dataclass whose ``Value``
fields are its operands: fields listed in ``OUTPUTS`` are written, the others read. Weights are named, not held.

Shapes are ``[rows, width]`` with symbolic rows: ``TOKENS`` (all tokens of the step, packed without padding) or
``SAMPLED`` (the rows whose logits are wanted). Elements are fp32 unless a value's ``format`` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import ClassVar


class Rows(Enum):
    """The symbolic row counts of a step."""

    TOKENS = "tokens"
    SAMPLED = "sampled"


class ActivationFormat(IntEnum):
    """How a value's elements are stored (NUMERICS N2). The numbers are shared with ``csrc/kernels/weight_format.h``."""

    F32 = 0
    INT8_GROUP32 = 1
    INT8_GROUP256 = 2


class WeightFormat(IntEnum):
    """Packed weight formats. The numbers are shared with ``csrc/kernels/weight_format.h``."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q5_0 = 5
    Q5_1 = 6
    Q8_0 = 7
    IQ4_NL = 8
    Q2_K = 9
    Q3_K = 10
    Q4_K = 11
    Q5_K = 12
    Q6_K = 13

    @property
    def activation(self) -> ActivationFormat:
        """The activation format that this weight format multiplies."""
        if self <= WeightFormat.BF16:
            return ActivationFormat.F32
        return ActivationFormat.INT8_GROUP32 if self <= WeightFormat.IQ4_NL else ActivationFormat.INT8_GROUP256


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the program: assigned once, by one op, under a stable name such as ``layers.3.mlp.down.in``."""

    name: str
    rows: Rows
    width: int
    format: ActivationFormat = ActivationFormat.F32


class RopeStyle(Enum):
    """Which elements rotate together: ``HALF`` pairs i with i + rotary_dim/2 (NeoX), ``INTERLEAVED`` 2i with 2i + 1."""

    HALF = "half"
    INTERLEAVED = "interleaved"


class Activation(Enum):
    """Gate activations: SiLU, GELU (erf) and GELU with the tanh approximation."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class Op:
    """Base of all ops."""

    OUTPUTS: ClassVar[tuple[str, ...]] = ("out",)

    def outputs(self) -> tuple[Value, ...]:
        """Values that this op assigns."""
        return tuple(v for name in self.OUTPUTS for v in _values(getattr(self, name)))

    def inputs(self) -> tuple[Value, ...]:
        """Values that this op reads, in field order."""
        return tuple(v for name in _input_fields(type(self)) for v in _values(getattr(self, name)))

    def weights(self) -> tuple[str, ...]:
        """Names of the weights that this op reads."""
        return ()


_INPUT_FIELDS: dict[type[Op], tuple[str, ...]] = {}


def _input_fields(op: type[Op]) -> tuple[str, ...]:
    """Names of the fields that hold values (or parts with values) which an op reads."""
    names = _INPUT_FIELDS.get(op)
    if names is None:
        holds_values = {f.name for f in fields(op) if "Value" in str(f.type) or "LinearPart" in str(f.type)}
        names = tuple(f.name for f in fields(op) if f.name in holds_values and f.name not in op.OUTPUTS)
        _INPUT_FIELDS[op] = names
    return names


def _values(operand: object) -> tuple[Value, ...]:
    if isinstance(operand, Value):
        return (operand,)
    if isinstance(operand, tuple):
        return tuple(v for item in operand for v in (item.values() if isinstance(item, LinearPart) else _values(item)))
    return ()


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """``out[t] = weight[token_ids[t]] * scale``; weight is a matrix ``[vocabulary, width]``."""

    weight: str
    out: Value
    scale: float = 1.0

    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True, slots=True)
class RmsNorm(Op):
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``, over groups of ``group_width`` elements of a row.

    ``group_width`` is the row's width, or the head size for per-head q and k norms (weight ``[group_width]``).
    After fusion ``out`` may be None (nobody reads fp32), and ``quantized`` lists int8 copies, one per format.
    """

    OUTPUTS: ClassVar[tuple[str, ...]] = ("out", "quantized")
    x: Value
    weight: str
    out: Value | None
    eps: float
    group_width: int
    weight_offset: float = 0.0
    quantized: tuple[Value, ...] = ()

    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True, slots=True)
class Linear(Op):
    """``out = x @ weight.T + bias``; weight ``[out.width, x.width]``, bias a vector ``[out.width]``.

    ``adapter`` (LoRA, an adapter index per row) is part of the signature and not filled yet: the checker refuses it.
    """

    x: Value
    weight: str
    out: Value
    bias: str | None = None
    adapter: str | None = None

    def weights(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Rope(Op):
    """Rotates the first ``rotary_dim`` elements of each head by ``position * frequencies[i]`` (RoFormer, eq. 34).

    ``frequencies`` holds ``rotary_dim / 2`` angles per position in double precision, scaling included;
    ``magnitude`` multiplies cosine and sine (YaRN and LongRoPE attention factor).
    """

    x: Value
    out: Value
    heads: int
    head_dim: int
    rotary_dim: int
    style: RopeStyle
    frequencies: tuple[float, ...]
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True)
class Attention(Op):
    """Causal attention of the step's tokens over their sequences' KV pages, after writing k and v there.

    ``q [tokens, heads * head_dim]``, ``k, v [tokens, kv_heads * head_dim]``. ``layer`` counts within KV group
    ``group``. Token at slot p sees slots max(0, p - window + 1)..p. With ``softcap`` c a score s becomes
    ``c * tanh(s / c)`` after ``scale``.

    Signature that later techniques fill (the checker refuses them today): ``lse`` log-sum-exp per row and head,
    ``mass`` attention mass per key, ``selection`` slots per KV head to read, ``tail_index`` logical position to slot.
    """

    OUTPUTS: ClassVar[tuple[str, ...]] = ("out", "quantized", "lse", "mass")
    q: Value
    k: Value
    v: Value
    out: Value | None
    layer: int
    group: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    quantized: tuple[Value, ...] = ()
    lse: Value | None = None
    mass: Value | None = None
    selection: Value | None = None
    tail_index: Value | None = None


@dataclass(frozen=True, slots=True)
class GatedActivation(Op):
    """``activation(gate) * up``."""

    OUTPUTS: ClassVar[tuple[str, ...]] = ("out", "quantized")
    gate: Value
    up: Value
    out: Value | None
    activation: Activation
    quantized: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Add(Op):
    """``a + b``."""

    a: Value
    b: Value
    out: Value


@dataclass(frozen=True, slots=True)
class SoftCap(Op):
    """``cap * tanh(x / cap)`` (Gemma 2's final logits)."""

    x: Value
    out: Value
    cap: float


@dataclass(frozen=True, slots=True)
class GatherSampled(Op):
    """Rows of x whose logits are wanted: ``[tokens, width] -> [sampled, width]``."""

    x: Value
    out: Value


# ---- ops that only passes create -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quantize(Op):
    """Int8 copy of x in ``out.format`` (NUMERICS N2), where its producer could not do it."""

    x: Value
    out: Value


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One matrix of a ``LinearGroup``: ``out = x @ weight.T + bias``, then ``+ residual`` if given."""

    x: Value
    weight: str
    out: Value
    bias: str | None = None
    residual: Value | None = None

    def values(self) -> tuple[Value, ...]:
        """Operands read, residual included (``out`` is listed by the group)."""
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass(frozen=True, slots=True)
class LinearGroup(Op):
    """Linears that need no barrier between them (q, k, v; gate, up), run as one parallel region."""

    OUTPUTS: ClassVar[tuple[str, ...]] = ()
    parts: tuple[LinearPart, ...] = field(default=())

    def outputs(self) -> tuple[Value, ...]:
        return tuple(part.out for part in self.parts)

    def weights(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in (part.weight, part.bias) if name is not None)
