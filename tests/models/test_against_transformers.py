"""Every architecture computes what transformers computes, on tiny random models."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny_models import (
    ArrayWeights,
    bind_model,
    config_json,
    logits,
    random_transformers_model,
    relative_error,
    saved_tensors,
    shapes,
    torch_backend,
)

from tokenmill.models import bind
from tokenmill.program.ops import Rope

TOLERANCE = 2e-5
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
IDS = [int(i) for i in np.random.default_rng(7).integers(0, 97, 50)]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.7 * i for i in range(pairs)],
    }


GEMMA = {**BASE, "head_dim": 16, "num_key_value_heads": 1, "num_attention_heads": 4, "query_pre_attn_scalar": 24}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}

CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": (transformers.LlamaConfig, {"num_key_value_heads": 6}),
    "llama-multi-query": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "llama-head-dim": (transformers.LlamaConfig, {"head_dim": 12}),
    "llama-linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ),
    "llama-llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-yarn": (transformers.LlamaConfig, {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        transformers.LlamaConfig,
        {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 8, "truncate": False}},
    ),
    "llama-yarn-attention-factor": (
        transformers.LlamaConfig,
        {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 8}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3-biases": (transformers.Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "gemma2": (transformers.Gemma2Config, {**GEMMA, "sliding_window": 8}),
    "gemma2-sharp-caps": (
        transformers.Gemma2Config,
        {**GEMMA, "sliding_window": 8, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma2-no-caps": (
        transformers.Gemma2Config,
        {**GEMMA, "sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {**GEMMA, "sliding_window": 8, "num_hidden_layers": 7}),
    "gemma3-two-ropes": (
        transformers.Gemma3TextConfig,
        {**GEMMA, "sliding_window": 8, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPES},
    ),
    "gemma3-layer-types": (
        transformers.Gemma3TextConfig,
        {
            **GEMMA,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": (transformers.Phi3Config, {}),
    "phi3-window": (transformers.Phi3Config, {"sliding_window": 8}),
    "phi3-partial-rotary": (
        transformers.Phi3Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": (
        transformers.Phi3Config,
        {"rope_parameters": longrope(4), "original_max_position_embeddings": 16},
    ),
}


def reference(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def ours(model: transformers.PreTrainedModel, ids: list[int], max_length: int | None = None, **changes: Any):
    bound = bind_model(model, max_length, **changes)
    return logits(torch_backend(bound.program, ArrayWeights(saved_tensors(model), bound.sources)), ids)


def make(case: str) -> transformers.PreTrainedModel:
    config_class, changes = CASES[case]
    return random_transformers_model(config_class(**{**BASE, **changes}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str) -> None:
    model = make(case)
    assert relative_error(ours(model, IDS), reference(model, IDS)) < TOLERANCE


def test_longrope_takes_the_short_factors_when_the_configured_length_is_the_trained_one() -> None:
    model = make("phi3-longrope")
    short = IDS[:16]
    assert relative_error(ours(model, short, max_length=16), reference(model, short)) < TOLERANCE
    assert relative_error(ours(model, short, max_length=17), reference(model, short)) > 100 * TOLERANCE


def test_dynamic_ntk_follows_the_configured_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = transformers.LlamaConfig(**{**BASE, "max_position_embeddings": 32, "rope_parameters": scaling})
    model = random_transformers_model(config)
    # The reference keeps the frequencies of the longest sequence it has seen: the short one comes first.
    assert relative_error(ours(model, IDS[:32]), reference(model, IDS[:32])) < TOLERANCE
    assert relative_error(ours(model, IDS, max_length=len(IDS)), reference(model, IDS)) < TOLERANCE
    assert relative_error(ours(model, IDS), reference(model, IDS)) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "new", "old"),
    [
        ("llama", "rope_parameters", {"rope_theta": 10000.0}),
        ("llama-llama3", "rope_parameters", {"rope_theta": 500.0, "rope_scaling": LLAMA3}),
        (
            "llama-linear",
            "rope_parameters",
            {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            "phi3-partial-rotary",
            "rope_parameters",
            {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
        (
            "phi3-longrope",
            "rope_parameters",
            {"rope_theta": 10000.0, "rope_scaling": {**longrope(4), "rope_type": "su"}},
        ),
        (
            "gemma3-two-ropes",
            "rope_parameters",
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "layer_types": None,
                "sliding_window_pattern": 6,
            },
        ),
    ],
)
def test_older_config_keys_mean_the_same(case: str, new: str, old: dict[str, Any]) -> None:
    model = make(case)
    assert new in config_json(model)
    then, now = bind_model(model, **{new: None}, **old), bind_model(model)
    assert then.config == now.config
    assert then.program.ops == now.program.ops


def test_a_saved_folder_binds_and_equals_the_model(tmp_path) -> None:
    model = make("gemma3")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bound = bind(json.loads((tmp_path / "config.json").read_text()), "hf", shapes(tensors))
    found = logits(torch_backend(bound.program, ArrayWeights(tensors, bound.sources)), IDS)
    assert relative_error(found, reference(model, IDS)) < TOLERANCE


def test_a_mutated_rotation_is_noticed() -> None:
    """Negative control: frequencies off by one part in a thousand exceed the tolerance."""
    model = make("llama")
    bound = bind_model(model)
    ops = [
        replace(op, frequencies=tuple(1.001 * f for f in op.frequencies)) if isinstance(op, Rope) else op
        for op in bound.program.ops
    ]
    weights = ArrayWeights(saved_tensors(model), bound.sources)
    found = logits(torch_backend(bound.program.with_ops(ops), weights), IDS)
    assert relative_error(found, reference(model, IDS)) > 10 * TOLERANCE
