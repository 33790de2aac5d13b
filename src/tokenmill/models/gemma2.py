"""Gemma 2: norms before and after each block, local and global attention in turn, soft-capped scores and logits.

Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size" (2024), section 2. Checkpoints in the Hugging
Face layout store norm gains around zero; GGUF files have the 1 added.
"""

from __future__ import annotations

import math

from tokenmill.models.architecture import (
    HF_SANDWICH_NAMES,
    Architecture,
    ModelConfig,
    biased_linears,
    decoder_config,
    head_size,
    layer_windows,
)
from tokenmill.models.hyperparameters import Hyperparameters
from tokenmill.models.llama import AttentionBlock, mlp
from tokenmill.program.ops import Activation, Value
from tokenmill.program.recorder import Recorder

HEAD_DIM = 256
LAYERS_OF_27B = 46
"""GGUF does not store the scale of queries; the 27B model alone divides by the hidden size per head."""


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; even layers are local."""
    p.refuse("use_bidirectional_attention", "attention that looks ahead is not supported")
    layers = p.integer("block_count", "num_hidden_layers")
    hidden = p.integer("embedding_length", "hidden_size")
    window = p.integer("attention.sliding_window", "sliding_window", 4096)
    return decoder_config(
        p,
        head_dim=head_size(p, HEAD_DIM),
        activation=p.activation("hidden_activation", Activation.GELU_TANH),
        norm_offset=0.0 if p.source == "gguf" else 1.0,
        embedding_scale=hidden**0.5,
        attention_scale=query_scale(p, layers == LAYERS_OF_27B),
        windows=layer_windows(p, layers, window, [layer % 2 == 0 for layer in range(layers)]),
        attention_softcap=p.optional_number("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        logit_softcap=p.optional_number("final_logit_softcapping", "final_logit_softcapping", 30.0),
        biased=biased_linears(p),
    )


def query_scale(p: Hyperparameters, hidden_per_head: bool) -> float:
    """Factor of the scores: 1 / sqrt(query_pre_attn_scalar), which GGUF leaves to the size of the model."""
    if p.source == "hf":
        divisor = p.number(None, "query_pre_attn_scalar", float(HEAD_DIM))
    elif hidden_per_head:
        divisor = p.integer("embedding_length", None) / p.integer("attention.head_count", None)
    else:
        divisor = float(head_size(p, HEAD_DIM))
    return 1.0 / math.sqrt(divisor)


def describe(c: ModelConfig, r: Recorder) -> None:
    """The network."""
    decoder(c, r, attention)


def decoder(c: ModelConfig, r: Recorder, attention: AttentionBlock) -> None:
    """Each block's result is normalised before it joins the residual stream."""

    def norm(x: Value, name: str, out: str) -> Value:
        return r.rms_norm(x, name, eps=c.norm_eps, weight_offset=c.norm_offset, out=out)

    x = r.embed("token_embedding", c.hidden_size, scale=c.embedding_scale)
    for layer in range(c.layers):
        with r.scope(f"layers.{layer}"):
            h = norm(x, "attention_norm", "attention.in")
            h = norm(attention(c, r, h, layer), "post_attention_norm", "attention.normed")
            x = r.add(x, h, out="attention.residual")
            h = norm(x, "mlp_norm", "mlp.in")
            h = norm(mlp(c, r, h), "post_mlp_norm", "mlp.normed")
            x = r.add(x, h, out="residual")
    x = r.gather_sampled(x, out="sampled")
    x = norm(x, "output_norm", "hidden")
    head = "token_embedding" if c.tied else "output"
    if c.logit_softcap is None:
        r.linear(x, head, c.vocab_size, out="logits")
    else:
        x = r.linear(x, head, c.vocab_size, out="logits.uncapped")
        r.softcap(x, c.logit_softcap, out="logits")


def attention(c: ModelConfig, r: Recorder, h: Value, layer: int) -> Value:
    """Grouped-query attention with soft-capped scores."""
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
        softcap=c.attention_softcap,
        window=c.windows[layer],
        out="attention.o.in",
    )
    return r.linear(h, "attention.o", c.hidden_size, bias="attention.o" in c.biased)


GEMMA2 = Architecture(
    name="gemma2",
    gguf=("gemma2",),
    hf=("gemma2",),
    configure=configure,
    describe=describe,
    hf_names=HF_SANDWICH_NAMES,
)
