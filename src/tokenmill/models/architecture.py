"""What an architecture is: how its hyper-parameters are read, how its network is described, where its weights lie.

A family's file (``llama.py``, ...) defines one :class:`Architecture`. Its program names weights canonically
(``layers.3.attention.q``); :class:`TensorNames` says which checkpoint tensor, or which rows of one, each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenmill.errors import UnsupportedModelError
from tokenmill.models.hyperparameters import Hyperparameters, ModelConfigError, Source
from tokenmill.models.rope import DEFAULT_THETA, gguf_rotation, hf_parameters, hf_rotation
from tokenmill.program.ops import Activation, RopeStyle
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder, Rotation


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The hyper-parameters that shape a network, resolved: nothing here depends on where they were read."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    """Longest context that the model was made for, in tokens."""
    norm_eps: float
    rotation: Rotation
    """RoPE of the layers (of the global ones, if ``local_rotation`` is given)."""
    attention_scale: float
    """Factor of the scores q . k."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer, in tokens; None sees everything before it."""
    tied: bool
    """Whether the head reads the token embedding."""
    activation: Activation = Activation.SILU
    local_rotation: Rotation | None = None
    """RoPE of the layers with a sliding window, where it differs."""
    norm_offset: float = 0.0
    """Added to norm gains that a checkpoint stores around zero."""
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    biased: frozenset[str] = frozenset()
    """Linears of a layer that have a bias: ``attention.q``, ``mlp.up``, ..."""

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def rotation_of(self, layer: int) -> Rotation:
        """The RoPE of one layer."""
        local = self.local_rotation is not None and self.windows[layer] is not None
        return self.local_rotation if local and self.local_rotation is not None else self.rotation


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A checkpoint tensor, or rows ``[first, end)`` of one."""

    tensor: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class BoundModel:
    """A checkpoint recognised: its network, and where each weight of the program lies."""

    architecture: str
    config: ModelConfig
    program: Program
    sources: Mapping[str, TensorSlice]


@dataclass(frozen=True, slots=True)
class Fused:
    """Part of a fused tensor of a layer: its stem, and the rows that belong to the weight."""

    stem: str
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Canonical weight names to the tensor names of one source."""

    embedding: str
    output_norm: str
    output: str
    layer: str
    """Prefix of a layer's tensors, with ``{}`` for its number."""
    parts: Mapping[str, str]
    """Stem of each part of a layer, without ``.weight`` or ``.bias``."""
    ignored: tuple[str, ...] = ()
    """Substrings of tensors that the network does not need: constants that older exporters stored."""

    def prefixed(self, prefix: str) -> TensorNames:
        """The same names inside a larger model."""
        return TensorNames(
            prefix + self.embedding,
            prefix + self.output_norm,
            self.output,
            prefix + self.layer,
            self.parts,
            self.ignored,
        )

    def locate(self, weight: str, fused: Mapping[str, Fused]) -> TensorSlice:
        """Where canonical weight ``weight`` lies."""
        roots = {"token_embedding": self.embedding, "output_norm": self.output_norm, "output": self.output}
        if weight in roots:
            return TensorSlice(roots[weight])
        _, number, part = weight.split(".", 2)
        suffix = "weight"
        if part.endswith(".bias"):
            part, suffix = part.removesuffix(".bias"), "bias"
        prefix = self.layer.format(number)
        if part in fused:
            return TensorSlice(f"{prefix}{fused[part].stem}.{suffix}", fused[part].rows)
        return TensorSlice(f"{prefix}{self.parts[part]}.{suffix}")


GGUF_NAMES = TensorNames(
    embedding="token_embd.weight",
    output_norm="output_norm.weight",
    output="output.weight",
    layer="blk.{}.",
    parts={
        "attention_norm": "attn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.o": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "post_attention_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "ffn_gate",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
        "post_mlp_norm": "post_ffw_norm",
    },
    ignored=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd"),
)

_HF_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def _hf_names(norms: Mapping[str, str]) -> TensorNames:
    return TensorNames(
        embedding="model.embed_tokens.weight",
        output_norm="model.norm.weight",
        output="lm_head.weight",
        layer="model.layers.{}.",
        parts={**_HF_PARTS, **norms},
        ignored=("rotary_emb.inv_freq",),
    )


HF_NAMES = _hf_names({"mlp_norm": "post_attention_layernorm"})
"""Networks with one norm before attention and one before the MLP."""

