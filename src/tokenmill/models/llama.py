"""Llama 1 to 3.x, and the many models with the same network (SmolLM2, TinyLlama, ...).

Touvron et al., "LLaMA" (2023) and "Llama 2" (2023, grouped-query attention); "The Llama 3 Herd of Models" (2024, RoPE
scaling). GGUF files store q and k with permuted rows, so that pairs of *neighbouring* elements rotate.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.models.architecture import Architecture, ModelConfig, biased_linears, decoder_config
from tokenmill.models.hyperparameters import Hyperparameters
from tokenmill.program.ops import Activation, RopeStyle, Value
from tokenmill.program.recorder import Recorder

AttentionBlock = Callable[[ModelConfig, Recorder, Value, int], Value]
"""Describes a layer's attention, from its normalised input to its output projection."""


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; GGUF files of Mistral models call themselves llama and may have a sliding window."""
    window = p.optional_integer("attention.sliding_window", None)
    return decoder_config(
        p,
        gguf_style=RopeStyle.INTERLEAVED,
        activation=p.activation("hidden_act", Activation.SILU),
        biased=biased_linears(p),
        windows=(window,) * p.integer("block_count", "num_hidden_layers"),
    )


def describe(c: ModelConfig, r: Recorder) -> None:
    """The network."""
    decoder(c, r, attention)


def decoder(c: ModelConfig, r: Recorder, attention: AttentionBlock) -> None:
    """Pre-norm decoder: attention and a gated MLP on a residual stream."""
    x = r.embed("token_embedding", c.hidden_size)
    for layer in range(c.layers):
        with r.scope(f"layers.{layer}"):
            h = r.rms_norm(x, "attention_norm", eps=c.norm_eps, out="attention.in")
            x = r.add(x, attention(c, r, h, layer), out="attention.residual")
            h = r.rms_norm(x, "mlp_norm", eps=c.norm_eps, out="mlp.in")
            x = r.add(x, mlp(c, r, h), out="residual")
    x = r.gather_sampled(x, out="sampled")
    x = r.rms_norm(x, "output_norm", eps=c.norm_eps, out="hidden")
    r.linear(x, "token_embedding" if c.tied else "output", c.vocab_size, out="logits")


def attention(c: ModelConfig, r: Recorder, h: Value, layer: int) -> Value:
    """Grouped-query attention with rotary positions."""
    q = r.linear(h, "attention.q", c.q_width, bias="attention.q" in c.biased)
    k = r.linear(h, "attention.k", c.kv_width, bias="attention.k" in c.biased)
    v = r.linear(h, "attention.v", c.kv_width, bias="attention.v" in c.biased)
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


def mlp(c: ModelConfig, r: Recorder, h: Value) -> Value:
    """SwiGLU (Shazeer, 2020)."""
    gate = r.linear(h, "mlp.gate", c.intermediate_size, bias="mlp.gate" in c.biased)
    up = r.linear(h, "mlp.up", c.intermediate_size, bias="mlp.up" in c.biased)
    h = r.gated(gate, up, c.activation, out="mlp.down.in")
    return r.linear(h, "mlp.down", c.hidden_size, bias="mlp.down" in c.biased)


LLAMA = Architecture(name="llama", gguf=("llama",), hf=("llama",), configure=configure, describe=describe)
