"""The checker refuses each way of breaking the op set's rules, and says which op and what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from tokenmill.program.check import ProgramError, check
from tokenmill.program.kv import KvGroupSpec
from tokenmill.program.ops import (
    Activation,
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
    RopeStyle,
    Rows,
    SoftCap,
    Value,
    WeightFormat,
)
from tokenmill.program.program import Program


def value(name: str, width: int, rows: Rows = Rows.TOKENS, format: ActivationFormat = ActivationFormat.F32) -> Value:
    return Value(name, rows, width, format)


X, H, Q, K, V = value("x", 8), value("h", 8), value("q", 8), value("k", 4), value("v", 4)
R, A, Z, Y = value("r", 8), value("a", 8), value("o", 8), value("y", 8)
GATE, UP, G, CAPPED = value("gate", 6), value("up", 6), value("g", 6), value("capped", 6)
S, L = value("s", 8, Rows.SAMPLED), value("l", 10, Rows.SAMPLED)


@dataclass(frozen=True, slots=True)
class Sine(Op):
    x: Value
    out: Value


OPS: dict[str, Op] = {
    "embed": Embed("e", X),
    "norm": RmsNorm(X, "n", H, 1e-5, 8),
    "q": Linear(H, "wq", Q, bias="bq"),
    "kv": LinearGroup((LinearPart(H, "wk", K), LinearPart(H, "wv", V))),
    "rope": Rope(Q, R, 2, 4, 4, RopeStyle.HALF, (1.0, 0.1)),
    "attention": Attention(R, K, V, A, 0, 0, 2, 1, 4, 0.5),
    "o": LinearGroup((LinearPart(A, "wo", Z, residual=X),)),
    "add": Add(Z, X, Y),
    "gates": LinearGroup((LinearPart(Y, "wg", GATE), LinearPart(Y, "wu", UP))),
    "gated": GatedActivation(GATE, UP, G, Activation.SILU),
    "softcap": SoftCap(G, CAPPED, 3.0),
    "gather": GatherSampled(Y, S),
    "head": Linear(S, "e", L),
}
WEIGHTS = {
    "e": (10, 8),
    "n": (8,),
    "wq": (8, 8),
    "bq": (8,),
    "wk": (4, 8),
    "wv": (4, 8),
    "wo": (8, 8),
    "wg": (6, 8),
    "wu": (6, 8),
}
GOOD = Program(tuple(OPS.values()), (KvGroupSpec(1, 1, 4),), WEIGHTS, 10)
INT8 = ActivationFormat.INT8_GROUP32


def changed(name: str, **fields: object) -> Program:
    return GOOD.with_ops(replace(op, **fields) if key == name else op for key, op in OPS.items())


def inserted(name: str, *ops: Op) -> Program:
    """The good program with ``ops`` after op ``name``."""
    listed: list[Op] = []
    for key, op in OPS.items():
        listed += [op, *ops] if key == name else [op]
    return GOOD.with_ops(listed)


def without(name: str) -> Program:
    return GOOD.with_ops(op for key, op in OPS.items() if key != name)


def weighted(**shapes: tuple[int, ...]) -> Program:
    return replace(GOOD, weights={**WEIGHTS, **shapes})


def grouped(*groups: KvGroupSpec) -> Program:
    return replace(GOOD, kv_groups=groups)


def test_the_good_program_passes() -> None:
    check(GOOD)


BAD: dict[str, tuple[Callable[[], Program], str]] = {
    "use before assignment": (lambda: without("norm"), "reads h before it is assigned"),
    "second assignment": (lambda: inserted("norm", OPS["norm"]), "assigns h a second time"),
    "another shape than assigned": (lambda: changed("norm", x=value("x", 16), group_width=16), "was assigned as"),
    "no vocabulary": (lambda: replace(GOOD, vocab_size=0), "vocabulary has 0 entries"),
    "an op that assigns nothing": (lambda: inserted("o", LinearGroup(())), "assigns nothing"),
    "an op outside the set": (lambda: inserted("o", Sine(Z, value("z", 8))), "is not an op of the set"),
    "embedding of sampled rows": (lambda: changed("embed", out=value("x", 8, Rows.SAMPLED)), "one row per token"),
    "embedding scale": (lambda: changed("embed", scale=float("inf")), "scale inf is not finite"),
    "embedding shape": (lambda: weighted(e=(11, 8)), r"weight e has shape \(11, 8\), needs \(10, 8\)"),
    "missing weight": (
        lambda: replace(GOOD, weights={k: v for k, v in WEIGHTS.items() if k != "wq"}),
        "weight wq is not in the program's list",
    ),
    "unused weight": (lambda: weighted(more=(1,)), "weight more is listed but no op reads it"),
    "norm eps": (lambda: changed("norm", eps=0.0), "eps 0.0 must be positive"),
    "norm groups": (lambda: changed("norm", group_width=3), "width 8 is not a multiple of group_width 3"),
    "norm weight": (lambda: weighted(n=(4,)), "weight n has shape"),
    "int8 copy of a norm per head": (
        lambda: changed("norm", group_width=4, quantized=(value("h8", 8, format=INT8),)),
        "only a norm over the whole row",
    ),
    "int8 copy in fp32": (lambda: changed("norm", quantized=(value("h8", 8),)), "h8 is F32, an int8 copy must"),
    "one int8 format twice": (
        lambda: changed("norm", quantized=(value("h8", 8, format=INT8), value("h9", 8, format=INT8))),
        "one int8 format twice",
    ),
    "int8 copy of another width": (
        lambda: changed("norm", quantized=(value("h8", 4, format=INT8),)),
        "must have one shape",
    ),
    "linear weight": (lambda: weighted(wq=(8, 4)), r"weight wq has shape \(8, 4\), needs \(8, 8\)"),
    "linear bias": (lambda: weighted(bq=(7,)), r"weight bq has shape \(7,\), needs \(8,\)"),
    "linear rows": (lambda: changed("head", out=value("l", 10)), "must have the same rows"),
    "linear result in int8": (lambda: changed("q", out=value("q", 8, format=INT8)), "q is INT8_GROUP32, must be F32"),
    "residual shape": (
        lambda: changed("o", parts=(LinearPart(A, "wo", Z, residual=K),)),
        r"k \[tokens, 4\] and o \[tokens, 8\] must have one shape",
    ),
    "residual of the same group": (
        lambda: changed("kv", parts=(LinearPart(H, "wk", K), LinearPart(H, "wv", V, residual=K))),
        "reads k before it is assigned",
    ),
    "rope width": (lambda: changed("rope", heads=3), "width 8 is not heads x head_dim"),
    "rope rotary_dim": (lambda: changed("rope", rotary_dim=6), "rotary_dim 6 must be even"),
    "rope odd rotary_dim": (lambda: changed("rope", rotary_dim=3), "rotary_dim 3 must be even"),
    "rope frequencies": (lambda: changed("rope", frequencies=(1.0,)), "1 frequencies given for rotary_dim 4"),
    "rope NaN": (lambda: changed("rope", frequencies=(1.0, float("nan"))), "a frequency is not finite"),
    "rope magnitude": (lambda: changed("rope", magnitude=0.0), "magnitude 0.0 must be positive"),
    "attention heads": (lambda: changed("attention", heads=3, kv_heads=2), "3 heads cannot share 2 KV heads"),
    "attention q width": (lambda: changed("attention", heads=4), "q has width 8, needs 4 x 4"),
    "attention k width": (lambda: changed("attention", kv_heads=2), "k has width 4, needs 2 x 4"),
    "attention scale": (lambda: changed("attention", scale=0.0), "scale 0.0 must be positive"),
    "attention softcap": (lambda: changed("attention", softcap=0.0), "softcap 0.0 must be positive"),
    "attention window": (lambda: changed("attention", window=0), "window 0 must be positive"),
    "attention out width": (lambda: changed("attention", out=value("a", 4)), "must have one shape"),
    "attention group": (lambda: changed("attention", group=1), "KV group 1 does not exist"),
    "attention layer": (lambda: changed("attention", layer=1), "layer 1 is outside KV group 0 of 1 layers"),
    "attention against its group": (lambda: grouped(KvGroupSpec(1, 1, 4, window=9)), "KV group 0 has"),
    "KV layer without attention": (
        lambda: grouped(KvGroupSpec(2, 1, 4)),
        "layer 1 of KV group 0 is written by no attention",
    ),
    "KV layer written twice": (
        lambda: inserted("attention", replace(OPS["attention"], out=value("b", 8))),
        "layer 0 of KV group 0 is written twice",
    ),
    "gate and up": (lambda: changed("gated", up=Y), "must have one shape"),
    "softcap": (lambda: changed("softcap", cap=-1.0), "cap -1.0 must be positive"),
    "gather to token rows": (lambda: changed("gather", out=value("s", 8)), "gathers sampled rows from token rows"),
    "gather width": (lambda: changed("gather", out=value("s", 4, Rows.SAMPLED)), "widths differ: 8 and 4"),
    "add of other rows": (lambda: inserted("gather", Add(S, Y, value("z", 8))), "must have one shape"),
    "quantize to fp32": (lambda: inserted("add", Quantize(Y, value("y8", 8))), "y8 is F32, an int8 copy must"),
    "fp32 op on int8": (
        lambda: inserted(
            "add", Quantize(Y, value("y8", 8, format=INT8)), SoftCap(value("y8", 8, format=INT8), value("z", 8), 1.0)
        ),
        "y8 is INT8_GROUP32, must be F32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_program_is_refused(case: str) -> None:
    program, message = BAD[case]
    with pytest.raises(ProgramError, match=message):
        check(program())


@pytest.mark.parametrize("part", ["lse", "mass", "selection", "tail_index"])
def test_parts_of_attention_that_nothing_fills_yet_are_refused_by_name(part: str) -> None:
    filled = value("more", 8) if part in ("lse", "mass") else X
    with pytest.raises(ProgramError, match=f"{part}: this part of attention's signature is not supported yet"):
        check(changed("attention", **{part: filled}))


def test_adapters_are_refused_by_name() -> None:
    with pytest.raises(ProgramError, match="adapter 'style': adapters are not supported yet"):
        check(changed("q", adapter="style"))


def test_with_formats_a_linear_must_read_what_its_weight_multiplies() -> None:
    plain = dict.fromkeys(("wq", "wk", "wv", "wo", "wg", "wu", "e"), WeightFormat.F16)
    check(GOOD, plain)
    with pytest.raises(ProgramError, match=r"weight wo \(Q4_K\) multiplies INT8_GROUP256, but a is F32"):
        check(GOOD, {**plain, "wo": WeightFormat.Q4_K})
    with pytest.raises(ProgramError, match="the packed format of weight e is not given"):
        check(GOOD, {name: format for name, format in plain.items() if name != "e"})


def test_the_message_names_the_op() -> None:
    with pytest.raises(ProgramError, match=r"op 10, capped \[tokens, 6\] = SoftCap\(x=g, cap=-1\)"):
        check(changed("softcap", cap=-1.0))
