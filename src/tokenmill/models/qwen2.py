"""Qwen2 and Qwen2.5: Llama's network with biases on q, k and v ("Qwen2 Technical Report", 2024)."""

from __future__ import annotations

from tokenmill.models.architecture import Architecture, ModelConfig, decoder_config, layer_windows
from tokenmill.models.hyperparameters import Hyperparameters
from tokenmill.models.llama import describe
from tokenmill.program.ops import Activation


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; the biases are part of the architecture."""
    return decoder_config(
        p,
        activation=p.activation("hidden_act", Activation.SILU),
        biased=frozenset({"attention.q", "attention.k", "attention.v"}),
        windows=qwen_windows(p, p.integer("block_count", "num_hidden_layers")),
    )


def qwen_windows(p: Hyperparameters, layers: int) -> tuple[int | None, ...]:
    """Windows count only if ``use_sliding_window`` says so, and then from layer ``max_window_layers`` on."""
    if not p.flag(None, "use_sliding_window", False):
        return (None,) * layers
    first = p.integer(None, "max_window_layers", 28, least=0)
    window = p.integer(None, "sliding_window", 4096)
    return layer_windows(p, layers, window, [layer >= first for layer in range(layers)])


QWEN2 = Architecture(name="qwen2", gguf=("qwen2",), hf=("qwen2",), configure=configure, describe=describe)
