"""Phi-3 and Phi-4 (dense): Llama's network, stored with q, k and v in one tensor and gate and up in another.

Abdin et al., "Phi-3 Technical Report" (2024). Long-context models use LongRoPE; some rotate part of each head.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.models.architecture import Architecture, Fused, ModelConfig, decoder_config, head_size
from tokenmill.models.hyperparameters import Hyperparameters, Source
from tokenmill.models.llama import describe
from tokenmill.models.rope import DEFAULT_THETA, gguf_rotation, hf_parameters, hf_rotation
from tokenmill.program.ops import Activation, RopeStyle
from tokenmill.program.recorder import Rotation

TRAINED_LENGTH = 4096
"""``original_max_position_embeddings`` where a config.json leaves it out."""


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; LongRoPE's factors follow the configured maximum length."""
    window = p.optional_integer("attention.sliding_window", "sliding_window")
    return decoder_config(
        p,
        activation=p.activation("hidden_act", Activation.SILU),
        windows=(window,) * p.integer("block_count", "num_hidden_layers"),
        rotation=rotation(p, head_size(p)),
    )


def rotation(p: Hyperparameters, head_dim: int) -> Rotation:
    """RoPE, scaled by LongRoPE or not at all."""
    if p.source == "gguf":
        return gguf_rotation(p, head_dim, RopeStyle.HALF)
    parameters = dict(hf_parameters(p))
    parameters["original_max_position_embeddings"] = p.integer(None, "original_max_position_embeddings", TRAINED_LENGTH)
    # Early long-context checkpoints call LongRoPE "su" or "yarn".
    if parameters.get("rope_type", parameters.get("type")) in ("su", "yarn"):
        parameters["rope_type"] = "longrope"
    return hf_rotation(p, head_dim, parameters, p.number(None, "rope_theta", DEFAULT_THETA))


def fused(c: ModelConfig, source: Source) -> Mapping[str, Fused]:
    """Rows of the fused tensors: q, then k, then v; gate, then up."""
    qkv, gate_up = ("attn_qkv", "ffn_up") if source == "gguf" else ("self_attn.qkv_proj", "mlp.gate_up_proj")
    k, v, end = c.q_width, c.q_width + c.kv_width, c.q_width + 2 * c.kv_width
    return {
        "attention.q": Fused(qkv, (0, k)),
        "attention.k": Fused(qkv, (k, v)),
        "attention.v": Fused(qkv, (v, end)),
        "mlp.gate": Fused(gate_up, (0, c.intermediate_size)),
        "mlp.up": Fused(gate_up, (c.intermediate_size, 2 * c.intermediate_size)),
    }


PHI3 = Architecture(name="phi3", gguf=("phi3",), hf=("phi3",), configure=configure, describe=describe, fused=fused)
