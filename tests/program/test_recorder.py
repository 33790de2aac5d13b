"""Recording gives stable names, shared KV groups and a readable listing."""

from __future__ import annotations

import pytest

from tokenmill.program.check import ProgramError
from tokenmill.program.kv import KvElement, KvGroupSpec
from tokenmill.program.ops import Attention, RopeStyle, Rows
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder, Rotation

ROTATION = Rotation((1.0, 0.1), RopeStyle.HALF)


def attention_layers(windows: list[int | None]) -> Program:
    r = Recorder(vocab_size=10)
    x = r.embed("token_embedding", 8)
    for layer, window in enumerate(windows):
        with r.scope(f"layers.{layer}"):
            q, k, v = (r.linear(x, name, width) for name, width in (("q", 8), ("k", 4), ("v", 4)))
            q = r.rope(q, ROTATION, heads=2, out="q.rotated")
            h = r.attention(q, k, v, heads=2, kv_heads=1, scale=0.5, window=window, out="attended")
            x = r.add(x, h, out="residual")
    return r.program()


def test_names_are_relative_to_open_scopes() -> None:
    r = Recorder(vocab_size=10)
    x = r.embed("token_embedding", 8)
    with r.scope("layers.0"), r.scope("mlp"):
        h = r.linear(x, "up", 16, bias=True)
    program = r.program()
    assert h.name == "layers.0.mlp.up.out"
    assert dict(program.weights) == {
        "token_embedding": (10, 8),
        "layers.0.mlp.up": (16, 8),
        "layers.0.mlp.up.bias": (16,),
    }


def test_layers_of_equal_geometry_share_a_group_and_count_within_it() -> None:
    program = attention_layers([4, None, 4])
    assert program.kv_groups == (KvGroupSpec(2, 1, 4, window=4), KvGroupSpec(1, 1, 4, window=None))
    places = [(op.group, op.layer) for op in program.ops if isinstance(op, Attention)]
    assert places == [(0, 0), (1, 0), (0, 1)]


def test_the_kv_element_is_the_callers_choice() -> None:
    program = attention_layers([4, None]).with_kv_element(KvElement.BF16)
    assert {group.element for group in program.kv_groups} == {KvElement.BF16}


def test_gathering_changes_the_rows_symbol() -> None:
    r = Recorder(vocab_size=10)
    x = r.gather_sampled(r.embed("token_embedding", 8), out="sampled")
    assert x.rows is Rows.SAMPLED
    assert r.linear(x, "output", 10, out="logits").rows is Rows.SAMPLED


def test_one_weight_has_one_shape() -> None:
    r = Recorder(vocab_size=10)
    x = r.embed("token_embedding", 8)
    r.linear(x, "token_embedding", 12, out="logits")
    with pytest.raises(ProgramError, match=r"weight token_embedding has shape \(10, 8\), needs \(12, 8\)"):
        r.program()


def test_the_listing_shows_groups_ops_and_shapes() -> None:
    listing = str(attention_layers([4]))
    assert "kv group 0: 1 layers x 1 heads x 4, window 4, f16" in listing
    assert "layers.0.q.out [tokens, 8] = Linear(x=embedding, weight=layers.0.q)" in listing
    assert "style=half, frequencies=<2 values>" in listing
