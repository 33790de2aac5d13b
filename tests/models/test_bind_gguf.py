"""Checkpoints in the GGUF layout compute what the models they were converted from compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    ArrayWeights,
    logits,
    random_transformers_model,
    relative_error,
    saved_tensors,
    shapes,
    torch_backend,
)

from tokenmill.models import BoundModel, ModelConfigError, bind
from tokenmill.models.rope import llama3, plain
from tokenmill.program.ops import Rope, RopeStyle

TOLERANCE = 2e-5
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 97, 50)]
BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

ROOTS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH = {
    **LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def converted(model: transformers.PreTrainedModel, architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors as the usual converter writes them."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.block_count": c.num_hidden_layers,
        f"{architecture}.context_length": c.max_position_embeddings,
        f"{architecture}.embedding_length": c.hidden_size,
        f"{architecture}.feed_forward_length": c.intermediate_size,
        f"{architecture}.attention.head_count": c.num_attention_heads,
        f"{architecture}.attention.head_count_kv": c.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
    }
    if getattr(c, "sliding_window", None):
        metadata[f"{architecture}.attention.sliding_window"] = c.sliding_window
    gemma = architecture.startswith("gemma")
    tensors = {}
    for name, tensor in saved_tensors(model).items():
        if gemma and "norm" in name:
            tensor = tensor + 1.0
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            tensor = tensor.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        if name in ROOTS:
            tensors[ROOTS[name]] = tensor
        else:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            stem, suffix = part.rsplit(".", 1)
            tensors[f"blk.{layer}.{(SANDWICH if gemma else LAYER)[stem]}.{suffix}"] = tensor
    return metadata, tensors


def bind_gguf(metadata: dict[str, Any], tensors: dict[str, np.ndarray], max_length: int | None = None) -> BoundModel:
    return bind(metadata, "gguf", shapes(tensors), max_length, read_vector=lambda name: tensors[name])


def error_of(
    model: transformers.PreTrainedModel,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    ids: list[int] = IDS,
    max_length: int | None = None,
) -> float:
    """Relative error of the GGUF's logits against transformers on the original."""
    bound = bind_gguf(metadata, tensors, max_length)
    found = logits(torch_backend(bound.program, ArrayWeights(tensors, bound.sources)), ids)
    with torch.no_grad():
        return relative_error(found, model(torch.tensor([ids])).logits[0].numpy())


GEMMA = {"head_dim": 16, "num_key_value_heads": 1, "num_attention_heads": 4, "query_pre_attn_scalar": 16}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", transformers.LlamaConfig(**BASE)),
        ("llama", transformers.LlamaConfig(**BASE, attention_bias=True, tie_word_embeddings=True)),
        ("llama", transformers.MistralConfig(**BASE, sliding_window=8)),
        ("qwen2", transformers.Qwen2Config(**BASE)),
        ("qwen3", transformers.Qwen3Config(**BASE, head_dim=16)),
        ("gemma2", transformers.Gemma2Config(**{**BASE, **GEMMA}, sliding_window=8)),
        ("gemma3", transformers.Gemma3TextConfig(**{**BASE, **GEMMA, "num_hidden_layers": 7}, sliding_window=8)),
        ("phi3", transformers.Phi3Config(**BASE)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_logits_equal_those_of_the_original(architecture: str, config: transformers.PretrainedConfig) -> None:
    model = random_transformers_model(config)
    assert error_of(model, *converted(model, architecture)) < TOLERANCE


def test_llama_rotates_neighbouring_elements() -> None:
    metadata, tensors = converted(random_transformers_model(transformers.LlamaConfig(**BASE)), "llama")
    styles = {op.style for op in bind_gguf(metadata, tensors).program.ops if isinstance(op, Rope)}
    assert styles == {RopeStyle.INTERLEAVED}


def test_rope_freqs_divide_the_frequencies() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = random_transformers_model(transformers.LlamaConfig(**BASE, rope_parameters=scaling))
    metadata, tensors = converted(model, "llama")
    metadata["llama.rope.freq_base"] = 500.0
    frequencies = plain(500.0, 8)
    tensors["rope_freqs.weight"] = np.divide(frequencies, llama3(frequencies, 8.0, 1.0, 4.0, 32)).astype(np.float32)
    assert error_of(model, metadata, tensors) < TOLERANCE


def test_linear_and_yarn_scaling() -> None:
    for kind, more in (("linear", {}), ("yarn", {"original_max_position_embeddings": 16})):
        parameters = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **more}
        model = random_transformers_model(transformers.Qwen2Config(**BASE, rope_parameters=parameters))
        metadata, tensors = converted(model, "qwen2")
        metadata |= {
            "qwen2.rope.freq_base": 100.0,
            "qwen2.rope.scaling.type": kind,
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 16,
        }
        assert error_of(model, metadata, tensors) < TOLERANCE


def test_longrope_factors_follow_the_configured_length() -> None:
    short, long = [1.0 + 0.1 * i for i in range(4)], [2.0 + 0.7 * i for i in range(4)]
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    config = transformers.Phi3Config(**BASE, rope_parameters=parameters, original_max_position_embeddings=16)
    model = random_transformers_model(config)
    metadata, tensors = converted(model, "phi3")
    metadata["phi3.rope.scaling.original_context_length"] = 16
    tensors["rope_factors_short.weight"] = np.array(short, np.float32)
    tensors["rope_factors_long.weight"] = np.array(long, np.float32)
    assert error_of(model, metadata, tensors) < TOLERANCE
    assert error_of(model, metadata, tensors, IDS[:16], max_length=16) < TOLERANCE


def test_frequency_factors_need_a_reader() -> None:
    metadata, tensors = converted(random_transformers_model(transformers.LlamaConfig(**BASE)), "llama")
    tensors["rope_freqs.weight"] = np.ones(4, np.float32)
    with pytest.raises(ModelConfigError, match=r"rope_freqs\.weight.*read_vector"):
        bind(metadata, "gguf", shapes(tensors))


def test_per_layer_lists_are_accepted_if_all_layers_agree() -> None:
    metadata, tensors = converted(random_transformers_model(transformers.LlamaConfig(**BASE)), "llama")
    metadata["llama.attention.head_count_kv"] = [2, 2, 2]
    assert bind_gguf(metadata, tensors).config.kv_heads == 2
    metadata["llama.attention.head_count_kv"] = [2, 1, 2]
    with pytest.raises(Exception, match=r"llama\.attention\.head_count_kv differs from layer to layer"):
        bind_gguf(metadata, tensors)