HF_SANDWICH_NAMES = _hf_names(
    {
        "post_attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
)
"""Networks with norms before and after both (Gemma 2 and 3)."""


def _nothing_fused(config: ModelConfig, source: Source) -> Mapping[str, Fused]:
    return {}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family of networks."""

    name: str
    gguf: Sequence[str]
    """Values of ``general.architecture``."""
    hf: Sequence[str]
    """Values of ``model_type``."""
    configure: Callable[[Hyperparameters], ModelConfig]
    """Resolves the hyper-parameters."""
    describe: Callable[[ModelConfig, Recorder], None]
    """Records the network."""
    hf_names: TensorNames = field(default=HF_NAMES)
    fused: Callable[[ModelConfig, Source], Mapping[str, Fused]] = _nothing_fused


def decoder_config(p: Hyperparameters, gguf_style: RopeStyle = RopeStyle.HALF, **family: Any) -> ModelConfig:
    """The hyper-parameters that all these decoders share; ``family`` gives or overrides fields of ModelConfig.

    ``gguf_style`` is how GGUF files of the family rotate; checkpoints in the Hugging Face layout pair halves.
    """
    layers = p.integer("block_count", "num_hidden_layers")
    hidden = p.integer("embedding_length", "hidden_size")
    heads = p.integer("attention.head_count", "num_attention_heads")
    head_dim = family.get("head_dim") or head_size(p)
    if "rotation" not in family:
        family["rotation"] = default_rotation(p, head_dim, gguf_style)
    common: dict[str, Any] = {
        "vocab_size": p.shape(embedding_tensor(p))[0],
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": p.integer("attention.head_count_kv", "num_key_value_heads", heads),
        "head_dim": head_dim,
        "intermediate_size": p.integer("feed_forward_length", "intermediate_size"),
        "max_position": p.integer("context_length", "max_position_embeddings"),
        "norm_eps": p.number("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6 if p.source == "hf" else None),
        "attention_scale": head_dim**-0.5,
        "windows": (None,) * layers,
        "tied": is_tied(p),
    }
    config = ModelConfig(**{**common, **family})
    if config.heads % config.kv_heads:
        raise ModelConfigError(f"{config.heads} attention heads cannot share {config.kv_heads} KV heads evenly")
    return config


def head_size(p: Hyperparameters, default: int | None = None) -> int:
    """Elements of a head: as stated, else ``default``, else the hidden size split evenly."""
    if default is None and not p.value("attention.key_length", "head_dim"):
        hidden = p.integer("embedding_length", "hidden_size")
        heads = p.integer("attention.head_count", "num_attention_heads")
        if hidden % heads:
            key = p.key("attention.head_count", "num_attention_heads")
            raise ModelConfigError(f"{key} {heads} does not divide the hidden size {hidden}, and no head size is given")
        default = hidden // heads
    head_dim = p.integer("attention.key_length", "head_dim", default)
    if p.integer("attention.value_length", None, head_dim) != head_dim:
        raise UnsupportedModelError("attention.value_length differs from attention.key_length")
    return head_dim


def default_rotation(p: Hyperparameters, head_dim: int, gguf_style: RopeStyle) -> Rotation:
    """The RoPE of a family that has one kind for all layers."""
    if p.source == "gguf":
        return gguf_rotation(p, head_dim, gguf_style)
    return hf_rotation(p, head_dim, hf_parameters(p), p.number(None, "rope_theta", DEFAULT_THETA))


def hf_prefix(p: Hyperparameters) -> str:
    """What stands before ``model.`` in the tensor names: text models inside multimodal ones have more."""
    for prefix in ("", "language_model.", "model.language_model."):
        if f"{prefix}{HF_NAMES.embedding}" in p.tensors:
            return prefix
    return ""


def embedding_tensor(p: Hyperparameters) -> str:
    """Name of the token embedding, whose rows are the vocabulary (metadata may count fewer than are stored)."""
    return GGUF_NAMES.embedding if p.source == "gguf" else hf_prefix(p) + HF_NAMES.embedding


def is_tied(p: Hyperparameters) -> bool:
    """Whether the head reads the token embedding: as config.json says, else where no tensor for a head exists."""
    if p.source == "gguf":
        return GGUF_NAMES.output not in p.tensors
    stated = p.value(None, "tie_word_embeddings")
    return HF_NAMES.output not in p.tensors if stated is None else p.flag(None, "tie_word_embeddings")


def biased_linears(p: Hyperparameters) -> frozenset[str]:
    """Linears of a layer that have a bias in this checkpoint, judged by the first layer."""
    names = GGUF_NAMES if p.source == "gguf" else HF_NAMES.prefixed(hf_prefix(p))
    linears = [part for part in names.parts if part.startswith(("attention.", "mlp.")) and not part.endswith("_norm")]
    return frozenset(part for part in linears if names.locate(f"layers.0.{part}.bias", {}).tensor in p.tensors)


def layer_windows(p: Hyperparameters, layers: int, window: int | None, local: Sequence[bool]) -> tuple[int | None, ...]:
    """The window of each layer: ``layer_types`` of config.json if it is there, else ``local`` says which have one."""
    types = p.value(None, "layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise ModelConfigError(f"layer_types must name one of {', '.join(known)} for each of {layers} layers")
        local = [t == "sliding_attention" for t in types]
    if any(local) and window is None:
        raise ModelConfigError(f"{p.key('attention.sliding_window', 'sliding_window')} is missing")
    return tuple(window if is_local else None for is_local in local)
