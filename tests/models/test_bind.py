"""Binding recognises what fits and refuses, by name, what does not."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmill.errors import UnsupportedModelError
from tokenmill.models import BoundModel, ModelConfigError, TensorSlice, bind

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LAYER = {
    "input_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
TENSORS = {
    "model.embed_tokens.weight": (100, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (100, 32),
    **{f"model.layers.{i}.{stem}.weight": shape for i in range(2) for stem, shape in LAYER.items()},
}


def bound(config: dict[str, Any] | None = None, tensors: dict[str, tuple[int, ...]] | None = None) -> BoundModel:
    return bind({**CONFIG, **(config or {})}, "hf", {**TENSORS, **(tensors or {})})


def without(name: str) -> dict[str, tuple[int, ...]]:
    return {tensor: shape for tensor, shape in TENSORS.items() if tensor != name}


def test_weights_have_canonical_names_and_known_places() -> None:
    model = bound()
    assert model.architecture == "llama"
    assert model.sources["layers.1.mlp.down"] == TensorSlice("model.layers.1.mlp.down_proj.weight")
    assert model.sources["layers.0.mlp_norm"] == TensorSlice("model.layers.0.post_attention_layernorm.weight")
    assert model.program.weights["layers.1.attention.k"] == (16, 32)
    assert set(model.sources) == set(model.program.weights)
    assert {where.tensor for where in model.sources.values()} == set(TENSORS)


def test_values_have_stable_names() -> None:
    values = bound().program.values()
    assert {"hidden", "logits", "layers.1.mlp.down.in", "layers.0.attention.o.in", "layers.0.attention.in"} <= set(
        values
    )
    assert (values["logits"].rows.value, values["logits"].width) == ("sampled", 100)


def test_the_vocabulary_is_what_the_embedding_holds() -> None:
    assert bound({"vocab_size": 90}).config.vocab_size == 100


def test_a_missing_head_means_a_tied_one_unless_the_config_says_otherwise() -> None:
    tied = bind(CONFIG, "hf", without("lm_head.weight"))
    assert tied.config.tied
    assert "output" not in tied.program.weights
    assert bound({"tie_word_embeddings": True}).config.tied
    with pytest.raises(ModelConfigError, match=r"lm_head\.weight is missing"):
        bind({**CONFIG, "tie_word_embeddings": False}, "hf", without("lm_head.weight"))


def test_phi3_weights_are_rows_of_fused_tensors() -> None:
    stems = {stem: shape for stem, shape in LAYER.items() if not stem.endswith(("q_proj", "k_proj", "v_proj"))}
    stems = {stem: shape for stem, shape in stems.items() if stem not in ("mlp.gate_proj", "mlp.up_proj")}
    stems |= {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (96, 32)}
    tensors = {name: shape for name, shape in TENSORS.items() if ".layers." not in name}
    tensors |= {f"model.layers.{i}.{stem}.weight": shape for i in range(2) for stem, shape in stems.items()}
    model = bind({**CONFIG, "model_type": "phi3"}, "hf", tensors)
    fused = "model.layers.1.self_attn.qkv_proj.weight"
    assert model.sources["layers.1.attention.q"] == TensorSlice(fused, (0, 32))
    assert model.sources["layers.1.attention.k"] == TensorSlice(fused, (32, 48))
    assert model.sources["layers.1.attention.v"] == TensorSlice(fused, (48, 64))
    assert model.sources["layers.0.mlp.up"] == TensorSlice("model.layers.0.mlp.gate_up_proj.weight", (48, 96))
    with pytest.raises(ModelConfigError, match=r"qkv_proj\.weight has shape \(60, 32\).*need \(64, 32\)"):
        bind({**CONFIG, "model_type": "phi3"}, "hf", {**tensors, fused: (60, 32)})


def test_layers_of_one_window_share_a_kv_group() -> None:
    types = ["sliding_attention", "full_attention"]
    biases = {
        f"model.layers.{i}.self_attn.{part}_proj.bias": (width,)
        for i in range(2)
        for part, width in (("q", 32), ("k", 16), ("v", 16))
    }
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    mixed = bound({**qwen, "layer_types": types}, biases).program.kv_groups
    assert [(group.window, group.layers) for group in mixed] == [(8, 1), (None, 1)]
    alike = bound({**qwen, "max_window_layers": 0}, biases).program.kv_groups
    assert [(group.window, group.layers) for group in alike] == [(8, 2)]


def test_the_text_model_of_a_multimodal_checkpoint_is_found() -> None:
    norms = {"pre_feedforward_layernorm": (32,), "post_feedforward_layernorm": (32,)}
    norms |= {"self_attn.q_norm": (8,), "self_attn.k_norm": (8,)}
    tensors = {f"language_model.{name}": shape for name, shape in without("lm_head.weight").items()}
    for i in range(2):
        tensors |= {f"language_model.model.layers.{i}.{stem}.weight": shape for stem, shape in norms.items()}
    tensors["vision_tower.patch.weight"] = (3, 3)
    text = {**CONFIG, "model_type": "gemma3_text", "head_dim": 8}
    model = bind({"model_type": "gemma3", "text_config": text}, "hf", tensors)
    assert model.sources["token_embedding"] == TensorSlice("language_model.model.embed_tokens.weight")


def test_an_unknown_architecture_is_refused_by_name_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3"):
        bound({"model_type": "mamba"})
    with pytest.raises(UnsupportedModelError, match=r"'bert'.*llama"):
        bind({"general.architecture": "bert"}, "gguf", {})
    with pytest.raises(ModelConfigError, match="model_type is missing"):
        bind({}, "hf", TENSORS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be an integer from 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide the hidden size 32"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing from the RoPE parameters"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "RoPE parameter factor is 'two'"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"partial_rotary_factor": 1.5}, "must be even, positive and at most the head size 8"),
    ],
)
def test_bad_hyper_parameters_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        bound(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; known: silu"),
        ({"rope_scaling": {"type": "spiral", "factor": 2}}, "rope_type is 'spiral'; known: default"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ],
)
def test_unsupported_features_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        bound(changes)


def test_tensors_that_are_missing_mis_shaped_or_unknown_are_named() -> None:
    with pytest.raises(ModelConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        bind(CONFIG, "hf", without("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelConfigError, match=r"q_proj\.weight has shape \(31, 32\), .* need \(32, 32\)"):
        bound(tensors={"model.layers.0.self_attn.q_proj.weight": (31, 32)})
    with pytest.raises(UnsupportedModelError, match=r"experts\.0\.weight has no place in the llama architecture"):
        bound(tensors={"model.layers.0.experts.0.weight": (4, 4)})
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj\.weight has no place"):
        bound(tensors={"model.layers.2.mlp.up_proj.weight": (48, 32)})
    assert bound(tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}).architecture == "llama"


def test_layer_types_must_fit_the_layers() -> None:
    for types in (["full_attention"], ["full_attention", "linear_attention"], "full_attention"):
        with pytest.raises(ModelConfigError, match="layer_types must name one of"):
            bound({"model_type": "gemma2", "layer_types": types})
