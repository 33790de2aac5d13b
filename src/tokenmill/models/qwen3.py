"""Qwen3 (dense): q and k are normalised per head, and the head size is its own ("Qwen3 Technical Report", 2025)."""

from __future__ import annotations

from tokenmill.models.architecture import Architecture, ModelConfig, biased_linears, decoder_config, head_size
from tokenmill.models.hyperparameters import Hyperparameters
from tokenmill.models.llama import decoder
from tokenmill.models.qwen2 import qwen_windows
from tokenmill.program.ops import Activation, Value
from tokenmill.program.recorder import Recorder

HEAD_DIM = 128
"""Head size of every published model, where the metadata leaves it out."""


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; heads times head size need not be the hidden size."""
    return decoder_config(
        p,
        head_dim=head_size(p, HEAD_DIM),
        activation=p.activation("hidden_act", Activation.SILU),
        biased=biased_linears(p),
        windows=qwen_windows(p, p.integer("block_count", "num_hidden_layers")),
    )


def describe(c: ModelConfig, r: Recorder) -> None:
    """Llama's decoder with the attention below."""
    decoder(c, r, attention)


def attention(c: ModelConfig, r: Recorder, h: Value, layer: int) -> Value:
    """Grouped-query attention; each head of q and k is normalised before it rotates."""
    q = r.linear(h, "attention.q", c.q_width, bias="attention.q" in c.biased)
    k = r.linear(h, "attention.k", c.kv_width, bias="attention.k" in c.biased)
    v = r.linear(h, "attention.v", c.kv_width, bias="attention.v" in c.biased)
    q = r.rms_norm(q, "attention.q_norm", eps=c.norm_eps, group_width=c.head_dim, out="attention.q.normed")
    k = r.rms_norm(k, "attention.k_norm", eps=c.norm_eps, group_width=c.head_dim, out="attention.k.normed")
    q = r.rope(q, c.rotation, heads=c.heads, out="attention.q.rotated")
    k = r.rope(k, c.rotation, heads=c.kv_heads, out="attention.k.rotated")
    h = r.attention(
        q,
        k,
        v,
        heads=c.heads,
        kv_heads=c.kv_heads,
        scale=c.attention_scale,
        window=c.windows[layer],
        out="attention.o.in",
    )
    return r.linear(h, "attention.o", c.hidden_size, bias="attention.o" in c.biased)


QWEN3 = Architecture(name="qwen3", gguf=("qwen3",), hf=("qwen3",), configure=configure, describe=describe)
