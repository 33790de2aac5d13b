"""Programs to test with: a decoder layer, and random well-formed ones for properties that hold for all."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from tokenmill.program.ops import Activation, RopeStyle, Value, WeightFormat
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder, Rotation

WIDTH, HEADS, VOCABULARY = 32, 2, 20
FORMATS = st.sampled_from([WeightFormat.F32, WeightFormat.F16, WeightFormat.Q8_0, WeightFormat.Q4_K, WeightFormat.Q6_K])


def record(network: Callable[[Recorder], None]) -> Program:
    r = Recorder(VOCABULARY)
    network(r)
    return r.program()


def layer(r: Recorder) -> None:
    """One decoder layer and a head."""
    rotation = Rotation((1.0, 0.5, 0.25, 0.125), RopeStyle.HALF)
    x = r.embed("token_embedding", 32)
    h = r.rms_norm(x, "attention_norm", eps=1e-5, out="attention.in")
    q, k, v = r.linear(h, "q", 32, bias=True), r.linear(h, "k", 16), r.linear(h, "v", 16)
    q, k = r.rope(q, rotation, heads=4, out="q.rotated"), r.rope(k, rotation, heads=2, out="k.rotated")
    h = r.attention(q, k, v, heads=4, kv_heads=2, scale=0.35, out="o.in")
    x = r.add(x, r.linear(h, "o", 32), out="residual")
    h = r.rms_norm(x, "mlp_norm", eps=1e-5, out="mlp.in")
    h = r.gated(r.linear(h, "gate", 48), r.linear(h, "up", 48), Activation.SILU, out="down.in")
    x = r.add(x, r.linear(h, "down", 32), out="out")
    x = r.gather_sampled(x, out="sampled")
    x = r.rms_norm(x, "output_norm", eps=1e-5, out="hidden")
    r.linear(x, "token_embedding", 20, out="logits")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Up to 14 random ops, each reading random values of those before, then a head over the sampled rows."""
    r = Recorder(VOCABULARY)
    made = [r.embed("token_embedding", WIDTH)]
    for index in range(draw(st.integers(1, 14))):
        with r.scope(str(index)):
            made.append(random_op(draw, r, made))
    x = r.gather_sampled(draw(st.sampled_from(made)), out="sampled")
    x = r.rms_norm(x, "output_norm", eps=1e-5, out="hidden")
    r.linear(x, "token_embedding", VOCABULARY, out="logits")
    return r.program()


def random_op(draw: st.DrawFn, r: Recorder, made: list[Value]) -> Value:
    def operand() -> Value:
        return draw(st.sampled_from(made[-4:]))

    rotation = Rotation(tuple(1.0 / (i + 1) for i in range(WIDTH // HEADS // 2)), RopeStyle.HALF)
    match draw(
        st.sampled_from(
            ["norm", "head norm", "linear", "linear", "linear", "add", "add", "gated", "cap", "rope", "attend"]
        )
    ):
        case "norm":
            return r.rms_norm(operand(), "norm", eps=1e-5, out="normed")
        case "head norm":
            return r.rms_norm(operand(), "head_norm", eps=1e-5, group_width=WIDTH // HEADS, out="normed")
        case "linear":
            return r.linear(operand(), "linear", WIDTH, bias=draw(st.booleans()))
        case "add":
            return r.add(operand(), operand(), out="sum")
        case "gated":
            return r.gated(operand(), operand(), Activation.SILU, out="gated")
        case "cap":
            return r.softcap(operand(), 5.0, out="capped")
        case "rope":
            return r.rope(operand(), rotation, heads=HEADS, out="rotated")
        case _:
            window = draw(st.sampled_from([None, 3]))
            geometry = {"heads": HEADS, "kv_heads": HEADS, "scale": 0.25, "window": window}
            return r.attention(operand(), operand(), operand(), **geometry, out="attended")


@st.composite
def formats(draw: st.DrawFn, program: Program) -> dict[str, WeightFormat]:
    """A random packed format for every matrix."""
    return {name: draw(FORMATS) for name in program.matrices()}


@st.composite
def kept_values(draw: st.DrawFn, program: Program) -> list[str]:
    """Up to three values to keep."""
    return draw(st.lists(st.sampled_from(sorted(program.values())), max_size=3, unique=True))
