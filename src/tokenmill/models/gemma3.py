"""Gemma 3 (text): five local layers for each global one, with a RoPE of their own, and q and k normalised per head.

Gemma Team, "Gemma 3 Technical Report" (2025), section 2. Checkpoints in the Hugging Face layout store norm gains around
zero; GGUF files have the 1 added. The text model inside a multimodal checkpoint is found and used alone.
"""

from __future__ import annotations

from tokenmill.models.architecture import (
    HF_SANDWICH_NAMES,
    Architecture,
    ModelConfig,
    biased_linears,
    decoder_config,
    head_size,
    layer_windows,
)
from tokenmill.models.gemma2 import HEAD_DIM, decoder, query_scale
from tokenmill.models.hyperparameters import Hyperparameters
from tokenmill.models.rope import gguf_rotary_dim, gguf_rotation, hf_rotation, plain
from tokenmill.program.ops import Activation, RopeStyle, Value
from tokenmill.program.recorder import Recorder, Rotation

PATTERN = 6
"""Every sixth layer is global."""
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
LAYERS_OF_27B = 62


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; scaling for long contexts applies to the global layers only."""
    p.refuse("use_bidirectional_attention", "attention that looks ahead is not supported")
    p.refuse("attn_logit_softcapping", "Gemma 3 has no soft-capped scores")
    layers = p.integer("block_count", "num_hidden_layers")
    hidden = p.integer("embedding_length", "hidden_size")
    head_dim = head_size(p, HEAD_DIM)
    pattern = p.integer("attention.sliding_window_pattern", "sliding_window_pattern", PATTERN)
    window = p.integer("attention.sliding_window", "sliding_window", 4096)
    rotation, local_rotation = rotations(p, head_dim)
    return decoder_config(
        p,
        head_dim=head_dim,
        activation=p.activation("hidden_activation", Activation.GELU_TANH),
        norm_offset=0.0 if p.source == "gguf" else 1.0,
        embedding_scale=hidden**0.5,
        attention_scale=query_scale(p, layers == LAYERS_OF_27B),
        rotation=rotation,
        local_rotation=local_rotation,
        windows=layer_windows(p, layers, window, [(layer + 1) % pattern != 0 for layer in range(layers)]),
        logit_softcap=p.optional_number("final_logit_softcapping", "final_logit_softcapping"),
        biased=biased_linears(p),
    )


def rotations(p: Hyperparameters, head_dim: int) -> tuple[Rotation, Rotation]:
    """RoPE of the global and of the local layers."""
    if p.source == "gguf":
        local_theta = p.number("rope.freq_base_swa", None, LOCAL_THETA)
        local = Rotation(plain(local_theta, gguf_rotary_dim(p, head_dim)), RopeStyle.HALF)
        return gguf_rotation(p, head_dim, RopeStyle.HALF, default_theta=GLOBAL_THETA), local
    by_type = p.value(None, "rope_parameters") or {}
    full = by_type.get("full_attention") or p.value(None, "rope_scaling") or {}
    sliding = by_type.get("sliding_attention") or {}
    return (
        hf_rotation(p, head_dim, full, p.number(None, "rope_theta", GLOBAL_THETA)),
        hf_rotation(p, head_dim, sliding, p.number(None, "rope_local_base_freq", LOCAL_THETA)),
    )


def describe(c: ModelConfig, r: Recorder) -> None:
    """Gemma 2's decoder with the attention below."""
    decoder(c, r, attention)


def attention(c: ModelConfig, r: Recorder, h: Value, layer: int) -> Value:
    """Grouped-query attention, local or global; each head of q and k is normalised before it rotates."""
    rotation = c.rotation_of(layer)

    def head_norm(x: Value, name: str, out: str) -> Value:
        return r.rms_norm(x, name, eps=c.norm_eps, weight_offset=c.norm_offset, group_width=c.head_dim, out=out)

    q = r.linear(h, "attention.q", c.q_width, bias="attention.q" in c.biased)
    k = r.linear(h, "attention.k", c.kv_width, bias="attention.k" in c.biased)
    v = r.linear(h, "attention.v", c.kv_width, bias="attention.v" in c.biased)
    q = head_norm(q, "attention.q_norm", "attention.q.normed")
    k = head_norm(k, "attention.k_norm", "attention.k.normed")
    q = r.rope(q, rotation, heads=c.heads, out="attention.q.rotated")
    k = r.rope(k, rotation, heads=c.kv_heads, out="attention.k.rotated")
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


GEMMA3 = Architecture(
    name="gemma3",
    gguf=("gemma3",),
    hf=("gemma3_text", "gemma3"),
    configure=configure,
    describe=describe,
    hf_names=HF_SANDWICH_NAMES,
)
