"""Recording: the small language in which model files describe a network.

A model file calls these methods once, in the order of computation; each appends one op and returns the value that it
assigns. Names are relative to the scopes that are open:

    recorder = Recorder(vocab_size=49152)
    x = recorder.embed("token_embedding", width=576)
    with recorder.scope("layers.0"):
        h = recorder.rms_norm(x, "attention_norm", eps=1e-5, out="attention.in")
        q = recorder.linear(h, "attention.q", width=576)        # weight layers.0.attention.q
    program = recorder.program()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tokenmill.program.check import check
from tokenmill.program.kv import KvGroupSpec
from tokenmill.program.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    GatedActivation,
    GatherSampled,
    Linear,
    Op,
    RmsNorm,
    Rope,
    RopeStyle,
    Rows,
    SoftCap,
    Value,
)
from tokenmill.program.program import Program, Shape


@dataclass(frozen=True, slots=True)
class Rotation:
    """How heads rotate: see :class:`~tokenmill.program.ops.Rope`, whose fields these become."""

    frequencies: tuple[float, ...]
    """Angle per position of each rotated pair, radians; two elements of a head rotate for each."""
    style: RopeStyle
    magnitude: float = 1.0


class Recorder:
    """Records one program. ``name`` is a weight, ``out`` names the assigned value (default: ``<name>.out``)."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._prefix = ""
        self._ops: list[Op] = []
        self._weights: dict[str, Shape] = {}
        self._group_layers: dict[tuple[int | None, int, int], int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names inside are ``<enclosing scopes>.<name>.<given name>``."""
        outer = self._prefix
        self._prefix = f"{outer}{name}."
        try:
            yield
        finally:
            self._prefix = outer

    def embed(self, name: str, width: int, *, scale: float = 1.0, out: str = "embedding") -> Value:
        """Rows of matrix ``name`` for the step's token ids, times ``scale``."""
        weight = self._weight(name, (self._vocab_size, width))
        value = self._value(out, Rows.TOKENS, width)
        return self._append(Embed(weight=weight, out=value, scale=scale), value)

    def rms_norm(
        self, x: Value, name: str, *, eps: float, out: str, group_width: int | None = None, weight_offset: float = 0.0
    ) -> Value:
        """RMSNorm with gain vector ``name``, over the row or over groups of ``group_width`` (a head) of it."""
        group_width = x.width if group_width is None else group_width
        value = self._value(out, x.rows, x.width)
        weight = self._weight(name, (group_width,))
        norm = RmsNorm(x=x, weight=weight, out=value, eps=eps, group_width=group_width, weight_offset=weight_offset)
        return self._append(norm, value)

    def linear(self, x: Value, name: str, width: int, *, bias: bool = False, out: str | None = None) -> Value:
        """``x @ name.T``, plus the vector ``<name>.bias`` if there is one."""
        weight = self._weight(name, (width, x.width))
        bias_weight = self._weight(f"{name}.bias", (width,)) if bias else None
        value = self._value(f"{name}.out" if out is None else out, x.rows, width)
        return self._append(Linear(x=x, weight=weight, out=value, bias=bias_weight), value)

    def rope(self, x: Value, rotation: Rotation, *, heads: int, out: str) -> Value:
        """Rotates each of the ``heads`` heads of a row by the row's position."""
        value = self._value(out, x.rows, x.width)
        op = Rope(
            x=x,
            out=value,
            heads=heads,
            head_dim=x.width // heads,
            rotary_dim=2 * len(rotation.frequencies),
            style=rotation.style,
            frequencies=rotation.frequencies,
            magnitude=rotation.magnitude,
        )
        return self._append(op, value)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        heads: int,
        kv_heads: int,
        scale: float,
        out: str,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Value:
        """Causal attention over the KV cache. Layers of equal window, KV heads and head size share a KV group."""
        head_dim = q.width // heads
        key = (window, kv_heads, head_dim)
        layer = self._group_layers.setdefault(key, 0)
        self._group_layers[key] = layer + 1
        value = self._value(out, q.rows, q.width)
        op = Attention(
            q=q,
            k=k,
            v=v,
            out=value,
            layer=layer,
            group=list(self._group_layers).index(key),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            softcap=softcap,
            window=window,
        )
        return self._append(op, value)

    def gated(self, gate: Value, up: Value, activation: Activation, *, out: str) -> Value:
        """``activation(gate) * up``."""
        value = self._value(out, gate.rows, gate.width)
        return self._append(GatedActivation(gate=gate, up=up, out=value, activation=activation), value)

    def add(self, a: Value, b: Value, *, out: str) -> Value:
        """``a + b``."""
        value = self._value(out, a.rows, a.width)
        return self._append(Add(a=a, b=b, out=value), value)

    def softcap(self, x: Value, cap: float, *, out: str) -> Value:
        """``cap * tanh(x / cap)``."""
        value = self._value(out, x.rows, x.width)
        return self._append(SoftCap(x=x, out=value, cap=cap), value)

    def gather_sampled(self, x: Value, *, out: str) -> Value:
        """The rows of x whose logits are wanted."""
        value = self._value(out, Rows.SAMPLED, x.width)
        return self._append(GatherSampled(x=x, out=value), value)

    def program(self) -> Program:
        """What was recorded, checked. Raises ProgramError."""
        groups = tuple(
            KvGroupSpec(layers=layers, kv_heads=kv_heads, head_dim=head_dim, window=window)
            for (window, kv_heads, head_dim), layers in self._group_layers.items()
        )
        program = Program(tuple(self._ops), groups, dict(self._weights), self._vocab_size)
        check(program)
        return program

    def _append(self, op: Op, value: Value) -> Value:
        self._ops.append(op)
        return value

    def _value(self, name: str, rows: Rows, width: int) -> Value:
        return Value(self._prefix + name, rows, width)

    def _weight(self, name: str, shape: Shape) -> str:
        """Notes the shape; the checker compares every later use with the first one's."""
        full = self._prefix + name
        self._weights.setdefault(full, shape)
        return full
